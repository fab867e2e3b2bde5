"""ChatGLM2, ChatGLM3 and GLM-4: the names of ChatGLM's own code or of GlmForCausalLM, SAT's ChatGLM2, 3 and 4 models.

HF keeps gate and up as one matrix. SAT's classes keep them apart, and ChatGLM3Model has them the other way round than the
others. Half of each head is rotated: in pairs (0 1)(2 3) by HF and by SAT's 2 and 3, in halves by SAT's 4.
"""

from typing import ClassVar

from .._family import Family
from .._family import copied
from .._rules import Copy
from .._rules import Frequencies
from .._rules import Halves
from .._rules import Split
from .._rules import Stack
from .llama import check_head_dim
from .llama import decoder_sizes

SAT = "transformer.layers.{i}."
UP, GATE, OTHER = SAT + "mlp.dense_h_to_4h.weight", SAT + "mlp.dense_h_to_4h_gate.weight", "mixins.mlp.w2.{i}.weight"
FREQUENCIES = "mixins.attn.rotary_pos_emb.inv_freq"
TOKENS = {"pad_token_id": "pad_token_id", "eos_token_id": "eos_token_id"}
# What stands where in SAT's arguments, if the two agree on what it is.
SAME = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "padded_vocab_size",
    "max_sequence_length": "seq_length",
    "inner_hidden_size": "ffn_hidden_size",
}


def gated(hf):
    """[gate; up] of one matrix; ChatGLM3Model applies silu to the mixin's part."""
    dims = ["inner hidden", "inner hidden"]
    return (
        Split(hf, (OTHER, UP), dims, "column", "gate_in_mixin"),
        Split(hf, (UP, OTHER), dims, "column", "up_in_mixin"),
        Split(hf, (GATE, UP), dims, "column", "is_gated_mlp"),
    )


def where_gate_is(args):
    gated = bool(args.get("is_gated_mlp", False))
    swapped = args["model_class"] == "ChatGLM3Model"
    return {"is_gated_mlp": gated, "gate_in_mixin": swapped and not gated, "up_in_mixin": not swapped and not gated}


def common_args(name, config):
    return {
        "model_class": name,
        "tokenizer_type": config.get("_name_or_path") or "fake",
        "layernorm_order": "pre",
        "model_parallel_size": 1,
        "use_bias": False,
        "use_qkv_bias": True,
    }


class ChatGLM(Family):
    """The names of the code that comes with the weights."""

    model_types = ("chatglm",)
    architecture = "ChatGLMForConditionalGeneration"
    foreign = "the code of ChatGLM comes with its weights, and code that comes with weights is not run here"
    prefix = "transformer."
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
    sat_accepts: ClassVar[dict] = {"use_bias": (False,), "use_qkv_bias": (True,)}
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
        config["rope_ratio"] = theta / 10000.0

    def sizes(self, config, args):
        dim, heads = config.divide("hidden_size", "num_attention_heads"), config["num_attention_heads"]
        groups = config.count("multi_query_group_num") if config.get("multi_query_attention") else heads
        return where_gate_is(args) | {
            "vocab": config.count("padded_vocab_size"),
            "hidden": config["hidden_size"],
            "inner": config.count("ffn_hidden_size"),
            "heads": heads,
            "kv_heads": groups,
            "q": heads * dim,
            "kv": groups * dim,
            "head_dim": dim,
            "rope_dim": dim // 2,
            "rope_half": dim // 4,
            "i": config.each("num_layers"),
        }

    def args(self, config):
        args = common_args(self.model_classes[0], config) | {ours: config.count(theirs) for ours, theirs in SAME.items()}
        args["layernorm_epsilon"] = config.number("layernorm_epsilon")
        if config.get("multi_query_attention"):
            args["num_multi_query_heads"] = config.count("multi_query_group_num")
        return copied(args, TOKENS, config)

    def config(self, args):
        groups = args.groups()
        config = {theirs: args.count(ours) for ours, theirs in SAME.items()}
        config |= {
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            "layernorm_epsilon": args.number("layernorm_epsilon", 1e-5),
            "kv_channels": args.divide("hidden_size", "num_attention_heads"),
            "multi_query_attention": groups > 0,
            "multi_query_group_num": groups or 1,
        }
        keys = ("original_rope", "post_layer_norm", "rmsnorm", "add_bias_linear", "add_qkv_bias")
        config |= {key: self.hf_accepts[key][0] for key in keys}
        return copied(config | {"apply_residual_connection_post_layernorm": False}, TOKENS, args)


class ChatGLM2(ChatGLM):
    name = "chatglm2"
    title = "ChatGLM2-6B"
    model_classes = ("ChatGLM2Model",)
    hf_accepts: ClassVar[dict] = ChatGLM.hf_accepts | {"rope_ratio": (1, None)}
    sat_accepts: ClassVar[dict] = ChatGLM.sat_accepts | {"is_gated_mlp": (False, True)}


class ChatGLM3(ChatGLM):
    name = "chatglm3"
    title = "ChatGLM3-6B"
    model_classes = ("ChatGLM3Model",)

    def theta(self, config):
        return 10000.0 * config.number("rope_ratio", 1.0)

    def rope_base(self, args):
        return 10000.0 * args.number("base_scale", 1.0)

    def args(self, config):
        return super().args(config) | {"base_scale": float(config.number("rope_ratio", 1.0))}


class Glm(Family):
    """Into ChatGLM3Model, whose arguments hold the rotary base; ChatGLM2Model and ChatGLM4Model are read as well."""

    name = "glm"
    title = "GLM-4 of transformers (glm-4-9b-hf and the like)"
    model_types = ("glm",)
    model_classes = ("ChatGLM3Model", "ChatGLM2Model", "ChatGLM4Model")
    architecture = "GlmForCausalLM"
    prefix = "model."
    hf_accepts: ClassVar[dict] = {"hidden_act": ("silu",), "attention_bias": (True,), "tie_word_embeddings": (False,)}
    sat_accepts: ClassVar[dict] = {"use_bias": (False,), "use_qkv_bias": (True,), "is_gated_mlp": (False, True)}
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
        return args.get("model_class") == "ChatGLM4Model"

    def check_hf(self, config, problems):
        super().check_hf(config, problems)
        check_head_dim(config, problems)
        rotary = config.section("rope_parameters") if config.get("rope_parameters") else {}
        part = rotary.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
        if part != 0.5:
            problems.add(f"{config.path}: partial_rotary_factor is {part}; SAT's ChatGLM models rotate half of a head")

    def rope_base(self, args):
        return 10000.0 * args.number("base_scale", 1.0) if args["model_class"] == "ChatGLM3Model" else 10000.0

    def set_theta(self, config, theta):
        config["rope_theta"] = theta
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}

    def sizes(self, config, args):
        sizes = decoder_sizes(config) | where_gate_is(args)
        dim = sizes["rope_dim"]
        return sizes | {
            "head_dim": dim,
            "rope_dim": dim // 2,
            "rope_half": dim // 4,
            "halves": args["model_class"] == "ChatGLM4Model",
        }

    def args(self, config):
        args = common_args("ChatGLM3Model", config) | {
            "num_layers": config.count("num_hidden_layers"),
            "hidden_size": config.count("hidden_size"),
            "num_attention_heads": config.count("num_attention_heads"),
            "vocab_size": config.count("vocab_size"),
            "max_sequence_length": config.count("max_position_embeddings"),
            "inner_hidden_size": config.count("intermediate_size"),
            "layernorm_epsilon": config.number("rms_norm_eps"),
            "num_multi_query_heads": config.count("num_key_value_heads", config["num_attention_heads"]),
            "base_scale": self.theta(config) / 10000.0,
        }
        return copied(args, TOKENS, config)

    def config(self, args):
        config = {
            "model_type": "glm",
            "architectures": [self.architecture],
            "num_hidden_layers": args.count("num_layers"),
            "hidden_size": args.count("hidden_size"),
            "intermediate_size": args.count("inner_hidden_size", 4 * args["hidden_size"]),
            "num_attention_heads": args.count("num_attention_heads"),
            "num_key_value_heads": args.groups() or args["num_attention_heads"],
            "head_dim": args.divide("hidden_size", "num_attention_heads"),
            "vocab_size": args.count("vocab_size"),
            "max_position_embeddings": args.count("max_sequence_length"),
            "rms_norm_eps": args.number("layernorm_epsilon", 1e-5),
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }
        return copied(config, TOKENS, args)


FAMILIES = (ChatGLM2(), ChatGLM3(), Glm())
