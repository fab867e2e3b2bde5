"""What the norms share: their input, how rows are divided among programs, and the second stage of a weight's gradient."""

import functools

from .._runtime import cdiv
from .._runtime import fit
from .._runtime import kernels
from .._runtime import programs
from ._check import FLOATS

BLOCKS = 128, 1024, 2048, 4096, 8192
ROWS = {128: 16, 1024: 2}
LOOP_BLOCK = 4096
# A backward's programs on one multiprocessor: 16 warps together, all that fit where a thread takes 128 registers.
RESIDENT = {128: 4, 1024: 4, 2048: 4, 4096: 2, 8192: 1}


def unusable(op, x):
    """Why no norm takes x: its dtype is none of FLOATS, or it has no dimension."""
    if x.dtype not in FLOATS:
        return ValueError(f"{op}: x must be float32, float16 or bfloat16, got {x.dtype}")
    return ValueError(f"{op}: x must have a last dimension to normalise over, got a scalar")


@functools.cache
def _tile(n):
    if n > BLOCKS[-1]:
        return {"ROWS": 1, "BLOCK": LOOP_BLOCK, "LOOP": True}
    block = fit(n, BLOCKS)
    return {"ROWS": ROWS.get(block, 1), "BLOCK": block, "LOOP": False}


def tile(n, least=BLOCKS[0]):
    """The constants of a kernel, its smallest BLOCK being `least`, for rows of n numbers; under tracing any will do."""
    return _tile(n if type(n) is int and n > least else least)


def share(x, rows, constants):
    """How many programs a backward divides the rows of x among."""
    return programs(x, cdiv(rows, constants["ROWS"]), RESIDENT[constants["BLOCK"]])


def column_sum(partial, count, out):
    """Write into out, a weight's gradient, the sum of `count` programs' shares of it."""
    n = out.numel()
    kernels.column_sum[(cdiv(n, 128),)](partial, out, count, n, ROWS=32, BLOCK=128)
    return out
