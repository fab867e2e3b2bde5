"""One file a family: its rules, and its configuration both ways."""

import importlib
import pkgutil

FAMILIES = {
    family.name: family
    for module in sorted(found.name for found in pkgutil.iter_modules(__path__))
    for family in importlib.import_module(f"{__name__}.{module}").FAMILIES
}
