"""The second stage of a weight gradient: the sum of the partial sums of all programs, rounded once."""

import triton
import triton.language as tl

from _aot import variants


@variants(
    partial="*fp32",
    out="*T",
    rows="i32",
    n="i32:16",
    T=["fp32", "bf16", "fp16"],
    ROWS=[128],
    BLOCK=[32],
    num_warps=4,
    scalar=("stores",),
)
@triton.jit
def column_sum(partial, out, rows, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = col < n
    sums = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    for first in range(0, rows, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        both = keep[None, :] & (row < rows)[:, None]
        sums += tl.load(partial + row[:, None] * n + col[None, :], mask=both, other=0.0)
    tl.store(out + col, tl.sum(sums, axis=0), mask=keep)
