"""Liger's modulated RMSNorm module."""

from .functional import liger_modulated_rms_norm
from .rms_norm import LigerRMSNorm


class LigerModulatedRMSNorm(LigerRMSNorm):
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
        super().__init__(hidden_size, eps, offset, casting_mode, init_fn, in_place, elementwise_affine=elementwise_affine)

    def forward(self, hidden_states, scale, shift=None):
        options = self.variance_epsilon, self.offset, self.casting_mode, self.in_place
        return liger_modulated_rms_norm(hidden_states, self.weight, scale, shift, *options)
