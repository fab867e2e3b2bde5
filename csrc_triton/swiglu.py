"""SwiGLU, BLOCK numbers of one row a program, arithmetic in fp32. Contiguous tensors come as rows of BLOCK numbers."""

import triton
import triton.language as tl

from _aot import variants
from _glu import place
from _math import sigmoid

AXES = {"T": ["fp32", "bf16", "fp16"], "BLOCK": [1024], "num_warps": 4}


@variants(
    gate="*T",
    up="*T",
    y="*T",
    size="i64:16",
    gate_stride="i32:16",
    up_stride="i32:16",
    n="i32:16",
    gate_multiplier="fp32",
    down_multiplier="fp32",
    **AXES,
)
@triton.jit
def swiglu_fwd(gate, up, y, size, gate_stride, up_stride, n, gate_multiplier, down_multiplier, BLOCK: tl.constexpr):
    row, col, at, keep = place(n, size, BLOCK)
    g = tl.load(gate + row * gate_stride + col, mask=keep, other=0.0).to(tl.float32) * gate_multiplier
    u = tl.load(up + row * up_stride + col, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + at, g * sigmoid(g) * u * down_multiplier, mask=keep)


@variants(
    dy="*T",
    gate="*T",
    up="*T",
    dgate="*T",
    dup="*T",
    size="i64:16",
    dy_stride="i32:16",
    gate_stride="i32:16",
    up_stride="i32:16",
    d_stride="i32:16",
    n="i32:16",
    gate_multiplier="fp32",
    down_multiplier="fp32",
    **AXES,
)
@triton.jit
def swiglu_bwd(
    dy,
    gate,
    up,
    dgate,
    dup,
    size,
    dy_stride,
    gate_stride,
    up_stride,
    d_stride,
    n,
    gate_multiplier,
    down_multiplier,
    BLOCK: tl.constexpr,
):
    row, col, _, keep = place(n, size, BLOCK)
    dys = tl.load(dy + row * dy_stride + col, mask=keep, other=0.0).to(tl.float32) * down_multiplier
    g = tl.load(gate + row * gate_stride + col, mask=keep, other=0.0).to(tl.float32) * gate_multiplier
    u = tl.load(up + row * up_stride + col, mask=keep, other=0.0).to(tl.float32)
    s = sigmoid(g)
    tl.store(dgate + row * d_stride + col, dys * u * (s + g * s * (1.0 - s)) * gate_multiplier, mask=keep)
    tl.store(dup + row * d_stride + col, dys * g * s, mask=keep)
