"""The documentation site: a page for each operator, from its docstrings, and all pages made HTML by Sphinx.

    python tools/pages.py out/docs
The package must be installed, with the dependency group docs. A warning is an error, as in `make docs`, which calls this.
"""

import argparse
import ast
import functools
import importlib
import inspect
import pathlib
import pkgutil
import re
import shutil
import sys

import torch
from sphinx.cmd.build import main as sphinx

from liger_aot import _op
from liger_aot import functional
from liger_aot import nn
from liger_aot import ops

DOCS = pathlib.Path(__file__).parent.parent / "docs"


def modules():
    """Of each operator, the module that is all of it."""
    names = [m.name for m in pkgutil.iter_modules(ops.__path__) if not m.name.startswith("_")]
    return [importlib.import_module(f"{ops.__name__}.{name}") for name in names]


def title(module):
    return module.__name__.rpartition(".")[2]


def operators(module):
    """(names of the differentiable operators, names of those that these launch) which a module registers."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return [name for name in own if name in _op.PUBLIC], [name for name in own if name in _op.BODIES]


def functions(module):
    """Those of its operators that liger_aot has as functions, with torch's arguments."""
    return [name for name in operators(module)[0] if name in vars(functional)]


# --- what is raised


def is_error(node):
    return isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith(("Error", "SystemExit")) and bool(node.args)


def template(node):
    """The text of a message, with values in braces as in the source; None of what is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (p.value if isinstance(p, ast.Constant) else f"{{{ast.unparse(p.value)}}}" for p in node.values)
        return "".join(parts)
    if isinstance(node, ast.BinOp):
        return "".join(template(side) or f"{{{ast.unparse(side)}}}" for side in (node.left, node.right))
    return None


@functools.cache
def parsed(path):
    """({name: function}, {name: (file, name there)}) of what a file defines, and of what it imports from beside it."""
    tree = ast.parse(path.read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    beside = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module]
    return functions, {a.asname or a.name: (path.parent / f"{n.module}.py", a.name) for n in beside for a in n.names}


def raised(path, name, seen):
    """(exception, message) of each that a function may raise, or one that it calls, in its file or in one beside it."""
    functions, imported = parsed(path)
    if name in imported:
        return raised(*imported[name], seen) if imported[name][0].exists() else []
    if name not in functions or (path, name) in seen:
        return []
    seen.add((path, name))
    found = []
    for node in sorted(
        ast.walk(functions[name]), key=lambda node: (getattr(node, "lineno", 0), getattr(node, "col_offset", 0))
    ):
        if is_error(node) and (text := template(node.args[0])):
            found.append((node.func.id, text))
        elif isinstance(node, ast.Name):
            found += raised(path, node.id, seen)
    return found


def refusals(module):
    """What calls of a module's functions refuse, a line each."""
    places, found = [pathlib.Path(functional.__file__), pathlib.Path(module.__file__)], {}
    for name in functions(module):
        seen = set()
        for error, text in (item for path in places for item in raised(path, name, seen)):
            found[f"{error}: {re.sub(r'^{(op|name)}', name, text)}"] = None
    return "\n".join(found)


# --- pages


def plain(lines):
    """Lines of a docstring, which is plain text with `code` and >>> examples, for Sphinx."""
    text = "\n".join(lines)
    pieces = re.split(r"(`[^`\n]+`|^ *>>>(?:.+\n?)+)", text, flags=re.M)
    return "".join(p if i % 2 else re.sub(r"[*_|\\]", r"\\\g<0>", p) for i, p in enumerate(pieces)).split("\n")


def block(kind, text):
    return f"```{kind}\n{text}\n```\n"


def documented(text):
    return block("{eval-rst}", "\n".join(plain(text.split("\n"))))


def described(name, function):
    """An operator's schema and docstring."""
    doc = inspect.getdoc(function)
    return block("text", getattr(torch.ops.liger, name).default._schema) + (f"\n{documented(doc)}" if doc else "")


def layers(names):
    """The modules of liger_aot.nn that compute operators."""
    found = [c for c in vars(nn).values() if inspect.isclass(c) and c.__module__ == nn.__name__ and "forward" in vars(c)]
    return [c.__name__ for c in found if not {*names}.isdisjoint(c.forward.__code__.co_names)]


def dtypes(name, text):
    """Those sections of the dtype table whose headings name an operator."""
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    return "".join(s.partition("\n")[2] for s in sections if f"`{name}`" in s.partition("\n")[0]).strip()


def page(module, table):
    """An operator's page, in Markdown."""
    formula, _, source = inspect.getdoc(module).partition("\n\n")
    public, launched = operators(module)
    parts = [f"# {title(module)}\n", block("text", re.sub(" {2,}", "\n    ", formula)), documented(source) if source else ""]
    parts += ["## Function\n", *(block("{eval-rst}", f".. autofunction:: liger_aot.{name}") for name in functions(module))]
    parts += [block("{eval-rst}", f".. autoclass:: liger_aot.nn.{layer}") for layer in layers(public)]
    for operator in public:
        parts += [f"## torch.ops.liger.{operator}\n", described(operator, getattr(module, operator))]
    parts += ["## Dtypes\n", dtypes(title(module), table), "\nSee [](../dtypes.md) for autocast and rounding.\n"]
    parts += [
        "## What is refused\n",
        "In braces stands what the error shows of the call.\n",
        block("text", refusals(module)),
    ]
    parts += [
        "## Forward and backward operators\n",
        "What autograd calls, and a graph holds after `run_decompositions()`. They take what the public operator gives them,\n"
        "unchecked.\n",
    ]
    parts += [described(operator, getattr(module, operator)) for operator in launched]
    return "\n".join(parts)


def write(folder):
    """folder/<operator>.md for each."""
    folder.mkdir(parents=True)
    table = (DOCS / "dtypes.md").read_text()
    for module in modules():
        (folder / f"{title(module)}.md").write_text(page(module, table))


def build(out, builder="html"):
    """The site in out/html; out/source is what Sphinx reads. Its exit status."""
    source = out / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(DOCS, source)
    write(source / "ops")
    return sphinx(["-W", "--keep-going", "-q", "-b", builder, "-d", str(out / "doctrees"), str(source), str(out / builder)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    out = parser.parse_args().out
    status = build(out)
    print(f"{out / 'html' / 'index.html'}" if not status else "the site has errors", file=sys.stderr if status else sys.stdout)
    sys.exit(status)
