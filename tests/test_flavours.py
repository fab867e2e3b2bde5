"""The wheel's flavours, and the index that offers them."""

import hashlib
import os
import re
import subprocess
import zipfile

import pytest

from liger_aot import _runtime

from repository import FLAVOURS
from repository import pip
from repository import tool
from stub import machinery

pytestmark = pytest.mark.usefixtures("no_flavour")
aot, flavour, index = machinery("_aot"), tool("flavour"), tool("index")


def asked(state="wheel"):
    """(version, requirements) as scikit-build-core is told."""
    provider = flavour.Provider()
    provider.build_state(state)
    return provider.dynamic_metadata({"version": "1.2"}, {})["version"], provider.get_requires_for_dynamic_metadata({})


def test_the_plain_flavour(monkeypatch):
    monkeypatch.setenv("LIGER_AOT_CUDA", "")
    assert asked() == ("1.2", ["nvidia-cuda-nvcc-cu12==12.9.86"])
    assert flavour.architectures("Triton 1, ptxas 12.9.86\n") == ["80", "90", "100f", "120f"]


@pytest.mark.parametrize("cuda", flavour.FLAVOURS)
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
