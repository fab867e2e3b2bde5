"""ChatGLM2, ChatGLM3 and GLM-4: the names of ChatGLM's own code or of GlmForCausalLM, SAT's ChatGLM2, 3 and 4 models.

HF keeps gate and up as one matrix. SAT's classes keep them apart, and ChatGLM3Model has them the other way round than the
others. Half of each head is rotated: in pairs (0 1)(2 3) by HF and by SAT's 2 and 3, in halves by SAT's 4.
"""

from typing import ClassVar

from .._family import NAMES
from .._family import Family
from .._family import grouped
from .._family import rotary
from .._rules import Copy
from .._rules import Frequencies
from .._rules import Halves
from .._rules import Split
from .._rules import Stack
from .llama import Decoder

SAT = "transformer.layers.{i}."
UP, GATE, OTHER = SAT + "mlp.dense_h_to_4h.weight", SAT + "mlp.dense_h_to_4h_gate.weight", "mixins.mlp.w2.{i}.weight"
FREQUENCIES = "mixins.attn.rotary_pos_emb.inv_freq"


def gated(hf):
    """[gate; up] of one matrix; ChatGLM3Model applies silu to the mixin's part."""
    dims = ["inner hidden", "inner hidden"]
    return (
        Split(hf, (OTHER, UP), dims, "column", "gate_in_mixin"),
        Split(hf, (UP, OTHER), dims, "column", "up_in_mixin"),
        Split(hf, (GATE, UP), dims, "column", "is_gated_mlp"),
    )


def where_gate_is(args, swapped):
    gated = bool(args.get("is_gated_mlp", False))
    return {"is_gated_mlp": gated, "gate_in_mixin": swapped and not gated, "up_in_mixin": not swapped and not gated}


def scaled(args):
    return digits(10000.0 * args.number("base_scale", 1.0))


def digits(number):
    """Those of a base or of a ratio: the last ones of a float are what a quotient and a product leave."""
    return float(f"{number:.12g}")


class ChatGLM(Family):
    """The names of the code that comes with the weights."""

    model_types = ("chatglm",)
    architecture = "ChatGLMForConditionalGeneration"
    foreign = "the code of ChatGLM comes with its weights, and code that comes with weights is not run here"
    prefix = "transformer."
    rope_share = 2
    names: ClassVar[dict] = NAMES | {
        "num_layers": "num_layers",
        "inner_hidden_size": "ffn_hidden_size",
        "vocab_size": "padded_vocab_size",
        "max_sequence_length": "seq_length",
    }
    epsilon = ("layernorm_epsilon",)
    hf_accepts: ClassVar[dict] = {
        "original_rope": (True,),
        "post_layer_norm": (True,),
        "rmsnorm": (True,),
        "add_bias_linear": (False,),
        "add_qkv_bias": (True,),
        "apply_residual_connection_post_layernorm": (False,),
        "pre_seq_len": (None,),
        "quantization_bit": (0, None),
    }
    sat_fixed: ClassVar[dict] = {"use_bias": False, "use_qkv_bias": True}
    HF = "transformer.encoder.layers.{i}."
    rules = (
        Copy("transformer.embedding.word_embeddings.weight", "transformer.word_embeddings.weight", "vocab hidden", "vocab"),
        Copy(HF + "input_layernorm.weight", SAT + "input_layernorm.weight", "hidden"),
        Copy(
            HF + "self_attention.query_key_value.weight", SAT + "attention.query_key_value.weight", "q+kv+kv hidden", "column"
        ),
        Copy(HF + "self_attention.query_key_value.bias", SAT + "attention.query_key_value.bias", "q+kv+kv", "column"),
        Copy(HF + "self_attention.dense.weight", SAT + "attention.dense.weight", "hidden q", "row"),
        Copy(HF + "post_attention_layernorm.weight", SAT + "post_attention_layernorm.weight", "hidden"),
        *gated(HF + "mlp.dense_h_to_4h.weight"),
        Copy(HF + "mlp.dense_4h_to_h.weight", SAT + "mlp.dense_4h_to_h.weight", "hidden inner", "row"),
        Copy("transformer.encoder.final_layernorm.weight", "transformer.final_layernorm.weight", "hidden"),
        Copy("transformer.output_layer.weight", "mixins.chatglm-final.lm_head.weight", "vocab hidden", "column"),
        Frequencies("transformer.rotary_pos_emb.inv_freq", FREQUENCIES, write=True),
    )

    def claims_hf(self, config):
        return super().claims_hf(config) and "multi_query_attention" in config

    def check_hf(self, config, problems):
        super().check_hf(config, problems)
        dim, own = config.get("kv_channels"), config.divide("hidden_size", "num_attention_heads")
        if dim is not None and dim != own:
            problems.add(f"{config.path}: kv_channels is {dim}; SAT's heads are hidden_size / num_attention_heads {own} wide")

    def theta(self, config):
        return 10000.0

    def set_theta(self, config, theta):
        config["rope_ratio"] = digits(theta / 10000.0)

    def sizes(self, config, args):
        sizes = super().sizes(config, args)
        shared = config.divide("num_attention_heads", "multi_query_group_num") if config.get("multi_query_attention") else 1
        return grouped(sizes, sizes["heads"] // shared) | where_gate_is(args, self.sat_class(args) == "ChatGLM3Model")

    def args(self, config):
        args = super().args(config)
        if config.get("multi_query_attention"):
            args["num_multi_query_heads"] = config.count("multi_query_group_num")
        return args

    def config(self, args):
        groups = args.groups()
        keys = ("original_rope", "post_layer_norm", "rmsnorm", "add_bias_linear", "add_qkv_bias")
        config = super().config(args) | {key: self.hf_accepts[key][0] for key in keys}
        return config | {
            "architectures": ["ChatGLMModel"],
            "apply_residual_connection_post_layernorm": False,
            "kv_channels": args.divide("hidden_size", "num_attention_heads"),
            "multi_query_attention": groups > 0,
            "multi_query_group_num": groups or 1,
        }


class ChatGLM2(ChatGLM):
    name = "chatglm2"
    title = "ChatGLM2-6B"
    model_classes = ("ChatGLM2Model",)
    hf_accepts: ClassVar[dict] = ChatGLM.hf_accepts | {"rope_ratio": (1, None)}
    sat_accepts: ClassVar[dict] = {"is_gated_mlp": (False, True)}


class ChatGLM3(ChatGLM):
    name = "chatglm3"
    title = "ChatGLM3-6B"
    model_classes = ("ChatGLM3Model",)

    def theta(self, config):
        return digits(10000.0 * config.number("rope_ratio", 1.0))

    def rope_base(self, args):
        return scaled(args)

    def buffer_theta(self, theta):
        """Its code computes with rope_ratio times 10000, and does not read the buffer that it registers, which is of 10000."""
        return 10000.0

    def args(self, config):
        return super().args(config) | {"base_scale": float(config.number("rope_ratio", 1.0))}


class Glm(Decoder):
    """Into ChatGLM3Model, whose arguments hold the rotary base; ChatGLM2Model and ChatGLM4Model are read as well."""

    name = "glm"
    title = "GLM-4 of transformers (glm-4-9b-hf and the like)"
    model_types = ("glm",)
    model_classes = ("ChatGLM3Model", "ChatGLM2Model", "ChatGLM4Model")
    architecture = "GlmForCausalLM"
    rope_share = 2
    hf_defaults: ClassVar[dict] = {
        "glm": {
            "num_key_value_heads": 2,
            "head_dim": 128,
            "eos_token_id": [151329, 151336, 151338],
            "pad_token_id": 151329,
        }
    }
    hf_accepts: ClassVar[dict] = {"hidden_act": ("silu",), "attention_bias": (True,), "tie_word_embeddings": (False,)}
    sat_accepts: ClassVar[dict] = {"is_gated_mlp": (False, True)}
    sat_fixed: ClassVar[dict] = ChatGLM.sat_fixed
    HF = "model.layers.{i}."
    rules = (
        Copy("model.embed_tokens.weight", "transformer.word_embeddings.weight", "vocab hidden", "vocab"),
        Copy(HF + "input_layernorm.weight", SAT + "input_layernorm.weight", "hidden"),
        *(
            kind([f"{layer}self_attn.{x}_proj.{p}" for x in "qkv"], f"{SAT}attention.query_key_value.{p}", dims, "column", when)
            for layer in (HF,)
            for kind, when in ((Stack, "not halves"), (Halves, "halves"))
            for p, dims in (("weight", ("q hidden", "kv hidden", "kv hidden")), ("bias", ("q", "kv", "kv")))
        ),
        Copy(HF + "self_attn.o_proj.weight", SAT + "attention.dense.weight", "hidden q", "row"),
        Copy(HF + "post_attention_layernorm.weight", SAT + "post_attention_layernorm.weight", "hidden"),
        *gated(HF + "mlp.gate_up_proj.weight"),
        Copy(HF + "mlp.down_proj.weight", SAT + "mlp.dense_4h_to_h.weight", "hidden inner", "row"),
        Copy("model.norm.weight", "transformer.final_layernorm.weight", "hidden"),
        Copy("lm_head.weight", "mixins.chatglm-final.lm_head.weight", "vocab hidden", "column"),
        Frequencies("", FREQUENCIES),
    )

    def claims_sat(self, args):
        return self.sat_class(args) == "ChatGLM4Model"

    def check_hf(self, config, problems):
        super().check_hf(config, problems)
        part = rotary(config).get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
        if part != 0.5:
            problems.add(f"{config.path}: partial_rotary_factor is {part}; SAT's ChatGLM models rotate half of a head")

    def theta(self, config):
        return digits(super().theta(config))

    def rope_base(self, args):
        return scaled(args) if self.sat_class(args) == "ChatGLM3Model" else 10000.0

    def set_theta(self, config, theta):
        config["rope_theta"] = theta
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}

    def sizes(self, config, args):
        own = self.sat_class(args)
        return super().sizes(config, args) | where_gate_is(args, own == "ChatGLM3Model") | {"halves": own == "ChatGLM4Model"}

    def args(self, config):
        return super().args(config) | {
            "num_multi_query_heads": config.count("num_key_value_heads", config["num_attention_heads"]),
            "base_scale": digits(self.theta(config) / 10000.0),
        }

    def config(self, args):
        return super().config(args) | {
            "head_dim": args.divide("hidden_size", "num_attention_heads"),
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
            "tie_word_embeddings": False,
        }


FAMILIES = (ChatGLM2(), ChatGLM3(), Glm())
