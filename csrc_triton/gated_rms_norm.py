"""RMSNorm of groups of columns with a gate, ROWS rows a program, arithmetic in fp32. A wide group is walked in a loop."""

import triton
import triton.language as tl

from _aot import variants
from _math import sigmoid

DTYPES = [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32")]  # (x and gate, weight)
ROWS = {128: 8, 1024: 1, 4096: 1}


def declared(X, W, ROWS, BLOCK, LOOP):
    return (X, W) in DTYPES and globals()["ROWS"][BLOCK] == ROWS and (not LOOP or BLOCK == 4096)


AXES = {
    "X": ["fp32", "bf16", "fp16"],
    "W": ["fp32", "bf16", "fp16"],
    "ROWS": [1, 8],
    "BLOCK": [128, 1024, 4096],
    "LOOP": [False, True],
    "num_warps": lambda BLOCK: 16 if BLOCK == 4096 else 4,
    "where": declared,
}


@triton.jit
def activation(gs, silu):
    """silu or sigmoid of gs, and its derivative."""
    s = sigmoid(gs)
    return tl.where(silu != 0, gs * s, s), tl.where(silu != 0, s + gs * s * (1.0 - s), s * (1.0 - s))


@triton.jit
def product(us, ws, scale, cast, last, T: tl.constexpr, W: tl.constexpr):
    """(us · scale, the same rounded to T where cast says so, that times ws, which a gate that comes last meets rounded too)."""
    uhat = us * scale
    xhat = tl.where(cast != 0, uhat.to(T).to(tl.float32), uhat)
    zs = xhat * ws
    return uhat, xhat, tl.where((cast != 0) & (last != 0), zs.to(W).to(tl.float32), zs)


@variants(
    x="*X",
    gate="*X",
    weight="*W",
    y="*X",
    rstd="*fp32",
    x_stride="i32:16",
    gate_stride="i32:16",
    rows="i32",
    n="i32:16",
    eps="fp32",
    cast="i32",
    last="i32",
    silu="i32",
    **AXES,
)
@triton.jit
def gated_rms_norm_fwd(
    x,
    gate,
    weight,
    y,
    rstd,
    x_stride,
    gate_stride,
    rows,
    n,
    eps,
    cast,
    last,
    silu,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group, groups = tl.program_id(1), tl.num_programs(1)
    col = tl.arange(0, BLOCK)
    T: tl.constexpr = x.dtype.element_ty
    W: tl.constexpr = weight.dtype.element_ty
    real = (row < rows)[:, None]
    x_at, gate_at = x + row[:, None] * x_stride + group * n, gate + row[:, None] * gate_stride + group * n
    y_at, weight_at = y + (row[:, None] * groups + group) * n, weight + group * n

    if LOOP:
        squares = tl.full((ROWS, BLOCK), 0.0, tl.float32)
        for start in range(0, n, BLOCK):
            keep = (start + col < n)[None, :] & real
            xs = tl.load(x_at + (start + col)[None, :], mask=keep, other=0.0).to(tl.float32)
            gs = tl.load(gate_at + (start + col)[None, :], mask=keep & (last == 0), other=0.0).to(tl.float32)
            acts, _ = activation(gs, silu)
            us = tl.where(last != 0, xs, xs * acts)
            squares += us * us
        scale = tl.rsqrt(tl.sum(squares, axis=1) / n + eps)
        for start in range(0, n, BLOCK):
            keep = (start + col < n)[None, :] & real
            xs = tl.load(x_at + (start + col)[None, :], mask=keep, other=0.0).to(tl.float32)
            gs = tl.load(gate_at + (start + col)[None, :], mask=keep, other=0.0).to(tl.float32)
            ws = tl.load(weight_at + start + col, mask=start + col < n, other=0.0).to(tl.float32)[None, :]
            acts, _ = activation(gs, silu)
            _, _, zs = product(tl.where(last != 0, xs, xs * acts), ws, scale[:, None], cast, last, T, W)
            tl.store(y_at + (start + col)[None, :], tl.where(last != 0, zs * acts, zs), mask=keep)
    else:
        keep = (col < n)[None, :] & real
        xs = tl.load(x_at + col[None, :], mask=keep, other=0.0).to(tl.float32)
        gs = tl.load(gate_at + col[None, :], mask=keep, other=0.0).to(tl.float32)
        ws = tl.load(weight_at + col, mask=col < n, other=0.0).to(tl.float32)[None, :]
        acts, _ = activation(gs, silu)
        us = tl.where(last != 0, xs, xs * acts)
        scale = tl.rsqrt(tl.sum(us * us, axis=1) / n + eps)
        _, _, zs = product(us, ws, scale[:, None], cast, last, T, W)
        tl.store(y_at + col[None, :], tl.where(last != 0, zs * acts, zs), mask=keep)
    tl.store(rstd + row * groups + group, scale, mask=row < rows)


@variants(
    dy="*X",
    x="*X",
    gate="*X",
    weight="*W",
    rstd="*fp32",
    dx="*X",
    dgate="*X",
    dw="*fp32",
    x_stride="i32:16",
    gate_stride="i32:16",
    rows="i32",
    n="i32:16",
    cast="i32",
    last="i32",
    silu="i32",
    # Without a bound of its own, ptxas spills one or two numbers to fit more programs.
    maxnreg=lambda LOOP: 96 if LOOP else 128,
    **AXES,
)
@triton.jit
def gated_rms_norm_bwd(
    dy,
    x,
    gate,
    weight,
    rstd,
    dx,
    dgate,
    dw,
    x_stride,
    gate_stride,
    rows,
    n,
    cast,
    last,
    silu,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
):
    # Program (p, g) owns the row groups p, p + P, p + 2P, ... of the columns of group g; dw[p] is its share of the gradient.
    program, group, groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    col = tl.arange(0, BLOCK)
    T: tl.constexpr = x.dtype.element_ty
    W: tl.constexpr = weight.dtype.element_ty
    own, step = dw + (program * groups + group) * n, tl.num_programs(0) * ROWS
    weight_at = weight + group * n

    if LOOP:
        for first in range(tl.program_id(0) * ROWS, rows, step):
            row = (first + tl.arange(0, ROWS)).to(tl.int64)
            real = (row < rows)[:, None]
            x_at, gate_at = x + row[:, None] * x_stride + group * n, gate + row[:, None] * gate_stride + group * n
            at = (row[:, None] * groups + group) * n
            scale = tl.load(rstd + row * groups + group, mask=row < rows, other=0.0)[:, None]
            products = tl.full((ROWS, BLOCK), 0.0, tl.float32)
            for start in range(0, n, BLOCK):
                keep = (start + col < n)[None, :] & real
                xs = tl.load(x_at + (start + col)[None, :], mask=keep, other=0.0).to(tl.float32)
                gs = tl.load(gate_at + (start + col)[None, :], mask=keep, other=0.0).to(tl.float32)
                dys = tl.load(dy + at + (start + col)[None, :], mask=keep, other=0.0).to(tl.float32)
                ws = tl.load(weight_at + start + col, mask=start + col < n, other=0.0).to(tl.float32)[None, :]
                acts, _ = activation(gs, silu)
                products += tl.where(last != 0, xs, xs * acts) * tl.where(last != 0, dys * acts, dys) * ws
            mean = (tl.sum(products, axis=1) / n)[:, None] * scale
            for start in range(0, n, BLOCK):
                keep = (start + col < n)[None, :] & real
                xs = tl.load(x_at + (start + col)[None, :], mask=keep, other=0.0).to(tl.float32)
                gs = tl.load(gate_at + (start + col)[None, :], mask=keep, other=0.0).to(tl.float32)
                dys = tl.load(dy + at + (start + col)[None, :], mask=keep, other=0.0).to(tl.float32)
                ws = tl.load(weight_at + start + col, mask=start + col < n, other=0.0).to(tl.float32)[None, :]
                acts, slopes = activation(gs, silu)
                uhat, xhat, zs = product(tl.where(last != 0, xs, xs * acts), ws, scale, cast, last, T, W)
                dzs = tl.where(last != 0, dys * acts, dys)
                dus = (dzs * ws - uhat * mean) * scale
                tl.store(dx + at + (start + col)[None, :], tl.where(last != 0, dus, dus * acts), mask=keep)
                tl.store(dgate + at + (start + col)[None, :], tl.where(last != 0, dys * zs, dus * xs) * slopes, mask=keep)
                # This program wrote these numbers for the row before; the sum above is a barrier between the two.
                before = tl.load(own + start + col, mask=(start + col < n) & (first >= step), other=0.0)
                tl.store(own + start + col, before + tl.sum(dzs * xhat, axis=0), mask=start + col < n)
    else:
        ws = tl.load(weight_at + col, mask=col < n, other=0.0).to(tl.float32)[None, :]
        dws = tl.full((ROWS, BLOCK), 0.0, tl.float32)
        for first in range(tl.program_id(0) * ROWS, rows, step):
            row = (first + tl.arange(0, ROWS)).to(tl.int64)
            keep = (col < n)[None, :] & (row < rows)[:, None]
            at = (row[:, None] * groups + group) * n + col[None, :]
            scale = tl.load(rstd + row * groups + group, mask=row < rows, other=0.0)[:, None]
            xs = tl.load(x + row[:, None] * x_stride + group * n + col[None, :], mask=keep, other=0.0).to(tl.float32)
            gs = tl.load(gate + row[:, None] * gate_stride + group * n + col[None, :], mask=keep, other=0.0).to(tl.float32)
            dys = tl.load(dy + at, mask=keep, other=0.0).to(tl.float32)
            acts, slopes = activation(gs, silu)
            uhat, xhat, zs = product(tl.where(last != 0, xs, xs * acts), ws, scale, cast, last, T, W)
            dzs = tl.where(last != 0, dys * acts, dys)
            mean = (tl.sum(dzs * ws * uhat, axis=1) / n)[:, None]
            dus = (dzs * ws - uhat * mean) * scale
            tl.store(dx + at, tl.where(last != 0, dus, dus * acts), mask=keep)
            tl.store(dgate + at, tl.where(last != 0, dys * zs, dus * xs) * slopes, mask=keep)
            dws += dzs * xhat
        tl.store(own + col, tl.sum(dws, axis=0), mask=col < n)
