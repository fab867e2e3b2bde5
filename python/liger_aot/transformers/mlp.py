"""Liger's fused SwiGLU MLPs: the products are torch's matrix products, what lies between them is one kernel."""

from torch.nn.functional import linear

from ..functional import swiglu
from .swiglu import LigerFalconH1SwiGLUMLP
from .swiglu import LigerSwiGLUMLP


class LigerMLPFunction:
    @staticmethod
    def apply(input, gate_weight, up_weight, down_weight, gate_multiplier=1.0, down_multiplier=1.0):
        gate, up = linear(input, gate_weight), linear(input, up_weight)
        return linear(swiglu(gate, up, gate_multiplier=gate_multiplier), down_weight) * down_multiplier


class LigerMLP(LigerSwiGLUMLP):
    """LigerSwiGLUMLP, with biases where config.mlp_bias says so (Liger leaves them out)."""

    def __init__(self, config):
        super().__init__(config)


class LigerFalconH1MLP(LigerFalconH1SwiGLUMLP):
    """LigerFalconH1SwiGLUMLP, which takes biases too."""
