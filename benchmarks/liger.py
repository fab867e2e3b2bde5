"""liger-kernel's host path on a machine without a GPU: its autograd Functions and Triton's JIT dispatch as they are.

Stubbed out: Triton's driver (device, stream, loading) and the C function that launches. Kernels are compiled for sm_90 as on a
GPU machine. Not counted for Liger, because CPU tensors do not need it: torch.cuda.device() around its launches.
"""

import importlib.metadata
import os
import tempfile

import torch

CACHE = tempfile.TemporaryDirectory()  # for as long as this process


class Driver:
    """Triton's driver with C functions in place of torch's, which are C functions too."""

    get_current_device = staticmethod(int)
    get_current_stream = staticmethod({0: 7}.get)

    class utils:  # noqa: N801
        @staticmethod
        def load_binary(name, image, shared, device):
            return "module", "function", 0, 0, 1024

        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    @staticmethod
    def launcher_cls(source, metadata):
        return lambda *arguments: None

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


class Nothing:
    """In a compiled kernel's place."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments):
        return None

    def run(self, *arguments):
        pass


def functions(compiled=True):
    """(liger_kernel.transformers.functional, its version), or (None, why not); not compiled where nothing is measured."""
    try:
        version = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return None, "liger-kernel is not installed (pip install --group bench)"
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = CACHE.name
    try:
        from triton.runtime import driver
    except ImportError as error:
        return None, f"Triton cannot be imported ({error})"

    driver.set_active(Driver())
    if not compiled:
        import triton

        triton.compiler.compile = lambda *arguments, **options: Nothing()
    from liger_kernel.transformers import functional

    return functional, version
