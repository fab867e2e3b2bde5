"""Cross entropy of each row of logits in one pass over it, the mean or sum over rows, and the gradient."""

import triton
import triton.language as tl

from _aot import variants
from _math import tanh

INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) as exp2(x · log2(e)): tl.exp spends three instructions on denormal results
# (logits, their gradient): the gradient is rounded to 16 bits where the logits are a fp32 chunk that a 16-bit matmul made.
DTYPES = [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "bf16"), ("fp32", "fp16")]


LANES = tl.constexpr(1024)


@variants(
    logits="*X",
    target="*i64",
    weight="*fp32",
    weight_sum="*fp32",
    loss="*fp32",
    lse="*fp32",
    predicted="*i64",
    stride="i32:16",
    n="i32:16",
    ignore_index="i64",
    smoothing="fp32",
    softcap="fp32",
    scale="fp32",
    z_scale="fp32",
    has_weight="i32",
    X=["fp32", "bf16", "fp16"],
    SOFTCAP=[False, True],
    PREDICT=[False, True],
    BLOCK=[1024, 4096],
    num_warps=4,
    # Without a bound of its own, ptxas spills one or two numbers to fit more programs.
    maxnreg=lambda SOFTCAP, PREDICT: 128 if SOFTCAP or PREDICT else 96,
    where=lambda SOFTCAP, BLOCK: not SOFTCAP or BLOCK == 4096,
    scalar=("stores",),
)
@triton.jit
def cross_entropy_fwd(
    logits,
    target,
    weight,
    weight_sum,
    loss,
    lse,
    predicted,
    stride,
    n,
    ignore_index,
    smoothing,
    softcap,
    scale,
    z_scale,
    has_weight,
    SOFTCAP: tl.constexpr,
    PREDICT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Every lane has a running maximum and sum of its own: the loop moves nothing between threads, and rescales once for
    # BLOCK // LANES numbers.
    row = tl.program_id(0).to(tl.int64)
    lane, step = tl.arange(0, LANES), tl.arange(0, BLOCK // LANES) * LANES
    x_at, y = logits + row * stride, tl.load(target + row)
    valid, inside = y != ignore_index, (y >= 0) & (y < n)
    top = tl.full((LANES,), -INF, tl.float32)
    sums = tl.full((LANES,), 0.0, tl.float32)
    best = lane
    factor = scale
    if SOFTCAP:
        factor = scale / softcap
    for start in range(0, tl.where(valid, n, 0), BLOCK):
        at = start + step[:, None] + lane[None, :]
        keep = at < n
        z = tl.load(x_at + at, mask=keep, other=0.0).to(tl.float32) * factor
        if SOFTCAP:
            z = softcap * tanh(z)
        z = tl.where(keep, z, -INF)
        peak = tl.max(z, axis=0)
        if PREDICT:
            best = tl.where(peak > top, tl.min(tl.where(z == peak[None, :], at, n), axis=0), best)
        higher = tl.maximum(top, peak)
        base = tl.where(higher == -INF, 0.0, higher)
        sums = sums * tl.exp2((top - base) * LOG2E) + tl.sum(tl.exp2((z - base[None, :]) * LOG2E), axis=0)
        top = higher
    # Label smoothing reads the row once more: in the loop above its products would cost registers that every caller pays.
    products = tl.full((LANES,), 0.0, tl.float32)
    for start in range(0, tl.where(valid & (smoothing != 0.0), n, 0), BLOCK):
        at = start + step[:, None] + lane[None, :]
        keep = at < n
        z = tl.load(x_at + at, mask=keep, other=0.0).to(tl.float32) * factor
        if SOFTCAP:
            z = softcap * tanh(z)
        products += tl.sum(z * tl.load(weight + at, mask=keep & (has_weight != 0), other=1.0), axis=0)

    highest = tl.max(top, axis=0)
    log_sum = tl.log(tl.where(valid, tl.sum(sums * tl.exp2((top - highest) * LOG2E), axis=0), 1.0))
    total = highest + log_sum
    zy = tl.load(x_at + y, mask=valid & inside, other=0.0).to(tl.float32) * factor
    if SOFTCAP:
        zy = softcap * tanh(zy)
    wy = tl.load(weight + y, mask=valid & inside & (has_weight != 0), other=1.0)
    # lse - zy, but exact where the target is all but certain.
    nll = wy * (log_sum + (highest - zy))
    share = tl.where(has_weight != 0, tl.load(weight_sum, mask=(has_weight != 0) & (smoothing != 0.0), other=0.0), n)
    spread = smoothing / n * (total * share - tl.sum(products, axis=0))
    result = (1.0 - smoothing) * nll + tl.where(smoothing != 0.0, spread, 0.0) + z_scale * total * total
    tl.store(loss + row, tl.where(valid, tl.where(inside, result, NAN), 0.0))
    tl.store(lse + row, tl.where(valid, total, 0.0))
    if PREDICT:
        first = tl.minimum(tl.min(tl.where(top == highest, best, n), axis=0), n - 1)
        tl.store(predicted + row, tl.where(valid, first, -1))


@variants(
    loss="*fp32",
    lse="*fp32",
    target="*i64",
    weight="*fp32",
    predicted="*i64",
    result="*L",
    totals="*fp32",
    rows="i32",
    n="i32",
    ignore_index="i64",
    z_scale="fp32",
    mean="i32",
    has_weight="i32",
    has_predicted="i32",
    L=["fp32", "bf16", "fp16"],
    BLOCK=[2048],
    num_warps=8,
    scalar=("loads", "stores"),
)
@triton.jit
def cross_entropy_reduce(
    loss,
    lse,
    target,
    weight,
    predicted,
    result,
    totals,
    rows,
    n,
    ignore_index,
    z_scale,
    mean,
    has_weight,
    has_predicted,
    BLOCK: tl.constexpr,
):
    # One program, so that the order of the sum is always the same. totals is what the two parts of the gradient are
    # multiplied by, then the z-loss and the accuracy.
    losses = tl.full((BLOCK,), 0.0, tl.float32)
    squares, weights, count, hits = losses, losses, losses, losses
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        y = tl.load(target + row, mask=row < rows, other=0)
        valid = (row < rows) & (y != ignore_index)
        losses += tl.load(loss + row, mask=valid, other=0.0)
        lses = tl.load(lse + row, mask=valid & (z_scale != 0.0), other=0.0)
        squares += lses * lses
        ws = tl.load(weight + y, mask=valid & (y >= 0) & (y < n) & (has_weight != 0), other=1.0)
        weights += tl.where(valid, ws, 0.0)
        count += tl.where(valid, 1.0, 0.0)
        guess = tl.load(predicted + row, mask=valid & (has_predicted != 0), other=-1)
        hits += tl.where(valid & (guess == y), 1.0, 0.0)
    number = tl.sum(count, axis=0)
    loss_factor = 1.0 / tl.where(mean != 0, tl.sum(weights, axis=0), 1.0)
    z_factor = 1.0 / tl.where(mean != 0, number, 1.0)
    z_loss = tl.where(z_scale != 0.0, z_scale * tl.sum(squares, axis=0) * z_factor, 0.0)
    tl.store(result, tl.sum(losses, axis=0) * loss_factor + z_loss)
    # Without rows the mean is 0 / 0, but there is no gradient: the linear loss multiplies what it made in forward by these.
    tl.store(totals, tl.where(number == 0.0, 0.0, loss_factor))
    tl.store(totals + 1, tl.where(number == 0.0, 0.0, z_factor))
    tl.store(totals + 2, z_loss)
    tl.store(totals + 3, tl.sum(hits, axis=0) / number)


@variants(
    dloss="*fp32",
    logits="*X",
    target="*i64",
    weight="*fp32",
    weight_sum="*fp32",
    lse="*fp32",
    totals="*fp32",
    dlogits="*D",
    dloss_stride="i32",
    stride="i32:16",
    n="i32:16",
    ignore_index="i64",
    smoothing="fp32",
    softcap="fp32",
    scale="fp32",
    z_scale="fp32",
    has_weight="i32",
    has_totals="i32",
    X=["fp32", "bf16", "fp16"],
    D=["fp32", "bf16", "fp16"],
    SOFTCAP=[False, True],
    BLOCK=[1024, 4096],
    num_warps=lambda SOFTCAP: 8 if SOFTCAP else 4,  # which takes half as many registers again
    where=lambda X, D, SOFTCAP, BLOCK: (X, D) in DTYPES and (not SOFTCAP or BLOCK == 4096),
)
@triton.jit
def cross_entropy_bwd(
    dloss,
    logits,
    target,
    weight,
    weight_sum,
    lse,
    totals,
    dlogits,
    dloss_stride,
    stride,
    n,
    ignore_index,
    smoothing,
    softcap,
    scale,
    z_scale,
    has_weight,
    has_totals,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program takes one block of one row.
    blocks = (n + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(target + row)
    valid, inside = y != ignore_index, (y >= 0) & (y < n)
    smooth, weighted = valid & (smoothing != 0.0), valid & (has_weight != 0)
    upstream = tl.load(dloss + row * dloss_stride, mask=valid, other=0.0) * scale
    upstream = tl.where(valid & (inside == 0), NAN, upstream)
    loss_factor = upstream * tl.load(totals, mask=valid & (has_totals != 0), other=1.0)
    z_factor = upstream * tl.load(totals + 1, mask=valid & (has_totals != 0), other=1.0)
    total = tl.load(lse + row, mask=valid, other=0.0)
    picked = loss_factor * (1.0 - smoothing) * tl.load(weight + y, mask=weighted & inside, other=1.0)
    spread = loss_factor * smoothing / n
    share = tl.where(smooth & weighted, tl.load(weight_sum, mask=smooth & weighted, other=0.0), n)
    share = picked + spread * share + 2.0 * z_factor * z_scale * total

    keep = at < n
    z = tl.load(logits + row * stride + at, mask=keep & valid, other=0.0).to(tl.float32) * scale
    ws = tl.load(weight + at, mask=keep & smooth & weighted, other=1.0)
    slope = 1.0
    if SOFTCAP:
        t = tanh(z * (1.0 / softcap))
        z = softcap * t
        slope = 1.0 - t * t
    dz = share * tl.exp2((z - total) * LOG2E) - tl.where(at == y, picked, 0.0) - spread * ws
    tl.store(dlogits + row * n + at, dz * slope, mask=keep)
