"""Hyper-connections, arithmetic in fp32: a token has streams of n numbers, and coefficients of its own that mix them.

In the kernels of coefficients the number of streams is built in, as HC. In the others it is any that P holds; a tile's lanes
beyond it are masked.
"""

import triton
import triton.language as tl

from _aot import variants
from _math import sigmoid

HC, P = [2, 4, 8, 16], [4, 16]
# Of a layer's output: the dtype of the streams, or else fp32.
MIXED = {"T": ["fp32", "bf16", "fp16"], "F": ["fp32", "bf16", "fp16"], "where": lambda T, F: F in (T, "fp32")}


@triton.jit
def places(rows, group, HC: tl.constexpr):
    """The tokens of a group, which of them there are, and their places in (tokens, HC) and (tokens, HC, HC)."""
    TOKENS: tl.constexpr = 256 // (HC * HC)
    token = (group * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    lane = tl.arange(0, HC)
    return token, token < rows, lane[None, :], lane[None, :, None] * HC + lane[None, None, :]


@triton.jit
def row_softmax(logits):
    powers = tl.exp(logits - tl.max(logits, axis=2)[:, :, None])
    return powers / tl.sum(powers, axis=2)[:, :, None]


@triton.jit
def row_sums(matrix, eps):
    return tl.sum(matrix, axis=2)[:, :, None] + eps


@triton.jit
def column_sums(matrix, eps):
    return tl.sum(matrix, axis=1)[:, None, :] + eps


@triton.jit
def gate(dots, own, rstd, alpha, b):
    """The sigmoids of one head; dots and b point at its numbers."""
    return sigmoid(tl.load(dots, mask=own, other=0.0) * rstd * alpha + tl.load(b))


@triton.jit
def gate_bwd(upstream, dots, ddots, own, rstd, alpha, b, scale):
    """(dz, dz · mix) of scale times the sigmoids of one head."""
    mix = tl.load(dots, mask=own, other=0.0) * rstd
    s = sigmoid(mix * alpha + tl.load(b))
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
    width="fp32",
    tmax="i32",
    rms_eps="fp32",
    pre_eps="fp32",
    sinkhorn_eps="fp32",
    post_mult="fp32",
    HC=HC,
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
    width,
    tmax,
    rms_eps,
    pre_eps,
    sinkhorn_eps,
    post_mult,
    HC: tl.constexpr,
):
    token, real, lane, square = places(rows, tl.program_id(0), HC)
    size = tl.load(norm + token, mask=real, other=1.0)
    rstd = tl.rsqrt(size * size / width + rms_eps)
    at, own, keep = token * (HC * (HC + 2)), real[:, None], real[:, None, None]
    first, head = dots + at[:, None] + lane, token[:, None] * HC + lane
    gates = gate(first, own, rstd[:, None], tl.load(alpha_pre), b + lane)
    tl.store(pre + head, gates + pre_eps, mask=own)
    gates = gate(first + HC, own, rstd[:, None], tl.load(alpha_post), b + HC + lane)
    tl.store(post + head, gates * post_mult, mask=own)

    logits = tl.load(dots + at[:, None, None] + 2 * HC + square, mask=keep, other=0.0) * rstd[:, None, None]
    matrix = row_softmax(logits * tl.load(alpha_res) + tl.load(b + 2 * HC + square)) + sinkhorn_eps
    matrix /= column_sums(matrix, sinkhorn_eps)
    for _ in range(1, tmax):
        matrix /= row_sums(matrix, sinkhorn_eps)
        matrix /= column_sums(matrix, sinkhorn_eps)
    tl.store(res + token[:, None, None] * (HC * HC) + square, matrix, mask=keep)


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
    width="fp32",
    tmax="i32",
    rms_eps="fp32",
    sinkhorn_eps="fp32",
    post_mult="fp32",
    HC=HC,
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
    width,
    tmax,
    rms_eps,
    sinkhorn_eps,
    post_mult,
    HC: tl.constexpr,
):
    # Program p owns the groups of tokens p, p + N, p + 2N, ...; partial[p] is its share of the gradients of b and the alphas.
    # history[p] holds the matrices between the iterations, of one group at a time.
    program, programs = tl.program_id(0), tl.num_programs(0)
    TOKENS: tl.constexpr = 256 // (HC * HC)
    pres, posts, ress = tl.load(alpha_pre), tl.load(alpha_post), tl.load(alpha_res)
    db_pre, dalpha_pre = tl.full((HC,), 0.0, tl.float32), tl.full((HC,), 0.0, tl.float32)
    db_post, dalpha_post = tl.full((HC,), 0.0, tl.float32), tl.full((HC,), 0.0, tl.float32)
    db_res, dalpha_res = tl.full((HC, HC), 0.0, tl.float32), tl.full((HC, HC), 0.0, tl.float32)

    for group in range(program, (rows + TOKENS - 1) // TOKENS, programs):
        token, real, lane, square = places(rows, group, HC)
        size = tl.load(norm + token, mask=real, other=1.0)
        rstd = tl.rsqrt(size * size / width + rms_eps)
        at, own, keep = token * (HC * (HC + 2)), real[:, None], real[:, None, None]
        first, dfirst, head = dots + at[:, None] + lane, ddots + at[:, None] + lane, token[:, None] * HC + lane

        dz, slope = gate_bwd(dpre + head, first, dfirst, own, rstd[:, None], pres, b + lane, 1.0)
        db_pre += tl.sum(dz, axis=0)
        dalpha_pre += tl.sum(slope, axis=0)
        along = tl.sum(slope, axis=1) * pres
        dz, slope = gate_bwd(dpost + head, first + HC, dfirst + HC, own, rstd[:, None], posts, b + HC + lane, post_mult)
        db_post += tl.sum(dz, axis=0)
        dalpha_post += tl.sum(slope, axis=0)
        along += tl.sum(slope, axis=1) * posts

        mix = tl.load(dots + at[:, None, None] + 2 * HC + square, mask=keep, other=0.0) * rstd[:, None, None]
        p = row_softmax(mix * ress + tl.load(b + 2 * HC + square))
        start_sums = column_sums(p + sinkhorn_eps, sinkhorn_eps)
        start = (p + sinkhorn_eps) / start_sums
        past = history + program.to(tl.int64) * (tmax - 1) * 256 + tl.arange(0, TOKENS)[:, None, None] * (HC * HC) + square
        matrix = start
        for t in range(tmax - 1):
            tl.store(past + t * 256, matrix)
            matrix /= row_sums(matrix, sinkhorn_eps)
            matrix /= column_sums(matrix, sinkhorn_eps)
        tl.debug_barrier()  # a thread reads what others wrote
        d = tl.load(dres + token[:, None, None] * (HC * HC) + square, mask=keep, other=0.0)
        for t in range(tmax - 1):
            matrix = tl.load(past + (tmax - 2 - t) * 256)
            sums = row_sums(matrix, sinkhorn_eps)
            by_row = matrix / sums
            columns = column_sums(by_row, sinkhorn_eps)
            d = (d - tl.sum(d * (by_row / columns), axis=1)[:, None, :]) / columns
            d = (d - tl.sum(d * by_row, axis=2)[:, :, None]) / sums
        tl.debug_barrier()  # before the next group's matrices
        d = (d - tl.sum(d * start, axis=1)[:, None, :]) / start_sums
        dz = p * (d - tl.sum(d * p, axis=2)[:, :, None])
        tl.store(ddots + at[:, None, None] + 2 * HC + square, dz * ress * rstd[:, None, None], mask=keep)
        db_res += tl.sum(dz, axis=0)
        dalpha_res += tl.sum(dz * mix, axis=0)
        along += tl.sum(tl.sum(dz * mix, axis=2), axis=1) * ress
        tl.store(dscale + token, -along * rstd * rstd / width, mask=real)

    lane = tl.arange(0, HC)
    share = partial + program.to(tl.int64) * (HC * (HC + 2) + 3)
    tl.store(share + lane, db_pre)
    tl.store(share + HC + lane, db_post)
    tl.store(share + 2 * HC + lane[:, None] * HC + lane[None, :], db_res)
    share += HC * (HC + 2)
    tl.store(share, tl.sum(dalpha_pre, axis=0))
    tl.store(share + 1, tl.sum(dalpha_post, axis=0))
    tl.store(share + 2, tl.sum(tl.sum(dalpha_res, axis=1), axis=0))


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
    mixed=("loads",),  # a token's coefficients
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
