"""Log-probability of the target, entropy and logsumexp of each row of logits, in one pass over it, and the gradient."""

import triton
import triton.language as tl

from _aot import variants

INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
LANES = tl.constexpr(1024)
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) as exp2(x · log2(e)): tl.exp spends three instructions on denormal results


@variants(
    logits="*fp32",
    target="*i64",
    logp="*fp32",
    entropy="*fp32",
    lse="*fp32",
    stride="i32:16",
    n="i32:16",
    ignore_index="i64",
    scale="fp32",
    BLOCK=[1024, 4096],
    num_warps=4,
    scalar=("stores",),
)
@triton.jit
def logprob_fwd(logits, target, logp, entropy, lse, stride, n, ignore_index, scale, BLOCK: tl.constexpr):
    # Every lane has a maximum of its own, the sum of exp(z - maximum) and that of exp(z - maximum) · (z - maximum).
    row = tl.program_id(0).to(tl.int64)
    lane, step = tl.arange(0, LANES), tl.arange(0, BLOCK // LANES) * LANES
    x_at, y = logits + row * stride, tl.load(target + row)
    valid, inside = y != ignore_index, (y >= 0) & (y < n)
    top = tl.full((LANES,), -INF, tl.float32)
    sums = tl.full((LANES,), 0.0, tl.float32)
    products = tl.full((LANES,), 0.0, tl.float32)
    for start in range(0, tl.where(valid, n, 0), BLOCK):
        at = start + step[:, None] + lane[None, :]
        keep = at < n
        z = tl.where(keep, tl.load(x_at + at, mask=keep, other=0.0) * scale, -INF)
        higher = tl.maximum(top, tl.max(z, axis=0))
        base = tl.where(higher == -INF, 0.0, higher)
        less = tl.where(z == -INF, 0.0, z - base[None, :])
        e = tl.where(z == -INF, 0.0, tl.exp2(less * LOG2E))
        drop = tl.where(top == -INF, 0.0, top - base)
        shrink = tl.where(top == -INF, 0.0, tl.exp2(drop * LOG2E))
        products = shrink * (products + sums * drop) + tl.sum(e * less, axis=0)
        sums = sums * shrink + tl.sum(e, axis=0)
        top = higher

    highest = tl.max(top, axis=0)
    base = tl.where(highest == -INF, 0.0, highest)
    drop = tl.where(top == -INF, 0.0, top - base)
    shrink = tl.where(top == -INF, 0.0, tl.exp2(drop * LOG2E))
    total = tl.where(valid, tl.sum(sums * shrink, axis=0), 1.0)
    product = tl.sum(shrink * (products + sums * drop), axis=0)
    log_sum = tl.log(total)
    zy = tl.load(x_at + y, mask=valid & inside, other=0.0) * scale
    tl.store(logp + row, tl.where(valid, tl.where(inside, (zy - base) - log_sum, NAN), 0.0))
    tl.store(entropy + row, tl.where(valid, log_sum - product / total, 0.0))
    tl.store(lse + row, tl.where(valid, base + log_sum, 0.0))


@variants(
    logits="*fp32",
    target="*i64",
    lse="*fp32",
    entropy="*fp32",
    dlogp="*fp32",
    dentropy="*fp32",
    dlse="*fp32",
    dlogits="*D",
    stride="i32:16",
    n="i32:16",
    ignore_index="i64",
    scale="fp32",
    D=["fp32", "bf16", "fp16"],
    BLOCK=[1024, 4096],
    num_warps=4,
)
@triton.jit
def logprob_bwd(
    logits,
    target,
    lse,
    entropy,
    dlogp,
    dentropy,
    dlse,
    dlogits,
    stride,
    n,
    ignore_index,
    scale,
    BLOCK: tl.constexpr,
):
    # The programs of a row lie side by side: program -> (row, block of columns).
    blocks = (n + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    keep = at < n
    y = tl.load(target + row)
    valid, inside = y != ignore_index, (y >= 0) & (y < n)
    total, spread = tl.load(lse + row), tl.load(entropy + row)
    dlogps, dspread, dtotal = tl.load(dlogp + row), tl.load(dentropy + row), tl.load(dlse + row)
    z = tl.where(keep, tl.load(logits + row * stride + at, mask=keep & valid, other=0.0) * scale, -INF)
    less = tl.where(z == -INF, 0.0, z - total)
    p = tl.where(z == -INF, 0.0, tl.exp2(less * LOG2E))
    dz = p * (dtotal - dlogps - dspread * (less + spread)) + tl.where(at == y, dlogps, 0.0)
    dx = tl.where(valid, tl.where(inside, dz * scale, NAN), 0.0)
    tl.store(dlogits + row * n + at, dx, mask=keep)
