"""Liger's modulated RMSNorm module."""

import torch

from ._names import one_of
from .functional import liger_modulated_rms_norm


class LigerModulatedRMSNorm(torch.nn.Module):
    """(1 + scale) · norm + shift of hidden_states, norm as of LigerRMSNorm. in_place has no effect."""

    def __init__(
        self,
        hidden_size,
        eps=1e-6,
        offset=0.0,
        casting_mode="llama",
        init_fn="ones",
        in_place=True,
        elementwise_affine=True,
    ):
        super().__init__()
        one_of("LigerModulatedRMSNorm", "init_fn", init_fn, ("ones", "zeros"))
        one_of("LigerModulatedRMSNorm", "casting_mode", casting_mode, ("none", "gemma", "llama"))
        self.elementwise_affine = elementwise_affine
        self.weight = torch.nn.Parameter(getattr(torch, init_fn)(hidden_size)) if elementwise_affine else None
        self.variance_epsilon, self.offset = eps, offset
        self.casting_mode, self.in_place = casting_mode, in_place

    def forward(self, hidden_states, scale, shift=None):
        options = self.variance_epsilon, self.offset, self.casting_mode, self.in_place
        return liger_modulated_rms_norm(hidden_states, self.weight, scale, shift, *options)

    def extra_repr(self):
        shape = None if self.weight is None else tuple(self.weight.shape)
        return f"{shape}, eps={self.variance_epsilon}, offset={self.offset}, casting_mode={self.casting_mode}"
