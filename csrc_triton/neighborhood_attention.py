"""Attention of each token to those of its window, ROWS tokens of one head a program, arithmetic in fp32.

A program walks over the window, by steps of the dilation: of its tokens at once, their neighbours one step further. A key is
read as often as a window is wide, but from memory once: what programs share are rows side by side. Nothing of the size of
tokens times tokens, or tokens times window, is ever stored, and nothing outside a window is read.
"""

import triton
import triton.language as tl

from _aot import variants

INF = tl.constexpr(float("inf"))
AXES = {
    "T": ["fp32", "bf16", "fp16"],
    "ROWS": [64, 32, 16],
    "D": [32, 64, 128],
    "num_warps": 4,
    "where": lambda ROWS, D: ROWS * D == 2048,
}
STRIDES = {f"{x}_{along}": "i32:16" if along == "token" else "i64:16" for x in "qkv" for along in ("batch", "head", "token")}
NUMBERS = STRIDES | {"heads": "i32", "tokens": "i32", "n": "i32:16", "half": "i32", "dilation": "i32", "scale": "fp32"}


@triton.jit
def place(heads, tokens, ROWS: tl.constexpr):
    """This program's batch, head and tokens, and where the head's tokens begin among those of all heads."""
    blocks = (tokens + ROWS - 1) // ROWS
    group = tl.program_id(0) // blocks
    token = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    return (group // heads).to(tl.int64), (group % heads).to(tl.int64), token, group.to(tl.int64) * tokens


@triton.jit
def rows(x_at, token, stride, real, col, n):
    keep = real[:, None] & (col < n)[None, :]
    return tl.load(x_at + token[:, None] * stride + col[None, :], mask=keep, other=0.0).to(tl.float32)


@triton.jit
def neighbour(token, steps, dilation, tokens, real):
    """The token that is so many steps from each, and whether there is one."""
    other = token + steps * dilation
    return other, real & (other >= 0) & (other < tokens)


@variants(
    q="*T",
    k="*T",
    v="*T",
    y="*T",
    lse="*fp32",
    **NUMBERS,
    **AXES,
)
@triton.jit
def neighborhood_attention_fwd(
    q,
    k,
    v,
    y,
    lse,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    heads,
    tokens,
    n,
    half,
    dilation,
    scale,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    batch, head, token, begin = place(heads, tokens, ROWS)
    col, real = tl.arange(0, D), token < tokens
    k_at, v_at = k + batch * k_batch + head * k_head, v + batch * v_batch + head * v_head
    qs = rows(q + batch * q_batch + head * q_head, token, q_token, real, col, n)
    top, total = tl.full((ROWS,), -INF, tl.float32), tl.full((ROWS,), 0.0, tl.float32)
    sums = tl.full((ROWS, D), 0.0, tl.float32)
    reach = tl.minimum(half, (tokens - 1) // dilation)
    for step in range(2 * reach + 1):
        other, near = neighbour(token, step - reach, dilation, tokens, real)
        s = tl.sum(qs * rows(k_at, other, k_token, near, col, n), axis=1) * scale
        s = tl.where(near, s, -INF)
        higher = tl.maximum(top, s)
        base = tl.where(higher == -INF, 0.0, higher)
        p, shrink = tl.exp(s - base), tl.exp(top - base)
        total = total * shrink + p
        sums = sums * shrink[:, None] + p[:, None] * rows(v_at, other, v_token, near, col, n)
        top = higher
    keep = real[:, None] & (col < n)[None, :]
    tl.store(y + (begin + token)[:, None] * n + col[None, :], sums / total[:, None], mask=keep)
    tl.store(lse + begin + token, top + tl.log(total), mask=real)


@variants(
    dy="*T",
    q="*T",
    k="*T",
    v="*T",
    lse="*fp32",
    dq="*T",
    mean="*fp32",
    dy_batch="i64:16",
    dy_head="i64:16",
    dy_token="i32:16",
    **NUMBERS,
    **AXES,
)
@triton.jit
def neighborhood_attention_bwd_q(
    dy,
    q,
    k,
    v,
    lse,
    dq,
    mean,
    dy_batch,
    dy_head,
    dy_token,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    heads,
    tokens,
    n,
    half,
    dilation,
    scale,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    # First the mean of dp = dy · v over the window, by the weights p, which is not taken from the result: that is rounded.
    batch, head, token, begin = place(heads, tokens, ROWS)
    col, real = tl.arange(0, D), token < tokens
    k_at, v_at = k + batch * k_batch + head * k_head, v + batch * v_batch + head * v_head
    qs = rows(q + batch * q_batch + head * q_head, token, q_token, real, col, n)
    dys = rows(dy + batch * dy_batch + head * dy_head, token, dy_token, real, col, n)
    log_sum = tl.load(lse + begin + token, mask=real, other=0.0)
    means, sums = tl.full((ROWS,), 0.0, tl.float32), tl.full((ROWS, D), 0.0, tl.float32)
    reach = tl.minimum(half, (tokens - 1) // dilation)
    for step in range(2 * reach + 1):
        other, near = neighbour(token, step - reach, dilation, tokens, real)
        s = tl.sum(qs * rows(k_at, other, k_token, near, col, n), axis=1) * scale
        dp = tl.sum(dys * rows(v_at, other, v_token, near, col, n), axis=1)
        means += tl.where(near, tl.exp(s - log_sum) * dp, 0.0)
    for step in range(2 * reach + 1):
        other, near = neighbour(token, step - reach, dilation, tokens, real)
        ks = rows(k_at, other, k_token, near, col, n)
        dp = tl.sum(dys * rows(v_at, other, v_token, near, col, n), axis=1)
        ds = tl.exp(tl.sum(qs * ks, axis=1) * scale - log_sum) * (dp - means)
        sums += tl.where(near, ds, 0.0)[:, None] * ks
    keep = real[:, None] & (col < n)[None, :]
    tl.store(dq + (begin + token)[:, None] * n + col[None, :], sums * scale, mask=keep)
    tl.store(mean + begin + token, means, mask=real)


@variants(
    dy="*T",
    q="*T",
    k="*T",
    v="*T",
    lse="*fp32",
    mean="*fp32",
    dk="*T",
    dv="*T",
    dy_batch="i64:16",
    dy_head="i64:16",
    dy_token="i32:16",
    **NUMBERS,
    **AXES,
)
@triton.jit
def neighborhood_attention_bwd_kv(
    dy,
    q,
    k,
    v,
    lse,
    mean,
    dk,
    dv,
    dy_batch,
    dy_head,
    dy_token,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    heads,
    tokens,
    n,
    half,
    dilation,
    scale,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    # A key is in the windows of just those queries that are in its own.
    batch, head, token, begin = place(heads, tokens, ROWS)
    col, real = tl.arange(0, D), token < tokens
    q_at, dy_at = q + batch * q_batch + head * q_head, dy + batch * dy_batch + head * dy_head
    ks = rows(k + batch * k_batch + head * k_head, token, k_token, real, col, n)
    vs = rows(v + batch * v_batch + head * v_head, token, v_token, real, col, n)
    k_sums, v_sums = tl.full((ROWS, D), 0.0, tl.float32), tl.full((ROWS, D), 0.0, tl.float32)
    reach = tl.minimum(half, (tokens - 1) // dilation)
    for step in range(2 * reach + 1):
        other, near = neighbour(token, step - reach, dilation, tokens, real)
        qs = rows(q_at, other, q_token, near, col, n)
        dys = rows(dy_at, other, dy_token, near, col, n)
        log_sum = tl.load(lse + begin + other, mask=near, other=0.0)
        means = tl.load(mean + begin + other, mask=near, other=0.0)
        p = tl.where(near, tl.exp(tl.sum(qs * ks, axis=1) * scale - log_sum), 0.0)
        v_sums += p[:, None] * dys
        k_sums += (p * (tl.sum(dys * vs, axis=1) - means))[:, None] * qs
    keep = real[:, None] & (col < n)[None, :]
    at = (begin + token)[:, None] * n + col[None, :]
    tl.store(dk + at, k_sums * scale, mask=keep)
    tl.store(dv + at, v_sums, mask=keep)
