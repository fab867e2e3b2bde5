"""Liger's Kullback-Leibler divergence of a linear head from probabilities that are given, as a module."""

import torch

from ._names import one_of
from .functional import ACCUMULATE
from .functional import liger_fused_linear_kl_div


class LigerFusedLinearKLDivLoss(torch.nn.Module):
    """accum_dtype has no effect: sums are fp32."""

    def __init__(
        self,
        reduction: str | None = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"LigerFusedLinearKLDivLoss: temperature must be positive, got {temperature}")
        one_of("LigerFusedLinearKLDivLoss", "accum_dtype", accum_dtype, ACCUMULATE)
        self.reduction = reduction
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.eps = eps
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: torch.Tensor,
        student_weight: torch.Tensor,
        target: torch.Tensor,
        shift_labels: torch.LongTensor | None = None,
    ):
        options = self.reduction, self.ignore_index, self.temperature, self.eps, self.accum_dtype
        return liger_fused_linear_kl_div(student_input, student_weight, target, shift_labels, *options)

    def extra_repr(self):
        names = "reduction", "ignore_index", "temperature", "eps", "accum_dtype"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
