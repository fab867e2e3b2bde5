"""Rotary embedding of q and k: HEADS heads of one token a program, arithmetic in fp32. Tensors keep their strides.

The two numbers of a pair lie half a rotated part apart, or side by side: PAIRS_IN says where they are read, PAIRS_OUT where
they are written. PLAIN is the common form: halves, and cos and sin as wide as the columns that are rotated, the first.
The backward is the forward with what is in and what is out exchanged, and the two numbers of sin exchanged and negated.
"""

import triton
import triton.language as tl

from _aot import variants

HEADS = 8


def num_warps(HALF):
    return {32: 1, 64: 2, 128: 4}[HALF]


def declared(X, C, HALF, LOOP, PAIRS_IN, PAIRS_OUT, PLAIN):
    if C not in ("fp32", X):
        return False
    if PLAIN:
        return not (PAIRS_IN or PAIRS_OUT) and (HALF == 128 or not LOOP)
    return (HALF, LOOP) in ((32, False), (64, True))  # few forms, for those who are few


@triton.jit
def turn_half(
    x_at,
    out_at,
    cos_at,
    sin_at,
    start,
    real,
    half,
    angles,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS_IN: tl.constexpr,
    PAIRS_OUT: tl.constexpr,
    PLAIN: tl.constexpr,
):
    other, first, sign, step, height, width, height_at, width_at = angles
    col = (start + tl.arange(0, HALF))[None, :]
    keep = real & (col < half)
    both = (2 * start + tl.arange(0, 2 * HALF))[None, :]  # where pairs lie side by side
    if PAIRS_IN:
        xs = tl.load(x_at + both, mask=real & (both < 2 * half), other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(xs, (HEADS, HALF, 2)))
    else:
        x1 = tl.load(x_at + col, mask=keep, other=0.0).to(tl.float32)
        x2 = tl.load(x_at + half + col, mask=keep, other=0.0).to(tl.float32)
    at = col
    if not PLAIN:
        at = col * step + tl.where(col >= width, width_at, tl.where(col >= height, height_at, 0))
    # Each head loads the angles itself, from the first level cache: to share them between threads would take barriers.
    c1 = tl.load(cos_at + at, mask=keep, other=0.0).to(tl.float32)
    c2 = tl.load(cos_at + other + at, mask=keep, other=0.0).to(tl.float32)
    s1 = tl.load(sin_at + first + at, mask=keep, other=0.0).to(tl.float32) * sign
    s2 = tl.load(sin_at + (other - first) + at, mask=keep, other=0.0).to(tl.float32) * sign
    if PAIRS_OUT:
        ys = tl.reshape(tl.join(x1 * c1 - x2 * s1, x2 * c2 + x1 * s2), (HEADS, 2 * HALF))
        tl.store(out_at + both, ys, mask=real & (both < 2 * half))
    else:
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
    angles,
    offset,
    rest,
    end,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    LOOP: tl.constexpr,
    PAIRS_IN: tl.constexpr,
    PAIRS_OUT: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Rotate a block of heads of one token, where x and out start, by the angles at cos_at and sin_at."""
    head = (block * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    real = (head < heads)[:, None]
    x_at, out_at = x + head[:, None] * x_head, out + head[:, None] * out_head
    x1_at, out1_at = x_at + offset, out_at + offset
    if LOOP:
        for start in range(0, half, HALF):
            turn_half(x1_at, out1_at, cos_at, sin_at, start, real, half, angles, HEADS, HALF, PAIRS_IN, PAIRS_OUT, PLAIN)
    else:
        turn_half(x1_at, out1_at, cos_at, sin_at, 0, real, half, angles, HEADS, HALF, PAIRS_IN, PAIRS_OUT, PLAIN)
    for start in range(rest, end, 2 * HALF):  # the columns that are not rotated
        col = start + tl.arange(0, 2 * HALF)
        both = real & (col < end)[None, :]
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
    full="i32",
    step="i32",
    height="i32",
    width="i32",
    height_at="i32",
    width_at="i32",
    imaginary="i32",
    begin="i32:16",
    parts="i32",
    X=["fp32", "bf16", "fp16"],
    C=["fp32", "bf16", "fp16"],
    HEADS=[HEADS],
    HALF=[32, 64, 128],
    LOOP=[False, True],
    PAIRS_IN=[False, True],
    PAIRS_OUT=[False, True],
    PLAIN=[False, True],
    num_warps=num_warps,
    # Without a bound of its own, ptxas spills one or two numbers to fit more programs.
    maxnreg=lambda PLAIN: 72 if PLAIN else 128,
    mixed=("loads",),  # angles, which may lie anywhere
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
    full,
    step,
    height,
    width,
    height_at,
    width_at,
    imaginary,
    begin,
    parts,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    LOOP: tl.constexpr,
    PAIRS_IN: tl.constexpr,
    PAIRS_OUT: tl.constexpr,
    PLAIN: tl.constexpr,
):
    # Forward: first is 0 and sign 1. Backward: first is half, so that s1 is the second half of sin, and sign is -1. All of the
    # rest is for what is not PLAIN. full: whether each number of a pair has its own cos and sin, or both have one. Angles lie
    # `step` apart, and those of sin `imaginary` behind its start; pairs from `height` on have angles that are `height_at`
    # behind, from `width` on those `width_at` behind; what is rotated starts at the column `begin` and is `parts` times two
    # halves.
    q_blocks = (q_heads + HEADS - 1) // HEADS
    blocks = q_blocks + (k_heads + HEADS - 1) // HEADS
    block = tl.program_id(0) % blocks
    place = tl.program_id(0) // blocks
    other, offset, rest, end = half, 0, 2 * half, n
    if not PLAIN:
        part = place % parts
        place = place // parts
        cos += part * (1 + full) * half * step
        sin += part * (1 + full) * half * step + imaginary
        rest = tl.where(begin == 0, parts * 2 * half, 0)
        end = tl.where(part == 0, rest + n - parts * 2 * half, rest)  # the first part sees to the others
        offset = begin + part * 2 * half
        other = full * half
        if PAIRS_IN and PAIRS_OUT:  # the angles too
            other, step = full, step * (1 + full)
        first = tl.where(first == 0, 0, other)
    angles = other, first, sign, step, height, width, height_at, width_at
    batch, token = (place // tokens).to(tl.int64), (place % tokens).to(tl.int64)
    at = batch * cos_batch + token * cos_token
    if block < q_blocks:
        x, out = q + batch * q_batch + token * q_token, q_out + batch * q_out_batch + token * q_out_token
        turn(
            x, out, cos + at, sin + at, q_head, q_out_head, q_heads, block, half, angles, offset, rest, end,
            HEADS, HALF, LOOP, PAIRS_IN, PAIRS_OUT, PLAIN,
        )  # fmt: skip
    else:
        x, out = k + batch * k_batch + token * k_token, k_out + batch * k_out_batch + token * k_out_token
        block -= q_blocks
        turn(
            x, out, cos + at, sin + at, k_head, k_out_head, k_heads, block, half, angles, offset, rest, end,
            HEADS, HALF, LOOP, PAIRS_IN, PAIRS_OUT, PLAIN,
        )  # fmt: skip
