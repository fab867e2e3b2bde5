"""Sparsemax of rows, one a program, arithmetic in fp32. A row wider than 1024 is walked in a loop, again and again."""

import triton
import triton.language as tl

from _aot import variants

AXES = {
    "T": ["fp32", "bf16", "fp16"],
    "BLOCK": [1024, 4096],
    "LOOP": [False, True],
    "num_warps": lambda BLOCK: BLOCK // 512,
    "where": lambda BLOCK, LOOP: LOOP is (BLOCK == 4096),
}


@variants(x="*T", y="*T", x_stride="i32:16", n="i32:16", **AXES)
@triton.jit
def sparsemax_fwd(x, y, x_stride, n, BLOCK: tl.constexpr, LOOP: tl.constexpr):
    # Newton's method on Σ max(z - threshold, 0) = 1 from below, z being x less its largest number: each step leaves out
    # numbers that are too small, and ends the search where it leaves out none. What is not a number makes the row that.
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x_at, y_at = x + row * x_stride, y + row * n
    if LOOP:
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, n, BLOCK):
            xs = tl.load(x_at + start + col, mask=start + col < n, other=float("-inf")).to(tl.float32)
            largest = tl.where(xs > largest, xs, largest)
        highest = tl.max(largest, axis=0)
        threshold, before, count = -1.0, n + 2, n + 1
        while count < before:
            sums, counts = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0, tl.int32)
            for start in range(0, n, BLOCK):
                keep = start + col < n
                zs = tl.load(x_at + start + col, mask=keep, other=float("-inf")).to(tl.float32) - highest
                small = (zs <= threshold) | (start + col >= n)
                sums += tl.where(small, 0.0, zs)
                counts += tl.where(small, 0, 1)
            before, count = count, tl.sum(counts, axis=0)
            threshold = (tl.sum(sums, axis=0) - 1.0) / count
        for start in range(0, n, BLOCK):
            keep = start + col < n
            zs = tl.load(x_at + start + col, mask=keep, other=float("-inf")).to(tl.float32) - highest
            tl.store(y_at + start + col, tl.where(zs <= threshold, 0.0, zs - threshold), mask=keep)
    else:
        keep = col < n
        xs = tl.load(x_at + col, mask=keep, other=float("-inf")).to(tl.float32)
        zs = xs - tl.max(xs, axis=0)
        threshold, before, count = -1.0, n + 2, n + 1
        while count < before:
            small = (zs <= threshold) | (col >= n)
            before, count = count, tl.sum(tl.where(small, 0, 1), axis=0)
            threshold = (tl.sum(tl.where(small, 0.0, zs), axis=0) - 1.0) / count
        tl.store(y_at + col, tl.where(zs <= threshold, 0.0, zs - threshold), mask=keep)


@variants(dy="*T", y="*T", dx="*T", dy_stride="i32:16", n="i32:16", **AXES)
@triton.jit
def sparsemax_bwd(dy, y, dx, dy_stride, n, BLOCK: tl.constexpr, LOOP: tl.constexpr):
    # Of what is not zero, the gradient less its mean.
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    dy_at, at = dy + row * dy_stride, row * n
    if LOOP:
        sums, counts = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0, tl.int32)
        for start in range(0, n, BLOCK):
            keep = start + col < n
            dys = tl.load(dy_at + start + col, mask=keep, other=0.0).to(tl.float32)
            positive = tl.load(y + at + start + col, mask=keep, other=0.0).to(tl.float32) > 0
            sums += tl.where(positive, dys, 0.0)
            counts += tl.where(positive, 1, 0)
        mean = tl.sum(sums, axis=0) / tl.sum(counts, axis=0)
        for start in range(0, n, BLOCK):
            keep = start + col < n
            dys = tl.load(dy_at + start + col, mask=keep, other=0.0).to(tl.float32)
            positive = tl.load(y + at + start + col, mask=keep, other=0.0).to(tl.float32) > 0
            tl.store(dx + at + start + col, tl.where(positive, dys - mean, 0.0), mask=keep)
    else:
        keep = col < n
        dys = tl.load(dy_at + col, mask=keep, other=0.0).to(tl.float32)
        positive = tl.load(y + at + col, mask=keep, other=0.0).to(tl.float32) > 0
        mean = tl.sum(tl.where(positive, dys, 0.0), axis=0) / tl.sum(tl.where(positive, 1, 0), axis=0)
        tl.store(dx + at + col, tl.where(positive, dys - mean, 0.0), mask=keep)
