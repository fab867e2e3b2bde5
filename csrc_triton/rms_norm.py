"""RMSNorm, ROWS rows a program, arithmetic in fp32. A row wider than the largest BLOCK is walked in a loop."""

import triton
import triton.language as tl

from _aot import variants
from _norm import BLOCK
from _norm import LOOP_BACKWARD
from _norm import LOOP_FORWARD
from _norm import normalise
from _norm import rms_axes

BLOCKS = [128, *BLOCK]


@variants(
    x="*X",
    weight="*W",
    y="*Y",
    rstd="*fp32",
    x_stride="i32:16",
    rows="i32",
    n="i32:16",
    eps="fp32",
    offset="fp32",
    has_weight="i32",
    cast="i32",
    **rms_axes(BLOCKS, LOOP_FORWARD),
)
@triton.jit
def rms_norm_fwd(
    x,
    weight,
    y,
    rstd,
    x_stride,
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
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    T: tl.constexpr = x.dtype.element_ty
    x_at, y_at, real = x + row[:, None] * x_stride, y + row[:, None] * n, (row < rows)[:, None]

    if LOOP:
        squares = tl.full((ROWS, BLOCK), 0.0, tl.float32)
        for start in range(0, n, BLOCK):
            keep = (start + col < n)[None, :] & real
            xs = tl.load(x_at + (start + col)[None, :], mask=keep, other=0.0).to(tl.float32)
            squares += xs * xs
        scale = tl.rsqrt(tl.sum(squares, axis=1) / n + eps)
        for start in range(0, n, BLOCK):
            keep = start + col < n
            xs = tl.load(x_at + (start + col)[None, :], mask=keep[None, :] & real, other=0.0).to(tl.float32)
            ws = tl.load(weight + start + col, mask=keep & (has_weight != 0), other=0.0).to(tl.float32)
            ys, _ = normalise(xs, ws, scale, offset, cast, T)
            tl.store(y_at + (start + col)[None, :], ys, mask=keep[None, :] & real)
    else:
        keep = col < n
        xs = tl.load(x_at + col[None, :], mask=keep[None, :] & real, other=0.0).to(tl.float32)
        ws = tl.load(weight + col, mask=keep & (has_weight != 0), other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(xs * xs, axis=1) / n + eps)
        ys, _ = normalise(xs, ws, scale, offset, cast, T)
        tl.store(y_at + col[None, :], ys, mask=keep[None, :] & real)
    tl.store(rstd + row, scale, mask=row < rows)


@variants(
    dy="*Y",
    x="*X",
    weight="*W",
    rstd="*fp32",
    ds="*X",
    dx="*X",
    dw="*fp32",
    x_stride="i32:16",
    rows="i32",
    n="i32:16",
    offset="fp32",
    has_weight="i32",
    cast="i32",
    has_ds="i32",
    need_dw="i32",
    **rms_axes(BLOCKS, LOOP_BACKWARD),
)
@triton.jit
def rms_norm_bwd(
    dy,
    x,
    weight,
    rstd,
    ds,
    dx,
    dw,
    x_stride,
    rows,
    n,
    offset,
    has_weight,
    cast,
    has_ds,
    need_dw,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
):
    # Program p owns the row groups p, p + P, p + 2P, ...; dw[p] is its share of the weight gradient.
    # ds, a gradient that reaches x by another way, is added to dx: the residual's, in fused_add_rms_norm.
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    T: tl.constexpr = x.dtype.element_ty
    own, step = dw + program * n, tl.num_programs(0) * ROWS

    if LOOP:
        for first in range(tl.program_id(0) * ROWS, rows, step):
            row = (first + tl.arange(0, ROWS)).to(tl.int64)
            real = (row < rows)[:, None]
            x_at, at = row[:, None] * x_stride, row[:, None] * n
            scale = tl.load(rstd + row, mask=row < rows, other=0.0)
            products = tl.full((ROWS, BLOCK), 0.0, tl.float32)
            for start in range(0, n, BLOCK):
                keep = start + col < n
                both = keep[None, :] & real
                xs = tl.load(x + x_at + (start + col)[None, :], mask=both, other=0.0).to(tl.float32)
                dys = tl.load(dy + at + (start + col)[None, :], mask=both, other=0.0).to(tl.float32)
                ws = tl.load(weight + start + col, mask=keep & (has_weight != 0), other=0.0).to(tl.float32)
                products += xs * dys * (offset + ws)[None, :]
            mean = tl.sum(products, axis=1) * scale / n
            for start in range(0, n, BLOCK):
                keep = start + col < n
                both = keep[None, :] & real
                xs = tl.load(x + x_at + (start + col)[None, :], mask=both, other=0.0).to(tl.float32)
                dys = tl.load(dy + at + (start + col)[None, :], mask=both, other=0.0).to(tl.float32)
                ws = tl.load(weight + start + col, mask=keep & (has_weight != 0), other=0.0).to(tl.float32)
                rest = tl.load(ds + at + (start + col)[None, :], mask=both & (has_ds != 0), other=0.0).to(tl.float32)
                _, xhat = normalise(xs, ws, scale, offset, cast, T)
                wdy = dys * (offset + ws)[None, :]
                dxs = (wdy - xs * scale[:, None] * mean[:, None]) * scale[:, None] + rest
                tl.store(dx + at + (start + col)[None, :], dxs, mask=both)
                # This program wrote these numbers for the row before; the sum above is a barrier between the two.
                before = tl.load(own + start + col, mask=keep & (first >= step) & (need_dw != 0), other=0.0)
                tl.store(own + start + col, before + tl.sum(dys * xhat, axis=0), mask=keep & (need_dw != 0))
    else:
        keep = col < n
        ws = tl.load(weight + col, mask=keep & (has_weight != 0), other=0.0).to(tl.float32)
        dws = tl.full((ROWS, BLOCK), 0.0, tl.float32)
        for first in range(tl.program_id(0) * ROWS, rows, step):
            row = (first + tl.arange(0, ROWS)).to(tl.int64)
            both = keep[None, :] & (row < rows)[:, None]
            at = row[:, None] * n + col[None, :]
            scale = tl.load(rstd + row, mask=row < rows, other=0.0)
            xs = tl.load(x + row[:, None] * x_stride + col[None, :], mask=both, other=0.0).to(tl.float32)
            dys = tl.load(dy + at, mask=both, other=0.0).to(tl.float32)
            rest = tl.load(ds + at, mask=both & (has_ds != 0), other=0.0).to(tl.float32)
            _, xhat = normalise(xs, ws, scale, offset, cast, T)
            wdy = dys * (offset + ws)[None, :]
            mean = tl.sum(xs * wdy, axis=1) * scale / n
            tl.store(dx + at, (wdy - xs * scale[:, None] * mean[:, None]) * scale[:, None] + rest, mask=both)
            dws += dys * xhat
        tl.store(own + col, tl.sum(dws, axis=0), mask=keep & (need_dw != 0))
