"""Direct preference optimisation, and the losses of the same two log-ratios that followed it."""

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from ._base import Loss
from ._base import check_positive
from ._base import check_reference
from ._base import smoothed
from ._preference import preference_loss


def exo_pair(chosen, rejected, beta, epsilon, tau):
    margin = chosen - rejected
    q, log_q, log_rest = margin.sigmoid(), logsigmoid(margin), logsigmoid(-margin)
    return q * (log_q - math.log1p(-epsilon)) + (1 - q) * (log_rest - math.log(epsilon))


def nca_pair(chosen, rejected, beta, epsilon, tau):
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def robust(chosen, rejected, beta, epsilon, tau):
    margin = chosen - rejected
    return (epsilon * logsigmoid(-margin) - (1 - epsilon) * logsigmoid(margin)) / (1 - 2 * epsilon)


def discopop(chosen, rejected, beta, epsilon, tau):
    margin = chosen - rejected
    modulation = (margin / tau).sigmoid()
    return -logsigmoid(margin) * (1 - modulation) + (-margin).exp() * modulation


# Of the rewards β · log(π / π_ref) of the chosen and the rejected sequence, β, label smoothing ε and DiscoPOP's τ.
LOSSES = {
    "sigmoid": lambda chosen, rejected, beta, epsilon, tau: smoothed(chosen - rejected, 0.0),
    "hinge": lambda chosen, rejected, beta, epsilon, tau: (1 - (chosen - rejected)).relu(),
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": lambda chosen, rejected, beta, epsilon, tau: -logsigmoid(chosen) - logsigmoid(-rejected),
    "sppo_hard": lambda chosen, rejected, beta, epsilon, tau: ((chosen - 0.5) ** 2 + (rejected + 0.5) ** 2) / beta**2,
    "apo_zero": lambda chosen, rejected, beta, epsilon, tau: (-chosen).sigmoid() + rejected.sigmoid(),
    "apo_down": lambda chosen, rejected, beta, epsilon, tau: chosen.sigmoid() + (rejected - chosen).sigmoid(),
    "discopop": discopop,
}
# What each takes for label_smoothing; the others take none.
SMOOTHED = {"exo_pair": (lambda e: 0 < e < 1, "in (0, 1)"), "robust": (lambda e: 0 <= e < 0.5, "in [0, 0.5)")}


def check_options(op, beta, loss_type, label_smoothing, discopop_tau):
    if loss_type not in LOSSES:
        raise ValueError(f"{op}: loss_type must be one of {', '.join(LOSSES)}, got {loss_type!r}")
    check_positive(op, beta=beta, discopop_tau=discopop_tau)
    fits, accepted = SMOOTHED.get(loss_type, (lambda e: e == 0, "0"))
    if not fits(label_smoothing):
        raise ValueError(
            f"{op}: label_smoothing must be {accepted} with loss_type {loss_type!r}, got {label_smoothing}; "
            f"{' and '.join(SMOOTHED)} use it"
        )


def liger_fused_linear_dpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    compute_nll_loss: bool = False,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    alpha: float = 1.0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The mean over pairs of a loss of β · log(π / π_ref), chosen and rejected; plus alpha · NLL of the chosen, if asked.

    _input is (2 · pairs, length, H), chosen then rejected; target (2 · pairs, length) is already shifted. The loss types:
    sigmoid (arXiv:2305.18290), hinge (2305.10425), exo_pair (2402.00856, eq. 16), nca_pair (2402.05369), robust (2403.00409),
    bco_pair (2404.04656, without its shift), sppo_hard (2405.00675, eq. 4.7 with hard labels), apo_zero and apo_down
    (2408.06266, eq. 7 and 8), discopop (2406.08414, eq. 5). Metrics: log-probabilities of chosen and rejected, their mean
    logits, the NLL, their rewards.
    """
    op = "liger_fused_linear_dpo"
    check_options(op, beta, loss_type, label_smoothing, discopop_tau)
    check_reference(op, use_ref_model, ref_input, ref_weight, ref_bias=ref_bias)

    def losses(chosen, rejected):
        chosen, rejected = beta * chosen, beta * rejected
        return LOSSES[loss_type](chosen, rejected, beta, label_smoothing, discopop_tau), chosen, rejected

    reference = (ref_input, ref_weight, ref_bias) if use_ref_model else None
    arguments = _input, weight, target, bias, ignore_index, average_log_prob, compute_nll_loss, alpha
    return preference_loss(op, losses, *arguments, reference=reference)


class LigerFusedLinearDPOFunction:
    apply = staticmethod(liger_fused_linear_dpo)


class LigerFusedLinearDPOLoss(Loss):
    """liger_fused_linear_dpo; forward takes the weight first."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ):
        check_options("LigerFusedLinearDPOLoss", beta, loss_type, label_smoothing, discopop_tau)
        super().__init__(
            ignore_index=ignore_index,
            beta=beta,
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
            compiled=compiled,
            use_ref_model=use_ref_model,
            average_log_prob=average_log_prob,
            chunk_size=chunk_size,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            discopop_tau=discopop_tau,
        )

    def forward(self, lin_weight, _input, target, bias=None, ref_input=None, ref_weight=None, ref_bias=None):
        arguments = _input, lin_weight, target, bias, ref_input, ref_weight, ref_bias
        return liger_fused_linear_dpo(*arguments, **self.options)
