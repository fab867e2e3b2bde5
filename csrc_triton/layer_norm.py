"""LayerNorm, ROWS rows a program, arithmetic in fp32. A row wider than the largest BLOCK is walked in a loop."""

import triton
import triton.language as tl

from _aot import variants
from _norm import BLOCK
from _norm import LOOP_BACKWARD
from _norm import LOOP_FORWARD
from _norm import num_warps
from _norm import tile

DTYPES = [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32")]  # (x, weight and bias)


def axes(looped):
    return {
        "X": ["fp32", "bf16", "fp16"],
        "W": ["fp32", "bf16", "fp16"],
        "ROWS": [1, 2],
        "BLOCK": BLOCK,
        "LOOP": [False, True],
        "num_warps": num_warps,
        "where": lambda X, W, ROWS, BLOCK, LOOP: (X, W) in DTYPES and tile(ROWS, BLOCK, LOOP, looped),
    }


@variants(
    x="*X",
    weight="*W",
    bias="*W",
    y="*X",
    mean="*fp32",
    rstd="*fp32",
    x_stride="i32:16",
    rows="i32",
    n="i32:16",
    eps="fp32",
    has_weight="i32",
    has_bias="i32",
    **axes(LOOP_FORWARD),
)
@triton.jit
def layer_norm_fwd(
    x,
    weight,
    bias,
    y,
    mean,
    rstd,
    x_stride,
    rows,
    n,
    eps,
    has_weight,
    has_bias,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    x_at, y_at, real = x + row[:, None] * x_stride, y + row[:, None] * n, (row < rows)[:, None]

    if LOOP:
        # Welford's recurrence in each column of the block, then the columns joined: one reading of the row, not two.
        means, squares = tl.full((ROWS, BLOCK), 0.0, tl.float32), tl.full((ROWS, BLOCK), 0.0, tl.float32)
        for start in range(0, n, BLOCK):
            both = (start + col < n)[None, :] & real
            xs = tl.load(x_at + (start + col)[None, :], mask=both, other=0.0).to(tl.float32)
            ahead = tl.where(both, xs - means, 0.0)
            means += ahead / (start // BLOCK + 1)
            squares += ahead * (xs - means)
        count = (n - 1 - col) // BLOCK + 1
        centre = tl.sum(means * count[None, :], axis=1) / n
        apart = means - centre[:, None]
        scale = tl.rsqrt(tl.sum(squares + apart * apart * count[None, :], axis=1) / n + eps)
        for start in range(0, n, BLOCK):
            keep = start + col < n
            both = keep[None, :] & real
            xs = tl.load(x_at + (start + col)[None, :], mask=both, other=0.0).to(tl.float32)
            ws = tl.load(weight + start + col, mask=keep & (has_weight != 0), other=1.0).to(tl.float32)
            bs = tl.load(bias + start + col, mask=keep & (has_bias != 0), other=0.0).to(tl.float32)
            ys = (xs - centre[:, None]) * scale[:, None] * ws[None, :] + bs[None, :]
            tl.store(y_at + (start + col)[None, :], ys, mask=both)
    else:
        keep = col < n
        both = keep[None, :] & real
        xs = tl.load(x_at + col[None, :], mask=both, other=0.0).to(tl.float32)
        ws = tl.load(weight + col, mask=keep & (has_weight != 0), other=1.0).to(tl.float32)
        bs = tl.load(bias + col, mask=keep & (has_bias != 0), other=0.0).to(tl.float32)
        centre = tl.sum(xs, axis=1) / n
        apart = tl.where(both, xs - centre[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(apart * apart, axis=1) / n + eps)
        tl.store(y_at + col[None, :], apart * scale[:, None] * ws[None, :] + bs[None, :], mask=both)
    tl.store(mean + row, centre, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)


@variants(
    dy="*X",
    x="*X",
    weight="*W",
    mean="*fp32",
    rstd="*fp32",
    dx="*X",
    partial="*fp32",
    x_stride="i32:16",
    rows="i32",
    n="i32:16",
    has_weight="i32",
    need_dw="i32",
    need_db="i32",
    **axes(LOOP_BACKWARD),
)
@triton.jit
def layer_norm_bwd(
    dy,
    x,
    weight,
    mean,
    rstd,
    dx,
    partial,
    x_stride,
    rows,
    n,
    has_weight,
    need_dw,
    need_db,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
):
    # Program p owns the row groups p, p + P, p + 2P, ...; partial[p] is its share of dw and then of db, as far as needed.
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    step = tl.num_programs(0) * ROWS
    dw = partial + program * n * (need_dw + need_db)
    db = dw + n * need_dw

    if LOOP:
        for first in range(tl.program_id(0) * ROWS, rows, step):
            row = (first + tl.arange(0, ROWS)).to(tl.int64)
            real = (row < rows)[:, None]
            x_at, at = x + row[:, None] * x_stride, row[:, None] * n
            centre = tl.load(mean + row, mask=row < rows, other=0.0)
            scale = tl.load(rstd + row, mask=row < rows, other=0.0)
            sums, products = tl.full((ROWS, BLOCK), 0.0, tl.float32), tl.full((ROWS, BLOCK), 0.0, tl.float32)
            for start in range(0, n, BLOCK):
                keep = start + col < n
                both = keep[None, :] & real
                xs = tl.load(x_at + (start + col)[None, :], mask=both, other=0.0).to(tl.float32)
                dys = tl.load(dy + at + (start + col)[None, :], mask=both, other=0.0).to(tl.float32)
                ws = tl.load(weight + start + col, mask=keep & (has_weight != 0), other=1.0).to(tl.float32)
                wdy = dys * ws[None, :]
                sums += wdy
                products += wdy * (xs - centre[:, None])
            constant = tl.sum(sums, axis=1) / n
            slope = tl.sum(products, axis=1) * scale / n
            for start in range(0, n, BLOCK):
                keep = start + col < n
                both = keep[None, :] & real
                xs = tl.load(x_at + (start + col)[None, :], mask=both, other=0.0).to(tl.float32)
                dys = tl.load(dy + at + (start + col)[None, :], mask=both, other=0.0).to(tl.float32)
                ws = tl.load(weight + start + col, mask=keep & (has_weight != 0), other=1.0).to(tl.float32)
                xhat = (xs - centre[:, None]) * scale[:, None]
                dxs = (dys * ws[None, :] - constant[:, None] - xhat * slope[:, None]) * scale[:, None]
                tl.store(dx + at + (start + col)[None, :], dxs, mask=both)
                # This program wrote these numbers for the row before; the sums above are a barrier between the two.
                before = tl.load(dw + start + col, mask=keep & (first >= step) & (need_dw != 0), other=0.0)
                tl.store(dw + start + col, before + tl.sum(dys * xhat, axis=0), mask=keep & (need_dw != 0))
                before = tl.load(db + start + col, mask=keep & (first >= step) & (need_db != 0), other=0.0)
                tl.store(db + start + col, before + tl.sum(dys, axis=0), mask=keep & (need_db != 0))
    else:
        keep = col < n
        ws = tl.load(weight + col, mask=keep & (has_weight != 0), other=1.0).to(tl.float32)
        dws, dbs = tl.full((ROWS, BLOCK), 0.0, tl.float32), tl.full((ROWS, BLOCK), 0.0, tl.float32)
        for first in range(tl.program_id(0) * ROWS, rows, step):
            row = (first + tl.arange(0, ROWS)).to(tl.int64)
            both = keep[None, :] & (row < rows)[:, None]
            at = row[:, None] * n + col[None, :]
            centre = tl.load(mean + row, mask=row < rows, other=0.0)
            scale = tl.load(rstd + row, mask=row < rows, other=0.0)
            xs = tl.load(x + row[:, None] * x_stride + col[None, :], mask=both, other=0.0).to(tl.float32)
            dys = tl.load(dy + at, mask=both, other=0.0).to(tl.float32)
            xhat = (xs - centre[:, None]) * scale[:, None]
            wdy = dys * ws[None, :]
            constant, slope = tl.sum(wdy, axis=1) / n, tl.sum(wdy * xhat, axis=1) / n
            tl.store(dx + at, (wdy - constant[:, None] - xhat * slope[:, None]) * scale[:, None], mask=both)
            dws += dys * xhat
            dbs += dys
        tl.store(dw + col, tl.sum(dws, axis=0), mask=keep & (need_dw != 0))
        tl.store(db + col, tl.sum(dbs, axis=0), mask=keep & (need_db != 0))
