"""Hyper-connections, arithmetic in fp32: a token has hc streams of n numbers, and coefficients of its own that mix them.

Any number of streams that P holds; a tile's lanes beyond it are masked.
"""

import triton
import triton.language as tl

from _aot import variants
from _math import sigmoid

P = [4, 16]
# Of a layer's output: the dtype of the streams, or else fp32.
MIXED = {"T": ["fp32", "bf16", "fp16"], "F": ["fp32", "bf16", "fp16"], "where": lambda T, F: F in (T, "fp32")}


@triton.jit
def places(rows, group, P: tl.constexpr):
    """The tokens of a group, their (tokens, P, P) tile's rows and columns, and which tokens there are."""
    TOKENS: tl.constexpr = 256 // (P * P)
    token = (group * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    lane = tl.arange(0, P)
    return token, lane, lane[None, :, None], lane[None, None, :], token < rows


@triton.jit
def row_softmax(logits, col, hc):
    logits = tl.where(col < hc, logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, axis=2)[:, :, None])
    return powers / tl.sum(powers, axis=2)[:, :, None]


@triton.jit
def row_sums(matrix, row, hc, eps):
    return tl.where(row < hc, tl.sum(matrix, axis=2)[:, :, None] + eps, 1.0)


@triton.jit
def column_sums(matrix, col, hc, eps):
    return tl.where(col < hc, tl.sum(matrix, axis=1)[:, None, :] + eps, 1.0)


@triton.jit
def gate(dots, own, rstd, alpha, b, held):
    """The sigmoids of one head; dots and b point at its numbers."""
    z = tl.load(dots, mask=own, other=0.0) * rstd * alpha + tl.load(b, mask=held, other=0.0)[None, :]
    return sigmoid(z)


@triton.jit
def gate_bwd(upstream, dots, ddots, own, rstd, alpha, b, scale):
    """(dz, dz · mix) of scale times the sigmoids of one head."""
    mix = tl.load(dots, mask=own, other=0.0) * rstd
    s = sigmoid(mix * alpha + b[None, :])
    dz = tl.load(upstream, mask=own, other=0.0) * scale * s * (1.0 - s)
    tl.store(ddots, dz * alpha * rstd, mask=own)
    return dz, dz * mix


@variants(
    dots="*fp32",
    norm="*fp32",
    b="*fp32",
    alpha_pre="*fp32",
    alpha_post="*fp32",
    alpha_res="*fp32",
    pre="*fp32",
    post="*fp32",
    res="*fp32",
    rows="i32",
    hc="i32",
    width="fp32",
    tmax="i32",
    rms_eps="fp32",
    pre_eps="fp32",
    sinkhorn_eps="fp32",
    post_mult="fp32",
    P=P,
    num_warps=1,
    scalar=("loads", "stores"),
)
@triton.jit
def mhc_heads_fwd(
    dots,
    norm,
    b,
    alpha_pre,
    alpha_post,
    alpha_res,
    pre,
    post,
    res,
    rows,
    hc,
    width,
    tmax,
    rms_eps,
    pre_eps,
    sinkhorn_eps,
    post_mult,
    P: tl.constexpr,
):
    token, lane, row, col, real = places(rows, tl.program_id(0), P)
    size = tl.load(norm + token, mask=real, other=1.0)
    rstd = tl.rsqrt(size * size / width + rms_eps)
    at, square = token * (hc * (hc + 2)), row * hc + col
    held, own = lane < hc, real[:, None] & (lane < hc)[None, :]
    own_dots, head = dots + at[:, None] + lane[None, :], token[:, None] * hc + lane[None, :]
    gates = gate(own_dots, own, rstd[:, None], tl.load(alpha_pre), b + lane, held)
    tl.store(pre + head, gates + pre_eps, mask=own)
    gates = gate(own_dots + hc, own, rstd[:, None], tl.load(alpha_post), b + hc + lane, held)
    tl.store(post + head, gates * post_mult, mask=own)

    inside = (row < hc) & (col < hc)
    keep = real[:, None, None] & inside
    logits = tl.load(dots + at[:, None, None] + 2 * hc + square, mask=keep, other=0.0) * rstd[:, None, None]
    logits = logits * tl.load(alpha_res) + tl.load(b + 2 * hc + square, mask=inside, other=0.0)
    matrix = tl.where(inside, row_softmax(logits, col, hc) + sinkhorn_eps, 0.0)
    matrix /= column_sums(matrix, col, hc, sinkhorn_eps)
    for _ in range(1, tmax):
        matrix /= row_sums(matrix, row, hc, sinkhorn_eps)
        matrix /= column_sums(matrix, col, hc, sinkhorn_eps)
    tl.store(res + token[:, None, None] * (hc * hc) + square, matrix, mask=keep)


@variants(
    dpre="*fp32",
    dpost="*fp32",
    dres="*fp32",
    dots="*fp32",
    norm="*fp32",
    b="*fp32",
    alpha_pre="*fp32",
    alpha_post="*fp32",
    alpha_res="*fp32",
    ddots="*fp32",
    dscale="*fp32",
    history="*fp32",
    partial="*fp32",
    rows="i32",
    hc="i32",
    width="fp32",
    tmax="i32",
    rms_eps="fp32",
    sinkhorn_eps="fp32",
    post_mult="fp32",
    P=P,
    num_warps=1,
    scalar=("loads", "stores"),
)
@triton.jit
def mhc_heads_bwd(
    dpre,
    dpost,
    dres,
    dots,
    norm,
    b,
    alpha_pre,
    alpha_post,
    alpha_res,
    ddots,
    dscale,
    history,
    partial,
    rows,
    hc,
    width,
    tmax,
    rms_eps,
    sinkhorn_eps,
    post_mult,
    P: tl.constexpr,
):
    # Program p owns the groups of tokens p, p + N, p + 2N, ...; partial[p] is its share of the gradients of b and the alphas.
    # history[p] holds the matrices between the iterations, of one group at a time.
    program, programs = tl.program_id(0), tl.num_programs(0)
    TOKENS: tl.constexpr = 256 // (P * P)
    pres, posts, ress = tl.load(alpha_pre), tl.load(alpha_post), tl.load(alpha_res)
    lane = tl.arange(0, P)
    held, inside = lane < hc, (lane < hc)[:, None] & (lane < hc)[None, :]
    flat = (tl.arange(0, TOKENS)[:, None, None] * P + lane[None, :, None]) * P + lane[None, None, :]
    past = history + program.to(tl.int64) * (tmax - 1) * 256 + flat
    b_pre, b_post = tl.load(b + lane, mask=held, other=0.0), tl.load(b + hc + lane, mask=held, other=0.0)
    b_res = tl.load(b + 2 * hc + lane[:, None] * hc + lane[None, :], mask=inside, other=0.0)
    db_pre, dalpha_pre = tl.full((P,), 0.0, tl.float32), tl.full((P,), 0.0, tl.float32)
    db_post, dalpha_post = tl.full((P,), 0.0, tl.float32), tl.full((P,), 0.0, tl.float32)
    db_res, dalpha_res = tl.full((P, P), 0.0, tl.float32), tl.full((P, P), 0.0, tl.float32)

    for group in range(program, (rows + TOKENS - 1) // TOKENS, programs):
        token, _, row, col, real = places(rows, group, P)
        size = tl.load(norm + token, mask=real, other=1.0)
        rstd = tl.rsqrt(size * size / width + rms_eps)
        at, square = token * (hc * (hc + 2)), row * hc + col
        own, keep = real[:, None] & held[None, :], real[:, None, None] & inside[None, :, :]
        head = token[:, None] * hc + lane[None, :]

        first_dots, first_ddots = dots + at[:, None] + lane[None, :], ddots + at[:, None] + lane[None, :]
        dz, slope = gate_bwd(dpre + head, first_dots, first_ddots, own, rstd[:, None], pres, b_pre, 1.0)
        db_pre += tl.sum(dz, axis=0)
        dalpha_pre += tl.sum(slope, axis=0)
        along = tl.sum(slope, axis=1) * pres
        dz, slope = gate_bwd(dpost + head, first_dots + hc, first_ddots + hc, own, rstd[:, None], posts, b_post, post_mult)
        db_post += tl.sum(dz, axis=0)
        dalpha_post += tl.sum(slope, axis=0)
        along += tl.sum(slope, axis=1) * posts

        mix = tl.load(dots + at[:, None, None] + 2 * hc + square, mask=keep, other=0.0) * rstd[:, None, None]
        p = row_softmax(mix * ress + b_res[None, :, :], col, hc)
        first = tl.where(inside[None, :, :], p + sinkhorn_eps, 0.0)
        first_sums = column_sums(first, col, hc, sinkhorn_eps)
        first /= first_sums
        matrix = first
        for t in range(tmax - 1):
            tl.store(past + t * 256, matrix)
            matrix /= row_sums(matrix, row, hc, sinkhorn_eps)
            matrix /= column_sums(matrix, col, hc, sinkhorn_eps)
        tl.debug_barrier()  # a thread reads what others wrote
        d = tl.load(dres + token[:, None, None] * (hc * hc) + square, mask=keep, other=0.0)
        for t in range(tmax - 1):
            matrix = tl.load(past + (tmax - 2 - t) * 256)
            sums = row_sums(matrix, row, hc, sinkhorn_eps)
            by_row = matrix / sums
            columns = column_sums(by_row, col, hc, sinkhorn_eps)
            d = (d - tl.sum(d * (by_row / columns), axis=1)[:, None, :]) / columns
            # Lanes beyond the streams, which are subtracted from and divided as well, must not grow.
            d = tl.where(inside[None, :, :], (d - tl.sum(d * by_row, axis=2)[:, :, None]) / sums, 0.0)
        tl.debug_barrier()  # before the next group's matrices
        d = (d - tl.sum(d * first, axis=1)[:, None, :]) / first_sums
        dz = p * (d - tl.sum(d * p, axis=2)[:, :, None])
        tl.store(ddots + at[:, None, None] + 2 * hc + square, dz * ress * rstd[:, None, None], mask=keep)
        db_res += tl.sum(dz, axis=0)
        dalpha_res += tl.sum(dz * mix, axis=0)
        along += tl.sum(tl.sum(dz * mix, axis=2), axis=1) * ress
        tl.store(dscale + token, -along * rstd * rstd / width, mask=real)

    count = hc * (hc + 2)
    share = partial + program.to(tl.int64) * (count + 3)
    tl.store(share + lane, db_pre, mask=held)
    tl.store(share + hc + lane, db_post, mask=held)
    tl.store(share + 2 * hc + lane[:, None] * hc + lane[None, :], db_res, mask=inside)
    tl.store(share + count, tl.sum(dalpha_pre, axis=0))
    tl.store(share + count + 1, tl.sum(dalpha_post, axis=0))
    tl.store(share + count + 2, tl.sum(tl.sum(dalpha_res, axis=1), axis=0))


@variants(
    ddots="*fp32",
    dscale="*fp32",
    phi="*fp32",
    x="*T",
    dx="*T",
    rows="i32",
    heads="i32",
    n="i32:16",
    T=["fp32", "bf16", "fp16"],
    TOKENS=[8],
    BLOCK=[1024],
    num_warps=4,
)
@triton.jit
def mhc_coeffs_dx(ddots, dscale, phi, x, dx, rows, heads, n, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    # dx = ddots · phi + dscale · x, phi (heads, n): as many products as heads, of which there are too few for a matmul.
    blocks = tl.cdiv(n, BLOCK)
    token = (tl.program_id(0) // blocks * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    col = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    real, keep = token < rows, col < n
    sums, at = tl.full((TOKENS, BLOCK), 0.0, tl.float32), col
    for head in range(heads):
        own = tl.load(ddots + token * heads + head, mask=real, other=0.0)
        sums += own[:, None] * tl.load(phi + at, mask=keep, other=0.0)[None, :]
        at += n
    both, at = real[:, None] & keep[None, :], token[:, None] * n + col[None, :]
    xs = tl.load(x + at, mask=both, other=0.0).to(tl.float32)
    tl.store(dx + at, sums + tl.load(dscale + token, mask=real, other=0.0)[:, None] * xs, mask=both)


@variants(x="*T", h="*fp32", y="*T", hc="i32", n="i32:16", T=["fp32", "bf16", "fp16"], BLOCK=[1024], num_warps=4)
@triton.jit
def mhc_pre_fwd(x, h, y, hc, n, BLOCK: tl.constexpr):
    blocks = tl.cdiv(n, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    keep = col < n
    mixed = tl.full((BLOCK,), 0.0, tl.float32)
    stream = token * hc
    for _ in range(hc):
        mixed += tl.load(h + stream) * tl.load(x + stream * n + col, mask=keep, other=0.0).to(tl.float32)
        stream += 1
    tl.store(y + token * n + col, mixed, mask=keep)


@variants(
    dy="*T", x="*T", h="*fp32", dx="*T", dh="*fp32", hc="i32", n="i32:16", T=["fp32", "bf16", "fp16"], BLOCK=[1024], num_warps=4
)
@triton.jit
def mhc_pre_bwd(dy, x, h, dx, dh, hc, n, BLOCK: tl.constexpr):
    # One stream of one token a program.
    stream = tl.program_id(0).to(tl.int64)
    own, dy_at = tl.load(h + stream), dy + stream // hc * n
    products = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, n, BLOCK):
        col = start + tl.arange(0, BLOCK)
        keep = col < n
        dys = tl.load(dy_at + col, mask=keep, other=0.0).to(tl.float32)
        products += dys * tl.load(x + stream * n + col, mask=keep, other=0.0).to(tl.float32)
        tl.store(dx + stream * n + col, own * dys, mask=keep)
    tl.store(dh + stream, tl.sum(products, axis=0))


@variants(
    x="*T",
    f="*F",
    post="*fp32",
    res="*fp32",
    y="*T",
    hc="i32",
    n="i32:16",
    **MIXED,
    P=P,
    BLOCK=[1024],
    num_warps=4,
)
@triton.jit
def mhc_post_res_fwd(x, f, post, res, y, hc, n, P: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(n, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    out, col = tl.arange(0, P)[:, None], (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    held, keep = out < hc, col < n
    stream = token * hc
    fs = tl.load(f + token * n + col, mask=keep, other=0.0).to(tl.float32)
    mixed = tl.load(post + stream + out, mask=held, other=0.0) * fs
    for i in range(hc):
        part = tl.load(res + (stream + out) * hc + i, mask=held, other=0.0)
        mixed += part * tl.load(x + (stream + i) * n + col, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + (stream + out) * n + col, mixed, mask=held & keep)


@variants(
    dy="*T",
    x="*T",
    f="*F",
    post="*fp32",
    res="*fp32",
    dx="*T",
    df="*F",
    dpost="*fp32",
    dres="*fp32",
    hc="i32",
    n="i32:16",
    **MIXED,
    P=P,
    BLOCK=[1024],
    num_warps=lambda P: 4 if P == 4 else 8,
)
@triton.jit
def mhc_post_res_bwd(dy, x, f, post, res, dx, df, dpost, dres, hc, n, P: tl.constexpr, BLOCK: tl.constexpr):
    # The streams that go in are a tile's rows; those that come out are walked, once for dx and df, once for the products.
    token = tl.program_id(0).to(tl.int64)
    stream, lane = token * hc, tl.arange(0, P)
    held = (lane < hc)[:, None]
    row = stream + lane[:, None]
    products, alongs = tl.full((P, P), 0.0, tl.float32), tl.full((P,), 0.0, tl.float32)
    for start in range(0, n, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :]
        keep = col < n
        mixed, layer = tl.full((P, BLOCK), 0.0, tl.float32), tl.full((1, BLOCK), 0.0, tl.float32)
        for o in range(hc):
            dys = tl.load(dy + (stream + o) * n + col, mask=keep, other=0.0).to(tl.float32)
            mixed += tl.load(res + (stream + o) * hc + lane[:, None], mask=held, other=0.0) * dys
            layer += tl.load(post + stream + o) * dys
        tl.store(dx + row * n + col, mixed, mask=held & keep)
        tl.store(df + token * n + col, layer, mask=keep)
        xs = tl.load(x + row * n + col, mask=held & keep, other=0.0).to(tl.float32)
        fs = tl.load(f + token * n + col, mask=keep, other=0.0).to(tl.float32)
        for o in range(hc):
            dys = tl.load(dy + (stream + o) * n + col, mask=keep, other=0.0).to(tl.float32)
            products += tl.where((lane == o)[:, None], tl.sum(xs * dys, axis=1)[None, :], 0.0)
            alongs += tl.where(lane == o, tl.sum(tl.sum(fs * dys, axis=1), axis=0), 0.0)
    tl.store(dres + row * hc + lane[None, :], products, mask=held & (lane < hc)[None, :])
    tl.store(dpost + stream + lane, alongs, mask=lane < hc)
