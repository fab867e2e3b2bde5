"""Distillation of a linear head:  loss = hard · cross entropy + soft · what the teacher's logits say, summed over rows.

The soft part is ops.jsd's divergence (arXiv 2306.13649) of both softmaxes over temperature, or β · (1 - cos) of the logits.
Neither head's logits ever exist whole: they are made chunk_size rows at a time, in fp32, and the gradients from them on the
spot: those of the summed loss, of numbers near 1, which 16 bits hold well.
"""

import torch
from torch import Tensor

from .._op import op
from ._linear import Gradients
from ._linear import fake_gradients
from ._linear import logits_of
from .linear_jsd import softmax_jsd_bwd
from .linear_jsd import softmax_jsd_fwd
from .linear_logprob import logprob_bwd
from .linear_logprob import logprob_fwd


def hard_part(logits, target, ignore_index, weight, need):
    """(the cross entropy summed over a chunk's rows, weight times its gradient, in fp32, if needed)."""
    logp, entropy, lse = logprob_fwd(logits, target, ignore_index, 1.0)
    if not need:
        return -logp.sum(), None
    upstream, none = torch.full_like(lse, -weight), torch.zeros_like(lse)
    return -logp.sum(), logprob_bwd(upstream, none, none, logits, target, lse, entropy, ignore_index, 1.0, torch.float32)


def jsd_part(logits, others, target, ignore_index, beta, temperature, weight, need):
    losses, *made, _ = softmax_jsd_fwd(logits, others, target, ignore_index, beta, temperature)
    if not need:
        return losses.sum(), None
    saved, options = (logits, others, target, *made), (ignore_index, beta, 1 - beta, temperature, torch.float32)
    return losses.sum(), softmax_jsd_bwd(logits.new_full((), weight), *saved, *options)


def cosine_part(logits, others, target, ignore_index, beta, temperature, weight, need):
    """Both logits are overwritten; a temperature does not change an angle."""
    size, other = (x.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x in (logits, others))
    u, v = logits.div_(size), others.div_(other)
    cos, ignored = (u * v).sum(-1, keepdim=True), (target == ignore_index)[:, None]
    loss = (beta * (1 - cos)).masked_fill(ignored, 0.0).sum()
    return loss, v.sub_(u.mul_(cos)).mul_(-weight * beta / size).masked_fill_(ignored, 0.0) if need else None


SOFT = {"jsd": jsd_part, "cosine": cosine_part}


def fake_fwd(student, weight, bias, teacher, teacher_weight, teacher_bias, *rest):
    return student.new_empty(2, dtype=torch.float32), *fake_gradients(student, weight, bias, *rest[-3:])


@op(cpu=None, fake=fake_fwd)
def linear_distillation_fwd(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    target: Tensor,
    soft: str,
    beta: float,
    temperature: float,
    ignore_index: int,
    hard_weight: float,
    soft_weight: float,
    chunk_size: int,
    need_hard: bool,
    need_soft: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hard and soft summed over rows, 0 where not needed; the needed gradients of their weighted sum, of weight, bias fp32).

    At least one of the two is needed.
    """
    gradients = Gradients(student, weight, bias, need_input, need_weight, need_bias)
    need, sums = any(gradients.needed), student.new_zeros(2, dtype=torch.float32)
    for start in range(0, student.shape[0], chunk_size):
        rows, parts = slice(start, min(start + chunk_size, student.shape[0])), []
        logits = logits_of(student[rows], weight, bias)
        if need_hard:
            loss, dlogits = hard_part(logits, target[rows], ignore_index, hard_weight, need)
            sums[0] += loss
            parts.append(dlogits)
        if need_soft:
            others = logits_of(teacher[rows], teacher_weight, teacher_bias)
            loss, dlogits = SOFT[soft](logits, others, target[rows], ignore_index, beta, temperature, soft_weight, need)
            sums[1] += loss
            parts.append(dlogits)
            del others
        if need:
            dlogits = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
            gradients.add(rows, dlogits.to(weight.dtype))
        del logits, dlogits, parts  # before the next chunk's are made
    return sums, *gradients.results
