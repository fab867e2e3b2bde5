"""Liger's RMSNorm of a sum, as a module."""

import torch

from ._names import one_of
from .functional import liger_fused_add_rms_norm


class LigerFusedAddRMSNorm(torch.nn.Module):
    """(y, s): the RMSNorm of s = hidden_states + residual, and s. in_place has no effect."""

    def __init__(self, hidden_size, eps=1e-6, offset=0.0, casting_mode="llama", init_fn="ones", in_place=False):
        super().__init__()
        one_of("LigerFusedAddRMSNorm", "init_fn", init_fn, ("ones", "zeros"))
        one_of("LigerFusedAddRMSNorm", "casting_mode", casting_mode, ("none", "gemma", "llama"))
        self.weight = torch.nn.Parameter(getattr(torch, init_fn)(hidden_size))
        self.variance_epsilon, self.offset, self.casting_mode, self.in_place = eps, offset, casting_mode, in_place

    def forward(self, hidden_states, residual):
        return liger_fused_add_rms_norm(
            hidden_states, residual, self.weight, self.variance_epsilon, self.offset, self.casting_mode, self.in_place
        )

    def extra_repr(self):
        shape = tuple(self.weight.shape)
        return f"{shape}, eps={self.variance_epsilon}, offset={self.offset}, casting_mode={self.casting_mode}"
