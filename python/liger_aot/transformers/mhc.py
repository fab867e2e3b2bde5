"""Liger's module of hyper-connections."""

import torch
from torch import nn

from .functional import liger_mhc_forward


class LigerMHC(nn.Module):
    """A layer between hc streams of width c, (..., hc, c) in and out; its input gets the dtype of its first parameter.

    Parameters and what they start as are Liger's; hc may be 2, 4, 8 or 16.
    """

    def __init__(
        self,
        layer: nn.Module,
        *,
        hc: int,
        c: int,
        tmax: int = 20,
        rms_eps: float = 1e-6,
        pre_eps: float = 0.0,
        sinkhorn_eps: float = 1e-6,
        post_mult: float = 2.0,
        phi_dtype: torch.dtype = torch.float16,
        allow_fp32: bool = False,
    ):
        super().__init__()
        self.layer, self.hc, self.c = layer, hc, c
        self.tmax, self.rms_eps, self.pre_eps = tmax, rms_eps, pre_eps
        self.sinkhorn_eps, self.post_mult, self.allow_fp32 = sinkhorn_eps, post_mult, allow_fp32
        heads = hc * (hc + 2)
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        self.phi = nn.Parameter(0.02 * torch.randn(hc * c, heads, dtype=phi_dtype, device=device))
        self.b = nn.Parameter(torch.zeros(heads, dtype=torch.float32, device=device))
        for name in ("alpha_pre", "alpha_post", "alpha_res"):
            self.register_parameter(name, nn.Parameter(torch.ones((), dtype=torch.float32, device=device)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2:] != (self.hc, self.c):
            raise ValueError(f"LigerMHC: x must have shape (..., {self.hc}, {self.c}), got {tuple(x.shape)}")
        parameters = self.phi, self.b, self.alpha_pre, self.alpha_post, self.alpha_res
        options = {"tmax": self.tmax, "rms_eps": self.rms_eps, "pre_eps": self.pre_eps, "sinkhorn_eps": self.sinkhorn_eps}
        return liger_mhc_forward(x, self.layer, *parameters, allow_fp32=self.allow_fp32, post_mult=self.post_mult, **options)

    def extra_repr(self) -> str:
        return f"hc={self.hc}, c={self.c}, tmax={self.tmax}"
