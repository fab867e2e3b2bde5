"""Kahneman-Tversky optimisation (arXiv:2402.01306): each sequence is desirable or not, no pairs."""

import torch
from torch import Tensor

from ..functional import linear_logprob
from ..ops._loss import check_classes
from ._base import Loss
from ._base import check_reference
from ._base import check_sequences
from ._base import logits_sums
from ._base import reference_logps
from ._base import sequence_logps


def check_labels(op, labels, batch):
    """A mask: integers would have another meaning where it is turned round."""
    tensor = isinstance(labels, Tensor)
    if not tensor or labels.dtype is not torch.bool or labels.shape != (batch,):
        got = f"{labels.dtype} {tuple(labels.shape)}" if tensor else repr(labels)
        raise ValueError(f"{op}: preference_labels must be torch.bool ({batch},), true where desirable, got {got}")


def check_kl(op, kl, batch):
    """One for all sequences, or one for each: (batch, 1) would be taken off the ratio of every sequence."""
    if kl is None or isinstance(kl, int | float):
        return
    if not isinstance(kl, Tensor) or kl.shape not in ((), (1,), (batch,)):
        got = tuple(kl.shape) if isinstance(kl, Tensor) else repr(kl)
        raise ValueError(f"{op}: kl must be a number, or have shape () or (1,) or ({batch},), got {got}")


def liger_fused_linear_kto(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    preference_labels: Tensor,
    bias: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl: Tensor | float | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The mean over sequences of 1 - σ(±β · (log(π / π_ref) - kl)), plus where preference_labels is true, minus elsewhere.

    _input is (batch, length, H), target (batch, length), preference_labels (batch,), bool; kl, 0 if None, is a number, (), (1,)
    or (batch,) and gets no gradient. Metrics, each a sum over the desirable, then one over the undesirable sequences:
    log-probabilities, logits, rewards.
    """
    op = "liger_fused_linear_kto"
    check_sequences(op, "_input", _input, weight, bias)
    target = check_classes(op, target, _input.shape[:2], _input)
    check_labels(op, preference_labels, target.shape[0])
    check_kl(op, kl, target.shape[0])
    check_reference(op, use_ref_model, ref_input, ref_weight, ref_bias=ref_bias)
    valid = target != ignore_index
    logps, _, _ = linear_logprob(_input, weight, target, bias=bias, ignore_index=ignore_index)
    ratios = sequences = sequence_logps(logps, valid, average_log_prob)
    if use_ref_model:
        others = reference_logps(op, ref_input, ref_weight, ref_bias, target, ignore_index=ignore_index)
        ratios = sequences - sequence_logps(others, valid, average_log_prob)
    kl = kl.detach() if isinstance(kl, Tensor) else kl or 0.0
    margins = beta * (ratios - kl)
    losses = torch.where(preference_labels, -margins, margins).sigmoid()
    summed = sequences, logits_sums(_input, weight, bias), beta * ratios
    both = preference_labels, ~preference_labels
    metrics = (torch.where(mask, x.detach(), 0).sum() for x in summed for mask in both)
    return losses.mean(), tuple(metrics)


class LigerFusedLinearKTOFunction:
    apply = staticmethod(liger_fused_linear_kto)


class LigerFusedLinearKTOLoss(Loss):
    """liger_fused_linear_kto, by default without a reference."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ):
        super().__init__(
            ignore_index=ignore_index,
            beta=beta,
            compiled=compiled,
            use_ref_model=use_ref_model,
            average_log_prob=average_log_prob,
            chunk_size=chunk_size,
        )

    def forward(
        self,
        _input,
        lin_weight,
        target,
        bias=None,
        preference_labels=None,
        ref_input=None,
        ref_weight=None,
        ref_bias=None,
        kl=None,
    ):
        arguments = _input, lin_weight, target, preference_labels, bias, ref_input, ref_weight, ref_bias, kl
        return liger_fused_linear_kto(*arguments, **self.options)
