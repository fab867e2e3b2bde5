"""Squared ReLU, BLOCK numbers of one row a program, arithmetic in fp32. Contiguous tensors come as rows of BLOCK numbers."""

import triton
import triton.language as tl

from _aot import variants
from _glu import place

AXES = {"T": ["fp32", "bf16", "fp16"], "BLOCK": [1024], "num_warps": 4}


@triton.jit
def relu(x):
    return tl.where(x <= 0.0, 0.0, x)  # what is no number stays none


@variants(x="*T", y="*T", size="i64:16", x_stride="i32:16", n="i32:16", **AXES)
@triton.jit
def relu_squared_fwd(x, y, size, x_stride, n, BLOCK: tl.constexpr):
    row, col, at, keep = place(n, size, BLOCK)
    positive = relu(tl.load(x + row * x_stride + col, mask=keep, other=0.0).to(tl.float32))
    tl.store(y + at, positive * positive, mask=keep)


@variants(dy="*T", x="*T", dx="*T", size="i64:16", dy_stride="i32:16", x_stride="i32:16", n="i32:16", **AXES)
@triton.jit
def relu_squared_bwd(dy, x, dx, size, dy_stride, x_stride, n, BLOCK: tl.constexpr):
    row, col, at, keep = place(n, size, BLOCK)
    dys = tl.load(dy + row * dy_stride + col, mask=keep, other=0.0).to(tl.float32)
    positive = relu(tl.load(x + row * x_stride + col, mask=keep, other=0.0).to(tl.float32))
    tl.store(dx + at, 2.0 * positive * dys, mask=keep)
