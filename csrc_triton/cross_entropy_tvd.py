"""Cross entropy of each row of logits, the total variation distance of its softmax from another's, and their gradient."""

import triton
import triton.language as tl

from _aot import variants
from _lse import LANES
from _lse import lse_of
from _lse import lse_step

INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
FLOATS = ["fp32", "bf16", "fp16"]


@variants(
    student="*T",
    teacher="*T",
    target="*i64",
    loss="*fp32",
    distance="*fp32",
    student_lse="*fp32",
    teacher_lse="*fp32",
    share="*fp32",
    student_stride="i32:16",
    teacher_stride="i32:16",
    n="i32:16",
    ignore_index="i64",
    T=FLOATS,
    BLOCK=[2048],
    num_warps=4,
    scalar=("stores",),
)
@triton.jit
def cross_entropy_tvd_fwd(
    student,
    teacher,
    target,
    loss,
    distance,
    student_lse,
    teacher_lse,
    share,
    student_stride,
    teacher_stride,
    n,
    ignore_index,
    BLOCK: tl.constexpr,
):
    # A row twice: for the two logsumexps, then for the distance and the share, Σ p · sign(p - q).
    row = tl.program_id(0).to(tl.int64)
    lane, step = tl.arange(0, LANES), tl.arange(0, BLOCK // LANES) * LANES
    x_at, t_at, y = student + row * student_stride, teacher + row * teacher_stride, tl.load(target + row)
    valid, inside = y != ignore_index, (y >= 0) & (y < n)
    end = tl.where(valid, n, 0)
    x_top = tl.full((LANES,), -INF, tl.float32)
    x_sums = tl.full((LANES,), 0.0, tl.float32)
    t_top, t_sums = x_top, x_sums
    for start in range(0, end, BLOCK):
        at = start + step[:, None] + lane[None, :]
        keep = at < n
        x_top, x_sums = lse_step(x_top, x_sums, tl.load(x_at + at, mask=keep, other=-INF).to(tl.float32))
        t_top, t_sums = lse_step(t_top, t_sums, tl.load(t_at + at, mask=keep, other=-INF).to(tl.float32))
    x_base, x_log = lse_of(x_top, x_sums)
    t_base, t_log = lse_of(t_top, t_sums)
    x_lse, t_lse = tl.where(valid, x_base + x_log, 0.0), tl.where(valid, t_base + t_log, 0.0)
    distances = tl.full((BLOCK,), 0.0, tl.float32)
    shares = distances
    for start in range(0, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        keep = at < n
        p = tl.exp(tl.load(x_at + at, mask=keep, other=-INF).to(tl.float32) - x_lse)
        q = tl.exp(tl.load(t_at + at, mask=keep, other=-INF).to(tl.float32) - t_lse)
        distances += tl.abs(p - q)
        shares += tl.where(p > q, p, tl.where(p < q, -p, 0.0))
    z = tl.load(x_at + y, mask=valid & inside, other=0.0).to(tl.float32)
    # lse - z, but exact where the target is all but certain.
    tl.store(loss + row, tl.where(valid, tl.where(inside, x_log + (x_base - z), NAN), 0.0))
    tl.store(distance + row, 0.5 * tl.sum(distances, axis=0))
    tl.store(student_lse + row, x_lse)
    tl.store(teacher_lse + row, t_lse)
    tl.store(share + row, tl.sum(shares, axis=0))


@variants(
    dloss="*fp32",
    ddistance="*fp32",
    student="*T",
    teacher="*T",
    target="*i64",
    student_lse="*fp32",
    teacher_lse="*fp32",
    share="*fp32",
    dstudent="*T",
    student_stride="i32:16",
    teacher_stride="i32:16",
    n="i32:16",
    ignore_index="i64",
    T=FLOATS,
    BLOCK=[2048],
    num_warps=4,
)
@triton.jit
def cross_entropy_tvd_bwd(
    dloss,
    ddistance,
    student,
    teacher,
    target,
    student_lse,
    teacher_lse,
    share,
    dstudent,
    student_stride,
    teacher_stride,
    n,
    ignore_index,
    BLOCK: tl.constexpr,
):
    # A program takes one block of one row.
    blocks = (n + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(target + row)
    valid, inside = y != ignore_index, (y >= 0) & (y < n)
    keep = at < n
    picked = tl.where(inside, tl.load(dloss + row), NAN)
    spread = 0.5 * tl.load(ddistance + row)
    x = tl.load(student + row * student_stride + at, mask=keep & valid, other=0.0).to(tl.float32)
    t = tl.load(teacher + row * teacher_stride + at, mask=keep & valid, other=0.0).to(tl.float32)
    p, q = tl.exp(x - tl.load(student_lse + row)), tl.exp(t - tl.load(teacher_lse + row))
    sign = tl.where(p > q, 1.0, tl.where(p < q, -1.0, 0.0))
    dx = p * (picked + spread * (sign - tl.load(share + row))) - tl.where(at == y, picked, 0.0)
    tl.store(dstudent + row * n + at, tl.where(valid, dx, 0.0), mask=keep)
