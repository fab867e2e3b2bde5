"""A CUDA driver that computes nothing: it records what is launched, reads the arguments as a GPU would, fails on demand.

Arguments are cut out of the launch buffer by the cubin's own parameter table, so that launcher and stub cannot err together.
"""

import collections
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import json
import pathlib
import struct
import threading
import zipfile
import zlib

import liger_aot
from liger_aot import _driver
from liger_aot import _runtime
from liger_aot._op import on_cpu

SUCCESS, INVALID_VALUE, INVALID_IMAGE, INVALID_CONTEXT, INVALID_HANDLE, NOT_FOUND, CAPTURING = 0, 1, 200, 201, 400, 500, 900
TEXTS = {
    INVALID_VALUE: b"invalid argument",
    2: b"out of memory",
    INVALID_IMAGE: b"device kernel image is invalid",
    INVALID_CONTEXT: b"invalid device context",
    INVALID_HANDLE: b"invalid resource handle",
    NOT_FOUND: b"named symbol not found",
    700: b"an illegal memory access was encountered",
    CAPTURING: b"operation not permitted when stream is capturing",
}
# As cuda.h numbers them, whatever the package thinks.
RELAXED_CAPTURE, DYNAMIC_SHARED_MEMORY = 2, 8
MULTIPROCESSORS, CAPABILITY_MAJOR, CAPABILITY_MINOR, MAX_SHARED_MEMORY = 16, 75, 76, 97
CONTEXT = 0x1000  # the primary context of device 0
FORMATS = {"i32": "i", "i64": "q", "fp32": "f"}


def machinery(name):
    """A module of the build, _aot or _gate, from the sources that are installed with the package."""
    path = pathlib.Path(liger_aot.__file__).parent / f"_triton/{name}.py"
    module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location(name, path))
    spec.loader.exec_module(module)
    return module


@functools.cache
def parameter_table(image, symbol):
    return machinery("_gate").parameter_table(image, symbol)


@functools.cache
def catalogue():
    """{CRC: (pack, name)} of every cubin of every pack."""
    packs = [_runtime.open_pack(path) for path in _runtime.pack_paths().values()]
    return {info.CRC: (pack, info.filename) for pack in packs for info in pack.archive.infolist()}


@dataclasses.dataclass
class Launch:
    kernel: str
    image: bytes
    device: int
    grid: tuple
    threads: int
    shared: int
    stream: int
    thread: int
    data: bytes  # the argument buffer

    @property
    def pack(self):
        return catalogue()[zlib.crc32(self.image)][0]

    @property
    def cubin(self):
        return catalogue()[zlib.crc32(self.image)][1]

    @property
    def values(self):
        """{parameter: value} as the kernel reads them."""
        table = parameter_table(self.image, self.kernel)
        cut = [self.data[offset : offset + size] for offset, size in table]
        declared = self.pack.parameters(self.kernel)
        assert len(cut) == len(declared) + 2
        assert cut[-2:] == [bytes(8)] * 2, "the scratch pointers must be null"
        formats = ["Q" if type_.startswith("*") else FORMATS[type_.removesuffix(":16")] for _, type_ in declared]
        return {name: struct.unpack(f, c)[0] for (name, _), f, c in zip(declared, formats, cut[:-2], strict=True)}


class StatusError(Exception):
    """A driver function's status other than success."""


def entry(function):
    """A driver function: recorded, failing where a test wants it to, with the status before the result."""

    @functools.wraps(function)
    def call(self, *args):
        name = function.__name__
        self.calls.append((name, args))
        try:
            if status := self.failures[name].popleft() if self.failures[name] else SUCCESS:
                raise StatusError(status)
            result = function(self, *args)
        except StatusError as error:
            return error.args
        return (SUCCESS,) if result is None else (SUCCESS, result)

    return call


class Stub:
    """In the form of cuda.bindings: each function returns (status, result...).

    failures[name] holds what the next calls of that function return; the thread that makes the stub has device 0's context,
    as after torch's first allocation, and others have none.
    """

    name = "stub"

    def __init__(self, capability=(9, 0), multiprocessors=132, shared=232448, version=13000, record=True):
        self.version, self.stream, self.capturing, self.before_launch = version, 7, False, lambda: None
        self.attributes = {
            CAPABILITY_MAJOR: capability[0],
            CAPABILITY_MINOR: capability[1],
            MULTIPROCESSORS: multiprocessors,
            MAX_SHARED_MEMORY: shared,
        }
        self.calls, self.launches, self.failures = [], [], collections.defaultdict(collections.deque)
        self.images, self.kernels, self.loaded, self.opted_in = {}, {}, set(), {}
        self.thread = threading.local()
        self.thread.context = CONTEXT
        self.record = record
        if not record:
            self.cuLaunchKernel = lambda *_: (SUCCESS,)

    def called(self, name):
        """The arguments of each call of a function."""
        return [args for called, args in self.calls if called == name]

    @property
    def context(self):
        return getattr(self.thread, "context", 0)

    @property
    def relaxed(self):
        return getattr(self.thread, "mode", 0) == RELAXED_CAPTURE or not self.capturing

    def cuGetErrorString(self, status):
        return (SUCCESS, TEXTS[status]) if status in TEXTS else (INVALID_VALUE, None)

    @entry
    def cuInit(self, flags):
        pass

    @entry
    def cuDriverGetVersion(self):
        return self.version

    @entry
    def cuDeviceGet(self, index):
        return index

    @entry
    def cuDeviceGetAttribute(self, attribute, device):
        return self.attributes[attribute]

    @entry
    def cuDevicePrimaryCtxRetain(self, device):
        return CONTEXT + device

    @entry
    def cuCtxGetCurrent(self):
        return self.context

    @entry
    def cuCtxSetCurrent(self, context):
        self.thread.context = context

    @entry
    def cuThreadExchangeStreamCaptureMode(self, mode):
        before, self.thread.mode = getattr(self.thread, "mode", 0), mode
        return before

    @entry
    def cuLibraryLoadData(self, image, *options):
        if not self.relaxed:
            raise StatusError(CAPTURING)
        if not image.startswith(b"\x7fELF"):
            raise StatusError(INVALID_IMAGE)
        self.images[handle := 0x2000 + len(self.images)] = image
        return handle

    @entry
    def cuLibraryGetKernel(self, library, symbol):
        if b"\0.text." + symbol + b"\0" not in self.images[library]:
            raise StatusError(NOT_FOUND)
        self.kernels[handle := 0x3000 + len(self.kernels)] = symbol.decode(), self.images[library]
        return handle

    @entry
    def cuKernelGetFunction(self, kernel):
        if not self.relaxed:
            raise StatusError(CAPTURING)
        if not self.context:
            raise StatusError(INVALID_CONTEXT)
        self.loaded.add((kernel, self.context))
        return kernel + 0x1000

    @entry
    def cuKernelSetAttribute(self, attribute, value, kernel, device):
        assert attribute == DYNAMIC_SHARED_MEMORY
        if value > self.attributes[MAX_SHARED_MEMORY]:
            raise StatusError(INVALID_VALUE)
        self.opted_in[kernel, device] = value

    @entry
    def cuLaunchKernel(self, kernel, x, y, z, threads, ty, tz, shared, stream, params, extra):
        self.before_launch()
        if not self.context:
            raise StatusError(INVALID_CONTEXT)
        if kernel not in self.kernels:
            raise StatusError(INVALID_HANDLE)
        if (kernel, self.context) not in self.loaded and not self.relaxed:
            raise StatusError(CAPTURING)
        device = self.context - CONTEXT
        if not (0 < x < 2**31 and 0 < y < 2**16 and z and threads <= 1024) or shared > self.opted_in.get(
            (kernel, device), 48 * 1024
        ):
            raise StatusError(INVALID_VALUE)
        symbol, image = self.kernels[kernel]
        words = (ctypes.c_void_p * 5).from_address(extra)
        assert (words[0], words[2], words[4], params) == (1, 2, None, 0)
        size = ctypes.c_size_t.from_address(words[3]).value
        assert size == sum(parameter_table(image, symbol)[-1]), "the buffer must end where the parameters do"
        data = ctypes.string_at(words[1], size)
        self.launches.append(Launch(symbol, image, device, (x, y, z), threads, shared, stream, threading.get_ident(), data))


class StubDriver(_driver.Driver):
    """The package's own driver over a stub, or over a back end over it; and in torch's place."""

    def __init__(self, stub, backend=None):
        super().__init__(backend or stub)
        self.stub = stub
        if not stub.record:  # as cheap as torch's own, which are C functions
            self.stream, self.current_device = {0: 7}.get, int

    def stream(self, index):
        return self.stub.stream

    def current_device(self):
        return max(self.stub.context - CONTEXT, 0)

    @contextlib.contextmanager
    def guard(self, index):
        before, self.stub.thread.context = self.stub.context, CONTEXT + index
        try:
            yield
        finally:
            self.stub.thread.context = before


class Launcher(_runtime.Cuda):
    """The package's own launcher over a stub; tensors in host memory pass for device 0's."""

    def __init__(self, stub, backend=None):
        super().__init__(functools.cache(lambda: StubDriver(stub, backend)))
        self.stub = stub

    def device(self, tensor, what="liger_aot"):
        if tensor.get_device() < 0:
            self.devices[-1] = self.at(0)
        return super().device(tensor, what)


class On:
    """A tensor, as far as a launcher looks at it, that says it is on a GPU."""

    is_meta = False

    def __init__(self, tensor, index):
        self.tensor, self.index, self.dtype = tensor, index, tensor.dtype

    def data_ptr(self):
        return self.tensor.data_ptr()

    def get_device(self):
        return self.index


@contextlib.contextmanager
def stubbed(stub=None, backend=None, **options):
    """Inside the `with`, operators on CPU tensors launch over a stub (yielded); record=False for timing the launcher."""
    launcher = Launcher(stub or Stub(**options), backend)
    with _runtime.kernels.launched_by(launcher), on_cpu():
        yield launcher.stub


def copy_pack(folder, change=lambda manifest, entries: None, kernel="column_sum", arch="90"):
    """A pack in `folder` that says it is for `arch`, of one kernel of the installed pack for sm_90, with what `change` does to
    it; then packed as the build packs.
    """
    with zipfile.ZipFile(_runtime.FOLDER / "sm_90.zip") as archive:
        manifest = json.loads(archive.read("manifest.json")) | {"kernels": [kernel], "arch": arch}
        entries = {n: archive.read(n) for n in archive.namelist() if n.startswith((f"{kernel}-", f"{kernel}."))}
    change(manifest, entries)
    manifest["sha256"] = hashlib.sha256(b"".join(entries[name] for name in sorted(entries))).hexdigest()
    path = pathlib.Path(folder) / f"sm_{arch}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(entries):
            archive.writestr(name, entries[name])
        archive.writestr("manifest.json", json.dumps(manifest))
    return path
