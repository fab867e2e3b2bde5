"""The kernels as Triton functions, interpreted on the CPU. The one file of the package that imports Triton."""

import contextlib
import functools
import os
import sys

# Triton decides while it is imported whether its own library functions are interpreted.
if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from ._op import on_cpu
from ._runtime import DTYPES
from ._runtime import kernels
from .export import SOURCES
from .export import load_sources

if not isinstance(tl.sum, interpreter.InterpretedFunction):
    raise ImportError("liger_aot: Triton was imported before, compiling; set TRITON_INTERPRET=1 in this process's environment")
NAMES = {dtype: name for name, dtype in DTYPES.items()}
load = functools.cache(load_sources)


def round_to_bfloat16(original, data, source, target, mode):
    """Triton's interpreter truncates fp32 to bf16; hardware rounds to nearest even."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return original(data, source, target, mode)
    bits = np.frombuffer(data.tobytes(), np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, np.uint16(0x7FC0), rounded).reshape(data.shape)


class Interpreter:
    """A launcher that interprets the kernel's source, for tensors in host memory."""

    def __init__(self, functions, multiprocessors=3):
        self.functions, self.count, self.launched = functions, multiprocessors, []

    def multiprocessors(self, tensor):
        return self.count

    def launch(self, kernel, grid, *args, **constants):
        if args[0].is_meta or 0 in grid:
            return
        function = self.functions[kernel]
        declared = [(list(types.values()), c) for types, c, _ in function.variants]
        dtypes = [f"*{NAMES[a.dtype]}" for a in args if hasattr(a, "dtype")]
        if (dtypes, constants) not in [([t for t in types if t[0] == "*"], c) for types, c in declared]:
            raise NotImplementedError(f"{kernel}: no variant is declared for {dtypes}, {constants}")
        self.launched.append(kernel)
        scalars = {"fp32": float, "i32": int, "i64": int}  # as the launcher packs them
        types = (t.removesuffix(":16") for t in function.parameters.values())
        function[grid](*(scalars.get(t, lambda a: a)(a) for t, a in zip(types, args, strict=True)), **constants)


@contextlib.contextmanager
def interpreted(folder=SOURCES):
    """Inside the `with`, operators on CPU tensors run the Triton kernels, interpreted; yields the launcher."""
    launcher, original = Interpreter(load(folder)), interpreter._convert_float
    interpreter._convert_float = functools.partial(round_to_bfloat16, original)
    try:
        with kernels.launched_by(launcher), on_cpu():
            yield launcher
    finally:
        interpreter._convert_float = original
