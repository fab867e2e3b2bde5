"""Jensen-Shannon divergence:  loss = Σ beta · p · log(p / m) + (1 - beta) · q · log(q / m),  m = beta · p + (1 - beta) · q.

The generalised one of distillation: Agarwal et al., On-Policy Distillation of Language Models, 2024 (arXiv 2306.13649). It is
KL(p || q) with beta 0 and KL(q || p) with beta 1, by which it is what it tends to near them, divided by beta or 1 - beta.
"""

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from ._divergence import check_beta
from ._divergence import jsd_slope
from ._divergence import jsd_terms
from ._divergence import launch_bwd
from ._divergence import launch_fwd
from ._divergence import prepare
from ._divergence import reference_bwd
from ._divergence import reference_fwd
from .kl_div import reduced


def forward_reference(log_q, log_p, labels, ignore_index, beta, each):
    _, _, q_term, p_term = jsd_terms(log_q, log_p, beta, 1 - beta)
    return reference_fwd(q_term + p_term, log_q, labels, ignore_index, each)


def backward_reference(dloss, log_q, log_p, labels, factor, ignore_index, beta, need_q, need_p):
    def gradient(needed, x, y, *weights):
        if not needed:
            return x.new_empty(0)
        q, p, q_term, _ = jsd_terms(x, y, *weights)
        return reference_bwd(jsd_slope(q, p, q_term, *weights), dloss, x, labels, factor, ignore_index)

    return gradient(need_q, log_q, log_p, beta, 1 - beta), gradient(need_p, log_p, log_q, 1 - beta, beta)


@op(cpu=forward_reference)
def jsd_fwd(log_q: Tensor, log_p: Tensor, labels: Tensor | None, ignore_index: int, beta: float, each: bool) -> Tensor:
    """The divergence of each number, in log_q's dtype, or the sum over each row, fp32; 0 where the label is ignore_index."""
    return launch_fwd("jsd", log_q, log_p, labels, ignore_index, each, beta, 1 - beta)


@op(cpu=backward_reference)
def jsd_bwd(
    dloss: Tensor,
    log_q: Tensor,
    log_p: Tensor,
    labels: Tensor | None,
    factor: Tensor | None,
    ignore_index: int,
    beta: float,
    need_q: bool,
    need_p: bool,
) -> tuple[Tensor, Tensor]:
    """The needed gradients, from that of each number's divergence, or with a factor of the reduced loss."""
    options = labels, factor, ignore_index
    dq = launch_bwd("jsd", dloss, log_q, log_p, *options, beta, 1 - beta) if need_q else log_q.new_empty(0)
    # With p and q, and beta and 1 - beta, in each other's place the divergence is the same.
    dp = launch_bwd("jsd", dloss, log_p, log_q, *options, 1 - beta, beta) if need_p else log_p.new_empty(0)
    return dq, dp


class JSDFunction(Function):
    @staticmethod
    def forward(ctx, log_q, log_p, labels, ignore_index, beta, over, dtype):
        losses = jsd_fwd(log_q, log_p, labels, ignore_index, beta, over is None)
        loss, factor = reduced(losses, labels, ignore_index, over, dtype)
        ctx.save_for_backward(log_q, log_p, labels, factor)
        ctx.options = ignore_index, beta
        return loss

    @staticmethod
    def backward(ctx, dloss):
        Function.once("jsd")
        needed = ctx.needs_input_grad[:2]
        gradients = jsd_bwd(dloss, *ctx.saved_tensors, *ctx.options, *needed)
        return *(g if n else None for g, n in zip(gradients, needed, strict=True)), None, None, None, None, None


@public
def jsd(
    input: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    *,
    beta: float = 0.5,
    ignore_index: int = -100,
    reduction: str = "batchmean",
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """The Jensen-Shannon divergence of log-probabilities: input is log q, the student's, target log p, the teacher's.

    Both are (..., C), of one device; where their dtypes differ they are widened to fp32. shift_labels, (...) and int64, says
    by ignore_index which rows count for nothing, whatever they hold. reduction "batchmean" divides the sum by the number of
    the other rows, "mean" that by C too, "none" gives the loss of each number. beta is 0, for KL(p || q), 1, for KL(q || p), or
    between. A class of probability 0 in p and q adds 0. Both get gradients. Arithmetic is fp32; the loss has input's dtype,
    fp32 under autocast, or loss_dtype. Raises ValueError on wrong shapes, devices, dtypes and options.
    """
    input, target, labels, over, dtype = prepare("jsd", input, target, shift_labels, reduction, loss_dtype)
    check_beta("jsd", beta)
    if needs_grad("jsd", input, target):
        return JSDFunction.apply(input, target, labels, ignore_index, beta, over, dtype)
    losses = jsd_fwd(input, target, labels, ignore_index, beta, over is None)
    return reduced(losses, labels, ignore_index, over, dtype)[0]
