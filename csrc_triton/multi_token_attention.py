"""The causal softmax of matrices of scores, one row a program, arithmetic in fp32: the last row is of all its n numbers, each
before it of one less.

A row wider than BLOCK is walked in a loop, as far as its mask; beyond, zeros are written.
"""

import triton
import triton.language as tl

from _aot import variants


@variants(
    x="*T",
    y="*T",
    x_stride="i32:16",
    tokens="i32",
    n="i32:16",
    T=["fp32", "bf16", "fp16"],
    BLOCK=[1024],
    LOOP=[False, True],
    num_warps=2,
)
@triton.jit
def causal_softmax_fwd(x, y, x_stride, tokens, n, BLOCK: tl.constexpr, LOOP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    end = tl.program_id(0) % tokens + 1 + n - tokens
    read = (end + 15) // 16 * 16  # a mask that ends anywhere would make a load of each number by itself
    col = tl.arange(0, BLOCK)
    x_at, y_at = x + row * x_stride, y + row * n
    if LOOP:
        # In each column of the block the largest number so far, and the sum of exp(number - largest); then the columns joined.
        largest, sums = tl.full((BLOCK,), float("-inf"), tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
        for start in range(0, end, BLOCK):
            at = start + col
            xs = tl.load(x_at + at, mask=(at < n) & (at < read), other=float("-inf")).to(tl.float32)
            xs = tl.where(at < end, xs, float("-inf"))
            above = tl.where(xs > largest, xs, largest)
            base = tl.where(above == float("-inf"), 0.0, above)
            sums = sums * tl.exp(largest - base) + tl.exp(xs - base)
            largest = above
        highest = tl.max(largest, axis=0)
        total = tl.sum(sums * tl.exp(largest - highest), axis=0)
        for start in range(0, n, BLOCK):
            at = start + col
            xs = tl.load(x_at + at, mask=(at < n) & (at < read), other=float("-inf")).to(tl.float32)
            xs = tl.where(at < end, xs, float("-inf"))
            tl.store(y_at + at, tl.exp(xs - highest) / total, mask=at < n)
    else:
        xs = tl.load(x_at + col, mask=(col < n) & (col < read), other=float("-inf")).to(tl.float32)
        xs = tl.where(col < end, xs, float("-inf"))
        powers = tl.exp(xs - tl.max(xs, axis=0))
        tl.store(y_at + col, powers / tl.sum(powers, axis=0), mask=col < n)
