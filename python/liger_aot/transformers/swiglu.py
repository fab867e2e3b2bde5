"""Liger's SwiGLU MLPs, each with its model's constructor and parameters."""

import torch
from torch.nn import Linear
from torch.nn import Parameter

from ..functional import moe_experts
from ..functional import packed_glu
from ..functional import swiglu


def require_silu(activation):
    if activation not in ("silu", "swish"):
        raise ValueError(f"SwiGLU: the config's activation must be silu or swish, got {activation!r}")


def first_of(config, *names):
    """Through getattr: a configuration of transformers has names that are other attributes, or its class's."""
    for name in names:
        if (value := getattr(config, name, None)) is not None:
            return value
    raise ValueError(f"LigerExperts: the config must have one of {', '.join(names)}, got {type(config).__name__}")


class LigerSwiGLUMLP(torch.nn.Module):
    """down_proj(silu(gate_proj(x)) · up_proj(x)), with biases where config.mlp_bias says so (Liger leaves them out)."""

    def __init__(self, config, intermediate_size=None):
        super().__init__()
        require_silu(self.activation(config))
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size if intermediate_size is None else intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.up_proj = Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.down_proj = Linear(self.intermediate_size, self.hidden_size, bias=bias)

    def activation(self, config):
        return config.hidden_act

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class LigerQwen3MoeSwiGLUMLP(LigerSwiGLUMLP):
    pass


class LigerSwiGLUMLPForMuseGlimmer(LigerSwiGLUMLP):
    def __init__(self, config):
        super().__init__(config)

    def activation(self, config):
        return getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)


class LigerHunyuanV1SwiGLUMLP(LigerSwiGLUMLP):
    def __init__(self, config, layer_idx=None, is_shared_mlp=False):
        super().__init__(config)
        self.layer_idx = layer_idx


class LigerFalconH1SwiGLUMLP(LigerSwiGLUMLP):
    """With the config's multipliers of the gate and of the result."""

    def __init__(self, config):
        super().__init__(config)
        self.gate_multiplier, self.down_multiplier = map(float, config.mlp_multipliers)

    def forward(self, x):
        product = swiglu(self.gate_proj(x), self.up_proj(x), gate_multiplier=self.gate_multiplier)
        return self.down_proj(product) * self.down_multiplier


class LigerExperts(torch.nn.Module):
    """The experts of Mixtral, Qwen3-MoE and their like, of hidden_states (..., H), top_k_index and top_k_weights (..., K)."""

    def __init__(self, config):
        super().__init__()
        require_silu(config.hidden_act)
        self.num_experts = first_of(config, "num_experts", "num_local_experts", "n_routed_experts")
        self.intermediate_dim = first_of(config, "moe_intermediate_size", "intermediate_size")
        self.hidden_dim = config.hidden_size
        self.gate_up_proj = Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        index, weights = (t.reshape(*hidden_states.shape[:-1], t.shape[-1]) for t in (top_k_index, top_k_weights))
        return moe_experts(hidden_states, self.gate_up_proj, self.down_proj, index, weights)


class LigerPhi3SwiGLUMLP(torch.nn.Module):
    """With one projection for gate and up."""

    def __init__(self, config):
        super().__init__()
        require_silu(config.hidden_act)
        self.config = config
        self.hidden_size, self.intermediate_size = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(self.hidden_size, 2 * self.intermediate_size, bias=False)
        self.down_proj = Linear(self.intermediate_size, self.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(packed_glu(self.gate_up_proj(x)))


class LigerBlockSparseTop2MLP(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        require_silu(config.hidden_act)
        self.ffn_dim, self.hidden_dim = config.intermediate_size, config.hidden_size
        self.w1 = Linear(self.hidden_dim, self.ffn_dim, bias=False)
        self.w2 = Linear(self.ffn_dim, self.hidden_dim, bias=False)
        self.w3 = Linear(self.hidden_dim, self.ffn_dim, bias=False)

    def forward(self, x):
        return self.w2(swiglu(self.w1(x), self.w3(x)))
