"""logsumexp of a row, a block of its numbers after another: every lane has a maximum and a sum of its own."""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
LANES = tl.constexpr(1024)


@triton.jit
def lse_step(top, sums, z):
    """The running maximum and sum of exponentials of each lane, with one more block (steps, LANES) of numbers."""
    higher = tl.maximum(top, tl.max(z, axis=0))
    base = tl.where(higher == -INF, 0.0, higher)
    return higher, sums * tl.exp(tl.where(top == -INF, -INF, top - base)) + tl.sum(tl.exp(z - base[None, :]), axis=0)


@triton.jit
def lse_of(top, sums):
    """(the largest number, the logarithm of the sum of exponentials of what the numbers are less than it): their sum is the
    logsumexp."""
    highest = tl.max(top, axis=0)
    base = tl.where(highest == -INF, 0.0, highest)
    return base, tl.log(tl.sum(sums * tl.exp(tl.where(top == -INF, -INF, top - base)), axis=0))
