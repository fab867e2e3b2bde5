"""Rotary embedding of q and k: HEADS heads of one token a program, arithmetic in fp32. Tensors keep their strides.

The backward is the forward with the two halves of sin exchanged and negated.
"""

import triton
import triton.language as tl

from _aot import variants

HEADS = 8


def num_warps(HALF):
    return {32: 1, 64: 2, 128: 4}[HALF]


def declared(X, C, HALF, LOOP):
    return C in ("fp32", X) and (HALF == 128 or not LOOP)


@triton.jit
def turn_half(x_at, out_at, cos_at, sin_at, start, real, half, first, sign, HALF: tl.constexpr):
    col = (start + tl.arange(0, HALF))[None, :]
    keep = real & (col < half)
    x1 = tl.load(x_at + col, mask=keep, other=0.0).to(tl.float32)
    x2 = tl.load(x_at + half + col, mask=keep, other=0.0).to(tl.float32)
    # Each head loads the angles itself, from the first level cache: to share them between threads would take barriers.
    c1 = tl.load(cos_at + col, mask=keep, other=0.0).to(tl.float32)
    c2 = tl.load(cos_at + half + col, mask=keep, other=0.0).to(tl.float32)
    s1 = tl.load(sin_at + first + col, mask=keep, other=0.0).to(tl.float32) * sign
    s2 = tl.load(sin_at + (half - first) + col, mask=keep, other=0.0).to(tl.float32) * sign
    tl.store(out_at + col, x1 * c1 - x2 * s1, mask=keep)
    tl.store(out_at + half + col, x2 * c2 + x1 * s2, mask=keep)


@triton.jit
def turn(
    x,
    out,
    cos_at,
    sin_at,
    x_head,
    out_head,
    heads,
    block,
    half,
    n,
    first,
    sign,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    LOOP: tl.constexpr,
):
    """Rotate a block of heads of one token, where x and out start, by the angles at cos_at and sin_at."""
    head = (block * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    real = (head < heads)[:, None]
    x_at, out_at = x + head[:, None] * x_head, out + head[:, None] * out_head
    if LOOP:
        for start in range(0, half, HALF):
            turn_half(x_at, out_at, cos_at, sin_at, start, real, half, first, sign, HALF)
    else:
        turn_half(x_at, out_at, cos_at, sin_at, 0, real, half, first, sign, HALF)
    for start in range(2 * half, n, 2 * HALF):  # the columns that are not rotated
        col = start + tl.arange(0, 2 * HALF)
        both = real & (col < n)[None, :]
        tl.store(out_at + col[None, :], tl.load(x_at + col[None, :], mask=both), mask=both)


@variants(
    q="*X",
    k="*X",
    cos="*C",
    sin="*C",
    q_out="*X",
    k_out="*X",
    q_batch="i64:16",
    q_head="i32:16",
    q_token="i32:16",
    k_batch="i64:16",
    k_head="i32:16",
    k_token="i32:16",
    q_out_batch="i64:16",
    q_out_head="i32:16",
    q_out_token="i32:16",
    k_out_batch="i64:16",
    k_out_head="i32:16",
    k_out_token="i32:16",
    cos_batch="i64:16",
    cos_token="i32:16",
    tokens="i32",
    q_heads="i32",
    k_heads="i32",
    half="i32:16",
    n="i32:16",
    first="i32:16",
    sign="fp32",
    X=["fp32", "bf16", "fp16"],
    C=["fp32", "bf16", "fp16"],
    HEADS=[HEADS],
    HALF=[32, 64, 128],
    LOOP=[False, True],
    num_warps=num_warps,
    where=declared,
)
@triton.jit
def rope(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    q_out_batch,
    q_out_head,
    q_out_token,
    k_out_batch,
    k_out_head,
    k_out_token,
    cos_batch,
    cos_token,
    tokens,
    q_heads,
    k_heads,
    half,
    n,
    first,
    sign,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    LOOP: tl.constexpr,
):
    # Forward: first is 0 and sign 1. Backward: first is half, so that s1 is the second half of sin, and sign is -1.
    q_blocks = (q_heads + HEADS - 1) // HEADS
    blocks = q_blocks + (k_heads + HEADS - 1) // HEADS
    block = tl.program_id(0) % blocks
    place = tl.program_id(0) // blocks
    batch, token = (place // tokens).to(tl.int64), (place % tokens).to(tl.int64)
    at = batch * cos_batch + token * cos_token
    if block < q_blocks:
        x, out = q + batch * q_batch + token * q_token, q_out + batch * q_out_batch + token * q_out_token
        turn(x, out, cos + at, sin + at, q_head, q_out_head, q_heads, block, half, n, first, sign, HEADS, HALF, LOOP)
    else:
        x, out = k + batch * k_batch + token * k_token, k_out + batch * k_out_batch + token * k_out_token
        block -= q_blocks
        turn(x, out, cos + at, sin + at, k_head, k_out_head, k_heads, block, half, n, first, sign, HEADS, HALF, LOOP)
