"""Wheels: their flavours, the index that offers them, what they are in a clean environment, and that they can be made again.

The slow ones build wheels of two kernel files, through the same steps as all of them.
"""

import base64
import concurrent.futures
import hashlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch
import yaml
from test_runtime import in_a_process

from liger_aot import _info
from liger_aot import _runtime
from liger_aot import _verify
from liger_aot.__main__ import main

from stub import Stub
from stub import StubDriver
from stub import copy_pack
from stub import machinery

ROOT = pathlib.Path(__file__).parent.parent


def tool(name):
    """A module of tools/, which the build runs and the wheel does not have."""
    if str(ROOT / "tools") not in sys.path:
        sys.path.append(str(ROOT / "tools"))
    return importlib.import_module(name)


aot, flavour, index = machinery("_aot"), tool("flavour"), tool("index")
EVERY = pytest.mark.parametrize("cuda", flavour.FLAVOURS)


@pytest.fixture(autouse=True)
def no_flavour(monkeypatch):
    for name in ("LIGER_AOT_CUDA", "LIGER_AOT_ARCHS"):
        monkeypatch.delenv(name, raising=False)


def asked(state="wheel"):
    """(version, requirements) as scikit-build-core is told."""
    provider = flavour.Provider()
    provider.build_state(state)
    return provider.dynamic_metadata({"version": "1.2"}, {})["version"], provider.get_requires_for_dynamic_metadata({})


def test_the_plain_flavour(monkeypatch):
    monkeypatch.setenv("LIGER_AOT_CUDA", "")
    assert asked() == ("1.2", ["nvidia-cuda-nvcc-cu12==12.9.86"])
    assert flavour.architectures("Triton 1, ptxas 12.9.86\n") == ["80", "90", "100f", "120f"]


FLAVOURS = {
    "12.6": ("1.2+cu126", "nvidia-cuda-nvcc-cu12==12.6.85", "80 90", 12000),
    "12.9": ("1.2+cu129", "nvidia-cuda-nvcc-cu12==12.9.86", "80 90 100f 120f", 12090),
    "13.0": ("1.2+cu130", "nvidia-cuda-nvcc==13.0.88", "80 90 100f 110f 120f", 13000),
}


@EVERY
def test_flavours(monkeypatch, cuda):
    version, requirement, archs, driver = FLAVOURS[cuda]
    ptxas = requirement.partition("==")[2]
    monkeypatch.setenv("LIGER_AOT_CUDA", cuda)
    assert asked() == (version, [requirement])
    assert asked("sdist") == ("1.2", [requirement]), "one source distribution serves all"
    assert flavour.architectures(f"Triton 1, ptxas {ptxas}") == archs.split()
    monkeypatch.setattr(aot, "ptxas_version", lambda: ptxas)
    assert max(aot.min_driver(arch) for arch in archs.split()) == driver


def test_other_architectures(monkeypatch):
    monkeypatch.setenv("LIGER_AOT_ARCHS", "75, 86;86")
    assert flavour.architectures("ptxas 12.9.86") == ["75", "86"]
    for arch, remedy in {"110f": r"LIGER_AOT_CUDA=13\.0 knows it \(make: CUDA=13\.0\)", "70": "no flavour knows it"}.items():
        monkeypatch.setenv("LIGER_AOT_ARCHS", arch)
        with pytest.raises(SystemExit, match=f"LIGER_AOT_ARCHS: ptxas 12.9.86 knows 75 80 .* 121f, got '{arch}'; {remedy}"):
            flavour.architectures("ptxas 12.9.86")


def test_the_oldest_architecture_is_what_a_flavour_assembles_for():
    known = {int(arch.rstrip("af")) for f in flavour.FLAVOURS.values() for arch in f.knows.split()}
    assert divmod(min(known), 10) == _runtime.OLDEST


def test_no_such_flavour(monkeypatch):
    monkeypatch.setenv("LIGER_AOT_CUDA", "12.8")
    with pytest.raises(SystemExit, match=r"LIGER_AOT_CUDA must be one of 12\.6, 12\.9, 13\.0, or unset .*, got '12\.8'"):
        asked()


def test_what_the_assembler_knows():
    text = subprocess.run([aot.ptxas(), "--help"], check=True, capture_output=True, text=True).stdout
    known = set(re.findall(r"'sm_(\w+)'", text))
    (ours,) = [f for f in flavour.FLAVOURS.values() if f.ptxas == aot.ptxas_version()]
    families = {n for n in known if int(n.rstrip("af")) // 10 in (7, 8, 9, 10, 12) and int(n.rstrip("af")) >= 75}
    assert families - set(ours.knows.split()) == {"101", "101a", "101f"}, "which CUDA 13 calls 110, and Triton too"
    assert set(ours.knows.split()) <= known
    for other in flavour.FLAVOURS.values():
        assert set(other.ships.split()) <= set(other.knows.split())


def pretend(folder, version="1.2", archs="80 90 100f 120f", named=None):
    """A wheel as far as an index and pip look at it."""
    path = folder / f"liger_aot-{named or version}-py3-none-any.whl"
    info = f"liger_aot-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for arch in archs.split():
            wheel.writestr(f"liger_aot/cubins/sm_{arch}.zip", os.urandom(64))
        metadata = f"Metadata-Version: 2.2\nName: liger-aot\nVersion: {version}\nRequires-Python: >=3.10\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "".join(f"{n},,\n" for n in wheel.namelist()))
    return path


def outside():
    """The environment outside the tests, in which Triton compiles."""
    return {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}


def pip(*args, python=sys.executable, **environment):
    command = [python, "-m", "pip", *args]
    return subprocess.run(command, env=outside() | environment, capture_output=True, text=True, cwd=ROOT.parent)


def test_the_index_offers_each_flavour_and_pip_installs_from_it(tmp_path):
    dist = tmp_path / "a folder" / "dist"
    dist.mkdir(parents=True)
    (dist / "whl").mkdir()
    (dist / "whl/cu999").mkdir()
    for version, archs in {"1.2": "80 90 100f 120f", "1.2+cu126": "80 90", "1.1+cu126": "80", "0.10": "80"}.items():
        pretend(dist, version, archs)
    index.write(dist)
    pages = sorted(str(p.relative_to(dist)) for p in dist.rglob("*.html"))
    assert pages == [f"whl/{f}/{p}index.html" for f in ("cu126", "plain") for p in ("", "liger-aot/")]
    assert not (dist / "whl/cu999").exists(), "what has no wheels any more"
    first = {page: (dist / page).read_bytes() for page in pages}
    index.write(dist)
    assert {page: (dist / page).read_bytes() for page in pages} == first

    wheel = dist / "liger_aot-1.2+cu126-py3-none-any.whl"
    text = (dist / "whl/cu126/liger-aot/index.html").read_text()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    address = f"../../../liger_aot-1.2%2Bcu126-py3-none-any.whl#sha256={digest}"
    assert f'<a href="{address}" data-requires-python="&gt;=3.10">{wheel.name}</a>' in text

    where = (dist / "whl/cu126").as_uri()
    command = "install", "--no-deps", "--isolated", "--no-cache-dir", "--index-url", where, "--target", tmp_path / "site"
    done = pip(*command, "liger-aot")
    assert "Successfully installed liger-aot-1.2+cu126" in done.stdout, done.stderr
    pretend(dist, "1.2+cu126", "80 90")
    refused = pip(*command, "--upgrade", "liger-aot")
    assert refused.returncode == 1
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in refused.stderr, "a wheel that changed after the index was written"


BAD_WHEELS = {
    "two architectures": (
        {"version": "1.10", "archs": "80 90"},
        r"holds \['80', '90'\], its flavour ships 80 90 100f 120f; build it without",
    ),
    "suffix": ({"version": "1.2+cu118"}, r"must end with nothing or one of cu126, cu129, cu130, plain, got \+cu118"),
    "name": ({"named": "1.3"}, r"is version 1\.2; build it again, its name says 1\.3"),
}


@pytest.mark.parametrize("fault", BAD_WHEELS)
def test_the_index_refuses(tmp_path, fault):
    pretend(tmp_path, "0.9+cu126", "80 90")
    pretend(tmp_path, "1.1")
    change, text = BAD_WHEELS[fault]
    pretend(tmp_path, **change)
    with pytest.raises(SystemExit, match=text):
        index.write(tmp_path)
    assert not (tmp_path / "whl").exists(), "nothing half-done"


def test_the_index_refuses_damaged_wheels_and_no_wheels(tmp_path):
    with pytest.raises(SystemExit, match=r"has no wheels of liger-aot; make some: make wheel CUDA=13\.0"):
        index.write(tmp_path)
    path = pretend(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(SystemExit, match=r"1\.2-py3-none-any\.whl is damaged \(.*\); build it again"):
        index.write(tmp_path)
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(SystemExit, match=r"is damaged: liger_aot/cubins/sm_80\.zip; build it again"):
        index.write(tmp_path)


# --- workflows


WORKFLOWS = {p.name: yaml.safe_load(p.read_text()) for p in sorted((ROOT / ".github/workflows").glob("*.yml"))}
STEPS = [
    (f"{name}: {job}: {step.get('name') or step.get('run') or step.get('uses')}", step)
    for name, workflow in WORKFLOWS.items()
    for job, about in workflow["jobs"].items()
    for step in about.get("steps", [])
]


def test_workflows_call_the_makefile():
    """No step repeats what a target does, and every target that is called is one; all that a release needs is called."""
    made = {name: re.findall(r"^make (\w+)", step.get("run", ""), re.M) for name, step in STEPS}
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split())
    called = {target for found in made.values() for target in found}
    assert called <= targets
    assert called >= {"lint", "test", "floor", "docs", "wheel", "sdist", "smoke", "slow", "index"}
    for name, step in STEPS:
        assert not re.search(r"\b(pip|pytest|ruff|sphinx-build|cmake|tools/)", step.get("run", "")), name
    for target in called:
        done = subprocess.run(["make", "--dry-run", target, "CUDA=13.0"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_what_smoke_runs_after_verify_and_info():
    command = ["make", "--no-print-directory", "--dry-run", "smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    code = shlex.split(done.stdout.splitlines()[-1])[-1]
    assert in_a_process(code).returncode == 0
    assert in_a_process(f"import triton; {code}").stderr.endswith("AssertionError\n")


def test_workflows_build_every_flavour():
    jobs = WORKFLOWS["wheels.yml"]["jobs"]
    assert [job["strategy"]["matrix"]["cuda"] for job in (jobs["wheel"], jobs["smoke"])] == [["", *flavour.FLAVOURS]] * 2
    (oldest,) = re.findall(r'^requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert jobs["smoke"]["strategy"]["matrix"]["python"][0] == oldest == f"3.{OLDEST}"
    tested = WORKFLOWS["ci.yml"]["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert tested[0] == "3.11", "the oldest that the packages pinned for the tests take"


def test_workflows_hold_together():
    """What a job needs and what it downloads is there; nothing but publishing may write."""
    for name, workflow in WORKFLOWS.items():
        assert workflow["permissions"] == {"contents": "read"}, name
        for about in workflow["jobs"].values():
            needs = about.get("needs", [])
            assert set([needs] if isinstance(needs, str) else needs) <= workflow["jobs"].keys()
            assert "permissions" not in about or name == "publish.yml"
            if "uses" in about:
                assert (ROOT / about["uses"]).is_file()
                called = WORKFLOWS[pathlib.PurePath(about["uses"]).name]
                assert "workflow_call" in called[True]
    publish = WORKFLOWS["publish.yml"]
    assert publish[True] == {"push": {"tags": ["v*"]}}, "YAML reads `on` as true"
    assert publish["jobs"]["ci"]["uses"].endswith("/ci.yml")
    assert publish["jobs"]["pypi"]["needs"] == ["ci", "wheels"], "nothing is published that lint and tests refuse"
    assert (publish["jobs"]["release"]["needs"], publish["jobs"]["pages"]["needs"]) == ("pypi", "release")
    assert publish["jobs"]["pypi"]["permissions"] == {"id-token": "write"}, "trusted publishing, without a token"
    uploaded = {step["with"]["name"] for _, step in STEPS if "upload-artifact@" in step.get("uses", "")}
    assert uploaded == {"docs", "wheel-${{ matrix.cuda || 'plain' }}", "sdist"}


# --- what is installed, and packs beside it


@pytest.fixture
def packs(tmp_path, monkeypatch):
    """Use a folder of packs of one's own, or what is there instead of one."""

    def use(folder):
        monkeypatch.setenv("LIGER_AOT_PACKS", str(folder))
        _runtime.open_pack.cache_clear()

    yield use
    monkeypatch.undo()
    _runtime.open_pack.cache_clear()


def test_a_pack_of_ones_own_is_found(tmp_path, packs, capsys):
    """As make pack would leave it: an architecture that is not shipped, and one instead of the package's own."""
    packs(tmp_path)
    for arch in "80", "86", "90":
        copy_pack(tmp_path, arch=arch)
    assert main(["info", "--arch", "8.9"]) == 0
    text = capsys.readouterr().out
    (line,) = re.findall("8.9            sm_86 \\(same major\\); (not .*)", text)
    assert {"not sm_80: same major", "not sm_90: runs on 9.x"} <= set(line.split("; "))
    assert f"{tmp_path / 'sm_90.zip'}\n{'':15}instead of {_runtime.FOLDER / 'sm_90.zip'}\n" in text
    assert main(["info", "--arch", "8.9", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["asked"]["pack"] == "sm_86"
    assert known["asked"]["fits"]["sm_90"] == "runs on 9.x"
    assert known["packs"]["sm_86"]["path"] == str(tmp_path / "sm_86.zip")
    assert main(["verify"]) == 0
    assert "sm_86: good: contract, hashes, CRCs, and every cubin's parameter table\n" in capsys.readouterr().out


def test_a_device_that_no_pack_serves(packs, tmp_path, capsys):
    packs(tmp_path)
    copy_pack(tmp_path, arch="80")
    assert main(["info", "--arch", "7.5"]) == 1
    text = capsys.readouterr().out
    assert "7.5            liger_aot: no kernels for compute capability 7.5. Packs:\n  sm_" in text
    assert "\n  sm_80: runs on 8.x\n" in text


@pytest.mark.parametrize(
    ("capability", "version", "status", "text"),
    [
        ((8, 6), 12020, 0, "cuda:0         a GPU, compute capability 8.6: sm_80 (same major); not sm_90: runs on 9.x\n"),
        (
            (9, 0),
            11080,
            1,
            "9.0: liger_aot: the NVIDIA driver serves CUDA 11.8, the sm_90 kernels need 12.0",
        ),
        (
            (7, 5),
            12020,
            1,
            "7.5: liger_aot: no kernels for compute capability 7.5. Packs:\n  sm_",
        ),
    ],
    ids=["served", "an old driver", "no pack"],
)
def test_which_pack_a_device_gets_and_why(packs, tmp_path, monkeypatch, capsys, capability, version, status, text):
    packs(tmp_path)
    paths = {"80": copy_pack(tmp_path, arch="80"), "90": _runtime.FOLDER / "sm_90.zip"}
    monkeypatch.setattr(_info, "driver", lambda: StubDriver(Stub(capability, version=version)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(_info, "pack_paths", lambda: paths)
    assert main(["info"]) == status
    said = capsys.readouterr().out
    assert text in said
    assert f"driver         serves CUDA {_runtime.version_text(version)}\n" in said
    assert main(["info", "--json"]) == status
    (about,) = json.loads(capsys.readouterr().out)["devices"]
    assert about["fits"].keys() == {"sm_80", "sm_90"}
    assert ("error" in about) == bool(status)


@pytest.mark.parametrize(
    ("devices", "built", "library", "status"),
    [(1, True, False, 1), (0, True, True, 1), (0, True, False, 0), (0, False, True, 0)],
    ids=["a device", "a driver", "none", "torch for the CPU"],
)
def test_a_driver_that_does_not_work_is_an_error_and_none_is_not(monkeypatch, capsys, devices, built, library, status):
    def driver():
        raise RuntimeError("cuInit: no device (CUDA driver error 100)")

    def load(name):
        if not library:
            raise OSError(name)

    monkeypatch.setattr(_info, "driver", driver)
    monkeypatch.setattr(_info.ctypes, "CDLL", load)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    assert main(["info"]) == status
    assert "driver         cuInit: no device (CUDA driver error 100)\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["info", "verify"])
def test_an_installed_pack_that_is_missing_is_named(monkeypatch, capsys, command):
    lost = _runtime.FOLDER.resolve() / "sm_61.zip"
    monkeypatch.setattr(_info, "recorded", lambda: {lost: b"", pathlib.Path("/of/another/installation/sm_61.zip"): b""})
    assert main([command]) == 1
    said = capsys.readouterr().out
    assert said.count(f"{lost}: was installed and is missing; install liger-aot again") == 1
    assert "another" not in said


@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_folder_of_packs_that_is_none_is_named(packs, tmp_path, command, capsys):
    packs(tmp_path / "nothing")
    assert main([command]) == 1
    said = capsys.readouterr().out
    assert f"must be a folder of packs, got {tmp_path / 'nothing'}, which is none; unset it" in said
    assert main([command, "--json"]) == 1
    assert "LIGER_AOT_PACKS" in json.dumps(json.loads(capsys.readouterr().out))
    with pytest.raises(NotImplementedError, match=f"\n  LIGER_AOT_PACKS: {tmp_path / 'nothing'} is no folder\nRemedy: "):
        _runtime.select_pack((7, 5))


def test_an_installation_without_packs_is_not_well(tmp_path, monkeypatch, capsys):
    for module in (_info, _verify):
        monkeypatch.setattr(module, "pack_paths", dict)
    monkeypatch.setattr(_verify, "FOLDER", tmp_path)
    assert main(["info"]) == main(["verify"]) == 1
    said = capsys.readouterr().out
    assert f"{'packs':14} none: installed without kernels, only CPU tensors are served\n" in said
    assert said.endswith("no packs: liger-aot was installed without kernels; only CPU tensors are served\n")
    assert main(["info", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["packs"] == {}
    assert main(["verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {}


def test_verify_holds_packs_to_what_was_installed(tmp_path, packs, monkeypatch):
    class Installed(importlib.metadata.PackagePath):
        def locate(self):
            return tmp_path / self.name

    path = copy_pack(tmp_path)
    value = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")
    installed = Installed("liger_aot/cubins/sm_90.zip")
    installed.hash = importlib.metadata.FileHash(f"sha256={value}")
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [installed] if name == "liger-aot" else None)
    _verify.recorded.cache_clear()
    try:
        assert _verify.problems(path) == []
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = b"harmless"
        _runtime.open_pack.cache_clear()
        assert _verify.problems(path) == [f"{path}: is not the file that was installed; install liger-aot again"]
    finally:
        _verify.recorded.cache_clear()


QUIET = """
import os, sys
written = []
def watch(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(str(args[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "tempfile.mkstemp", "tempfile.mkdtemp"):
        written.append(event)
import torch
sys.dont_write_bytecode = True
sys.addaudithook(watch)
import liger_aot
from liger_aot.__main__ import main
x = torch.ones(2, 8, requires_grad=True)
torch.ops.liger.rms_norm(x).sum().backward()
status = main(["info"]) + main(["verify"])
from stub import stubbed
with stubbed() as stub:
    liger_aot.preload()
    torch.ops.liger.rms_norm(x).sum().backward()
print("launched:", *(launch.kernel for launch in stub.launches))
print("written:", written, "status:", status)
"""


def test_nothing_is_written():
    """So that a read-only or shared file system serves, and processes that start at once are not in each other's way."""
    done = in_a_process(QUIET)
    assert done.stdout.endswith("launched: rms_norm_fwd rms_norm_bwd\nwritten: [] status: 0\n"), done.stdout + done.stderr


ONE_OF_EIGHT = """
import torch, liger_aot
from liger_aot.__main__ import main
from stub import stubbed
main(["verify", "--json"])
with stubbed() as stub:
    liger_aot.preload()
    torch.ops.liger.rms_norm(torch.ones(2, 8))
print("", *(launch.kernel for launch in stub.launches), "", sep="\\n")
"""


@pytest.mark.slow
def test_eight_processes_at_once():
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        ended = [(done.stdout, done.stderr, done.returncode) for done in pool.map(in_a_process, [ONE_OF_EIGHT] * 8)]
    assert ended == [ended[0]] * 8
    verified, launched, _ = ended[0][0].split("\n\n")
    assert json.loads(verified) == {f"sm_{arch}": [] for arch in _runtime.pack_paths()}
    assert launched == "rms_norm_fwd"


# --- wheels that are built


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
@pytest.mark.parametrize("cuda", [*flavour.FLAVOURS])
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


OLDEST = 10
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
