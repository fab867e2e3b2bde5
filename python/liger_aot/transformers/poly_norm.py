"""Liger's PolyNorm module."""

import torch

from .functional import liger_poly_norm


class LigerPolyNorm(torch.nn.Module):
    """liger_aot.poly_norm over the last dimension. in_place has no effect."""

    def __init__(self, eps=1e-6, in_place=True):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), 1.0 / 3.0))
        self.bias = torch.nn.Parameter(torch.tensor(1.0))
        self.variance_epsilon, self.in_place = eps, in_place

    def forward(self, hidden_states):
        return liger_poly_norm(hidden_states, self.weight, self.bias, self.variance_epsilon, self.in_place)

    def extra_repr(self):
        return f"eps={self.variance_epsilon}"
