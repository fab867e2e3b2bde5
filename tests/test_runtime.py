"""The launcher over the stub: what reaches the driver, which pack and which variant are chosen, and what is refused how."""

import json
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
import zipfile

import pytest
import torch

import liger_aot
from liger_aot import _info
from liger_aot import _op
from liger_aot import _runtime
from liger_aot import _verify
from liger_aot.__main__ import main

from stub import CONTEXT
from stub import Stub
from stub import StubDriver
from stub import copy_pack
from stub import stubbed

kernels = _runtime.kernels
rms_norm = torch.ops.liger.rms_norm.default
SUM = {"ROWS": 128, "BLOCK": 32}


@pytest.fixture
def stub():
    with stubbed() as stub:
        yield stub


@pytest.fixture
def packs(tmp_path, monkeypatch):
    """A folder whose packs come before the package's own."""
    monkeypatch.setenv("LIGER_AOT_PACKS", str(tmp_path))
    return tmp_path


class Pointer:
    """A tensor, as far as a launcher looks at it."""

    is_cuda, is_meta = True, False

    def __init__(self, address, dtype=torch.float32, index=0):
        self.address, self.dtype, self.index = address, dtype, index

    def data_ptr(self):
        return self.address

    def get_device(self):
        return self.index


def sum_up(partial=None, out=None, rows=3, n=64, grid=(1,), constants=SUM):
    tensors = [Pointer(0x10000) if t is None else t for t in (partial, out)]
    kernels.column_sum[grid](*tensors, rows, n, **constants)


def test_the_kernel_reads_what_was_passed(stub):
    x, w = torch.randn(9, 300)[2:, 3:260], torch.randn(257)
    y = rms_norm(x, w, 1e-6, offset=0.5, casting="llama")
    (launch,) = stub.launches
    assert launch.cubin == "rms_norm_fwd-fp32-fp32-fp32-fp32-ROWS2-BLOCK1024-LOOPFalse-any.cubin"
    assert (launch.grid, launch.threads) == ((4, 1, 1), 128)
    rstd = launch.values.pop("rstd")
    eps = torch.tensor(1e-6, dtype=torch.float32).item()
    scalars = {"x_stride": 300, "rows": 7, "n": 257, "eps": eps, "offset": 0.5, "has_weight": 1, "cast": 1}
    pointers = {"x": x.data_ptr(), "weight": w.data_ptr(), "y": y.data_ptr(), "rstd": rstd}
    assert launch.values == pointers | scalars
    assert list(launch.values) == [name for name, _ in launch.pack.parameters("rms_norm_fwd")]


def test_two_threads_at_once(stub):
    """Each has its own arguments: both have packed theirs when the first is read."""
    sum_up()
    barrier = threading.Barrier(2, timeout=20)
    stub.launches.clear()
    stub.before_launch = barrier.wait

    def work(n):
        stub.thread.context = CONTEXT
        for rows in range(1, 51):
            sum_up(rows=rows, n=n)

    threads = [threading.Thread(target=work, args=[n]) for n in (64, 128)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = {launch.thread: [] for launch in stub.launches}
    for launch in stub.launches:
        seen[launch.thread].append((launch.values["n"], launch.values["rows"]))
    assert sorted(seen.values()) == [[(n, rows) for rows in range(1, 51)] for n in (64, 128)]


def test_two_threads_load_once(stub):
    barrier = threading.Barrier(4, timeout=20)

    def work():
        stub.thread.context = CONTEXT
        barrier.wait()
        sum_up()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stub.launches) == 4
    assert len(stub.called("cuLibraryLoadData")) == 1


def test_each_assumption_of_every_aligned_variant_is_looked_at(stub):
    pack = _runtime.open_pack(_runtime.pack_paths()["90"])
    for kernel in pack.manifest["kernels"]:
        violate(stub, pack, kernel)


def violate(stub, pack, kernel):
    parameters = pack.parameters(kernel)
    assumed = [n for n, (_, type_) in enumerate(parameters) if type_.startswith("*") or type_.endswith(":16")]
    for variant in pack.table(kernel).values():
        if not variant.aligned:
            continue
        given = iter(variant.dtypes)
        good = [Pointer(0x10000, next(given)) if type_.startswith("*") else 32 for _, type_ in parameters]
        kernels.__getattr__(kernel)[(1,)](*good, **variant.constants)
        assert stub.launches[-1].cubin == variant.cubin
        for n in assumed:
            for off in (1, 2, 4, 8):
                bad = list(good)
                bad[n] = Pointer(0x10000 + off, good[n].dtype) if isinstance(good[n], Pointer) else 32 + off
                kernels.__getattr__(kernel)[(1,)](*bad, **variant.constants)
                assert stub.launches[-1].cubin == variant.cubin.replace("-aligned", "-any"), parameters[n]
        stub.launches.clear()


def test_what_is_not_launched(stub):
    for launches in (0, 1):  # before the first launch, and after it
        assert len(stub.launches) == launches
        before = len(stub.calls)
        sum_up(grid=(0,))
        sum_up(grid=(3, 0))
        kernels.column_sum[(1,)](torch.empty(2, 64, device="meta"), torch.empty(64, device="meta"), 2, 64, **SUM)
        assert len(stub.calls) == before
        sum_up(grid=(3, 2))
    assert stub.launches[0].grid == (3, 2, 1)


def test_tensors_in_host_memory_are_refused():
    x = torch.ones(64)
    with pytest.raises(ValueError, match="column_sum: tensors must be on a CUDA device, got cpu"):
        kernels.column_sum[(1,)](x, x, 1, 64, **SUM)


REMEDY = re.escape(" must be an integer below 2**31 (split the tensor, or make it contiguous), got ")


@pytest.mark.parametrize(("name", "value"), [("rows", 2**31), ("n", 2**31), ("rows", -(2**31) - 1), ("n", 2**40)])
def test_sizes_beyond_int32_are_refused_by_name(stub, name, value):
    sum_up(**{name: 2**31 - 2**15})
    with pytest.raises(ValueError, match=f"^column_sum: {name}{REMEDY}{value}$"):
        sum_up(**{name: value})
    assert len(stub.launches) == 1


@pytest.mark.parametrize("value", [2**31 - 2**15 + 1, 2**31 - 1])
@pytest.mark.parametrize("name", ["rows", "n"])
def test_what_is_walked_over_ends_a_step_before_int32(stub, name, value):
    """A kernel's loop adds its step, of rows or columns of a tile, once more than it goes round."""
    text = rf"^column_sum: {name} must be an integer up to 2\*\*31 - 2\*\*15 \(split the tensor\), got {value}$"
    with pytest.raises(ValueError, match=text):
        sum_up(**{name: value})
    assert not stub.launches


def test_strides_beyond_int32_are_refused_by_name(stub, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    x = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((2, 64), (2**31, 1))  # memory that is never touched
    with pytest.raises(ValueError, match=f"^rms_norm_fwd: x_stride{REMEDY}{2**31}$"):
        rms_norm(x, None, 1e-6)


def test_the_number_of_arguments(stub):
    with pytest.raises(TypeError, match=r"^column_sum\(\) takes 5 positional arguments but 6 "):
        kernels.column_sum[(1,)](Pointer(0), Pointer(0), 1, 2, 3, **SUM)


REFUSALS = [
    (
        {"out": Pointer(0, torch.float64)},
        r"column_sum: no variant in sm_90.zip for aligned pointers, float32, float64, 128, 32\.",
    ),
    (
        {"n": 65, "constants": {"ROWS": 7, "BLOCK": 32}},
        r"column_sum: no variant in sm_90.zip for any pointers, float32, .* 7, 32\.",
    ),
]


@pytest.mark.parametrize(("given", "text"), REFUSALS, ids=["dtype", "constant"])
def test_a_variant_that_was_not_built_is_refused(stub, given, text):
    with pytest.raises(NotImplementedError, match=text) as error:
        sum_up(**given)
    table = _runtime.open_pack(_runtime.pack_paths()["90"]).table("column_sum")
    rejected = re.findall(r"^  (\d+) x for ", str(error.value), re.M)
    assert sum(map(int, rejected)) == len(table), "each candidate has a reason"
    assert "Remedy: cast the inputs to a built combination, or declare the variant in csrc_triton" in str(error.value)
    assert not stub.called("cuLibraryLoadData")


def test_a_kernel_that_was_not_built_is_refused(stub):
    with pytest.raises(NotImplementedError, match=r"nonsense: not in sm_90.zip, which holds .*column_sum"):
        kernels.nonsense[(1,)](Pointer(0))


SHIPPED = "80", "90", "100f", "120f"
CHOICES = [
    *(((8, minor), SHIPPED, "80") for minor in (0, 6, 7, 9)),
    ((9, 0), SHIPPED, "90"),
    *(((10, minor), SHIPPED, "100f") for minor in (0, 3)),
    *(((12, minor), SHIPPED, "120f") for minor in (0, 1)),
    ((8, 6), ("80", "86"), "86"),
    ((8, 9), ("80", "86"), "86"),
    ((8, 0), ("80", "86"), "80"),
    ((9, 0), ("80", "90a"), "90a"),
    ((10, 3), ("100", "100f", "103f"), "103f"),
    ((10, 3), ("100", "100f"), "100f"),
    ((7, 5), SHIPPED, {"80": "runs on 8.x", "90": "runs on 9.x", "100f": "runs on 10.x", "120f": "runs on 12.x"}),
    ((7, 0), SHIPPED, {"80": "runs on 8.x"}),
    ((11, 0), SHIPPED, {"100f": "runs on 10.x"}),
    ((10, 3), ("100a",), {"100a": "runs on 10.0 alone"}),
    ((10, 0), ("103f",), {"103f": "needs 10.3 or a newer minor version"}),
    ((8, 0), ("86",), {"86": "needs 8.6 or a newer minor version"}),
    ((9, 0), (), {}),
]


@pytest.mark.parametrize(("capability", "built", "expected"), CHOICES, ids=str)
def test_which_pack_serves_which_device(monkeypatch, capability, built, expected):
    monkeypatch.setattr(_runtime, "pack_paths", lambda: {arch: arch for arch in built})
    monkeypatch.setattr(_runtime, "open_pack", lambda path: path)
    if isinstance(expected, str):
        assert _runtime.select_pack(capability) == expected
        return
    with pytest.raises(NotImplementedError) as error:
        _runtime.select_pack(capability)
    text = str(error.value)
    assert f"no kernels for compute capability {capability[0]}.{capability[1]}. Packs:" in text
    if capability < (7, 5):
        assert "\nRemedy: none: kernels can be built for 7.5 and newer; unbind" in text
        assert "make pack" not in text
    else:
        assert "\nRemedy: install the wheel for another CUDA, where that has them (docs/wheels.md), or build a pack" in text
        assert f"make pack ARCH={capability[0]}{capability[1]} (or a wheel with LIGER_AOT_ARCHS), and name its folder" in text
        assert "LIGER_AOT_PACKS" in text
    assert all(f"\n  sm_{arch}: {why}" in text for arch, why in expected.items())
    assert built or "Packs: none" in text


def test_a_device_without_a_pack_is_refused_by_every_call():
    with stubbed(capability=(7, 5)) as stub:
        for _ in range(2):
            with pytest.raises(NotImplementedError, match=r"no kernels for compute capability 7\.5"):
                rms_norm(torch.ones(2, 64), None, 1e-6)
    assert not stub.launches


def test_the_remedy_serves_the_process_that_was_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("LIGER_AOT_PACKS", raising=False)
    with stubbed(capability=(7, 5)) as stub:
        with pytest.raises(NotImplementedError, match="name its folder in LIGER_AOT_PACKS"):
            sum_up()
        copy_pack(tmp_path, arch="75")
        monkeypatch.setenv("LIGER_AOT_PACKS", str(tmp_path))
        sum_up()
    assert len(stub.launches) == 1


def test_minor_versions_share_a_pack(packs):
    copy_pack(packs, arch="80")
    with stubbed(capability=(8, 6), shared=99 * 1024) as stub:
        sum_up()
        assert kernels.launcher.at(0).pack.arch == "80"
    assert len(stub.launches) == 1


def test_a_driver_that_is_too_old_is_refused(packs):
    copy_pack(packs, lambda manifest, entries: manifest.update(min_driver=12090))
    text = "serves CUDA 12.8, the sm_90 kernels need 12.9 or newer; update the driver, or install the wheel for an older CUDA"
    with stubbed(version=12080), pytest.raises(RuntimeError, match=re.escape(text)):
        sum_up()
    with stubbed(version=12090) as stub:
        sum_up()
    assert len(stub.launches) == 1


def need(shared):
    def change(manifest, entries):
        table = json.loads(entries["column_sum.json"])
        for row in table["variants"]:
            row["shared"] = shared
        entries["column_sum.json"] = json.dumps(table).encode()

    return change


def test_shared_memory_is_opted_in_once_and_refused_where_there_is_less(packs):
    copy_pack(packs, need(100_000))
    with stubbed() as stub:
        sum_up()
        sum_up()
    assert [launch.shared for launch in stub.launches] == [100_000] * 2
    assert [args[:2] + args[3:] for args in stub.called("cuKernelSetAttribute")] == [(8, 100_000, 0)]
    with (
        stubbed(shared=99_999) as stub,
        pytest.raises(NotImplementedError, match="needs 100000 B of shared memory, the device has 99999"),
    ):
        sum_up()
    assert not stub.called("cuLibraryLoadData")
    with stubbed(shared=99_999):
        assert liger_aot.preload("column_sum") == 0


def test_up_to_48_kib_need_no_opting_in(packs):
    copy_pack(packs, need(48 * 1024))
    with stubbed() as stub:
        sum_up()
    assert len(stub.launches) == 1
    assert not stub.called("cuKernelSetAttribute")


def set_to(**changes):
    return lambda manifest, entries: manifest.update(changes)


OTHERS = [
    (
        set_to(contract="0" * 64, version="0.0.9"),
        r"was built for liger-aot 0\.0\.9 \(contract 000000000000\), this is .* \(contract",
    ),
    (
        set_to(schema=99),
        r"was built for liger-aot .*; install liger-aot again, or build the pack anew from the sources of this version",
    ),
    (lambda manifest, entries: manifest.pop("contract"), r"was built for liger-aot .* \(contract None\)"),
    (set_to(arch="80"), r"holds kernels for sm_80; name it sm_80\.zip"),
]


@pytest.mark.parametrize(("change", "text"), OTHERS, ids=["contract", "schema", "no contract", "architecture"])
def test_a_pack_of_something_else_is_refused(packs, change, text):
    path = copy_pack(packs, change)
    with stubbed() as stub, pytest.raises(RuntimeError, match=text):
        sum_up()
    assert not stub.called("cuLibraryLoadData")
    assert re.search(text, _verify.problems(path)[0])
    assert main(["verify"]) == main(["info"]) == 1


MANIFESTS = {
    "a list": (lambda known: [known], r"a JSON object is needed, got a list"),
    "no JSON": (lambda known: None, r"Expecting value: .*"),
    "no driver": (
        lambda known: {k: v for k, v in known.items() if k != "min_driver"},
        "min_driver: missing, empty or of another type",
    ),
    "numbers": (lambda known: known | {"arch": 90, "ptxas": 12}, "arch, ptxas: missing, empty or of another type"),
}


@pytest.mark.parametrize("fault", MANIFESTS)
def test_a_manifest_that_is_none_is_refused(packs, capsys, fault):
    """Whose bytes are as they were written: no checksum says so."""
    change, why = MANIFESTS[fault]
    path = copy_pack(packs)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    wrong = change(json.loads(entries["manifest.json"]))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (entries | {"manifest.json": json.dumps(wrong) if wrong else ""}).items():
            archive.writestr(name, data)
    text = rf"{re.escape(str(path))} is damaged: manifest\.json cannot be read \({why}\); make the pack again, or unset LIGER"
    with stubbed() as stub, pytest.raises(RuntimeError, match=text):
        sum_up()
    assert not stub.called("cuLibraryLoadData")
    for line in ("info", "info --json", "verify", "verify --json"):
        assert main(line.split()) == 1
        assert re.search(text, capsys.readouterr().out)


def test_what_is_read_of_a_manifest_is_what_the_build_writes():
    manifest = json.loads(_runtime.open_pack(_runtime.pack_paths()["90"]).read("manifest.json"))
    assert {*_runtime.MANIFEST, "schema", "contract"} == manifest.keys() >= {*_info.MANIFEST}
    known = json.loads(_runtime.open_pack(_runtime.pack_paths()["90"]).read("column_sum.json"))
    assert known.keys() == {*_runtime.ENTRY, "name"}
    assert {key for row in known["variants"] for key in row} == _runtime.VARIANT.keys()


def of_each(**fields):
    """Every variant with these fields, and without those that are None."""

    def change(known):
        rows = [{k: v for k, v in (row | fields).items() if v is not None} for row in known["variants"]]
        return known | {"variants": rows}

    return change


ANOTHER = "missing, empty or of another type"
ENTRIES = {
    "a list": (lambda known: [known], "a JSON object is needed, got a list"),
    "no parameters": (lambda known: {"variants": known["variants"]}, f"parameters: {ANOTHER}"),
    "no variant": (lambda known: known | {"variants": []}, f"variants: {ANOTHER}"),
    "names alone": (lambda known: known | {"parameters": ["partial", "out"]}, "ValueError: .*"),
    "another type": (lambda known: known | {"parameters": [["partial", "*fp32"], ["n", "i8"]]}, "KeyError: 'i8'"),
    "another dtype": (of_each(dtypes=["fp32", "fp8"]), "KeyError: 'fp8'"),
    "one field more": (of_each(clusters=2), "TypeError: .*'clusters'"),
    "lists": (lambda known: known | {"variants": [[*row.values()] for row in known["variants"]]}, "AttributeError: .*"),
} | {f"no {field}": (of_each(**{field: None}), f"{field}: {ANOTHER}") for field in _runtime.VARIANT}


@pytest.mark.parametrize("fault", ENTRIES)
def test_an_entry_that_is_none_is_refused(packs, capsys, fault):
    change, why = ENTRIES[fault]

    def rewrite(manifest, entries):
        entries["column_sum.json"] = json.dumps(change(json.loads(entries["column_sum.json"]))).encode()

    path = copy_pack(packs, rewrite)
    text = rf"{re.escape(str(path))} is damaged: column_sum\.json cannot be read \({why}\); make the pack again, or unset LIGER"
    with stubbed() as stub:
        for call in (sum_up, sum_up, liger_aot.preload):
            with pytest.raises(RuntimeError, match=text):
                call()
    assert not stub.called("cuLibraryLoadData")
    assert main(["verify"]) == 1
    assert re.search(text, capsys.readouterr().out)


DAMAGES = {
    "truncated": lambda data: data[:-100],
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "no zip": lambda data: b"\0" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pack_is_refused(packs, damage):
    path = copy_pack(packs)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with (
        stubbed(),
        pytest.raises(RuntimeError, match=r"sm_90\.zip is damaged: .*; make the pack again, or unset LIGER"),
    ):
        sum_up()


def test_whose_pack_is_damaged_is_said(packs, monkeypatch, capsys):
    """The package's own, which somebody's in LIGER_AOT_PACKS stands in for; verify reads both."""
    whole = copy_pack(packs)
    (own := packs / "installed").mkdir()
    (own / whole.name).write_bytes(whole.read_bytes()[:-100])
    monkeypatch.setattr(_runtime, "FOLDER", own)
    monkeypatch.setattr(_verify, "FOLDER", own)
    assert main(["verify"]) == 1
    text = capsys.readouterr().out
    assert f"sm_90: {_verify.GOOD}\n" in text
    assert re.search(rf"{own / whole.name}: bad\n.* is damaged: .*; install liger-aot again\n", text)


def test_a_cubin_with_one_wrong_bit_is_never_loaded(packs):
    path = copy_pack(packs)
    info = _runtime.open_pack(path).archive.getinfo("column_sum-fp32-fp32-ROWS128-BLOCK32-aligned.cubin")
    data = bytearray(path.read_bytes())
    data[info.header_offset + 30 + len(info.filename) + info.compress_size // 2] ^= 1
    path.write_bytes(data)
    _runtime.open_pack.cache_clear()
    with stubbed() as stub:
        with pytest.raises(
            RuntimeError, match=r"sm_90\.zip is damaged: column_sum-fp32-fp32-ROWS128-BLOCK32-aligned\.cubin cannot be"
        ):
            sum_up()
        sum_up(n=65)
    assert len(stub.called("cuLibraryLoadData")) == 1, "the other variants serve"
    assert main(["verify"]) == 1


def test_any_wrong_byte_is_noticed_or_does_not_matter(packs):
    path = copy_pack(packs)
    data, entries = path.read_bytes(), {i.filename: i.CRC for i in _runtime.open_pack(path).archive.infolist()}
    noticed, rng = 0, random.Random(0)
    for position in rng.sample(range(len(data)), 200):
        path.write_bytes(data[:position] + bytes([data[position] ^ rng.randrange(1, 256)]) + data[position + 1 :])
        _runtime.open_pack.cache_clear()
        if _verify.problems(path):
            noticed += 1
        else:
            assert {i.filename: i.CRC for i in _runtime.open_pack(path).archive.infolist()} == entries
    assert noticed > 150
    _runtime.open_pack.cache_clear()


def test_preload(stub):
    pack = _runtime.open_pack(_runtime.pack_paths()["90"])
    assert liger_aot.preload("column_sum") == len(pack.table("column_sum"))
    assert liger_aot.preload() == pack.manifest["variants"] == len(stub.called("cuLibraryLoadData"))
    assert liger_aot.preload(device="cuda:0") == pack.manifest["variants"] == len(stub.loaded)
    stub.capturing = True
    stub.thread.mode = 0
    before = len(stub.calls)
    x = torch.randn(3, 64, requires_grad=True)
    rms_norm(x, torch.randn(64, requires_grad=True), 1e-6).sum().backward()
    assert {name for name, _ in stub.calls[before:]} == {"cuLaunchKernel"}
    assert liger_aot.preload("column_sum", device=1) == 6
    assert (stub.context, {context for _, context in stub.loaded}) == (CONTEXT, {CONTEXT, CONTEXT + 1})
    with pytest.raises(ValueError, match=r"preload: names must be of kernels, .*, got rms_norm; liger_aot\.explain says which"):
        liger_aot.preload("column_sum", "rms_norm")
    with pytest.raises(ValueError, match="preload: device must be a CUDA device, got cpu"):
        liger_aot.preload(device="cpu")


def in_a_process(code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


FORK = """
import os, torch
from liger_aot import _runtime
from stub import Launcher, Stub
from test_runtime import sum_up
_runtime.kernels.launcher = Launcher(Stub())
_runtime.select_pack((9, 0))
{before}
child = os.fork()
if not child:
    print(_runtime.open_pack.cache_info().currsize, "packs are shared", flush=True)
    try:
        sum_up()
    except RuntimeError as error:
        print(error, flush=True)
    else:
        print("launched", flush=True)
    os._exit(0)
os.waitpid(child, 0)
sum_up()
"""


def test_fork():
    after = in_a_process(FORK.format(before="sum_up()"))
    refusal = "liger_aot: this process was forked after CUDA was used; start it with the spawn method"
    assert after.stdout == f"0 packs are shared\n{refusal}\n", after.stderr
    before = in_a_process(FORK.format(before=""))
    assert before.stdout == "0 packs are shared\nlaunched\n", before.stderr


def test_another_library_of_that_name():
    code = "import torch; taken = torch.library.Library('liger', 'DEF'); import liger_aot"
    done = in_a_process(code)
    assert done.returncode == 1
    assert (
        "ImportError: liger_aot: another library in this process has registered the operator namespace `liger` already"
        in done.stderr
    )


def test_explain_says_what_is_launched():
    x, w = torch.randn(9, 300, requires_grad=True), torch.randn(300, requires_grad=True)
    trace = liger_aot.explain("rms_norm", x, w, arch="90", casting="gemma")
    with stubbed(multiprocessors=trace.device.multiprocessors) as stub:
        rms_norm(x, w, casting="gemma").sum().backward()
    assert [t.variant.cubin for t in trace.launches] == [launch.cubin for launch in stub.launches]
    assert [(*t.grid, 1, 1)[:3] for t in trace.launches] == [launch.grid for launch in stub.launches]
    x.grad = w.grad = None
    again = liger_aot.explain(liger_aot.rms_norm, x, (300,), w, arch="9.0", casting="gemma")
    assert again.rows == trace.rows
    assert x.grad is None, "explaining leaves no gradients behind"
    chosen = [row for row in trace.rows if row["rejected"] is None]
    assert [row["cubin"] for row in chosen] == [launch.cubin for launch in stub.launches]
    pack = _runtime.open_pack(_runtime.pack_paths()["90"])
    assert len(trace.rows) == sum(len(pack.table(launch.kernel)) for launch in stub.launches)
    text = str(trace)
    assert text.startswith("rms_norm on compute capability 9.0, as if it had")
    assert "pack sm_90: exact; not sm_80: runs on 8.x" in text or "pack sm_90: exact" in text
    assert all(launch.cubin in text for launch in stub.launches)


def test_explain_says_what_is_missing():
    x = torch.ones(2, 64)
    with pytest.raises(ValueError, match="explain: for CPU tensors, arch must name a GPU architecture like '90', got None"):
        liger_aot.explain("rms_norm", x)
    with pytest.raises(ValueError, match=r"arch must be a GPU architecture like '90', '100f' or '8\.6', got 'hopper'"):
        liger_aot.explain("rms_norm", x, arch="hopper")
    with pytest.raises(NotImplementedError, match=r"no kernels for compute capability 7\.5"):
        liger_aot.explain("rms_norm", x, arch="75")
    for name in "foo", "liger::rms_norm":
        text = f"explain: op must be an operator of torch.ops.liger, like {', '.join(sorted(_op.PUBLIC))}, got '{name}'"
        with pytest.raises(ValueError, match=re.escape(text)):
            liger_aot.explain(name, x, arch="90")
    assert len(liger_aot.explain("rms_norm_fwd", x, None, 1e-6, 0.0, False, arch="90").launches) == 1

    def unbuilt(x):
        kernels.column_sum[(1,)](x, x, 1, 64, ROWS=1, BLOCK=1)

    assert str(liger_aot.explain("rms_norm", x[:0], arch="90")).endswith("\nlaunches nothing")
    trace = liger_aot.explain(lambda x: unbuilt(x), x, arch="90")
    assert trace.launches[0].variant is None
    assert "NO VARIANT" in str(trace)


def test_command_line(capsys, packs):
    assert main(["info"]) == 0
    assert "sm_90" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["versions"]["liger_aot"] == liger_aot.__version__
    assert known["packs"]["sm_90"]["variants"] > 0
    assert main(["verify"]) == 0
    assert "sm_90: good" in capsys.readouterr().out
    explain = ["explain", "rms_norm", "8x64", "64:float32", "--arch", "90", "--set", "eps=1e-6", "casting=llama", "--backward"]
    assert main(explain) == 0
    assert "rms_norm_bwd-" in capsys.readouterr().out
    assert main([*explain, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arch"] == "90"
    assert main(["explain", "rms_norm", "8x64", "--arch", "75"]) == 1
    assert "no kernels for compute capability 7.5" in capsys.readouterr().err
    assert main(["explain", "rms_norm", "8x64", "--arch", "90", "--set", "epsilon=1"]) == 2
    assert "unknown ['epsilon']" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["", "nonsense", "explain", "explain rms_norm 8xx8 --arch 90", "explain rms_norm 8:half2", "info -x"]
)
def test_bad_command_lines(line, capsys):
    with pytest.raises(SystemExit) as error:
        main(line.split())
    assert error.value.code == 2


def test_info_says_which_pack_serves_a_device(monkeypatch, packs):
    copy_pack(packs, arch="80")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    about = _info.about_device(StubDriver(Stub((8, 6))), 0)
    assert about == {"name": "a GPU", "capability": "8.6", "pack": "sm_80", "fit": "same major"}
    about = _info.about_device(StubDriver(Stub((7, 5))), 0)
    assert about["pack"] is None
    assert "no kernels for compute capability 7.5" in about["error"]
    about = _info.about_device(StubDriver(Stub(version=11080)), 0)
    assert "the NVIDIA driver serves CUDA 11.8, the sm_90 kernels need 12.0 or newer" in about["error"]


def test_verify_holds_cubins_to_the_launcher(packs, capsys):
    def change(manifest, entries):
        table = json.loads(entries["column_sum.json"])
        table["parameters"][3][1] = "i64"
        entries["column_sum.json"] = json.dumps(table).encode()

    path = copy_pack(packs, change)
    assert len(_verify.problems(path)) == len(_runtime.open_pack(path).table("column_sum"))
    assert (
        "takes (offset, size) [(0, 8), (8, 8), (16, 4), (20, 4), (24, 8), (32, 8)], the launcher passes"
        in _verify.problems(path)[0]
    )
    _runtime.open_pack.cache_clear()
    path = copy_pack(
        packs, lambda manifest, entries: entries.update({n: b"\x7fELF" for n in entries if n.endswith("any.cubin")})
    )
    assert ["any.cubin takes (offset, size) None" in problem for problem in _verify.problems(path)] == [True] * 3
    _runtime.open_pack.cache_clear()
    path = copy_pack(packs)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("another.cubin", b"more")
    assert _verify.problems(path) == [f"{path}: its entries are not those that its manifest was written for"]
    _runtime.open_pack.cache_clear()


def test_as_a_program(tmp_path):
    command = [sys.executable, "-m", "liger_aot", "verify", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {f"sm_{arch}": [] for arch in _runtime.pack_paths()}
