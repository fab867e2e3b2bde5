"""Answering for liger_kernel, where someone else's code imports it: opt-in, and undone by the handle."""

import contextlib
import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

VERSION = "0.8.5"  # of the Liger-Kernel whose names and signatures these are


class Alias:
    """Finds liger_kernel.X as the module liger_aot.X itself, for the X that have Liger's names; and liger_kernel.ops.

    The modules of liger_aot.ops are not Liger's: each of liger_kernel.ops is made here, and has the Liger*Functions of all.
    """

    def __init__(self, *packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        root, _, rest = name.partition(".")
        first, _, inner = rest.partition(".")
        if root != "liger_kernel" or first not in (*self.packages, "ops"):
            return None
        known = find_spec(f"{__package__}.{rest}") or (first == "ops" and find_spec(f"{__package__}.transformers.{inner}"))
        return ModuleSpec(name, self, is_package=rest == "ops") if known else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        # What stands in sys.modules afterwards is what was imported; returned by create_module, it would be given this spec.
        name = module.__name__
        if name.partition(".")[2].partition(".")[0] == "ops":
            module.__getattr__ = importlib.import_module(".ops", __package__).__getattr__
        else:
            sys.modules[name] = importlib.import_module(__package__ + name.removeprefix("liger_kernel"))


def forget_availability():
    """transformers keeps the answer to whether liger_kernel is there."""
    if utils := sys.modules.get("transformers.utils.import_utils"):
        utils.is_liger_kernel_available.cache_clear()


def close(finder):
    sys.meta_path.remove(finder)
    for name in [n for n in sys.modules if n.partition(".")[0] == "liger_kernel"]:
        del sys.modules[name]
    forget_availability()


def as_liger():
    """From here on liger_kernel.transformers is liger_aot.transformers: TrainingArguments(use_liger_kernel=True) reaches bind;
    liger_kernel.chunked_loss is liger_aot.chunked_loss, liger_kernel.megatron liger_aot.megatron, and liger_kernel.ops and its
    modules have the Liger*Functions.

    Changed are sys.modules and sys.meta_path, until close() of what this returns, or the end of a with statement; models that
    were bound stay bound. RuntimeError where liger-kernel is installed: nobody could tell which of the two answers.
    """
    spec = find_spec("liger_kernel")
    if spec and isinstance(spec.loader, Alias):
        raise RuntimeError("as_liger: must not be open already; close the other one first")
    if spec:
        place = spec.origin or ", ".join(spec.submodule_search_locations)
        raise RuntimeError(
            f"as_liger: liger-kernel must not be installed, found {place}; uninstall it, or reach liger_aot by its own names: "
            "LigerCallback for a Trainer, liger_aot.bind(model), liger_aot.transformers for liger_kernel.transformers"
        )
    finder = Alias("chunked_loss", "megatron", "transformers")
    root = ModuleType("liger_kernel", "liger_aot answers for this name: liger_aot.as_liger() was called.")
    root.__version__, root.__path__ = VERSION, []
    root.__spec__ = ModuleSpec("liger_kernel", finder, origin=__file__, is_package=True)
    sys.modules["liger_kernel"] = root
    sys.meta_path.insert(0, finder)
    forget_availability()
    handle = contextlib.ExitStack()
    handle.callback(close, finder)
    return handle
