"""Llama 1 to 3, Vicuna, Mistral without a window, Qwen2: HF's LlamaForCausalLM and SAT's LLaMAModel."""

from typing import ClassVar

from .._family import Family
from .._family import check_window
from .._family import grouped
from .._rules import Copy
from .._rules import Frequencies
from .._rules import Stack
from .._rules import Tied

HF, SAT = "model.layers.{i}.", "transformer.layers.{i}."
BOS_EOS = {"bos_token_id": 1, "eos_token_id": 2}  # of Llama, Mistral and Mixtral, in transformers


def attention(hf, sat, p, when=""):
    q_k_v = [f"{hf}self_attn.{x}_proj.{p}" for x in "qkv"]
    width = " hidden" if p == "weight" else ""
    dims = ["q" + width, "kv" + width, "kv" + width]
    return Stack(q_k_v, f"{sat}attention.query_key_value.{p}", dims, "column", when)


def decoder(rope, rope_when="", bias=True):
    """What Llama and its relatives share, up to the MLP."""
    return (
        Copy("model.embed_tokens.weight", "transformer.word_embeddings.weight", "vocab hidden", "vocab"),
        Copy(HF + "input_layernorm.weight", SAT + "input_layernorm.weight", "hidden"),
        attention(HF, SAT, "weight"),
        *([attention(HF, SAT, "bias", "qkv_bias")] if bias else []),
        Copy(HF + "self_attn.o_proj.weight", SAT + "attention.dense.weight", "hidden q", "row"),
        Copy(HF + "post_attention_layernorm.weight", SAT + "post_attention_layernorm.weight", "hidden"),
        Copy("model.norm.weight", "transformer.final_layernorm.weight", "hidden"),
        Copy("lm_head.weight", "mixins.lm.lm_head.weight", "vocab hidden", "column", "not tied"),
        Tied("model.embed_tokens.weight", "mixins.lm.lm_head.weight", "vocab hidden", "lm_head.weight", "column", "tied"),
        Frequencies(HF + "self_attn.rotary_emb.inv_freq", rope, when=rope_when),
    )


class Decoder(Family):
    """What the configurations of Llama and its relatives share."""

    prefix = "model."
    sat_fixed: ClassVar[dict] = {"use_bias": False}

    def check_hf(self, config, problems):
        super().check_hf(config, problems)
        check_window(self.name, config, problems)
        check_head_dim(config, problems)

    def sizes(self, config, args):
        sizes = super().sizes(config, args)
        heads = sizes["heads"]
        return grouped(sizes, heads // config.divide("num_attention_heads", "num_key_value_heads", heads))

    def args(self, config):
        args, heads = super().args(config), config.count("num_attention_heads")
        kv_heads = config.count("num_key_value_heads", heads)
        # Where nothing is said, SAT takes 0 and 1.
        args |= {key: config.tokens(key) for key in BOS_EOS}
        return args if kv_heads == heads else args | {"num_multi_query_heads": kv_heads}

    def config(self, args):
        none = {key: None for key in BOS_EOS if key in args and args[key] is None}
        return (
            super().config(args)
            | none
            | {
                "num_key_value_heads": args.groups() or args["num_attention_heads"],
                "hidden_act": "silu",
            }
        )


class Llama(Decoder):
    name = "llama"
    title = "Llama 1 to 3, Vicuna, Mistral without a window, Qwen2"
    model_types = ("llama", "mistral", "qwen2")
    model_classes = ("LLaMAModel",)
    architecture = "LlamaForCausalLM"
    hf_defaults: ClassVar[dict] = {
        "llama": BOS_EOS,
        "mistral": BOS_EOS | {"num_key_value_heads": 8, "sliding_window": 4096},
        "qwen2": {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096},
    }
    hf_accepts: ClassVar[dict] = {
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "partial_rotary_factor": (1, None),
    }
    sat_accepts: ClassVar[dict] = {
        "use_qkv_bias": (False, True),
        "is_gated_mlp": (False, True),
        "is_rotary_emb": (False, True),
    }
    rules = (
        *decoder("transformer.position_embeddings.inv_freq", "is_rotary_emb"),
        Frequencies("", "mixins.rotary.rotary_emb.inv_freq", when="not is_rotary_emb"),
        Copy(HF + "mlp.gate_proj.weight", SAT + "mlp.dense_h_to_4h_gate.weight", "inner hidden", "column", "is_gated_mlp"),
        Copy(HF + "mlp.gate_proj.weight", "mixins.mlp.gate_proj.{i}.weight", "inner hidden", "column", "not is_gated_mlp"),
        Copy(HF + "mlp.up_proj.weight", SAT + "mlp.dense_h_to_4h.weight", "inner hidden", "column"),
        Copy(HF + "mlp.down_proj.weight", SAT + "mlp.dense_4h_to_h.weight", "hidden inner", "row"),
    )

    def sizes(self, config, args):
        return super().sizes(config, args) | {
            "qkv_bias": args.get("use_qkv_bias", False),
            "is_rotary_emb": args.get("is_rotary_emb", False),
            "is_gated_mlp": args.get("is_gated_mlp", False),
        }

    def args(self, config):
        args = super().args(config) | {"is_gated_mlp": True, "is_rotary_emb": True}
        return args | {"use_qkv_bias": True} if config.get("model_type") == "qwen2" else args

    def config(self, args):
        config = super().config(args)
        if args.get("use_qkv_bias", False):
            return config | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
        return config | {"attention_bias": False, "mlp_bias": False}


def check_head_dim(config, problems):
    heads, hidden = config.count("num_attention_heads"), config.count("hidden_size")
    dim = config.count("head_dim", hidden // heads or 1)
    if dim * heads != hidden and config.get("head_dim") is not None:
        problems.add(
            f"{config.path}: head_dim {dim} times num_attention_heads {heads} must be hidden_size {hidden}: "
            "SAT's rotary embedding is as wide as hidden_size / num_attention_heads"
        )


FAMILIES = (Llama(),)
