"""Odds ratio preference optimisation (arXiv:2403.07691): no reference, the odds of mean log-probabilities."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._base import Loss
from ._preference import preference_loss


def log_odds(logp):
    return logp - (-logp.expm1()).log()


def liger_fused_linear_orpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    compute_nll_loss: bool = True,
    nll_target: Tensor | None = None,
    compiled: bool = True,
    chunk_size: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """NLL of the chosen, of nll_target if given, plus the mean over pairs of -β · log σ(log odds(chosen) - log odds(rejected)).

    odds = p / (1 - p), log p the mean log-probability of a sequence's tokens. _input is (2 · pairs, length, H), chosen then
    rejected; target and nll_target (2 · pairs, length). In a pair that lacks tokens both odds are taken to be the same, without
    gradients. Metrics: those of DPO, then the mean log σ and the mean log odds ratio.
    """

    def losses(chosen, rejected):
        lacking = (target == ignore_index).all(-1).view(2, -1).any(0)  # a log-probability of 0 has infinite odds
        ratio = torch.sub(*(log_odds(torch.where(lacking, -1.0, logp)) for logp in (chosen, rejected)))
        each = logsigmoid(ratio)
        return -beta * each, beta * chosen, beta * rejected, each.mean(), ratio.mean()

    arguments = _input, weight, target, bias, ignore_index, True, compute_nll_loss
    return preference_loss("liger_fused_linear_orpo", losses, *arguments, nll_target=nll_target)


class LigerFusedLinearORPOFunction:
    apply = staticmethod(liger_fused_linear_orpo)


class LigerFusedLinearORPOLoss(Loss):
    """liger_fused_linear_orpo; forward takes the weight first."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ):
        super().__init__(
            ignore_index=ignore_index,
            beta=beta,
            compute_nll_loss=compute_nll_loss,
            compiled=compiled,
            chunk_size=chunk_size,
        )

    def forward(self, lin_weight, _input, target, bias=None, nll_target=None):
        return liger_fused_linear_orpo(_input, lin_weight, target, bias, nll_target=nll_target, **self.options)
