"""Divergences of the rows of two tensors: of each number, or summed over a row; their reduction, and the gradient."""

import triton
import triton.language as tl

from _aot import variants
from _divergence import divergence
from _divergence import is_kept
from _divergence import slope

FLOATS = ["fp32", "bf16", "fp16"]


@variants(
    x="*T",
    y="*T",
    labels="*i64",
    loss="*fp32",
    x_stride="i32:16",
    y_stride="i32:16",
    n="i32:16",
    ignore_index="i64",
    beta="fp32",
    rest="fp32",
    eps="fp32",
    has_labels="i32",
    T=FLOATS,
    KIND=["kl", "jsd", "tvd"],
    BLOCK=[2048],
    num_warps=4,
    scalar=("stores",),
)
@triton.jit
def divergence_fwd(
    x,
    y,
    labels,
    loss,
    x_stride,
    y_stride,
    n,
    ignore_index,
    beta,
    rest,
    eps,
    has_labels,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program takes a row; every lane has a sum of its own.
    row = tl.program_id(0).to(tl.int64)
    valid = is_kept(labels, row, ignore_index, has_labels)
    sums = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, tl.where(valid, n, 0), BLOCK):
        at = start + tl.arange(0, BLOCK)
        keep = at < n
        xs = tl.load(x + row * x_stride + at, mask=keep, other=0.0).to(tl.float32)
        ys = tl.load(y + row * y_stride + at, mask=keep, other=0.0).to(tl.float32)
        sums += tl.where(keep, divergence(xs, ys, beta, rest, eps, KIND), 0.0)
    tl.store(loss + row, tl.sum(sums, axis=0))


@variants(
    x="*T",
    y="*T",
    labels="*i64",
    loss="*T",
    x_stride="i32:16",
    y_stride="i32:16",
    n="i32:16",
    ignore_index="i64",
    beta="fp32",
    rest="fp32",
    eps="fp32",
    has_labels="i32",
    T=FLOATS,
    KIND=["kl", "jsd", "tvd"],
    BLOCK=[2048],
    num_warps=4,
)
@triton.jit
def divergence_each(
    x,
    y,
    labels,
    loss,
    x_stride,
    y_stride,
    n,
    ignore_index,
    beta,
    rest,
    eps,
    has_labels,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program takes one block of one row.
    blocks = (n + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    keep, valid = at < n, is_kept(labels, row, ignore_index, has_labels)
    xs = tl.load(x + row * x_stride + at, mask=keep & valid, other=0.0).to(tl.float32)
    ys = tl.load(y + row * y_stride + at, mask=keep & valid, other=0.0).to(tl.float32)
    tl.store(loss + row * n + at, tl.where(valid, divergence(xs, ys, beta, rest, eps, KIND), 0.0), mask=keep)


@variants(
    loss="*fp32",
    labels="*i64",
    result="*L",
    factor="*fp32",
    rows="i32",
    batch="i32",
    width="i32",
    ignore_index="i64",
    has_labels="i32",
    L=FLOATS,
    BLOCK=[2048],
    num_warps=8,
    scalar=("loads", "stores"),
)
@triton.jit
def divergence_reduce(
    loss,
    labels,
    result,
    factor,
    rows,
    batch,
    width,
    ignore_index,
    has_labels,
    BLOCK: tl.constexpr,
):
    # One program, so that the order of the sum is always the same. The divisor is batch · width; with batch 0, count · width.
    losses = tl.full((BLOCK,), 0.0, tl.float32)
    count = losses
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        losses += tl.load(loss + row, mask=row < rows, other=0.0)
        count += tl.where((row < rows) & is_kept(labels, row, ignore_index, (row < rows) & (has_labels != 0)), 1.0, 0.0)
    number = tl.where(batch == 0, tl.sum(count, axis=0), batch) * width
    tl.store(result, tl.sum(losses, axis=0) / number)
    # Without rows the mean is 0 / 0, but there is no gradient.
    tl.store(factor, tl.where(number == 0.0, 0.0, 1.0 / number))


@variants(
    dloss="*G",
    x="*T",
    y="*T",
    labels="*i64",
    factor="*fp32",
    dx="*T",
    dloss_stride="i32:16",
    x_stride="i32:16",
    y_stride="i32:16",
    n="i32:16",
    ignore_index="i64",
    beta="fp32",
    rest="fp32",
    eps="fp32",
    has_labels="i32",
    G=FLOATS,
    T=FLOATS,
    KIND=["kl", "kl_target", "jsd", "tvd"],
    EACH=[False, True],
    BLOCK=[2048],
    num_warps=8,
    where=lambda G, T, EACH: G in ([T] if EACH else ["fp32"]),
)
@triton.jit
def divergence_bwd(
    dloss,
    x,
    y,
    labels,
    factor,
    dx,
    dloss_stride,
    x_stride,
    y_stride,
    n,
    ignore_index,
    beta,
    rest,
    eps,
    has_labels,
    KIND: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program takes one block of one row. dloss is of each number, or of the reduced loss, which was divided by 1 / factor.
    blocks = (n + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    keep, valid = at < n, is_kept(labels, row, ignore_index, has_labels)
    if EACH:
        upstream = tl.load(dloss + row * dloss_stride + at, mask=keep & valid, other=0.0).to(tl.float32)
    else:
        upstream = tl.load(dloss) * tl.load(factor)
    xs = tl.load(x + row * x_stride + at, mask=keep & valid, other=0.0).to(tl.float32)
    ys = tl.load(y + row * y_stride + at, mask=keep & valid, other=0.0).to(tl.float32)
    tl.store(dx + row * n + at, tl.where(valid, upstream * slope(xs, ys, beta, rest, eps, KIND), 0.0), mask=keep)
