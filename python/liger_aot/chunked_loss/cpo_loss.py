"""Contrastive preference optimisation (arXiv:2401.08417): DPO's loss without a reference, and the likelihood of the chosen."""

from torch import Tensor

from ._base import Loss
from ._base import smoothed
from ._preference import preference_loss


def check_options(op, label_smoothing):
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be between 0 and 1, got {label_smoothing}")


def liger_fused_linear_cpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    compute_nll_loss: bool = True,
    compiled: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The mean over pairs of -log σ(β · (log π(chosen) - log π(rejected))), smoothed, plus alpha · NLL of the chosen.

    _input is (2 · pairs, length, H), chosen then rejected; target (2 · pairs, length). Metrics as those of DPO.
    """
    check_options("liger_fused_linear_cpo", label_smoothing)

    def losses(chosen, rejected):
        return smoothed(beta * (chosen - rejected), label_smoothing), beta * chosen, beta * rejected

    arguments = _input, weight, target, bias, ignore_index, average_log_prob, compute_nll_loss, alpha
    return preference_loss("liger_fused_linear_cpo", losses, *arguments)


class LigerFusedLinearCPOFunction:
    apply = staticmethod(liger_fused_linear_cpo)


class LigerFusedLinearCPOLoss(Loss):
    """liger_fused_linear_cpo; forward takes the weight first."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ):
        check_options("LigerFusedLinearCPOLoss", label_smoothing)
        super().__init__(
            ignore_index=ignore_index,
            beta=beta,
            alpha=alpha,
            label_smoothing=label_smoothing,
            compute_nll_loss=compute_nll_loss,
            compiled=compiled,
            average_log_prob=average_log_prob,
            chunk_size=chunk_size,
        )

    def forward(self, lin_weight, _input, target, bias=None):
        return liger_fused_linear_cpo(_input, lin_weight, target, bias, **self.options)
