"""Liger's Jensen-Shannon divergence of two linear heads, as a module."""

import torch

from ._names import one_of
from .functional import ACCUMULATE
from .functional import liger_fused_linear_jsd


class LigerFusedLinearJSD(torch.nn.Module):
    """accum_dtype has no effect: sums are fp32."""

    def __init__(self, jsd_beta=0.5, ignore_index=-100, temperature=1.0, accum_dtype: torch.dtype | None = None):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"LigerFusedLinearJSD: temperature must be positive, got {temperature}")
        one_of("LigerFusedLinearJSD", "accum_dtype", accum_dtype, ACCUMULATE)
        self.jsd_beta = jsd_beta
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: torch.Tensor,
        student_weight: torch.Tensor,
        teacher_input: torch.Tensor,
        teacher_weight: torch.Tensor,
        shift_labels: torch.LongTensor | None,
    ):
        heads = student_input, student_weight, teacher_input, teacher_weight
        options = self.jsd_beta, self.ignore_index, self.temperature, self.accum_dtype
        return liger_fused_linear_jsd(*heads, shift_labels, *options)
