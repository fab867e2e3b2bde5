"""Dynamic Tanh, BLOCK columns a program, arithmetic in fp32."""

import triton
import triton.language as tl

from _aot import variants
from _math import tanh

DTYPES = [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32")]  # (x, parameters)
AXES = {
    "X": ["fp32", "bf16", "fp16"],
    "W": ["fp32", "bf16", "fp16"],
    "BLOCK": [1024],
    "num_warps": 4,
    "where": lambda X, W: (X, W) in DTYPES,
}


@variants(
    x="*X",
    alpha="*W",
    gamma="*W",
    beta="*W",
    y="*X",
    x_stride="i32:16",
    n="i32:16",
    has_beta="i32",
    **AXES,
)
@triton.jit
def dyt_fwd(x, alpha, gamma, beta, y, x_stride, n, has_beta, BLOCK: tl.constexpr):
    blocks = (n + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = col < n
    xs = tl.load(x + row * x_stride + col, mask=keep, other=0.0).to(tl.float32)
    gammas = tl.load(gamma + col, mask=keep, other=0.0).to(tl.float32)
    betas = tl.load(beta + col, mask=keep & (has_beta != 0), other=0.0).to(tl.float32)
    tl.store(y + row * n + col, tanh(tl.load(alpha).to(tl.float32) * xs) * gammas + betas, mask=keep)


@variants(
    dy="*X",
    x="*X",
    alpha="*W",
    gamma="*W",
    dx="*X",
    partial="*fp32",
    x_stride="i32:16",
    rows="i32",
    n="i32:16",
    **AXES,
)
@triton.jit
def dyt_bwd(dy, x, alpha, gamma, dx, partial, x_stride, rows, n, BLOCK: tl.constexpr):
    # Program (p, b) owns the rows p, p + P, p + 2P, ... of the columns of block b; partial[p] is its share of the gradients of
    # gamma, of beta, and of alpha in each column.
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = col < n
    a = tl.load(alpha).to(tl.float32)
    gammas = tl.load(gamma + col, mask=keep, other=0.0).to(tl.float32)
    dgammas, dbetas = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    dalphas = tl.full((BLOCK,), 0.0, tl.float32)
    for ahead in range(0, rows - tl.program_id(0), programs):
        row = program + ahead
        xs = tl.load(x + row * x_stride + col, mask=keep, other=0.0).to(tl.float32)
        dys = tl.load(dy + row * n + col, mask=keep, other=0.0).to(tl.float32)
        t = tanh(a * xs)
        inner = dys * gammas * (1.0 - t * t)
        tl.store(dx + row * n + col, inner * a, mask=keep)
        dgammas += dys * t
        dbetas += dys
        dalphas += inner * xs
    own = partial + program * 3 * n + col
    tl.store(own, dgammas, mask=keep)
    tl.store(own + n, dbetas, mask=keep)
    tl.store(own + 2 * n, dalphas, mask=keep)
