"""Kullback-Leibler divergence of the softmax of each row from probabilities, from its logits, and the gradient of these."""

import triton
import triton.language as tl

from _aot import variants
from _divergence import is_kept
from _lse import LANES
from _lse import lse_of
from _lse import lse_step

INF = tl.constexpr(float("inf"))
FLOATS = ["fp32", "bf16", "fp16"]


@variants(
    logits="*fp32",
    target="*T",
    labels="*i64",
    loss="*fp32",
    lse="*fp32",
    mass="*fp32",
    stride="i32:16",
    target_stride="i32:16",
    n="i32:16",
    ignore_index="i64",
    eps="fp32",
    scale="fp32",
    has_labels="i32",
    T=FLOATS,
    BLOCK=[2048],
    num_warps=4,
    scalar=("stores",),
)
@triton.jit
def softmax_kl_div_fwd(
    logits,
    target,
    labels,
    loss,
    lse,
    mass,
    stride,
    target_stride,
    n,
    ignore_index,
    eps,
    scale,
    has_labels,
    BLOCK: tl.constexpr,
):
    # A row once: with z the logits and t the probabilities, Σ t · (log t - z) + lse · Σ t.
    row = tl.program_id(0).to(tl.int64)
    lane, step = tl.arange(0, LANES), tl.arange(0, BLOCK // LANES) * LANES
    z_at, t_at = logits + row * stride, target + row * target_stride
    valid = is_kept(labels, row, ignore_index, has_labels)
    top = tl.full((LANES,), -INF, tl.float32)
    sums = tl.full((LANES,), 0.0, tl.float32)
    masses, products = sums, sums
    for start in range(0, tl.where(valid, n, 0), BLOCK):
        at = start + step[:, None] + lane[None, :]
        keep = at < n
        z = tl.where(keep, tl.load(z_at + at, mask=keep, other=0.0) * scale, -INF)
        t = tl.load(t_at + at, mask=keep, other=0.0).to(tl.float32)
        top, sums = lse_step(top, sums, z)
        masses += tl.sum(t, axis=0)
        # What has probability 0 counts for nothing, whatever its logarithm.
        products += tl.sum(tl.where(t == 0.0, 0.0, t * (tl.log(tl.maximum(t, eps)) - z)), axis=0)
    base, log_sum = lse_of(top, sums)
    total, weight = tl.where(valid, base + log_sum, 0.0), tl.sum(masses, axis=0)
    tl.store(loss + row, tl.sum(products, axis=0) + total * weight)
    tl.store(lse + row, total)
    tl.store(mass + row, weight)


@variants(
    dloss="*fp32",
    logits="*fp32",
    target="*T",
    labels="*i64",
    lse="*fp32",
    mass="*fp32",
    dlogits="*D",
    dloss_stride="i32",
    stride="i32:16",
    target_stride="i32:16",
    n="i32:16",
    ignore_index="i64",
    scale="fp32",
    has_labels="i32",
    T=FLOATS,
    D=FLOATS,
    BLOCK=[2048],
    num_warps=4,
)
@triton.jit
def softmax_kl_div_bwd(
    dloss,
    logits,
    target,
    labels,
    lse,
    mass,
    dlogits,
    dloss_stride,
    stride,
    target_stride,
    n,
    ignore_index,
    scale,
    has_labels,
    BLOCK: tl.constexpr,
):
    # A program takes one block of one row.
    blocks = (n + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    keep, valid = at < n, is_kept(labels, row, ignore_index, has_labels)
    upstream = tl.load(dloss + row * dloss_stride) * scale
    z = tl.load(logits + row * stride + at, mask=keep & valid, other=0.0) * scale
    t = tl.load(target + row * target_stride + at, mask=keep & valid, other=0.0).to(tl.float32)
    dz = upstream * (tl.load(mass + row) * tl.exp(z - tl.load(lse + row)) - t)
    tl.store(dlogits + row * n + at, tl.where(valid, dz, 0.0), mask=keep)
