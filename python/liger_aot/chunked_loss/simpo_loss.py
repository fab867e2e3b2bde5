"""Simple preference optimisation (arXiv:2405.14734): no reference, mean log-probabilities, a margin."""

from torch import Tensor

from ._base import Loss
from ._base import smoothed
from ._preference import preference_loss
from .cpo_loss import check_options


def liger_fused_linear_simpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    compute_nll_loss: bool = False,
    compiled: bool = True,
    gamma: float = 0.5,
    chunk_size: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The mean over pairs of -log σ(β · (log p(chosen) - log p(rejected)) - gamma), smoothed; plus alpha · NLL, if asked.

    log p is the mean log-probability of a sequence's tokens. _input is (2 · pairs, length, H), chosen then rejected; target
    (2 · pairs, length). Metrics as those of DPO.
    """
    check_options("liger_fused_linear_simpo", label_smoothing)

    def losses(chosen, rejected):
        return smoothed(beta * (chosen - rejected) - gamma, label_smoothing), beta * chosen, beta * rejected

    arguments = _input, weight, target, bias, ignore_index, True, compute_nll_loss, alpha
    return preference_loss("liger_fused_linear_simpo", losses, *arguments)


class LigerFusedLinearSimPOFunction:
    apply = staticmethod(liger_fused_linear_simpo)


class LigerFusedLinearSimPOLoss(Loss):
    """liger_fused_linear_simpo; forward takes the weight first."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ):
        check_options("LigerFusedLinearSimPOLoss", label_smoothing)
        super().__init__(
            ignore_index=ignore_index,
            beta=beta,
            alpha=alpha,
            label_smoothing=label_smoothing,
            compute_nll_loss=compute_nll_loss,
            compiled=compiled,
            gamma=gamma,
            chunk_size=chunk_size,
        )

    def forward(self, lin_weight, _input, target, bias=None):
        return liger_fused_linear_simpo(_input, lin_weight, target, bias, **self.options)
