"""GeGLU, BLOCK numbers of one row a program, arithmetic in fp32. Contiguous tensors come as rows of BLOCK numbers."""

import triton
import triton.language as tl

from _aot import variants
from _glu import place
from _math import sigmoid

AXES = {"T": ["fp32", "bf16", "fp16"], "BLOCK": [1024], "TANH": [True, False], "num_warps": 4}


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """(p, q) such that gelu(x) = x · p, whose derivative is p + x · q."""
    if TANH:
        # (1 + tanh(z)) / 2 = sigmoid(2 z), which does not cancel for negative z. By x = 100 it is long 0 or 1: the bound
        # keeps the square from overflowing, which would make the derivative 0 · infinity.
        square = tl.minimum(x * x, 10000.0)
        p = sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        q = p * (1.0 - p) * 1.5957691216057308 * (1.0 + 0.134145 * square)
    else:
        p = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        q = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return p, q


@variants(gate="*T", up="*T", y="*T", size="i64:16", gate_stride="i32:16", up_stride="i32:16", n="i32:16", **AXES)
@triton.jit
def geglu_fwd(gate, up, y, size, gate_stride, up_stride, n, BLOCK: tl.constexpr, TANH: tl.constexpr):
    row, col, at, keep = place(n, size, BLOCK)
    g = tl.load(gate + row * gate_stride + col, mask=keep, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=keep, other=0.0).to(tl.float32)
    p, _ = gelu(g, TANH)
    tl.store(y + at, g * p * u, mask=keep)


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
    **AXES,
)
@triton.jit
def geglu_bwd(
    dy, gate, up, dgate, dup, size, dy_stride, gate_stride, up_stride, d_stride, n, BLOCK: tl.constexpr, TANH: tl.constexpr
):
    row, col, _, keep = place(n, size, BLOCK)
    dys = tl.load(dy + row * dy_stride + col, mask=keep, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + col, mask=keep, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=keep, other=0.0).to(tl.float32)
    p, q = gelu(g, TANH)
    tl.store(dgate + row * d_stride + col, dys * u * (p + g * q), mask=keep)
    tl.store(dup + row * d_stride + col, dys * g * p, mask=keep)
