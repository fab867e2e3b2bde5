"""liger_aot.moe_experts as an implementation of transformers' experts, for models of transformers without bind.

register_experts_implementation()
model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="liger")  # or model.set_experts_implementation
"""

import torch
from torch import nn
from transformers import activations
from transformers.integrations import moe

from .._hooks import altered
from ..functional import moe_experts

# What packed_glu computes, by the class of a module's activation.
ACTIVATIONS = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.GELUActivation: "gelu",
}


def register_experts_implementation(name: str = "liger") -> None:
    """Have transformers know experts_forward by this name, for every model that asks for it; no other one changes."""
    moe.ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)


def experts_forward(self, hidden_states, top_k_index, top_k_weights):
    """What transformers calls in the place of the forward of its experts modules, with or without gate, biases, transposition.

    A gate of the module's own is called as it is; transformers' gate of silu or gelu is fused. The result has the dtype of
    hidden_states, which are cast to the projections'. Raises NotImplementedError for experts with a norm of their own.
    """
    if self.has_post_expert_norm:
        raise NotImplementedError(
            f"experts: {type(self).__name__} has a norm after each expert, which the implementation liger does not call; "
            "set_experts_implementation('grouped_mm')"
        )
    first = "gate_up_proj" if self.has_gate else "up_proj"
    biases = (getattr(self, f"{p}_bias") if self.has_bias else None for p in (first, "down_proj"))
    y = moe_experts(
        hidden_states.to(self.down_proj.dtype),
        getattr(self, first),
        self.down_proj,
        top_k_index,
        top_k_weights,
        **dict(zip(("gate_up_bias", "down_bias"), biases, strict=True)),
        activation=gate_of(self),
        transposed=self.is_transposed,
    )
    return y.to(hidden_states.dtype)


# What transformers' use_experts_implementation gives to experts whose forward it dispatches.
DISPATCHED = {"has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel"}


def in_the_place_of(implementation, experts):
    """Whether transformers would have this implementation compute these experts, and experts_forward can here."""
    if not vars(experts).keys() >= DISPATCHED or experts.config._experts_implementation != implementation:
        return False
    traced = torch.compiler.is_compiling() and experts.down_proj.dtype is not torch.bfloat16
    return not traced and not experts.has_post_expert_norm


def gate_of(experts):
    """packed_glu's name for the gate of experts, or the gate itself."""
    if not experts.has_gate:
        return experts.act_fn
    if type(experts)._apply_gate.__module__ == moe.__name__ and "_apply_gate" not in vars(experts):  # transformers' own
        act = experts.act_fn
        fused = ACTIVATIONS.get(type(act))
        if fused and not altered(act):
            return fused
    return experts._apply_gate
