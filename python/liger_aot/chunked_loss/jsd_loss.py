"""Distillation by the generalised Jensen-Shannon divergence (arXiv:2306.13649)."""

from torch import Tensor

from ._distillation import DistillationLoss
from ._distillation import check_options
from ._distillation import distillation_loss


def liger_fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    true_labels: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5,
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    compiled: bool = True,
    chunk_size: int = 1024,
    return_soft_hard_loss: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """weight_hard_loss · cross entropy + weight_soft_loss · JSD of softmax(logits / temperature), student and teacher.

    Inputs are (..., H), each with its own H, true_labels (...); means over labels that are not ignore_index. chunk_size rows
    of logits exist at a time. The teacher gets no gradient. With return_soft_hard_loss also both losses, without gradients.
    """
    op = "liger_fused_linear_jsd"
    check_options(op, beta, temperature, chunk_size)
    tensors = student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias, teacher_bias
    options = weight_hard_loss, weight_soft_loss, ignore_index, temperature, chunk_size, return_soft_hard_loss
    return distillation_loss(op, "jsd", beta, *tensors, *options)


class LigerFusedLinearJSDFunction:
    apply = staticmethod(liger_fused_linear_jsd)


class LigerFusedLinearJSDLoss(DistillationLoss):
    """liger_fused_linear_jsd."""

    function = staticmethod(liger_fused_linear_jsd)
