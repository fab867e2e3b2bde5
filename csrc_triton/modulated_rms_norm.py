"""RMSNorm whose rows are scaled and shifted, each group of rows alike, arithmetic in fp32."""

import triton
import triton.language as tl

from _aot import variants
from _norm import normalise

DTYPES = [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32")]  # (x, scale and the others)
AXES = {"X": ["fp32", "bf16", "fp16"], "W": ["fp32", "bf16", "fp16"]}


@variants(
    x="*X",
    weight="*W",
    scale="*W",
    shift="*W",
    y="*X",
    rstd="*fp32",
    x_stride="i32:16",
    scale_stride="i32:16",
    shift_stride="i32:16",
    each="i32",
    n="i32:16",
    eps="fp32",
    offset="fp32",
    has_weight="i32",
    has_shift="i32",
    cast="i32",
    **AXES,
    BLOCK=[2048],
    num_warps=4,
    where=lambda X, W: (X, W) in DTYPES,
)
@triton.jit
def modulated_rms_norm_fwd(
    x,
    weight,
    scale,
    shift,
    y,
    rstd,
    x_stride,
    scale_stride,
    shift_stride,
    each,
    n,
    eps,
    offset,
    has_weight,
    has_shift,
    cast,
    BLOCK: tl.constexpr,
):
    # A group is `each` rows, for which scale and shift have one. A row is walked in a loop.
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    group = row // each
    col = tl.arange(0, BLOCK)
    T: tl.constexpr = x.dtype.element_ty
    x_at, y_at = x + row[:, None] * x_stride, y + row[:, None] * n
    scale_at, shift_at = scale + group[:, None] * scale_stride, shift + group[:, None] * shift_stride

    squares = tl.full((1, BLOCK), 0.0, tl.float32)
    for start in range(0, n, BLOCK):
        at = (start + col)[None, :]
        xs = tl.load(x_at + at, mask=at < n, other=0.0).to(tl.float32)
        squares += xs * xs
    r = tl.rsqrt(tl.sum(squares, axis=1) / n + eps)
    for start in range(0, n, BLOCK):
        keep = start + col < n
        at, real = (start + col)[None, :], keep[None, :]
        xs = tl.load(x_at + at, mask=real, other=0.0).to(tl.float32)
        ws = tl.load(weight + start + col, mask=keep & (has_weight != 0), other=0.0).to(tl.float32)
        scales = tl.load(scale_at + at, mask=real, other=0.0).to(tl.float32)
        shifts = tl.load(shift_at + at, mask=real & (has_shift != 0), other=0.0).to(tl.float32)
        normal, _ = normalise(xs, ws, r, offset, cast, T)
        tl.store(y_at + at, normal * (1.0 + scales) + shifts, mask=real)
    tl.store(rstd + row, r)


@variants(
    dy="*X",
    x="*X",
    weight="*W",
    scale="*W",
    rstd="*fp32",
    dx="*X",
    dscale="*W",
    dshift="*W",
    dscale_parts="*fp32",
    dshift_parts="*fp32",
    dw="*fp32",
    x_stride="i32:16",
    scale_stride="i32:16",
    groups="i32",
    each="i32",
    n="i32:16",
    offset="fp32",
    has_weight="i32",
    cast="i32",
    need_dw="i32",
    need_dscale="i32",
    need_dshift="i32",
    whole="i32",
    **AXES,
    BLOCK=[2048, 4096],
    LOOP=[False, True],
    num_warps=8,
    where=lambda X, W, BLOCK, LOOP: (X, W) in DTYPES and (not LOOP or BLOCK == 4096),
)
@triton.jit
def modulated_rms_norm_bwd(
    dy,
    x,
    weight,
    scale,
    rstd,
    dx,
    dscale,
    dshift,
    dscale_parts,
    dshift_parts,
    dw,
    x_stride,
    scale_stride,
    groups,
    each,
    n,
    offset,
    has_weight,
    cast,
    need_dw,
    need_dscale,
    need_dshift,
    whole,
    BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
):
    # Program (p, g) owns the groups g, g + G, g + 2G, ..., and of each the rows p, p + P, p + 2P, ...; dw[p, g] is its share of
    # the gradient of weight. Its shares of a group's scale and shift are in dscale_parts[p] and dshift_parts[p], or, where it
    # owns all rows of its groups, whole, in dscale and dshift.
    part, parts = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    first, step = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    col = tl.arange(0, BLOCK)
    T: tl.constexpr = x.dtype.element_ty
    own = dw + (part * step + first) * n

    if LOOP:
        for ahead in range(0, groups - tl.program_id(1), step):
            group = first + ahead
            scale_at, share = scale + group * scale_stride, (part * groups + group) * n
            for later in range(0, each - tl.program_id(0), parts):
                row = group * each + part + later + tl.arange(0, 1)
                x_at, dy_at, dx_at = x + row[:, None] * x_stride, dy + row[:, None] * n, dx + row[:, None] * n
                r = tl.load(rstd + row)
                products = tl.full((1, BLOCK), 0.0, tl.float32)
                for start in range(0, n, BLOCK):
                    keep = start + col < n
                    at, real = (start + col)[None, :], keep[None, :]
                    xs = tl.load(x_at + at, mask=real, other=0.0).to(tl.float32)
                    dys = tl.load(dy_at + at, mask=real, other=0.0).to(tl.float32)
                    ws = tl.load(weight + start + col, mask=keep & (has_weight != 0), other=0.0).to(tl.float32)
                    scales = tl.load(scale_at + start + col, mask=keep, other=0.0).to(tl.float32)
                    products += xs * dys * ((1.0 + scales) * (offset + ws))[None, :]
                mean = tl.sum(products, axis=1) * r / n
                for start in range(0, n, BLOCK):
                    keep = start + col < n
                    at, real = (start + col)[None, :], keep[None, :]
                    xs = tl.load(x_at + at, mask=real, other=0.0).to(tl.float32)
                    dys = tl.load(dy_at + at, mask=real, other=0.0).to(tl.float32)
                    ws = tl.load(weight + start + col, mask=keep & (has_weight != 0), other=0.0).to(tl.float32)
                    scales = tl.load(scale_at + start + col, mask=keep, other=0.0).to(tl.float32)
                    normal, xhat = normalise(xs, ws, r, offset, cast, T)
                    scaled = dys * (1.0 + scales)[None, :]
                    dxs = (scaled * (offset + ws)[None, :] - xs * r[:, None] * mean[:, None]) * r[:, None]
                    tl.store(dx_at + at, dxs, mask=real)
                    # This program wrote these numbers for the row before; the sum above is a barrier between the two.
                    more = keep & (later != 0)
                    dscales = tl.load(dscale_parts + share + start + col, mask=more & (need_dscale != 0), other=0.0)
                    dscales += tl.sum(dys * normal, axis=0)
                    tl.store(dscale_parts + share + start + col, dscales, mask=keep & (need_dscale != 0))
                    dshifts = tl.load(dshift_parts + share + start + col, mask=more & (need_dshift != 0), other=0.0)
                    dshifts += tl.sum(dys, axis=0)
                    tl.store(dshift_parts + share + start + col, dshifts, mask=keep & (need_dshift != 0))
                    more = keep & ((later != 0) | (ahead != 0)) & (need_dw != 0)
                    dws = tl.load(own + start + col, mask=more, other=0.0) + tl.sum(scaled * xhat, axis=0)
                    tl.store(own + start + col, dws, mask=keep & (need_dw != 0))
    else:
        keep = col < n
        real = keep[None, :]
        ws = tl.load(weight + col, mask=keep & (has_weight != 0), other=0.0).to(tl.float32)
        dws = tl.full((1, BLOCK), 0.0, tl.float32)
        for ahead in range(0, groups - tl.program_id(1), step):
            group = first + ahead
            scales = tl.load(scale + group * scale_stride + col, mask=keep, other=0.0).to(tl.float32)
            dscales, dshifts = tl.full((1, BLOCK), 0.0, tl.float32), tl.full((1, BLOCK), 0.0, tl.float32)
            for later in range(0, each - tl.program_id(0), parts):
                row = group * each + part + later + tl.arange(0, 1)
                at = row[:, None] * n + col[None, :]
                r = tl.load(rstd + row)
                xs = tl.load(x + row[:, None] * x_stride + col[None, :], mask=real, other=0.0).to(tl.float32)
                dys = tl.load(dy + at, mask=real, other=0.0).to(tl.float32)
                normal, xhat = normalise(xs, ws, r, offset, cast, T)
                scaled = dys * (1.0 + scales)[None, :]
                wdy = scaled * (offset + ws)[None, :]
                mean = tl.sum(xs * wdy, axis=1) * r / n
                tl.store(dx + at, (wdy - xs * r[:, None] * mean[:, None]) * r[:, None], mask=real)
                dws += scaled * xhat
                dscales += dys * normal
                dshifts += dys
            share, alone = (part * groups + group) * n, group * n
            dscales, dshifts = tl.sum(dscales, axis=0), tl.sum(dshifts, axis=0)
            tl.store(dscale_parts + share + col, dscales, mask=keep & (need_dscale != 0) & (whole == 0))
            tl.store(dshift_parts + share + col, dshifts, mask=keep & (need_dshift != 0) & (whole == 0))
            tl.store(dscale + alone + col, dscales, mask=keep & (need_dscale != 0) & (whole != 0))
            tl.store(dshift + alone + col, dshifts, mask=keep & (need_dshift != 0) & (whole != 0))
        tl.store(own + col, tl.sum(dws, axis=0), mask=keep & (need_dw != 0))
