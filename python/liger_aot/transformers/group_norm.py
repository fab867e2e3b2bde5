"""Liger's GroupNorm module."""

import torch

from ._names import one_of
from .functional import liger_group_norm


class LigerGroupNorm(torch.nn.Module):
    """GroupNorm with a weight and a bias, which starts at zero (Liger draws it at random when `bias` is true)."""

    def __init__(self, num_channels, num_groups, eps=1e-6, bias=False, init_fn="ones"):
        super().__init__()
        one_of("LigerGroupNorm", "init_fn", init_fn, ("ones", "zeros"))
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"LigerGroupNorm: num_groups must divide num_channels {num_channels}, got {num_groups}")
        self.num_channels, self.num_groups, self.eps, self.variance_epsilon = num_channels, num_groups, eps, eps
        self.weight = torch.nn.Parameter(getattr(torch, init_fn)(num_channels))
        self.bias = torch.nn.Parameter(torch.zeros(num_channels))

    def forward(self, hidden_states):
        return liger_group_norm(
            hidden_states, self.weight, self.bias, self.num_channels, self.num_groups, self.variance_epsilon
        )

    def extra_repr(self):
        return f"num_channels={self.num_channels}, num_groups={self.num_groups}, eps={self.eps}"
