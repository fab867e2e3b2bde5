"""Liger's GEGLU MLPs, with the tanh form of gelu whatever the config says, as Liger's."""

import torch
from torch.nn import Linear

from ..functional import geglu


class LigerGEGLUMLP(torch.nn.Module):
    """down_proj(gelu(gate_proj(x)) · up_proj(x))."""

    def __init__(self, config):
        super().__init__()
        self.config, self.hidden_size = config, config.hidden_size
        self._project(config.intermediate_size)

    def _project(self, size):
        self.intermediate_size = size
        self.gate_proj = Linear(self.hidden_size, size, bias=False)
        self.up_proj = Linear(self.hidden_size, size, bias=False)
        self.down_proj = Linear(size, self.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class LigerGEGLUMLPForGemma4(LigerGEGLUMLP):
    """Twice as wide in the last layers, those that share keys and values, where config.use_double_wide_mlp says so."""

    def __init__(self, config, layer_idx=None):
        super().__init__(config)
        shared = getattr(config, "num_kv_shared_layers", 0)
        wide = getattr(config, "use_double_wide_mlp", False) and layer_idx is not None and shared > 0
        if wide and layer_idx >= getattr(config, "num_hidden_layers", 0) - shared:
            self._project(2 * config.intermediate_size)
