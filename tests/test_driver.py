"""Both back ends over the stub: ctypes by way of C function pointers, cuda.bindings with its own types."""

import ctypes
import re
import sys
import threading
from ctypes import POINTER
from ctypes import c_char_p
from ctypes import c_int
from ctypes import c_uint
from ctypes import c_void_p

import pytest
import torch

from liger_aot import _driver
from liger_aot import _runtime

from stub import CONTEXT
from stub import RELAXED_CAPTURE
from stub import On
from stub import Stub
from stub import stubbed

rms_norm = torch.ops.liger.rms_norm.default
# As cuda.h has them, whatever the launcher thinks. An argument that is a pointer to one of these is a result.
PROTOTYPES = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuCtxGetCurrent": [POINTER(c_void_p)],
    "cuCtxSetCurrent": [c_void_p],
    "cuThreadExchangeStreamCaptureMode": [POINTER(c_int)],
    "cuLibraryLoadData": [POINTER(c_void_p), c_void_p, c_void_p, c_void_p, c_uint, c_void_p, c_void_p, c_uint],
    "cuLibraryGetKernel": [POINTER(c_void_p), c_void_p, c_char_p],
    "cuKernelGetFunction": [POINTER(c_void_p), c_void_p],
    "cuKernelSetAttribute": [c_int, c_int, c_void_p, c_int],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p],
}
RESULTS = POINTER(c_int), POINTER(c_void_p), POINTER(c_char_p)
FUNCTIONS = [name for name in PROTOTYPES if name not in ("cuGetErrorString", "cuKernelSetAttribute")]


class Library:
    """What ctypes.CDLL gives for libcuda: C functions, which call the stub."""

    def __init__(self, stub):
        self.stub, self.raised = stub, []
        for name, types in PROTOTYPES.items():
            setattr(self, name, ctypes.CFUNCTYPE(c_int, *types)(self.function(name, types)))

    def function(self, name, types):
        def function(*args):
            try:
                out = [a for a, t in zip(args, types, strict=True) if t in RESULTS]
                given = [a or 0 for a, t in zip(args, types, strict=True) if t not in RESULTS]
                if name == "cuThreadExchangeStreamCaptureMode":
                    given = [out[0][0]]
                if name == "cuLibraryLoadData":
                    assert given[1:] == [0] * 6, "no options"
                    given = [elf_at(given[0])]
                status, *results = getattr(self.stub, name)(*given)
                for pointer, result in zip(out, results, strict=False):
                    pointer[0] = result
            except BaseException as error:
                self.raised.append(error)  # which ctypes would print and forget
                raise
            return status

        return function


def elf_at(address):
    """The cubin at an address; only its own headers say how long it is."""
    header = (ctypes.c_char * 64).from_address(address).raw
    programs, sections = (int.from_bytes(header[at : at + 8], "little") for at in (0x20, 0x28))
    each, count, of_each, of_count = (int.from_bytes(header[at : at + 2], "little") for at in (0x36, 0x38, 0x3A, 0x3C))
    return ctypes.string_at(address, max(programs + each * count, sections + of_each * of_count))


class Module:
    """What `from cuda.bindings import driver` gives: its own types; its functions take and return them, and call the stub."""

    def __init__(self, stub):
        self.real = real = pytest.importorskip("cuda.bindings.driver")
        enums = {"cuDeviceGetAttribute": real.CUdevice_attribute, "cuKernelSetAttribute": real.CUfunction_attribute}
        enums |= {"cuThreadExchangeStreamCaptureMode": real.CUstreamCaptureMode, "cuGetErrorString": real.CUresult}
        results = {"cuDeviceGet": real.CUdevice, "cuDevicePrimaryCtxRetain": real.CUcontext, "cuCtxGetCurrent": real.CUcontext}
        results |= {"cuLibraryLoadData": real.CUlibrary, "cuLibraryGetKernel": real.CUkernel}
        results |= {"cuKernelGetFunction": real.CUfunction, "cuThreadExchangeStreamCaptureMode": real.CUstreamCaptureMode}

        def function(name):
            def function(*args):
                if name in enums:
                    assert type(args[0]) is enums[name]
                if name == "cuLibraryLoadData":
                    assert args[1:] == ([], [], 0, [], [], 0)
                if name == "cuLaunchKernel":
                    if max(args[1:8]) >= 2**32:
                        raise OverflowError("value too large to convert to unsigned int")
                    assert (type(args[0]), type(args[8])) == (real.CUkernel, real.CUstream)
                plain = [a if isinstance(a, (bytes, list)) else int(a) for a in args]
                status, *result = getattr(stub, name)(*plain)
                if name in PROTOTYPES and not result and any(t is POINTER(c_void_p) for t in PROTOTYPES[name]):
                    result = [None]
                return real.CUresult(status), *(results.get(name, lambda r: r)(r) if r is not None else None for r in result)

            return function

        for name in PROTOTYPES:
            setattr(self, name, function(name))

    def __getattr__(self, name):
        return getattr(self.real, name)


@pytest.fixture(params=["stub", "ctypes", "cuda.bindings"])
def launcher(request):
    """The package's launcher in charge, over each back end over a stub."""
    stub, library = Stub(), None
    if request.param == "ctypes":
        library = Library(stub)
    backend = {"ctypes": lambda: _driver.Ctypes(library), "cuda.bindings": lambda: _driver.Bindings(Module(stub))}
    with stubbed(stub, backend.get(request.param, lambda: None)()):
        yield _runtime.kernels.launcher
    assert not library or not library.raised


def call(rows=5, n=256, backward=True):
    x, w = torch.randn(rows, n, requires_grad=backward), torch.randn(n, requires_grad=backward)
    y = rms_norm(x, w, 1e-6)
    return y.backward(torch.ones_like(y)) if backward else y


def test_a_training_step(launcher):
    call()
    stub = launcher.stub
    assert [launch.kernel for launch in stub.launches] == ["rms_norm_fwd", "rms_norm_bwd", "column_sum"]
    assert [launch.values["n"] for launch in stub.launches] == [256] * 3
    assert {(launch.device, launch.stream, launch.threads) for launch in stub.launches} == {(0, 7, 128)}
    assert len(stub.called("cuLibraryLoadData")) == 3
    call()
    assert len(stub.called("cuLibraryLoadData")) == 3, "a kernel is loaded once"
    assert len(stub.called("cuDevicePrimaryCtxRetain")) == 1, "the context's count of users grows by one"


@pytest.mark.parametrize(
    ("status", "text"), [(2, "out of memory"), (700, "an illegal memory access was encountered"), (999, "unknown error")]
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_failure_is_raised_and_forgotten(launcher, function, status, text):
    stub = launcher.stub
    if function == "cuInit":  # which the fixture called already, when it asked for the driver
        launcher.find_driver.cache_clear()
    stub.failures[function].append(status)
    with pytest.raises(RuntimeError, match=rf"{function}: {text} \(CUDA driver error {status}\)"):
        call(backward=False)
    assert not stub.launches
    call(backward=False)
    assert len(stub.launches) == 1
    assert stub.context == CONTEXT, "the thread's context is as it was"


def test_more_programs_than_a_grid_takes(launcher):
    text = "cross_entropy_fwd: rows must be such that at most 2**31 - 1 programs serve them, got 2147483648 programs; split"
    with pytest.raises(ValueError, match=re.escape(text)):
        launcher.at(0).driver.relaunch(1, "cross_entropy_fwd", 0, 0, 2**31, 1, 1, 128, 1, 1, 0, 0, 0, 0)
    text = "column_sum: a row must be such that at most 2**16 - 1 programs serve it, got 65536 programs; split the tensor"
    with pytest.raises(ValueError, match=re.escape(text)):
        launch_on(0, (3, 2**16))
    launch_on(0, (3, 2**16 - 1))
    assert [launch.grid for launch in launcher.stub.launches] == [(3, 2**16 - 1, 1)]


def test_a_failed_launch_says_what_it_was(launcher):
    launcher.stub.failures["cuLaunchKernel"].append(1)
    text = (
        r"rms_norm_fwd: cuLaunchKernel: invalid argument \(CUDA driver error 1\); grid \(3, 1, 1\), 128 threads, 32 B of shared"
    )
    with pytest.raises(RuntimeError, match=text):
        call(backward=False)


def test_a_thread_without_a_context(launcher):
    """As autograd's, or a user's first: the launch is made again in the device's own context."""
    call(backward=False)
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert [launch.device for launch in launcher.stub.launches] == [0] * 4
    assert len(launcher.stub.called("cuLaunchKernel")) == 5
    assert len({launch.thread for launch in launcher.stub.launches}) == 2
    launcher.stub.thread.context = 0
    launcher.stub.failures["cuLaunchKernel"] += [201, 201]
    with pytest.raises(RuntimeError, match="rms_norm_fwd: cuLaunchKernel: invalid device context"):
        call(backward=False)


def launch_on(index, grid=(1,)):
    x = torch.ones(64, dtype=torch.float32)
    tensor = On(x, index)
    _runtime.kernels.column_sum[grid](tensor, tensor, 1, 64, ROWS=128, BLOCK=32)


def test_the_tensors_device_is_used_and_the_current_one_stays(launcher):
    stub = launcher.stub
    for index in (0, 1, 1, 2, 0):
        launch_on(index)
        assert stub.context == CONTEXT, "the current device is 0 again"
    assert [launch.device for launch in stub.launches] == [0, 1, 1, 2, 0]
    assert len(stub.called("cuLibraryLoadData")) == 3
    stub.failures["cuLaunchKernel"].append(700)
    with pytest.raises(RuntimeError, match="illegal"):
        launch_on(1)
    assert stub.context == CONTEXT


@pytest.mark.parametrize("grid", [(2**31,), (2**32 + 1,), (1, 2**32 + 1)])
def test_a_grid_is_not_cut_short(launcher, grid):
    with pytest.raises(
        (ValueError, OverflowError, RuntimeError), match=r"at most 2\*\*(31|16) - 1 programs|too large|invalid argument"
    ):
        launch_on(0, grid)
    assert not launcher.stub.launches


def test_while_a_graph_is_captured(launcher):
    """A first call loads under relaxed capture mode, so that neither this nor another thread's capture is harmed."""
    launcher.stub.capturing = True
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        launcher.find_driver().call("cuLibraryLoadData", bytes(64), None, None, 0, None, None, 0)
    call()
    assert len(launcher.stub.launches) == 3
    modes = [mode for (mode,) in launcher.stub.called("cuThreadExchangeStreamCaptureMode")]
    assert modes == [RELAXED_CAPTURE, 0] * 3


def test_the_stream_is_asked_for_every_time(launcher):
    for launcher.stub.stream in (7, 0, 2**47):
        call(backward=False)
    assert [launch.stream or 0 for launch in launcher.stub.launches] == [7, 0, 2**47]


def test_what_is_asked_of_the_device(launcher):
    device = launcher.at(0)
    assert (device.capability, device.multiprocessors, device.max_shared_memory) == ((9, 0), 132, 232448)


def test_no_driver(monkeypatch):
    find = _driver.driver.__wrapped__
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(
        RuntimeError, match=r"liger_aot: PyTorch \S+ is a build without CUDA; install one with, or use CPU tensors"
    ):
        find()
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(f"{name}: cannot open shared object file")))
    with pytest.raises(
        RuntimeError, match=r"no NVIDIA driver on this machine \(libcuda.so.1: cannot open .*\); CPU tensors work"
    ):
        find()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match="CUDA kernels are served on Linux, not on darwin; CPU tensors work everywhere"):
        find()


def test_which_back_end(monkeypatch):
    stub = Stub()
    library, module = Library(stub), Module(stub)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr("cuda.bindings.driver", module)
    assert _driver.driver.__wrapped__().backend.name == "cuda.bindings"
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert _driver.driver.__wrapped__().backend.name == "ctypes"
    del library.cuKernelGetFunction
    with pytest.raises(
        RuntimeError, match=r"this NVIDIA driver has no cuKernelGetFunction; it is older than CUDA 12.0, update it"
    ):
        _driver.driver.__wrapped__()
