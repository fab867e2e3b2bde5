"""What the build makes, what it refuses, and that it makes the same again, of what changed only."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import liger_aot
from liger_aot import _build
from liger_aot import _runtime
from liger_aot import _verify

from repository import ROOT
from repository import tool
from stub import machinery

SOURCES = pathlib.Path(liger_aot.__file__).parent / "_triton"
ARCHS = pytest.mark.parametrize("arch", _runtime.pack_paths())
aot, gate, flavour = machinery("_aot"), machinery("_gate"), tool("flavour")


def pack_of(arch):
    return _runtime.open_pack(_runtime.pack_paths()[arch])


def compile(source, arch, out):
    """A process that compiles: here, Triton is set to interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, source.parent / "_aot.py", "compile", source, arch, out]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=out.parent)


@ARCHS
def test_every_cubin_takes_what_the_launcher_packs(arch):
    pack = pack_of(arch)
    for kernel in pack.manifest["kernels"]:
        types = [type_ for _, type_ in pack.parameters(kernel)]
        expected = gate.expected_parameters(types)
        assert _verify.passed(types) == expected
        for variant in pack.table(kernel).values():
            cubin = pack.read(variant.cubin)
            assert gate.parameter_table(cubin, kernel) == _verify.parameters(cubin, kernel) == expected
    assert _verify.problems(_runtime.pack_paths()[arch]) == []


@ARCHS
def test_packs(arch):
    pack = pack_of(arch)
    assert pack.arch == arch
    assert pack.manifest["variants"] == sum(len(pack.table(kernel)) for kernel in pack.manifest["kernels"]) <= 1500
    names = pack.archive.namelist()
    assert names == sorted(names)
    assert len(names) == len(set(names)) == pack.manifest["variants"] + len(pack.manifest["kernels"]) + 1
    assert {info.date_time for info in pack.archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    for kernel in pack.manifest["kernels"]:
        keys, others = set(pack.table(kernel)), pack_of(min(_runtime.pack_paths())).table(kernel)
        assert {(not key[0], *key[1:]) for key in keys} == keys, "an aligned variant has one for any alignment, and the reverse"
        assert others.keys() == keys, "all architectures have the same"


def test_the_sources_here_are_those_that_the_packs_were_built_from():
    assert aot.contract() == _build.CONTRACT


def test_the_contract_is_over_every_source(tmp_path, monkeypatch):
    monkeypatch.setattr(aot, "FOLDER", tmp_path)
    found = [aot.contract()]
    for name, text in [("a.py", ""), ("a.py", "1"), ("b.py", "1"), ("_math.py", "")]:
        (tmp_path / name).write_text(text)
        found.append(aot.contract())
    monkeypatch.setattr(aot, "ABI", aot.ABI + 1)
    found.append(aot.contract())
    assert len(set(found)) == len(found)


GOOD = "Used 32 registers, used 1 barriers, 416 bytes cmem[0]\n0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
METADATA = {"name": "column_sum", "global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1, "tensordesc_meta": []}
SPILLS = "it spills or uses local memory"
BAD_CUBINS = {
    "types": ({"types": {"a": "*fp32", "b": "*fp32", "c": "i32", "d": "i64"}}, r"its parameters .* launcher packs .*\(24, 8\)"),
    "one more": ({"types": {"a": "*fp32", "b": "*fp32", "c": "i32", "d": "i32", "e": "fp32"}}, "its parameters"),
    "symbol": ({"metadata": {"name": "other"}}, "its symbol is other"),
    "global scratch": ({"metadata": {"global_scratch_size": 16}}, "global_scratch_size is 16, must be 0"),
    "profile scratch": ({"metadata": {"profile_scratch_size": 8}}, "profile_scratch_size is 8, must be 0"),
    "cluster": ({"metadata": {"num_ctas": 2}}, "clusters and tensor descriptors are not launched"),
    "descriptor": ({"metadata": {"tensordesc_meta": [{}]}}, "clusters and tensor descriptors are not launched"),
    "stack": ({"report": GOOD.replace("0 bytes stack", "8 bytes stack")}, SPILLS),
    "spilled stores": ({"report": GOOD.replace("0 bytes spill stores", "4 bytes spill stores")}, SPILLS),
    "spilled loads": ({"report": GOOD.replace("0 bytes spill loads", "4 bytes spill loads")}, SPILLS),
    "local memory": ({"report": GOOD + "\n16 bytes lmem"}, SPILLS),
    "no report": ({"report": "Used 32 registers"}, SPILLS),
    "narrow loads": ({"form": "any"}, r"too few 128-bit global loads, the instructions of each width are \{"),
    "narrow stores": ({"scalar": ()}, r"too few 128-bit global stores, .* are \{"),
    "mostly narrow": ({"widths": {128: 1, 32: 5}}, r"too few 128-bit global loads, .* are \{128: 1, 32: 5\}"),
    "none wide": ({"widths": {64: 8}, "mixed": ("loads",)}, r"too few 128-bit global loads, .* are \{64: 8\}"),
}


def hold(form="aligned", types=None, metadata=None, report=GOOD, scalar=("stores",), mixed=(), widths=None, aligned=True):
    pack = pack_of(min(_runtime.pack_paths()))
    cubin = pack.read(f"column_sum-fp32-fp32-ROWS128-BLOCK32-{form}.cubin")
    types = types or dict(pack.parameters("column_sum"))
    kernel = SimpleNamespace(__name__="column_sum", scalar=scalar, mixed=mixed)
    registers = gate.check("that one", cubin, SimpleNamespace(**METADATA | (metadata or {})), report, kernel, types, aligned)
    if aligned:
        with pytest.MonkeyPatch.context() as patch:
            if widths:
                patch.setattr(gate, "global_widths", lambda lines: (widths, {}))
            gate.check_widths([("that one", kernel, cubin)], pack.arch)
    return registers


def test_the_gate_lets_good_cubins_pass():
    assert hold() == hold(widths={128: 1, 32: 3}) == hold(widths={128: 1, 32: 9}, mixed=("loads",)) == 32
    assert hold(form="any", aligned=False, report=GOOD.replace("0 bytes", "8 bytes")) == 32


def test_the_gate_reads_many_cubins_as_it_reads_one():
    pack = pack_of(min(_runtime.pack_paths()))
    cubins = [(k, pack.read(v.cubin)) for k in ("column_sum", "rms_norm_bwd") for v in list(pack.table(k).values())[:2]]
    alone = [gate.listings([one], pack.arch)[0] for one in cubins]
    assert [gate.global_widths(lines) for lines in gate.listings(cubins, pack.arch)] == [*map(gate.global_widths, alone)]
    assert len(set(map(len, alone))) > 2


@pytest.mark.parametrize("fault", BAD_CUBINS)
def test_the_gate_refuses(fault):
    change, text = BAD_CUBINS[fault]
    with pytest.raises(SystemExit, match=f"^build gate: that one: {text}"):
        hold(**change)


WRONG = """
import triton
import triton.language as tl
from _aot import variants

@variants(x="*T", y="*T", n="i32", T=["fp32", "bf16"], BLOCK=[16])
@triton.jit
def wrong(x, y, n, BLOCK: tl.constexpr):
    {body}
"""
BODIES = {
    "narrow": (
        "tl.store(y, tl.load(x))",
        "build gate: wrong-fp32-fp32-BLOCK16-aligned.cubin for sm_80: too few 128-bit global loads",
    ),
    "no such thing": ("tl.nothing(x)", "wrong-fp32-fp32-BLOCK16-aligned.cubin for sm_80 does not compile"),
}


@pytest.mark.parametrize("fault", BODIES)
def test_a_variant_that_fails_fails_the_build_by_name(tmp_path, fault):
    body, text = BODIES[fault]
    folder = tmp_path / "csrc"
    folder.mkdir()
    for name in ("_aot.py", "_gate.py"):
        shutil.copy(SOURCES / name, folder)
    (folder / "wrong.py").write_text(WRONG.format(body=body))
    done = compile(folder / "wrong.py", "80", tmp_path / "out.zip")
    assert done.returncode == 1
    assert text in done.stderr
    assert not (tmp_path / "out.zip").exists(), "half a pack has not the name of a whole one"


def test_declarations():
    def kernel():
        pass

    kernel.arg_names = ["n", "x"]
    with pytest.raises(TypeError, match="kernel: pointers must come before the other parameters"):
        aot.variants(n="i32", x="*fp32")(kernel)
    with pytest.raises(TypeError, match="kernel: max_registers is neither a parameter, an option nor a list"):
        aot.variants(n="i32", x="i32", max_registers=64)(kernel)


def test_the_same_again(tmp_path):
    """Two builds in two folders, from two folders, of one of the architectures that ptxas is asked for under another name."""
    packs = []
    for folder in (tmp_path / "a", tmp_path / "a longer name" / "b"):
        shutil.copytree(SOURCES, folder / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
        done = compile(folder / "csrc/column_sum.py", "100f", folder / "part.zip")
        assert done.returncode == 0, done.stderr
        command = [sys.executable, folder / "csrc/_aot.py", "pack", "100f", "1.0", folder / "sm_100f.zip", folder / "part.zip"]
        subprocess.run(command, check=True, capture_output=True)
        packs.append((folder / "sm_100f.zip").read_bytes())
    assert packs[0] == packs[1]
    with zipfile.ZipFile(tmp_path / "a/sm_100f.zip") as archive:
        assert len(archive.namelist()) == 6 + 2


@pytest.mark.parametrize(
    ("ptxas", "arch", "driver", "ptx"),
    [
        ("12.4.131", "80", 12000, 84),
        ("12.8.93", "90", 12000, 87),
        ("12.9.86", "75", 12000, 88),
        ("12.9.86", "86", 12000, 88),
        ("12.9.86", "90a", 12000, 88),
        ("12.9.86", "100f", 12090, 88),
        ("12.9.86", "120f", 12090, 88),
        ("13.0.48", "80", 13000, 90),
        ("13.1.80", "110f", 13010, 91),
    ],
)
def test_what_an_assembler_asks_of_the_driver(monkeypatch, ptxas, arch, driver, ptx):
    monkeypatch.setattr(aot, "ptxas_version", lambda: ptxas)
    assert (aot.min_driver(arch), aot.ptx_version()) == (driver, ptx)


def test_names_are_taken_once(tmp_path):
    for name in ("a", "b"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr("kernel.json", "{}")
    with pytest.raises(SystemExit, match=r"b\.zip: kernel\.json exists already"):
        aot.pack("80", "1", tmp_path / "sm_80.zip", [tmp_path / "a.zip", tmp_path / "b.zip"])
    assert not (tmp_path / "sm_80.zip").exists()


# Stands for _aot.py: it writes its command line where the result should be.
PRETEND = """
import pathlib, sys
if sys.argv[1] == "toolchain":
    print(pathlib.Path(__file__).with_name("version.txt").read_text())
else:
    out = {"compile": 4, "pack": 4, "contract": 3}[sys.argv[1]]
    pathlib.Path(sys.argv[out]).write_text(" ".join(sys.argv[1:]))
"""


class Build:
    """The project's CMakeLists.txt with two kernel files and a compiler that only pretends."""

    def __init__(self, folder):
        self.source, self.folder = folder / "source", folder / "build"
        self.archs, self.cuda, self.interpret = "80,100f", "", "0"
        for name in ("csrc_triton", "tools"):
            (self.source / name).mkdir(parents=True)
        for name in ("CMakeLists.txt", "tools/flavour.py"):
            shutil.copy(ROOT / name, self.source / name)
        for name in ("a.py", "b.py", "_gate.py", "_math.py"):
            self.write(name)
        (self.source / "csrc_triton/_aot.py").write_text(PRETEND)
        self.write("version.txt", "Triton 1, ptxas 12.9.86")

    def write(self, name, text=""):
        (self.source / "csrc_triton" / name).write_text(text)

    def start(self, *command):
        path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
        environment = os.environ | {"PATH": path, "LIGER_AOT_ARCHS": self.archs, "LIGER_AOT_CUDA": self.cuda}
        environment["TRITON_INTERPRET"] = self.interpret
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=self.source)

    def run(self, *command):
        done = self.start(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def configuration(self):
        definitions = ["-DSKBUILD_PROJECT_VERSION_FULL=1.2", f"-DPython_EXECUTABLE={sys.executable}"]
        return "cmake", "-G", "Ninja", "-S", self.source, "-B", self.folder, *definitions

    def configure(self):
        self.run(*self.configuration())

    def made(self):
        """What was out of date."""
        return sorted(re.findall(r"\] ((?:Compiling|Packing|Generating) .*)", self.run("ninja", "-C", self.folder)))


def test_what_changed_is_made_again(tmp_path):
    build = Build(tmp_path)
    build.configure()
    everything = [f"{verb} for sm_{arch}" for verb in ("Compiling a", "Compiling b") for arch in ("100f", "80")]
    hashed = ["Generating _build.py", "Packing sm_100f", "Packing sm_80"]
    assert build.made() == everything + hashed
    assert build.made() == []
    build.run("cmake", "--install", build.folder, "--prefix", tmp_path / "wheel")
    installed = sorted(str(p.relative_to(tmp_path / "wheel/liger_aot")) for p in (tmp_path / "wheel").rglob("*") if p.is_file())
    sources = [f"_triton/{name}.py" for name in ("_aot", "_gate", "_math", "a", "b")]
    assert installed == sorted(["_build.py", "cubins/sm_100f.zip", "cubins/sm_80.zip", *sources])
    assert (tmp_path / "wheel/liger_aot/_build.py").read_text().startswith("contract 1.2 ")

    build.write("a.py", "changed")
    assert build.made() == everything[:2] + hashed, "one edge for each architecture"
    build.write("_math.py", "changed")
    assert build.made() == everything + hashed
    build.configure()
    assert build.made() == [], "to configure again changes nothing"
    build.write("version.txt", "Triton 2, ptxas 12.9.86")
    build.configure()
    assert build.made() == everything + hashed[1:], "another compiler makes everything again"
    build.archs = "80"
    build.configure()
    assert build.made() == []
    (build.source / "csrc_triton/b.py").unlink()
    assert build.made() == ["Generating _build.py", "Packing sm_80"], "both hold a hash of all sources"
    (build.source / "csrc_triton/_math.py").rename(build.source / "csrc_triton/_more.py")
    assert build.made() == ["Generating _build.py", "Packing sm_80"]


def test_a_flavour_brings_its_architectures_and_takes_its_assembler_alone(tmp_path):
    build = Build(tmp_path)
    build.archs, build.cuda, build.interpret = "", "12.6", "1"
    assert "unset it to build" in build.start(*build.configuration()).stderr
    build.interpret = "0"
    refused = build.start(*build.configuration())
    assert refused.returncode
    assert "assembled by ptxas 12.6.85, found is 12.9.86; install nvidia-cuda-nvcc-cu12==12.6.85" in refused.stderr
    build.write("version.txt", "Triton 1, ptxas 12.6.85")
    build.configure()
    assert [line for line in build.made() if line.startswith("Packing")] == ["Packing sm_80", "Packing sm_90"]


def test_pins():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    required = {*project["build-system"]["requires"], flavour.FLAVOURS[flavour.PLAIN].requirement}
    assert all("==" in r for r in required), "what compiles is pinned"
    names = {re.split(r"[=<>~ ]", r)[0] for r in required}
    assert not names & {"torch", "numpy", "liger-kernel"}
    assert required <= set(project["dependency-groups"]["build"]), "builds without isolation use the same"
    assert {"include-group": "build"} in project["dependency-groups"]["demo"]
    assert {"include-group": "demo"} in project["dependency-groups"]["test"]
    assert [re.split(r"[=<>~]", r)[0] for r in project["project"]["dependencies"]] == ["torch"]


def test_the_demo_takes_no_package_that_the_oldest_python_cannot_have():
    """Of those that are pinned and are here, whose own metadata says what they take."""
    tomllib = pytest.importorskip("tomllib")
    project, seen = tomllib.loads((ROOT / "pyproject.toml").read_text()), []
    oldest = project["project"]["requires-python"].removeprefix(">=")
    groups = project["dependency-groups"]
    for requirement in map(Requirement, (r for r in (*groups["build"], *groups["demo"]) if isinstance(r, str))):
        taken = requirement.marker is None or requirement.marker.evaluate({"python_version": oldest})
        pins = [s.version for s in requirement.specifier if s.operator == "=="]
        if taken and pins:
            distribution = importlib.metadata.distribution(requirement.name)
            if distribution.version in pins:
                assert SpecifierSet(distribution.metadata["Requires-Python"]).contains(oldest), requirement
        seen += [requirement.name] * taken
    assert len(seen) == len({*seen}), "each package once"
    assert "transformers" in seen


def test_nothing_of_the_build_is_needed_to_run():
    """The package imports without Triton, and without what else compiles or tests."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(['triton', 'elftools', 'ninja', 'pytest', 'transformers']);"
        "import torch, liger_aot; print(tuple(torch.ops.liger.rms_norm(torch.ones(2, 3)).shape))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "(2, 3)\n", done.stderr
