"""PolyNorm, one row a program, arithmetic in fp32. Rows are walked in a loop."""

import triton
import triton.language as tl

from _aot import variants

DTYPES = [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32")]  # (x, weight and bias)
AXES = {
    "X": ["fp32", "bf16", "fp16"],
    "W": ["fp32", "bf16", "fp16"],
    "BLOCK": [2048],
    "num_warps": 8,
    "where": lambda X, W: (X, W) in DTYPES,
}


@variants(
    x="*X",
    weight="*W",
    bias="*W",
    y="*X",
    rstd="*fp32",
    x_stride="i32:16",
    n="i32:16",
    eps="fp32",
    **AXES,
)
@triton.jit
def poly_norm_fwd(x, weight, bias, y, rstd, x_stride, n, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x_at, y_at = x + row * x_stride, y + row * n
    sixths, fourths = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    squares = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, n, BLOCK):
        xs = tl.load(x_at + start + col, mask=start + col < n, other=0.0).to(tl.float32)
        square = xs * xs
        sixths += square * square * square
        fourths += square * square
        squares += square
    scale3 = tl.rsqrt(tl.sum(sixths, axis=0) / n + eps)
    scale2 = tl.rsqrt(tl.sum(fourths, axis=0) / n + eps)
    scale1 = tl.rsqrt(tl.sum(squares, axis=0) / n + eps)
    w3 = tl.load(weight).to(tl.float32) * scale3
    w2 = tl.load(weight + 1).to(tl.float32) * scale2
    w1 = tl.load(weight + 2).to(tl.float32) * scale1
    b = tl.load(bias).to(tl.float32)
    for start in range(0, n, BLOCK):
        keep = start + col < n
        xs = tl.load(x_at + start + col, mask=keep, other=0.0).to(tl.float32)
        tl.store(y_at + start + col, ((w3 * xs + w2) * xs + w1) * xs + b, mask=keep)
    tl.store(rstd + row * 3, scale3)
    tl.store(rstd + row * 3 + 1, scale2)
    tl.store(rstd + row * 3 + 2, scale1)


@variants(
    dy="*X",
    x="*X",
    weight="*W",
    rstd="*fp32",
    dx="*X",
    partial="*fp32",
    x_stride="i32:16",
    rows="i32",
    n="i32:16",
    **AXES,
)
@triton.jit
def poly_norm_bwd(dy, x, weight, rstd, dx, partial, x_stride, rows, n, BLOCK: tl.constexpr):
    # Program p owns the rows p, p + P, p + 2P, ...; partial[p] is its share of the gradients of the three weights and of bias.
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    col = tl.arange(0, BLOCK)
    w3 = tl.load(weight).to(tl.float32)
    w2 = tl.load(weight + 1).to(tl.float32)
    w1 = tl.load(weight + 2).to(tl.float32)
    dw3, dw2, dw1, db = 0.0, 0.0, 0.0, 0.0
    for ahead in range(0, rows - tl.program_id(0), programs):
        row = program + ahead
        x_at, dy_at, dx_at = x + row * x_stride, dy + row * n, dx + row * n
        scale3, scale2, scale1 = tl.load(rstd + row * 3), tl.load(rstd + row * 3 + 1), tl.load(rstd + row * 3 + 2)
        cubes, squares = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
        numbers, ones = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
        for start in range(0, n, BLOCK):
            keep = start + col < n
            xs = tl.load(x_at + start + col, mask=keep, other=0.0).to(tl.float32)
            dys = tl.load(dy_at + start + col, mask=keep, other=0.0).to(tl.float32)
            cubes += dys * (xs * xs * xs)
            squares += dys * (xs * xs)
            numbers += dys * xs
            ones += dys
        # The sums of dy times each normalised power: of the gradients of the weights, and of what normalising takes off dx.
        along3, along2 = tl.sum(cubes, axis=0) * scale3, tl.sum(squares, axis=0) * scale2
        along1 = tl.sum(numbers, axis=0) * scale1
        dw3, dw2, dw1, db = dw3 + along3, dw2 + along2, dw1 + along1, db + tl.sum(ones, axis=0)
        off3, off2, off1 = along3 * scale3 / n, along2 * scale2 / n, along1 * scale1 / n
        slope3, slope2, slope1 = 3.0 * w3 * scale3, 2.0 * w2 * scale2, w1 * scale1
        for start in range(0, n, BLOCK):
            keep = start + col < n
            xs = tl.load(x_at + start + col, mask=keep, other=0.0).to(tl.float32)
            dys = tl.load(dy_at + start + col, mask=keep, other=0.0).to(tl.float32)
            square = xs * xs
            dxs = slope3 * square * (dys - off3 * (square * xs)) + slope2 * xs * (dys - off2 * square)
            tl.store(dx_at + start + col, dxs + slope1 * (dys - off1 * xs), mask=keep)
    own = partial + program * 4
    tl.store(own, dw3)
    tl.store(own + 1, dw2)
    tl.store(own + 2, dw1)
    tl.store(own + 3, db)
