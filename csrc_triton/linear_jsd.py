"""Jensen-Shannon divergence of two softmaxes in each row, from their logits, and the gradient of one of the two."""

import triton
import triton.language as tl

from _aot import variants
from _divergence import is_kept
from _divergence import jsd_slope
from _divergence import jsd_terms
from _lse import LANES
from _lse import lse_of
from _lse import lse_step

INF = tl.constexpr(float("inf"))


@variants(
    student="*fp32",
    teacher="*fp32",
    labels="*i64",
    loss="*fp32",
    student_lse="*fp32",
    teacher_lse="*fp32",
    student_share="*fp32",
    teacher_share="*fp32",
    student_stride="i32:16",
    teacher_stride="i32:16",
    n="i32:16",
    ignore_index="i64",
    beta="fp32",
    rest="fp32",
    scale="fp32",
    has_labels="i32",
    BLOCK=[2048],
    num_warps=4,
    scalar=("stores",),
)
@triton.jit
def softmax_jsd_fwd(
    student,
    teacher,
    labels,
    loss,
    student_lse,
    teacher_lse,
    student_share,
    teacher_share,
    student_stride,
    teacher_stride,
    n,
    ignore_index,
    beta,
    rest,
    scale,
    has_labels,
    BLOCK: tl.constexpr,
):
    # A row twice: for the two logsumexps, then for the divergence. A share is the sum of the derivatives by log softmax.
    row = tl.program_id(0).to(tl.int64)
    lane, step = tl.arange(0, LANES), tl.arange(0, BLOCK // LANES) * LANES
    x_at, y_at = student + row * student_stride, teacher + row * teacher_stride
    valid = is_kept(labels, row, ignore_index, has_labels)
    end = tl.where(valid, n, 0)
    x_top = tl.full((LANES,), -INF, tl.float32)
    x_sums = tl.full((LANES,), 0.0, tl.float32)
    y_top, y_sums = x_top, x_sums
    for start in range(0, end, BLOCK):
        at = start + step[:, None] + lane[None, :]
        keep = at < n
        x_top, x_sums = lse_step(x_top, x_sums, tl.where(keep, tl.load(x_at + at, mask=keep, other=0.0) * scale, -INF))
        y_top, y_sums = lse_step(y_top, y_sums, tl.where(keep, tl.load(y_at + at, mask=keep, other=0.0) * scale, -INF))
    x_base, x_log = lse_of(x_top, x_sums)
    y_base, y_log = lse_of(y_top, y_sums)
    x_lse, y_lse = tl.where(valid, x_base + x_log, 0.0), tl.where(valid, y_base + y_log, 0.0)
    losses = tl.full((BLOCK,), 0.0, tl.float32)
    x_shares, y_shares = losses, losses
    for start in range(0, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        keep = at < n
        x = tl.where(keep, tl.load(x_at + at, mask=keep, other=0.0) * scale - x_lse, -INF)
        y = tl.where(keep, tl.load(y_at + at, mask=keep, other=0.0) * scale - y_lse, -INF)
        q, p, q_term, p_term = jsd_terms(x, y, beta, rest)
        losses += q_term + p_term
        x_shares += jsd_slope(q, p, q_term, beta, rest)
        y_shares += jsd_slope(p, q, p_term, rest, beta)
    tl.store(loss + row, tl.sum(losses, axis=0))
    tl.store(student_lse + row, x_lse)
    tl.store(teacher_lse + row, y_lse)
    tl.store(student_share + row, tl.sum(x_shares, axis=0))
    tl.store(teacher_share + row, tl.sum(y_shares, axis=0))


@variants(
    dloss="*fp32",
    logits="*fp32",
    others="*fp32",
    labels="*i64",
    lse="*fp32",
    others_lse="*fp32",
    share="*fp32",
    dlogits="*D",
    dloss_stride="i32",
    stride="i32:16",
    others_stride="i32:16",
    n="i32:16",
    ignore_index="i64",
    beta="fp32",
    rest="fp32",
    scale="fp32",
    has_labels="i32",
    D=["fp32", "bf16", "fp16"],
    BLOCK=[2048],
    num_warps=4,
)
@triton.jit
def softmax_jsd_bwd(
    dloss,
    logits,
    others,
    labels,
    lse,
    others_lse,
    share,
    dlogits,
    dloss_stride,
    stride,
    others_stride,
    n,
    ignore_index,
    beta,
    rest,
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
    x = tl.load(logits + row * stride + at, mask=keep & valid, other=0.0) * scale - tl.load(lse + row)
    y = tl.load(others + row * others_stride + at, mask=keep & valid, other=0.0) * scale - tl.load(others_lse + row)
    q, p, q_term, _ = jsd_terms(x, y, beta, rest)
    dx = upstream * (jsd_slope(q, p, q_term, beta, rest) - q * tl.load(share + row))
    tl.store(dlogits + row * n + at, tl.where(valid, dx, 0.0), mask=keep)
