"""Where a program of a gated unit finds its numbers."""

import triton
import triton.language as tl


@triton.jit
def place(n, size, BLOCK: tl.constexpr):
    """This program's row of width n, columns, offsets in a contiguous tensor of size numbers, and which of them exist."""
    blocks = (n + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = row * n + col
    return row, col, at, (col < n) & (at < size)
