"""Losses over pairs: the first half of a batch was chosen, the second half, in the same order, rejected."""

import torch

from ..functional import linear_cross_entropy
from ..functional import linear_logprob
from ..ops._loss import check_classes
from ._base import check_sequences
from ._base import logits_sums
from ._base import reference_logps
from ._base import sequence_logps


def preference_loss(
    op, losses, _input, weight, target, bias, ignore_index, average, nll, alpha=1.0, nll_target=None, reference=None
):
    """(loss, metrics): alpha · NLL of the chosen tokens, if `nll`, plus the mean of the pairs' losses.

    losses(chosen, rejected) gives the pairs' losses, their two rewards, and what else belongs to the metrics; both arguments
    are the sequences' log-probabilities, less those of the reference (input, weight, bias), if there is one. The metrics have
    no gradient: log-probabilities of chosen and rejected, mean logits of both, the NLL, then what losses gives.
    """
    check_sequences(op, "_input", _input, weight, bias)
    target = check_classes(op, target, _input.shape[:2], _input)
    if target.shape[0] % 2:
        raise ValueError(f"{op}: _input must hold pairs, chosen then rejected, got an odd batch of {target.shape[0]}")
    pairs, valid = target.shape[0] // 2, target != ignore_index
    logps, _, _ = linear_logprob(_input, weight, target, bias=bias, ignore_index=ignore_index)
    sequences = sequence_logps(logps, valid, average)
    ratios = sequences
    if reference is not None:
        others = reference_logps(op, *reference, target, ignore_index=ignore_index)
        ratios = sequences - sequence_logps(others, valid, average)
    each, *more = losses(ratios[:pairs], ratios[pairs:])
    loss, nll_loss = each.mean(), sequences.new_zeros(())
    if nll and nll_target is None:
        nll_loss = -logps[:pairs].sum() / valid[:pairs].sum().clamp(min=1)
    elif nll:
        if nll_target.shape != target.shape:
            raise ValueError(f"{op}: nll_target must have shape {tuple(target.shape)}, got {tuple(nll_target.shape)}")
        nll_target = nll_target[:pairs]
        total = linear_cross_entropy(
            _input[:pairs],
            weight,
            nll_target,
            linear_bias=bias,
            reduction="sum",
            ignore_index=ignore_index,
            loss_dtype=torch.float32,
        )
        nll_loss = total / (nll_target != ignore_index).sum().clamp(min=1)
    sums = logits_sums(_input, weight, bias) / (pairs * target.shape[1] * weight.shape[0])
    metrics = sequences[:pairs], sequences[pairs:], sums[:pairs].sum(), sums[pairs:].sum(), nll_loss, *more
    return loss + alpha * nll_loss, tuple(m.detach() for m in metrics)
