"""Softmax of rows, one a program, arithmetic in fp32. A row wider than the largest BLOCK is walked in a loop."""

import triton
import triton.language as tl

from _aot import variants

BLOCK = [1024, 4096]
AXES = {
    "T": ["fp32", "bf16", "fp16"],
    "BLOCK": BLOCK,
    "LOOP": [False, True],
    "num_warps": lambda BLOCK: BLOCK // 512,
    "where": lambda BLOCK, LOOP: not LOOP or BLOCK == 4096,
}


@variants(x="*T", y="*T", x_stride="i32:16", n="i32:16", **AXES)
@triton.jit
def softmax_fwd(x, y, x_stride, n, BLOCK: tl.constexpr, LOOP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x_at, y_at = x + row * x_stride, y + row * n
    if LOOP:
        # In each column of the block the largest number so far, and the sum of exp(number - largest); then the columns joined.
        largest, sums = tl.full((BLOCK,), float("-inf"), tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
        for start in range(0, n, BLOCK):
            xs = tl.load(x_at + start + col, mask=start + col < n, other=float("-inf")).to(tl.float32)
            above = tl.where(xs > largest, xs, largest)
            base = tl.where(above == float("-inf"), 0.0, above)
            sums = sums * tl.exp(largest - base) + tl.exp(xs - base)
            largest = above
        highest = tl.max(largest, axis=0)
        total = tl.sum(sums * tl.exp(largest - highest), axis=0)
        for start in range(0, n, BLOCK):
            keep = start + col < n
            xs = tl.load(x_at + start + col, mask=keep, other=float("-inf")).to(tl.float32)
            tl.store(y_at + start + col, tl.exp(xs - highest) / total, mask=keep)
    else:
        xs = tl.load(x_at + col, mask=col < n, other=float("-inf")).to(tl.float32)
        powers = tl.exp(xs - tl.max(xs, axis=0))
        tl.store(y_at + col, powers / tl.sum(powers, axis=0), mask=col < n)


@variants(dy="*T", y="*T", dx="*T", dy_stride="i32:16", n="i32:16", **AXES)
@triton.jit
def softmax_bwd(dy, y, dx, dy_stride, n, BLOCK: tl.constexpr, LOOP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    dy_at, at = dy + row * dy_stride, row * n
    if LOOP:
        products = tl.full((BLOCK,), 0.0, tl.float32)
        for start in range(0, n, BLOCK):
            keep = start + col < n
            dys = tl.load(dy_at + start + col, mask=keep, other=0.0).to(tl.float32)
            products += dys * tl.load(y + at + start + col, mask=keep, other=0.0).to(tl.float32)
        total = tl.sum(products, axis=0)
        for start in range(0, n, BLOCK):
            keep = start + col < n
            dys = tl.load(dy_at + start + col, mask=keep, other=0.0).to(tl.float32)
            ys = tl.load(y + at + start + col, mask=keep, other=0.0).to(tl.float32)
            tl.store(dx + at + start + col, ys * (dys - total), mask=keep)
    else:
        dys = tl.load(dy_at + col, mask=col < n, other=0.0).to(tl.float32)
        ys = tl.load(y + at + col, mask=col < n, other=0.0).to(tl.float32)
        tl.store(dx + at + col, ys * (dys - tl.sum(dys * ys, axis=0)), mask=col < n)
