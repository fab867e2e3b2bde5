"""Residual addition and RMSNorm in one pass, ROWS rows a program, arithmetic in fp32. Its backward is rms_norm_bwd."""

import triton
import triton.language as tl

from _aot import variants
from _norm import BLOCK
from _norm import LOOP_FORWARD
from _norm import normalise
from _norm import rms_axes


@variants(
    x="*X",
    residual="*X",
    weight="*W",
    s="*X",
    y="*Y",
    rstd="*fp32",
    x_stride="i32:16",
    residual_stride="i32:16",
    rows="i32",
    n="i32:16",
    eps="fp32",
    offset="fp32",
    has_weight="i32",
    cast="i32",
    **rms_axes(BLOCK, LOOP_FORWARD),
)
@triton.jit
def fused_add_rms_norm_fwd(
    x,
    residual,
    weight,
    s,
    y,
    rstd,
    x_stride,
    residual_stride,
    rows,
    n,
    eps,
    offset,
    has_weight,
    cast,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
):
    # What is normalised is the sum as it is stored, rounded: the same numbers that x + residual would hand to rms_norm.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    T: tl.constexpr = x.dtype.element_ty
    x_at, residual_at = x + row[:, None] * x_stride, residual + row[:, None] * residual_stride
    at, real = row[:, None] * n, (row < rows)[:, None]

    if LOOP:
        squares = tl.full((ROWS, BLOCK), 0.0, tl.float32)
        for start in range(0, n, BLOCK):
            keep = (start + col < n)[None, :] & real
            xs = tl.load(x_at + (start + col)[None, :], mask=keep, other=0.0).to(tl.float32)
            rs = tl.load(residual_at + (start + col)[None, :], mask=keep, other=0.0).to(tl.float32)
            sums = (xs + rs).to(T)
            tl.store(s + at + (start + col)[None, :], sums, mask=keep)
            squares += sums.to(tl.float32) * sums.to(tl.float32)
        scale = tl.rsqrt(tl.sum(squares, axis=1) / n + eps)
        tl.debug_barrier()  # every thread's stores to s, before any thread's loads from it
        for start in range(0, n, BLOCK):
            keep = start + col < n
            both = keep[None, :] & real
            ss = tl.load(s + at + (start + col)[None, :], mask=both, other=0.0).to(tl.float32)
            ws = tl.load(weight + start + col, mask=keep & (has_weight != 0), other=0.0).to(tl.float32)
            ys, _ = normalise(ss, ws, scale, offset, cast, T)
            tl.store(y + at + (start + col)[None, :], ys, mask=both)
    else:
        keep = col < n
        both = keep[None, :] & real
        xs = tl.load(x_at + col[None, :], mask=both, other=0.0).to(tl.float32)
        rs = tl.load(residual_at + col[None, :], mask=both, other=0.0).to(tl.float32)
        ws = tl.load(weight + col, mask=keep & (has_weight != 0), other=0.0).to(tl.float32)
        sums = (xs + rs).to(T)
        tl.store(s + at + col[None, :], sums, mask=both)
        ss = sums.to(tl.float32)
        scale = tl.rsqrt(tl.sum(ss * ss, axis=1) / n + eps)
        ys, _ = normalise(ss, ws, scale, offset, cast, T)
        tl.store(y + at + col[None, :], ys, mask=both)
    tl.store(rstd + row, scale, mask=row < rows)
