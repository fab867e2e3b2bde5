"""The documentation: it builds without a warning, its examples run, and no operator and no error is left out."""

import ast
import doctest
import glob
import html
import itertools
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from test_export import Stand

import liger_aot
from liger_aot import _build
from liger_aot import _jit
from liger_aot import _op
from liger_aot import export

from examples import EXAMPLES
from repository import ROOT
from repository import tool
from tiny import batch
from tiny import build

pages = tool("pages")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    # In a process of its own: Sphinx changes the signatures of what it documents.
    done = subprocess.run([sys.executable, ROOT / "tools/pages.py", out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / "html"


def text_of(path):
    return html.unescape(re.sub(r"<[^>]+>", "", path.read_text()))


def test_the_site_has_every_page(site):
    assert {p.stem for p in (ROOT / "docs").glob("*.md")} <= {p.stem for p in site.glob("*.html")}
    assert _build.VERSION in text_of(site / "index.html")


@pytest.mark.parametrize("module", pages.modules(), ids=lambda module: module.__name__.rpartition(".")[2])
def test_an_operators_page_says_all(site, module):
    """Formula, source, shapes, dtypes, what is raised, schemas, an example: a docstring without one of them is named."""
    public, launched = pages.operators(module)
    text = text_of(site / "ops" / f"{pages.title(module)}.html")
    assert "=" in module.__doc__.partition("\n\n")[0], "the module's first paragraph: the formula"
    assert re.search(r"arXiv|torch\.", module.__doc__), "its source: a paper, or torch's function"
    for name in pages.functions(module):
        doc = " ".join(getattr(module, name).__doc__.split())
        assert re.search(r"\([\w.]+, [^)]*\)|one shape", doc), "shapes"
        assert "dtype" in doc, "dtypes"
        assert "Raises ValueError" in doc, "what is raised"
        assert ">>> " in getattr(liger_aot, name).__doc__, "an example, in functional.py"
        assert f"ValueError: {name}: " in text, "what is refused"
    for operator in (*public, *launched):
        assert f"liger::{operator}(" in text, "its schema"
    assert pages.dtypes(pages.title(module), DTYPE_PAGE), "a heading of docs/dtypes.md that names it"


def test_no_operator_is_left_out():
    found = [operators for module in pages.modules() for operators in pages.operators(module)]
    assert sorted(itertools.chain(*found)) == sorted([*_op.PUBLIC, *_op.BODIES])
    assert {name for module in pages.modules() for name in pages.functions(module)} == set(EXAMPLES)


# --- examples


# Their first lines, and why they do not run here.
NOT_RUN = {
    'liger_aot.preload("rms_norm_fwd", "swiglu_fwd")': "a GPU",
    "torch._inductor.aoti_compile_and_package(lowered": "a GPU",
    "import liger_aot.convert": "a checkpoint of SwissArmyTransformer; test_convert_sat.py makes one",
    "report = liger_aot.bind(model)  # a plain loop": "ways in side by side; test_ways_in.py runs each",
}


def blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def test_examples_of_docstrings():
    for name in EXAMPLES:
        found = doctest.DocTestFinder(recurse=False).find(
            getattr(liger_aot, name), name, module=False, globs={"torch": torch, "liger_aot": liger_aot}
        )
        for test in found:
            assert test.examples
            assert not doctest.DocTestRunner().run(test).failed, f"{name}: see above"


PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.stem != "transformers" and blocks(p))]


COMPILED = "aoti_compile_and_package"  # by a C++ compiler, in half a minute; test_export.py does it for every operator
CASES = [pytest.param(path, False, id=path.stem) for path in PAGES]
CASES += [pytest.param(ROOT / "docs/deployment.md", True, id="deployment, compiled", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("path", "compiles"), CASES)
def test_examples_of_pages(path, compiles, tmp_path, monkeypatch):
    """One after another, given what a page does not make itself; those of docs/transformers.md are run by test_ways_in.py."""
    stands = {name: Stand(kernel) for name, kernel in _jit.load().items()}
    monkeypatch.setattr(export, "sources", lambda: stands)  # Triton interprets here
    monkeypatch.chdir(tmp_path)
    given = {"model": build(), "ids": batch()["input_ids"]}
    for code in blocks(path):
        if code.startswith(tuple(NOT_RUN)) or (COMPILED in code and not compiles):
            continue
        exec(compile(code, str(path), "exec"), given)


def test_what_does_not_run_is_there():
    text = "".join(p.read_text() for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    assert all(f"```python\n{line}" in text for line in NOT_RUN)


# --- dtypes


DTYPE_PAGE = (ROOT / "docs/dtypes.md").read_text()
SIXTEEN = ["fp16", "bf16"]


def norm_rows():
    """(x, w, casting, what the table says of y, dx, dw) of each combination that a row is for."""
    for line in re.findall(r"^\| (?:fp32|16 bit) .*", DTYPE_PAGE, re.M):
        x, w, casting, *results = [cell.strip() for cell in line.strip("|").split("|")]
        for x_ in SIXTEEN if x == "16 bit" else [x]:
            weights = {"the same": [x_], "none": [None]}.get(w, w.split(", "))
            castings = ["none", "gemma", "llama"] if casting == "any" else re.findall(r"`(\w+)`", casting)
            for w_, casting_ in itertools.product(weights, castings):
                says = [{"x": x_, "w": w_, "": None}.get(word, word) for word in (r.partition(",")[0] for r in results)]
                yield x_, w_, casting_, says


@pytest.mark.parametrize(("x", "w", "casting", "says"), [*norm_rows()])
def test_the_dtype_table_of_norms(x, w, casting, says):
    """y, dx, dw of rms_norm; the sum of fused_add_rms_norm; layer_norm as `none`."""
    inputs = torch.randn(3, 8, dtype=DTYPES[x], requires_grad=True)
    weight = None if w is None else torch.randn(8, dtype=DTYPES[w], requires_grad=True)
    expected = [None if word is None else DTYPES[word] for word in says]

    def got(y):
        inputs.grad = None
        y.sum().backward()
        return [y.dtype, inputs.grad.dtype, None if weight is None else weight.grad.dtype]

    assert got(torch.ops.liger.rms_norm(inputs, weight, casting=casting)) == expected
    y, s = torch.ops.liger.fused_add_rms_norm(inputs, inputs.detach(), weight, casting=casting)
    assert got(y) == expected
    assert s.dtype == inputs.dtype
    if casting == "none":
        assert got(torch.ops.liger.layer_norm(inputs, weight)) == expected


def test_the_dtype_table_says_each_combination():
    said = {(x, w, casting) for x, w, casting, _ in norm_rows()}
    third = {("fp16", "bf16"), ("bf16", "fp16")}  # the sentence above the table
    combinations = itertools.product(DTYPES, [*DTYPES, None], ["none", "gemma", "llama"])
    missing = {c for c in combinations if c not in said and c[:2] not in third}
    assert not missing


def test_the_table_of_flavours():
    """docs/wheels.md against tools/flavour.py: assembler, architectures."""
    flavour, text = tool("flavour"), (ROOT / "docs/wheels.md").read_text()
    rows = re.findall(r"^\| (`X\.Y\.Z.*?) \| ([\d.]+) \| (.*?) \|", text, re.M)
    found = {suffix: (ptxas, archs) for names, ptxas, archs in rows for suffix in re.findall(r"`X\.Y\.Z(.*?)`", names)}
    flavours = {f"+{flavour.suffix(cuda)}": f for cuda, f in flavour.FLAVOURS.items()} | {"": flavour.FLAVOURS[flavour.PLAIN]}
    assert found == {suffix: (f.ptxas, ", ".join(f.ships.split())) for suffix, f in flavours.items()}


# --- errors


SOURCES = pathlib.Path(liger_aot.__file__).parent
NAMES = [name for name in sorted(glob.glob("**/*.py", root_dir=SOURCES, recursive=True)) if name != "_demo.py"]  # noqa: PTH207 (follows links)
FILES = [SOURCES / name for name in NAMES if not name.startswith(("convert", "_triton"))]
TOOLS = [*(ROOT / "tools").glob("*.py"), *(ROOT / "csrc_triton").glob("_*.py")]
# Of these every message: the machine, packs, the driver, the build. What a function's arguments must be stands on its own page.
MACHINERY = [p for p in FILES if p.name[0] == "_" and p.parent in (SOURCES, SOURCES / "bind")] + [SOURCES / "export.py", *TOOLS]
SAYING = "problems", "inside", "wrong_folder", "missing", "require"  # functions whose texts are messages that others print


def said(node):
    """A message with … where its values stand."""
    text = pages.template(node)
    return text and re.sub(r"\{.*?\}", "…", text).replace("\n", " ")


def messages(path):
    """(every text in a file, those that it raises), without what is a value alone."""
    texts, raised = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        texts.add(said(node))
        if pages.is_error(node) and node.func.id != "AttributeError":
            raised.add(said(node.args[0]))
        if isinstance(node, ast.FunctionDef) and node.name in SAYING:
            raised |= {said(n) for n in ast.walk(node) if isinstance(n, ast.JoinedStr)}
    return texts - {None}, {text for text in raised - {None} if re.search("[a-z]{3}", text)}


HEADINGS = re.findall(r"^### `(.*)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.M)


def explained(text):
    return any(re.search(".*".join(map(re.escape, heading.split("…"))), text) for heading in HEADINGS)


def test_every_error_is_explained():
    """A heading of the page is a part of each message; convert's are on its own page."""
    lacking = [f"{path.name}: {text}" for path in MACHINERY for text in messages(path)[1] if not explained(text)]
    lacking += [
        f"{path.name}: {said(node.args[0])}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if pages.is_error(node) and node.func.id in ("NotImplementedError", "ImportError")
        if said(node.args[0]) and not explained(said(node.args[0]))
    ]
    assert not lacking, "docs/troubleshooting.md lacks\n" + "\n".join(sorted(lacking))
    assert explained("liger_aot: no kernels for compute capability 7.5. Packs: none")
    assert not explained("liger_aot: something else")


def test_no_error_is_made_up():
    texts = [text for path in [*FILES, *TOOLS] for text in messages(path)[0]]
    assert [h for h in HEADINGS if not any(h in text for text in texts)] == []
    assert len(HEADINGS) == len(set(HEADINGS))
    assert all(re.search("[a-z]{3}", h) for h in HEADINGS), "a heading of values alone would explain everything"


WITHOUT = """
import sys, torch
try:
    torch.ops.liger.rms_norm
except AttributeError as error:
    print(error)
torch.export.load(sys.argv[1])
"""


def test_what_torch_says_without_the_package(tmp_path):
    """The two messages of torch's own that are on the page and need no compiler."""
    program = torch.export.export(liger_aot.nn.RMSNorm(8), (torch.randn(2, 8),))
    torch.export.save(program, tmp_path / "norm.pt2")
    done = subprocess.run([sys.executable, "-c", WITHOUT, tmp_path / "norm.pt2"], capture_output=True, text=True)
    for message in re.findall(r"^\| `(.*?)`(?:, then `(.*?)`)? \|", (ROOT / "docs/troubleshooting.md").read_text(), re.M):
        if "Could not find schema" not in message[0]:  # of AOTInductor's loader
            assert all(part in done.stdout + done.stderr for part in message)
