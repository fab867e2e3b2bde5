"""GroupNorm: a row is one group of one sample, its channels side by side, arithmetic in fp32. Rows are walked in a loop."""

import triton
import triton.language as tl

from _aot import variants

DTYPES = [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32")]  # (x, weight and bias)
AXES = {
    "X": ["fp32", "bf16", "fp16"],
    "W": ["fp32", "bf16", "fp16"],
    "BLOCK": [2048],
    "num_warps": 4,
    "where": lambda X, W: (X, W) in DTYPES,
}


@variants(
    x="*X",
    weight="*W",
    bias="*W",
    y="*X",
    mean="*fp32",
    rstd="*fp32",
    n="i32:16",
    size="i32:16",
    groups="i32",
    eps="fp32",
    has_weight="i32",
    has_bias="i32",
    mixed=("loads",),  # each number's channel has a weight and a bias
    **AXES,
)
@triton.jit
def group_norm_fwd(x, weight, bias, y, mean, rstd, n, size, groups, eps, has_weight, has_bias, BLOCK: tl.constexpr):
    # n numbers a row, size of them a channel.
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x_at, y_at, first = x + row * n, y + row * n, row % groups * (n // size)
    # Welford's recurrence in each column of the block, then the columns joined: one reading of the row, not two.
    means, squares = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, n, BLOCK):
        keep = start + col < n
        xs = tl.load(x_at + start + col, mask=keep, other=0.0).to(tl.float32)
        ahead = tl.where(keep, xs - means, 0.0)
        means += ahead / (start // BLOCK + 1)
        squares += ahead * (xs - means)
    count = (n - 1 - col + BLOCK) // BLOCK
    centre = tl.sum(means * count, axis=0) / n
    apart = means - centre
    scale = tl.rsqrt(tl.sum(squares + apart * apart * count, axis=0) / n + eps)
    for start in range(0, n, BLOCK):
        keep = start + col < n
        channel = first + (start + col) // size
        xs = tl.load(x_at + start + col, mask=keep, other=0.0).to(tl.float32)
        ws = tl.load(weight + channel, mask=keep & (has_weight != 0), other=1.0).to(tl.float32)
        bs = tl.load(bias + channel, mask=keep & (has_bias != 0), other=0.0).to(tl.float32)
        tl.store(y_at + start + col, (xs - centre) * scale * ws + bs, mask=keep)
    tl.store(mean + row, centre)
    tl.store(rstd + row, scale)


@variants(
    dy="*X",
    x="*X",
    mean="*fp32",
    rstd="*fp32",
    partial="*fp32",
    size="i32:16",
    channels="i32",
    groups="i32",
    X=["fp32", "bf16", "fp16"],
    BLOCK=[1024],
    num_warps=4,
    scalar=("stores",),
)
@triton.jit
def group_norm_sums(dy, x, mean, rstd, partial, size, channels, groups, BLOCK: tl.constexpr):
    # Program (sample, channel) writes its share of the gradients of weight and bias, partial[sample, 0 and 1, channel].
    program = tl.program_id(0).to(tl.int64)
    sample, channel = program // channels, program % channels
    row = sample * groups + channel // (channels // groups)
    col = tl.arange(0, BLOCK)
    centre, scale, at = tl.load(mean + row), tl.load(rstd + row), program * size
    products, sums = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, size, BLOCK):
        keep = start + col < size
        xs = tl.load(x + at + start + col, mask=keep, other=0.0).to(tl.float32)
        dys = tl.load(dy + at + start + col, mask=keep, other=0.0).to(tl.float32)
        products += dys * ((xs - centre) * scale)
        sums += dys
    own = partial + sample * 2 * channels + channel
    tl.store(own, tl.sum(products, axis=0))
    tl.store(own + channels, tl.sum(sums, axis=0))


@variants(
    dy="*X",
    x="*X",
    weight="*W",
    mean="*fp32",
    rstd="*fp32",
    partial="*fp32",
    dx="*X",
    n="i32:16",
    size="i32:16",
    groups="i32",
    has_weight="i32",
    mixed=("loads",),  # as there
    **AXES,
)
@triton.jit
def group_norm_bwd(dy, x, weight, mean, rstd, partial, dx, n, size, groups, has_weight, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    width = n // size
    first, own = row % groups * width, partial + row // groups * 2 * groups * width
    products, sums = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        keep = start + col < width
        channel = first + start + col
        ws = tl.load(weight + channel, mask=keep & (has_weight != 0), other=1.0).to(tl.float32)
        products += ws * tl.load(own + channel, mask=keep, other=0.0)
        sums += ws * tl.load(own + groups * width + channel, mask=keep, other=0.0)
    slope, constant = tl.sum(products, axis=0) / n, tl.sum(sums, axis=0) / n
    centre, scale, at = tl.load(mean + row), tl.load(rstd + row), row * n
    for start in range(0, n, BLOCK):
        keep = start + col < n
        xs = tl.load(x + at + start + col, mask=keep, other=0.0).to(tl.float32)
        dys = tl.load(dy + at + start + col, mask=keep, other=0.0).to(tl.float32)
        ws = tl.load(weight + first + (start + col) // size, mask=keep & (has_weight != 0), other=1.0).to(tl.float32)
        tl.store(dx + at + start + col, (dys * ws - constant - (xs - centre) * scale * slope) * scale, mask=keep)
