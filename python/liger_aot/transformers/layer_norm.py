"""Liger's LayerNorm module."""

import torch

from ._names import one_of
from .functional import liger_layer_norm


class LigerLayerNorm(torch.nn.Module):
    """LayerNorm with a weight and a bias, which starts at zero (Liger draws it at random when `bias` is true).

    There is one implementation: impl, mode and backend must be None.
    """

    def __init__(self, hidden_size, eps=1e-6, bias=False, init_fn="ones", impl=None, mode=None, backend=None):
        super().__init__()
        one_of("LigerLayerNorm", "init_fn", init_fn, ("ones", "zeros"))
        for argument, value in {"impl": impl, "mode": mode, "backend": backend}.items():
            one_of("LigerLayerNorm", argument, value, (None,))
        self.hidden_size, self.eps, self.variance_epsilon, self.impl, self.mode = hidden_size, eps, eps, None, None
        self.weight = torch.nn.Parameter(getattr(torch, init_fn)(hidden_size))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states):
        return liger_layer_norm(hidden_states, self.weight, self.bias, self.variance_epsilon)

    def extra_repr(self):
        return f"{self.hidden_size}, eps={self.eps}"
