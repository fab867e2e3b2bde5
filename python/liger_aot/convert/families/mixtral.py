"""Mixtral: HF's MixtralForCausalLM and SAT's MixtralModel, whose first expert is the layer's own MLP."""

from typing import ClassVar

from .._error import ConvertError
from .._rules import Copy
from .llama import BOS_EOS
from .llama import HF
from .llama import SAT
from .llama import Decoder
from .llama import decoder

EXPERT = HF + "block_sparse_moe.experts."
MOST = 100_000  # experts of all layers that are believed


def expert(hf, sat):
    """gate, up and down of one expert, whose number ends SAT's names."""
    return (
        Copy(f"{EXPERT}{hf}.w1.weight", f"{SAT}mlp.dense_h_to_4h_gate{sat}.weight", "inner hidden", "column"),
        Copy(f"{EXPERT}{hf}.w3.weight", f"{SAT}mlp.dense_h_to_4h{sat}.weight", "inner hidden", "column"),
        Copy(f"{EXPERT}{hf}.w2.weight", f"{SAT}mlp.dense_4h_to_h{sat}.weight", "hidden inner", "row"),
    )


class Mixtral(Decoder):
    name = "mixtral"
    title = "Mixtral without a window"
    model_types = ("mixtral",)
    model_classes = ("MixtralModel",)
    architecture = "MixtralForCausalLM"
    hf_defaults: ClassVar[dict] = {"mixtral": BOS_EOS | {"num_key_value_heads": 8, "rope_theta": 1e6}}
    hf_accepts: ClassVar[dict] = {"hidden_act": ("silu",)}
    sat_accepts: ClassVar[dict] = {"num_experts": range(1, 1000)}
    sat_fixed: ClassVar[dict] = {"use_bias": False, "is_gated_mlp": True}
    rules = (
        *decoder("mixins.rotary.rotary_emb.inv_freq", bias=False),
        Copy(HF + "block_sparse_moe.gate.weight", "mixins.mlp.gates.{i}.weight", "experts hidden"),
        *expert("0", ""),
        *expert("{e}", "_{e}"),
    )

    def check_sat(self, args, problems):
        experts = args.count("num_experts")
        super().check_sat(args, problems)
        if args.count("num_experts_per_tok", 2) > experts:
            problems.add(f"{args.path}: num_experts_per_tok is {args['num_experts_per_tok']}, of {experts} experts")

    def rope_base(self, args):
        return 1e6

    def sizes(self, config, args):
        sizes, experts = super().sizes(config, args), config.count("num_local_experts")
        layers = len(sizes["i"])
        if layers * experts > MOST:
            raise ConvertError(
                f"{config.path}: 'num_hidden_layers' {layers} times 'num_local_experts' {experts} must be at most {MOST}"
            )
        return sizes | {"experts": experts, "e": range(1, experts)}

    def args(self, config):
        return super().args(config) | {
            "num_experts": config.count("num_local_experts"),
            "num_experts_per_tok": config.count("num_experts_per_tok"),
        }

    def config(self, args):
        return super().config(args) | {
            "num_local_experts": args.count("num_experts"),
            "num_experts_per_tok": args.count("num_experts_per_tok", 2),
        }


FAMILIES = (Mixtral(),)
