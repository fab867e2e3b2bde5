"""Rows of tokens in the order of experts, and back. BLOCK numbers of one row a program, or one row; sums in fp32.

A slot is one of the k experts of a token: order[row] is the slot of a row, position[slot] the row of a slot, -1 of none.
"""

import triton
import triton.language as tl

from _aot import variants
from _glu import place

DTYPES = [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32")]  # (rows, weights)
AXES = {
    "T": ["fp32", "bf16", "fp16"],
    "W": ["fp32", "bf16", "fp16"],
    "BLOCK": [1024],
    "num_warps": 4,
    "where": lambda T, W: (T, W) in DTYPES,
}


@variants(
    x="*T",
    order="*i64",
    y="*T",
    size="i64:16",
    x_stride="i32:16",
    k="i32",
    n="i32:16",
    T=["fp32", "fp16"],  # a copy of bf16 is one of fp16
    BLOCK=[1024],
    num_warps=4,
)
@triton.jit
def moe_permute_fwd(x, order, y, size, x_stride, k, n, BLOCK: tl.constexpr):
    row, col, at, keep = place(n, size, BLOCK)
    token = tl.load(order + row) // k
    tl.store(y + at, tl.load(x + token * x_stride + col, mask=keep, other=0.0), mask=keep)


@variants(
    x="*T",
    weight="*W",
    position="*i64",
    y="*T",
    size="i64:16",
    x_stride="i32:16",
    k="i32",
    n="i32:16",
    weighted="i32",
    maxnreg=64,  # left to itself, ptxas fits more programs by spilling three numbers
    **AXES,
)
@triton.jit
def moe_unpermute_fwd(x, weight, position, y, size, x_stride, k, n, weighted, BLOCK: tl.constexpr):
    token, col, at, keep = place(n, size, BLOCK)
    ys = tl.full((BLOCK,), 0.0, tl.float32)
    for i in range(k):
        row = tl.load(position + token * k + i)
        there = row >= 0
        w = tl.load(weight + token * k + i, mask=there & (weighted != 0), other=1.0).to(tl.float32)
        ys += w * tl.load(x + row * x_stride + col, mask=keep & there, other=0.0).to(tl.float32)
    tl.store(y + at, ys, mask=keep)


@variants(
    dy="*T",
    x="*T",
    weight="*W",
    order="*i64",
    position="*i64",
    dx="*T",
    dweight="*W",
    dy_stride="i32:16",
    x_stride="i32:16",
    k="i32",
    n="i32:16",
    **AXES,
)
@triton.jit
def moe_unpermute_bwd(dy, x, weight, order, position, dx, dweight, dy_stride, x_stride, k, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(order + row)
    there = tl.load(position + slot) >= 0
    w = tl.load(weight + slot, mask=there, other=0.0).to(tl.float32)
    col = tl.arange(0, BLOCK)
    products = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, n, BLOCK):
        keep = start + col < n
        dys = tl.load(dy + slot // k * dy_stride + start + col, mask=keep & there, other=0.0).to(tl.float32)
        xs = tl.load(x + row * x_stride + start + col, mask=keep & there, other=0.0).to(tl.float32)
        tl.store(dx + row * n + start + col, w * dys, mask=keep)
        products += dys * xs
    tl.store(dweight + slot, tl.sum(products, axis=0))
