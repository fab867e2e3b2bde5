"""Liger's sparsemax module."""

import torch

from .functional import liger_sparsemax


class LigerSparsemax(torch.nn.Module):
    def __init__(self, dim: int = -1):
        super().__init__()
        self.dim = dim

    def forward(self, x: torch.Tensor):
        return liger_sparsemax(x, self.dim)

    def extra_repr(self):
        return f"dim={self.dim}"
