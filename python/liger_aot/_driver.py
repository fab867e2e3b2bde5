"""The CUDA driver, behind the few calls that a launcher needs. Nothing else in the package touches a device.

Two back ends offer the driver's functions in one form, status first: cuda.bindings where it is installed (torch's CUDA 13
builds bring it), ctypes otherwise. A test hands `Driver` a third.
"""

import contextlib
import ctypes
import functools
import sys

import torch

INVALID_VALUE, INVALID_CONTEXT = 1, 201
MAX_SHARED_MEMORY = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
MULTIPROCESSORS = 16
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
DYNAMIC_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
SHARED_MEMORY_FOR_ALL = 48 * 1024  # a kernel that needs more must ask for it
RELAXED_CAPTURE = 2
MOST_PROGRAMS = 2**31 - 1, 2**16 - 1  # along the first and the second dimension of a grid


class Ctypes:
    """libcuda by its C ABI, in the form of cuda.bindings: each function returns (status, result...)."""

    name = "ctypes"

    def __init__(self, library):
        self.library = library
        out, p, i, u = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
        for name, *types in (
            ("cuInit", u),
            ("cuDriverGetVersion", out),
            ("cuGetErrorString", i, out),
            ("cuDeviceGet", out, i),
            ("cuDeviceGetAttribute", out, i, i),
            ("cuDevicePrimaryCtxRetain", out, i),
            ("cuCtxSetCurrent", p),
            ("cuCtxGetCurrent", out),
            ("cuThreadExchangeStreamCaptureMode", out),
            ("cuLibraryLoadData", out, p, p, p, u, p, p, u),
            ("cuLibraryGetKernel", out, p, ctypes.c_char_p),
            ("cuKernelGetFunction", out, p),
            ("cuKernelSetAttribute", i, i, p, i),
            ("cuLaunchKernel", p, u, u, u, u, u, u, u, p, p, p),
        ):
            function = getattr(library, name, None)
            if function is None:
                raise RuntimeError(f"liger_aot: this NVIDIA driver has no {name}; it is older than CUDA 12.0, update it")
            function.argtypes, function.restype = types, i
        self._launch = library.cuLaunchKernel

    def _get(self, type_, name, *args):
        result = type_()
        return getattr(self.library, name)(ctypes.byref(result), *args), result.value

    def cuInit(self, flags):
        return (self.library.cuInit(flags),)

    def cuDriverGetVersion(self):
        return self._get(ctypes.c_int, "cuDriverGetVersion")

    def cuGetErrorString(self, status):
        text = ctypes.c_char_p()
        return self.library.cuGetErrorString(status, ctypes.byref(text)), text.value

    def cuDeviceGet(self, index):
        return self._get(ctypes.c_int, "cuDeviceGet", index)

    def cuDeviceGetAttribute(self, attribute, device):
        return self._get(ctypes.c_int, "cuDeviceGetAttribute", attribute, device)

    def cuDevicePrimaryCtxRetain(self, device):
        return self._get(ctypes.c_void_p, "cuDevicePrimaryCtxRetain", device)

    def cuCtxSetCurrent(self, context):
        return (self.library.cuCtxSetCurrent(context),)

    def cuCtxGetCurrent(self):
        return self._get(ctypes.c_void_p, "cuCtxGetCurrent")

    def cuThreadExchangeStreamCaptureMode(self, mode):
        mode = ctypes.c_int(mode)
        return self.library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), mode.value

    def cuLibraryLoadData(self, image, *_):
        return self._get(ctypes.c_void_p, "cuLibraryLoadData", image, None, None, 0, None, None, 0)

    def cuLibraryGetKernel(self, library, symbol):
        return self._get(ctypes.c_void_p, "cuLibraryGetKernel", library, symbol)

    def cuKernelGetFunction(self, kernel):
        return self._get(ctypes.c_void_p, "cuKernelGetFunction", kernel)

    def cuKernelSetAttribute(self, attribute, value, kernel, device):
        return (self.library.cuKernelSetAttribute(attribute, value, kernel, device),)

    def cuLaunchKernel(self, kernel, x, y, *others):
        if (x | y) >> 31:  # of which ctypes would pass the lower half
            return (INVALID_VALUE,)
        return (self._launch(kernel, x, y, *others),)


class Bindings:
    """cuda.bindings, with plain integers where it wants its own types."""

    name = "cuda.bindings"

    def __init__(self, driver):
        self.driver = driver
        self._launch, self._stream = driver.cuLaunchKernel, functools.lru_cache(64)(driver.CUstream)

    def __getattr__(self, name):
        return getattr(self.driver, name)

    def cuGetErrorString(self, status):
        return self.driver.cuGetErrorString(self.driver.CUresult(status))

    def cuDeviceGetAttribute(self, attribute, device):
        return self.driver.cuDeviceGetAttribute(self.driver.CUdevice_attribute(attribute), device)

    def cuThreadExchangeStreamCaptureMode(self, mode):
        return self.driver.cuThreadExchangeStreamCaptureMode(self.driver.CUstreamCaptureMode(mode))

    def cuLibraryLoadData(self, image, *_):
        return self.driver.cuLibraryLoadData(image, [], [], 0, [], [], 0)

    def cuKernelSetAttribute(self, attribute, value, kernel, device):
        return self.driver.cuKernelSetAttribute(self.driver.CUfunction_attribute(attribute), value, kernel, device)

    def cuLaunchKernel(self, kernel, x, y, z, threads, ty, tz, shared, stream, params, extra):
        return self._launch(kernel, x, y, z, threads, ty, tz, shared, self._stream(stream), params, extra)


class Driver:
    """One process's driver: devices, loading, launching. Every status becomes an exception with the driver's text."""

    def __init__(self, backend):
        self.backend = backend
        self.call("cuInit", 0)
        self.launch = backend.cuLaunchKernel

    def call(self, name, *args):
        status, *result = getattr(self.backend, name)(*args)
        if status:
            raise RuntimeError(f"{name}: {self.text(status)}")
        return result[0] if result else None

    def text(self, status):
        text = self.backend.cuGetErrorString(int(status))[1]
        return f"{text.decode() if text else 'unknown error'} (CUDA driver error {int(status)})"

    @functools.cached_property
    def version(self):
        return self.call("cuDriverGetVersion")

    @functools.cache  # noqa: B019
    def attribute(self, name, index):
        return int(self.call("cuDeviceGetAttribute", name, self.call("cuDeviceGet", index)))

    def capability(self, index):
        return self.attribute(CAPABILITY_MAJOR, index), self.attribute(CAPABILITY_MINOR, index)

    def multiprocessors(self, index):
        return self.attribute(MULTIPROCESSORS, index)

    def max_shared_memory(self, index):
        return self.attribute(MAX_SHARED_MEMORY, index)

    # What torch knows better than the driver: the stream and the device that its user chose.
    stream = staticmethod(getattr(torch._C, "_cuda_getCurrentRawStream", None))
    current_device = staticmethod(getattr(torch._C, "_cuda_getDevice", None))

    def guard(self, index):
        return torch.cuda.device(index)

    @functools.cache  # noqa: B019 (a process has one driver)
    def context(self, index):
        """The device's primary context, which torch uses: retained once, for the life of the process."""
        return self.call("cuDevicePrimaryCtxRetain", self.call("cuDeviceGet", index))

    def load(self, image, symbol, shared, index):
        """A kernel handle from a cubin that is on its device when this returns, also while CUDA graphs are captured.

        The thread's current device stays what it was.
        """
        mode = self.call("cuThreadExchangeStreamCaptureMode", RELAXED_CAPTURE)
        try:
            before = self.call("cuCtxGetCurrent")
            self.call("cuCtxSetCurrent", self.context(index))
            try:
                library = self.call("cuLibraryLoadData", image, None, None, 0, None, None, 0)
                kernel = self.call("cuLibraryGetKernel", library, symbol.encode())
                if shared > SHARED_MEMORY_FOR_ALL:
                    self.call("cuKernelSetAttribute", DYNAMIC_SHARED_MEMORY, shared, kernel, self.call("cuDeviceGet", index))
                # A library is loaded lazily, by the first launch, unless a function of it is asked for.
                self.call("cuKernelGetFunction", kernel)
                return kernel
            finally:
                self.call("cuCtxSetCurrent", before)
        finally:
            self.call("cuThreadExchangeStreamCaptureMode", int(mode))

    def relaunch(self, status, name, index, *args):
        """What follows a launch that did not succeed: once more in a thread without a context, else an exception."""
        if int(status) == INVALID_CONTEXT:
            # A thread that torch has not touched, such as the first backward's, has no context.
            self.call("cuCtxSetCurrent", self.context(index))
            (status,) = self.launch(*args)
        if status:
            _, x, y, z, threads, _, _, shared, *_ = args
            check_grid(name, x, y)
            raise RuntimeError(
                f"{name}: cuLaunchKernel: {self.text(status)}; grid {x, y, z}, {threads} threads, {shared} B of shared memory"
            )


def check_grid(name, x, y=1):
    """No more programs than a grid takes."""
    most, most_of_a_row = MOST_PROGRAMS
    if x > most:
        raise ValueError(
            f"{name}: rows must be such that at most 2**31 - 1 programs serve them, got {x} programs; split the tensor"
        )
    if y > most_of_a_row:
        raise ValueError(
            f"{name}: a row must be such that at most 2**16 - 1 programs serve it, got {y} programs; split the tensor"
        )


@functools.cache
def driver():
    """The machine's driver; a RuntimeError that says what is missing where there is none."""
    if sys.platform != "linux":
        raise RuntimeError(f"liger_aot: CUDA kernels are served on Linux, not on {sys.platform}; CPU tensors work everywhere")
    if not torch.backends.cuda.is_built():
        raise RuntimeError(
            f"liger_aot: PyTorch {torch.__version__} is a build without CUDA; install one with, or use CPU tensors"
        )
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"liger_aot: no NVIDIA driver on this machine ({error}); CPU tensors work without") from None
    with contextlib.suppress(ImportError):
        from cuda.bindings import driver as bindings

        return Driver(Bindings(bindings))
    return Driver(Ctypes(library))
