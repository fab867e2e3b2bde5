"""Wheels that are built, made again, and installed in a clean environment: of two kernel files, by the same steps as all."""

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from liger_aot import _verify

from repository import FLAVOURS
from repository import OLDEST
from repository import ROOT
from repository import outside
from repository import pip
from repository import tool

pytestmark = pytest.mark.usefixtures("no_flavour")
KEPT = "column_sum.py", "swiglu.py"


def copy(folder):
    """The tree without its history and with few kernels; its contract is another one therefore."""
    left = shutil.ignore_patterns(".*", "build", "dist", "out", "__pycache__", "benchmarks")
    shutil.copytree(ROOT, folder, ignore=left, dirs_exist_ok=True)
    shutil.copy(ROOT / ".gitignore", folder)
    for kernel in (folder / "csrc_triton").glob("[a-z]*.py"):
        if kernel.name not in KEPT:
            kernel.unlink()
    return folder


def build(source, out, *options, **environment):
    done = pip("wheel", "--no-deps", "--wheel-dir", out, *options, source, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def manifest(wheel, arch):
    with zipfile.ZipFile(wheel) as archive, archive.open(f"liger_aot/cubins/sm_{arch}.zip") as pack:
        return json.loads(zipfile.ZipFile(pack).read("manifest.json"))


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return copy(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory):
    return build(source, tmp_path_factory.mktemp("dist"), "--no-build-isolation", LIGER_AOT_ARCHS="100f")


@pytest.mark.slow
def test_the_same_wheel_again(wheel, source, tmp_path):
    """From another folder, under another umask, at another time; and from the source distribution, where no git is."""
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    for name, cuda in {"one": "", "two": "13.0"}.items():
        command = [sys.executable, "-c", code, tmp_path / name]
        subprocess.run(command, check=True, capture_output=True, cwd=source, env=outside() | {"LIGER_AOT_CUDA": cuda})
    first, second = (path for name in ("one", "two") for path in (tmp_path / name).iterdir())
    assert (first.name, first.read_bytes()) == (second.name, second.read_bytes()), "one for all flavours"
    with tarfile.open(first) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    before = os.umask(0o077)
    try:
        other = copy(tmp_path / "a longer name" / "source")
        for folder in (other, unpacked):
            again = build(folder, tmp_path / f"from {folder.name}", "--no-build-isolation", LIGER_AOT_ARCHS="100f")
            assert (again.name, again.read_bytes()) == (wheel.name, wheel.read_bytes())
    finally:
        os.umask(before)


@pytest.mark.slow
@pytest.mark.parametrize("cuda", tool("flavour").FLAVOURS)
def test_wheels_of_each_flavour(source, tmp_path, cuda):
    """In isolation, as `make wheel CUDA=` builds."""
    version, requirement, archs, _ = FLAVOURS[cuda]
    last = archs.split()[-1]
    found = build(source, tmp_path, "-C", f"build-dir={tmp_path / 'build'}", LIGER_AOT_CUDA=cuda, LIGER_AOT_ARCHS=last)
    suffix = version.removeprefix("1.2")
    assert re.fullmatch(rf"liger_aot-\d+\.\d+\.\d+{re.escape(suffix)}-py3-none-any\.whl", found.name)
    packed = manifest(found, last)
    assert (packed["ptxas"], packed["arch"]) == (requirement.partition("==")[2], last)
    assert packed["version"].endswith(suffix)
    assert packed["min_driver"] == {"12.6": 12000, "12.9": 12090, "13.0": 13000}[cuda]


def pythons():
    """Every Python of this machine that could be asked: {version: path}."""
    places = [*map(pathlib.Path, os.environ["PATH"].split(os.pathsep)), *pathlib.Path.home().glob(".pyenv/versions/*/bin")]
    names = {n: f"python3.{n}" for n in range(OLDEST - 1, 20)}
    found = {n: place / name for n, name in names.items() for place in places if (place / name).exists() and runs(place / name)}
    return {f"3.{n}": path for n, path in found.items()}


def runs(python):
    """pyenv leaves names in PATH that run nothing, and distributions a Python that makes no environments."""
    return subprocess.run([python, "-c", "import ensurepip"], capture_output=True).returncode == 0


FILES = """
import ast, compileall, importlib.metadata, pathlib, sys
found = importlib.metadata.distribution("liger-aot")
package = pathlib.Path(found.locate_file("liger_aot"))
compiled = compileall.compile_dir(package, quiet=1)
for path in package.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        for name in names:
            if name.partition(".")[0] in sys.stdlib_module_names:
                module = importlib.import_module(name)
                if isinstance(node, ast.ImportFrom):
                    [getattr(module, a.name) for a in node.names if a.name != "*"]
print(bool(compiled), found.version, all(f.locate().exists() for f in found.files))
"""


@pytest.mark.slow
def test_every_python_installs_it(wheel, tmp_path):
    """Without torch, which this machine need not have for each: installed, compiled to bytecode without a warning, all that it
    takes from the standard library found there, removed."""
    version, tried = wheel.name.split("-")[1], pythons()
    assert f"3.{sys.version_info.minor}" in tried
    for name, found in tried.items():
        subprocess.run([found, "-m", "venv", tmp_path / name], check=True, capture_output=True)
        python = tmp_path / name / "bin/python"
        done = pip("install", "--no-deps", "--no-compile", wheel, python=python)
        if name == f"3.{OLDEST - 1}":
            assert "requires a different Python" in done.stderr
            continue
        assert done.returncode == 0, done.stderr
        done = subprocess.run([python, "-W", "error", "-c", FILES], capture_output=True, text=True)
        assert done.stdout == f"True {version} True\n", done.stderr
        assert pip("uninstall", "--yes", "liger-aot", python=python).returncode == 0
        shutil.rmtree(tmp_path / name)


def needs(name, found):
    """What a package needs, and what that needs, as it is installed here; no Triton and nothing of CUDA."""
    found.add(name)
    for text in importlib.metadata.requires(name) or []:
        other = re.match(r"[\w.-]+", text)[0].lower()
        if other not in found and "extra ==" not in text and not re.match("triton|nvidia|cuda", other) and is_here(other):
            needs(other, found)
    return found


def is_here(name):
    return any(importlib.metadata.distributions(name=name))


@pytest.fixture(scope="session")
def clean(wheel, tmp_path_factory):
    """What runs a program in an environment of torch and the wheel alone, with no other program in PATH."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    for name in needs("torch", set()):
        distribution = importlib.metadata.distribution(name)
        for top in {f.parts[0] for f in distribution.files} - {"..", "__pycache__"}:
            (site / top).symlink_to(distribution.locate_file(top))
    done = pip("--python", folder / "bin/python", "install", "--no-deps", wheel)
    assert done.returncode == 0, done.stderr

    def run(*command, **environment):
        command = [folder / "bin/python", *command]
        environment = {"PATH": str(folder / "bin"), "HOME": str(folder)} | environment
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)

    return run


ALONE = """
import importlib.util, shutil
import torch, liger_aot
assert not [n for n in ("triton", "numpy", "elftools", "transformers", "cuda") if importlib.util.find_spec(n)]
assert not [n for n in ("cc", "gcc", "c++", "clang", "nvcc", "ptxas") if shutil.which(n)]
gate, up = torch.randn(3, 64, requires_grad=True), torch.randn(3, 64)
y = torch.ops.liger.swiglu(gate, up)
torch.testing.assert_close(y, torch.nn.functional.silu(gate) * up)
y.sum().backward()
print(gate.grad.shape, liger_aot.__file__)
"""


@pytest.mark.slow
def test_torch_is_all_that_it_needs(clean):
    done = clean("-c", ALONE)
    assert done.returncode == 0, done.stderr
    done = clean("-m", "liger_aot", "verify")
    assert done.stdout == f"sm_100f: {_verify.GOOD}\n", done.stderr
    done = clean("-m", "liger_aot", "info", "--arch", "10.3", "--json")
    assert done.returncode == 0, done.stderr
    known = json.loads(done.stdout)
    assert known["asked"]["pack"] == "sm_100f"
    assert known["versions"]["triton"] is None


@pytest.mark.slow
def test_a_wheel_that_lost_its_end(wheel, tmp_path):
    """A download that broke off: refused as a whole by pip."""
    half = tmp_path / wheel.name
    half.write_bytes(wheel.read_bytes()[:-1000])
    done = pip("install", "--no-deps", "--target", tmp_path / "site", half)
    assert done.returncode == 1
    assert "is invalid" in done.stderr
    assert not (tmp_path / "site").exists()


@pytest.mark.slow
def test_what_is_installed_and_then_changes(clean):
    """verify notices what selection must not read on every import."""
    where = clean("-c", "import importlib.util as u; print(u.find_spec('liger_aot').submodule_search_locations[0])").stdout
    pack = pathlib.Path(where.strip(), "cubins/sm_100f.zip")
    data = pack.read_bytes()
    try:
        pack.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if data[-1] else data + b"\0")
        done = clean("-m", "liger_aot", "verify", "--json")
    finally:
        pack.write_bytes(data)
    assert done.returncode == 1
    assert f"{pack}: is not the file that was installed; install liger-aot again" in json.loads(done.stdout)["sm_100f"]


@pytest.mark.slow
def test_make_pack(source, clean, tmp_path):
    """A pack for an architecture that is not shipped: found where LIGER_AOT_PACKS says, by the package of its sources alone."""
    folder = copy(tmp_path / "source")
    command = ["make", "pack", "ARCH=75", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, env=outside(), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    packs = folder / "dist/packs"
    assert f"export LIGER_AOT_PACKS={packs}\n" in done.stdout
    assert [p.name for p in packs.iterdir()] == ["sm_75.zip"]

    refused = clean("-m", "liger_aot", "info", "--arch", "7.5")
    assert refused.returncode == 1
    assert "no kernels for compute capability 7.5" in refused.stdout
    served = clean("-m", "liger_aot", "info", "--arch", "7.5", LIGER_AOT_PACKS=str(packs))
    assert served.returncode == 0, served.stdout
    assert "7.5            sm_75 (exact); not sm_100f: runs on 10.x\n" in served.stdout
    assert f"sm_75: {_verify.GOOD}\n" in clean("-m", "liger_aot", "verify", LIGER_AOT_PACKS=str(packs)).stdout
    # This process has the package of all kernels.
    (found,) = _verify.problems(packs / "sm_75.zip")
    assert re.search(
        r"was built for liger-aot .* \(contract \w+\), this is .*; install liger-aot again, or build the pack", found
    )


def test_make_pack_wants_an_architecture():
    done = subprocess.run(["make", "pack"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "make pack: which architecture? make pack ARCH=75, or ARCH=110f CUDA=13.0" in done.stderr
