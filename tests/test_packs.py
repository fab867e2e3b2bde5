"""Packs that are installed and packs of one's own: which one a device gets, and what info and verify say of them."""

import base64
import concurrent.futures
import hashlib
import importlib.metadata
import json
import pathlib
import re
import zipfile

import pytest
import torch
from test_runtime import in_a_process

from liger_aot import _info
from liger_aot import _runtime
from liger_aot import _verify
from liger_aot.__main__ import main

from stub import Stub
from stub import StubDriver
from stub import copy_pack


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
