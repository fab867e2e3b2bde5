"""What the norms share: their input, how rows are divided among programs, and the second stage of a weight's gradient."""

import functools

import torch

from .._runtime import cdiv
from .._runtime import fit
from .._runtime import kernels
from ._check import FLOATS
from ._check import rows_of

BLOCKS = 128, 1024, 2048, 4096, 8192
ROWS = {128: 16, 1024: 2}
# Of rows that are wider than the largest BLOCK: rows and columns of a turn of the loop, forward and backward, which reads and
# writes its share of a weight's gradient once for all of the rows.
LOOP_FORWARD, LOOP_BACKWARD = (1, 4096), (2, 2048)
# A backward's programs on one multiprocessor: 16 warps together, all that fit where a thread takes 128 registers.
RESIDENT = {128: 4, 1024: 4, 2048: 4, 4096: 2, 8192: 1}
LOOP_RESIDENT = 2
SUM_ROWS, SUM_BLOCK = 128, 32  # rows and columns that a program of column_sum takes at once


def unusable(op, x):
    """Why no norm takes x: its dtype is none of FLOATS, or it has no dimension."""
    if x.dtype not in FLOATS:
        return ValueError(f"{op}: x must be float32, float16 or bfloat16, got {x.dtype}")
    return ValueError(f"{op}: x must have a last dimension to normalise over, got a scalar")


@functools.cache
def _tile(n, backward):
    if n > BLOCKS[-1]:
        return *(LOOP_BACKWARD if backward else LOOP_FORWARD), True
    block = fit(n, BLOCKS)
    return ROWS.get(block, 1), block, False


def layout(x, least=BLOCKS[0], backward=False):
    """x as rows_of gives it, in how many groups programs take its rows, and ROWS, BLOCK (from `least` on) and LOOP."""
    x, stride, rows, n = rows_of(x)
    each, block, loop = _tile(n if type(n) is int and n > least else least, backward)  # under tracing any will do
    return x, stride, rows, n, -(-rows // each), each, block, loop


def resident(block, loop):
    """How many programs of a backward there are for each multiprocessor."""
    return LOOP_RESIDENT if loop else RESIDENT[block]


def number_each(x, rows):
    """Room for a number of each row of x, in fp32."""
    if x.dim() == 2:
        return x.new_empty(rows, dtype=torch.float32)
    return x.new_empty(*(x.shape[:-1] or ((),)), dtype=torch.float32)  # torch reads a shape in one piece 0.7 us slower


def column_sum(partial, count, out):
    """Write into out, a weight's gradient, the sum of `count` programs' shares of it."""
    n = out.numel()
    kernels.column_sum[(cdiv(n, SUM_BLOCK),)](partial, out, count, n, ROWS=SUM_ROWS, BLOCK=SUM_BLOCK)
    return out
