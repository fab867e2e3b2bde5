"""CogVLM and CogVLM2: the names of the code that comes with the weights, and of CogVLM's SAT models.

A language model in which tokens of the image have an attention and an MLP of their own, behind an EVA2-CLIP tower. Nothing is
reshaped; SAT's names are where each part was mixed in.
"""

from typing import ClassVar

from .._family import DEFAULTS
from .._family import Family
from .._family import copied
from .._family import grouped
from .._family import to_args
from .._family import to_config
from .._rules import Copy
from .._rules import Frequencies
from .._rules import linear
from .._rules import norm
from .._settings import Settings

HF, SAT = "model.layers.{i}.", "transformer.layers.{i}."
# The layers with experts for the image.
HF_EXPERT = "model.layers.{k}."
TOWER, SAT_TOWER = "model.vision.transformer.layers.{j}.", "mixins.eva.vit_model.transformer.layers.{j}."
# Of the tower, whose arguments SAT keeps under eva_args and HF under vision_config.
SEEN_NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "inner_hidden_size": "intermediate_size",
    "max_sequence_length": "num_positions",
    "in_channels": "in_channels",
    "patch_size": "patch_size",
}
QKV, SEEN = "q+kv+kv hidden", "seen+seen+seen seen"


def language():
    return (
        Copy("model.embed_tokens.weight", "transformer.word_embeddings.weight", "vocab hidden", "vocab"),
        Copy(HF + "input_layernorm.weight", SAT + "input_layernorm.weight", "hidden"),
        Copy(HF + "self_attn.language_expert_query_key_value.weight", SAT + "attention.query_key_value.weight", QKV, "column"),
        Copy(HF + "self_attn.language_expert_dense.weight", SAT + "attention.dense.weight", "hidden q", "row"),
        Copy(HF + "post_attention_layernorm.weight", SAT + "post_attention_layernorm.weight", "hidden"),
        Copy(HF + "mlp.language_mlp.gate_proj.weight", "mixins.mlp.gate_proj.{i}.weight", "inner hidden", "column"),
        Copy(HF + "mlp.language_mlp.up_proj.weight", SAT + "mlp.dense_h_to_4h.weight", "inner hidden", "column"),
        Copy(HF + "mlp.language_mlp.down_proj.weight", SAT + "mlp.dense_4h_to_h.weight", "hidden inner", "row"),
        Copy("model.norm.weight", "transformer.final_layernorm.weight", "hidden"),
        Copy("lm_head.weight", "mixins.lm.lm_head.weight", "vocab hidden", "column"),
        Frequencies(HF + "self_attn.rotary_emb.inv_freq", "mixins.rotary.rotary_emb.inv_freq", write=True),
    )


def experts():
    hf, rotary, mlp = HF_EXPERT, "mixins.rotary.vision_", "mixins.mlp.vision_"
    return (
        Copy(hf + "self_attn.vision_expert_query_key_value.weight", rotary + "query_key_value_list.{k}.weight", QKV, "column"),
        Copy(hf + "self_attn.vision_expert_dense.weight", rotary + "dense_list.{k}.weight", "hidden q", "row"),
        Copy(hf + "mlp.vision_mlp.gate_proj.weight", mlp + "gate_proj.{k}.weight", "inner hidden", "column"),
        Copy(hf + "mlp.vision_mlp.up_proj.weight", mlp + "dense_h_to_4h_list.{k}.weight", "inner hidden", "column"),
        Copy(hf + "mlp.vision_mlp.down_proj.weight", mlp + "dense_4h_to_h_list.{k}.weight", "hidden inner", "row"),
    )


def tower():
    hf, sat = "model.vision.", "mixins.eva."
    patch = hf + "patch_embedding."
    return (
        Copy(patch + "cls_embedding", sat + "vit_model.transformer.word_embeddings.weight", "1 seen"),
        Copy(patch + "position_embedding.weight", sat + "vit_model.transformer.position_embeddings.weight", "places seen"),
        Copy(patch + "proj.weight", sat + "vit_model.mixins.patch_embedding.proj.weight", "seen channels patch patch"),
        Copy(patch + "proj.bias", sat + "vit_model.mixins.patch_embedding.proj.bias", "seen"),
        *linear(TOWER + "attention.query_key_value", SAT_TOWER + "attention.query_key_value", SEEN, "column"),
        *linear(TOWER + "attention.dense", SAT_TOWER + "attention.dense", "seen seen", "row"),
        *norm(TOWER + "input_layernorm", SAT_TOWER + "input_layernorm", "seen"),
        *linear(TOWER + "mlp.fc1", SAT_TOWER + "mlp.dense_h_to_4h", "seen_inner seen", "column"),
        *linear(TOWER + "mlp.fc2", SAT_TOWER + "mlp.dense_4h_to_h", "seen seen_inner", "row"),
        *norm(TOWER + "post_attention_layernorm", SAT_TOWER + "post_attention_layernorm", "seen"),
        Copy(hf + "linear_proj.linear_proj.weight", sat + "linear_proj.linear_proj.weight", "hidden seen"),
        *norm(hf + "linear_proj.norm1", sat + "linear_proj.norm1"),
        Copy(hf + "linear_proj.gate_proj.weight", sat + "linear_proj.gate_proj.weight", "inner hidden"),
        Copy(hf + "linear_proj.dense_h_to_4h.weight", sat + "linear_proj.dense_h_to_4h.weight", "inner hidden"),
        Copy(hf + "linear_proj.dense_4h_to_h.weight", sat + "linear_proj.dense_4h_to_h.weight", "hidden inner"),
        Copy(hf + "boi", sat + "boi", "1 1 hidden"),
        Copy(hf + "eoi", sat + "eoi", "1 1 hidden"),
    )


# Of the tower, what CogVLM's code on the hub computes, and what SAT takes where nothing is said.
SEEN_ARGS = {
    "layernorm_order": "post",
    "use_final_layernorm": False,
    "use_bias": True,
    "pre_len": 1,
    "post_len": 0,
    "vocab_size": 1,
}
SEEN_DEFAULTS = DEFAULTS | {"pre_len": 1, "post_len": 0}
WIDTH = 1792  # of the tower, in SAT's code


class CogVLM(Family):
    name = "cogvlm"
    title = "CogVLM"
    model_classes = ("CogVLMModel",)
    architecture = "CogVLMForCausalLM"
    foreign = "the code of CogVLM comes with its weights, and code that comes with weights is not run here"
    hf_accepts: ClassVar[dict] = {"hidden_act": ("silu",), "tie_word_embeddings": (False,)}
    sat_accepts: ClassVar[dict] = {"num_multi_query_heads": (0, None)}
    sat_fixed: ClassVar[dict] = {"use_bias": False}
    rules = (*language(), *experts(), *tower())
    tokenizer = "vicuna-7b-v1.5"
    base = 10000.0
    width = WIDTH
    hub_tokens: ClassVar[dict] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # of the configuration's class there
    per_place = 1  # patches that become one place of the text

    def claims_hf(self, config):
        return self.architecture in config.listed("architectures") and "num_multi_query_heads" not in config

    def filled(self, config):
        return Settings({**self.hub_tokens, **config}, config.path)

    def theta(self, config):
        return self.base

    def check_hf(self, config, problems):
        super().check_hf(config, problems)
        seen = self.vision(config)
        if seen.get("hidden_act", "gelu") != "gelu":
            problems.add(f"{seen.path}: hidden_act is {seen['hidden_act']!r}; SAT's EVA2CLIPModel computes 'gelu' alone")

    def check_sat(self, args, problems):
        super().check_sat(args, problems)
        eva = args.section("eva_args")
        for key, accepted in SEEN_ARGS.items():
            value = eva.get(key, SEEN_DEFAULTS.get(key))
            if value != accepted:
                problems.add(f"{eva.path}: {key} is {value!r}; {self.architecture} computes {accepted!r} alone")

    def check_code(self, config, problems):
        seen = self.vision(config)
        if seen.count("hidden_size") != self.width:
            own, code = seen["hidden_size"], f"SAT's {self.model_classes[0]} has {self.width} in its code"
            problems.add(f"{seen.path}: hidden_size is {own}; {code}, as the width of the tower")

    def rope_base(self, args):
        return self.base

    def set_theta(self, config, theta):
        """Both sides have the base in their code; the frequencies are in the files."""

    def vision(self, config):
        return config.section("vision_config")

    def experts(self, config):
        """SAT's CogVLMModel has experts for the image in its first 32 layers."""
        return range(min(config.count("num_hidden_layers"), 32))

    def groups(self, config):
        return config["num_attention_heads"]

    def sizes(self, config, args):
        seen = self.vision(config)
        seen.divide("hidden_size", "num_heads")
        return grouped(super().sizes(config, args), self.groups(config)) | {
            "k": self.experts(config),
            "j": seen.each("num_hidden_layers"),
            "seen": seen["hidden_size"],
            "seen_inner": seen.count("intermediate_size"),
            "seen_heads": seen["num_heads"],
            "places": seen.count("num_positions"),
            "channels": seen.count("in_channels"),
            "patch": seen.count("patch_size"),
        }

    def args(self, config):
        seen = self.vision(config)
        image = seen.count("image_size", round((seen.count("num_positions") - 1) ** 0.5) * seen.count("patch_size"))
        eva = {
            "model_class": "EVA2CLIPModel",
            "layernorm_epsilon": seen.number("layer_norm_eps", 1e-6),
            "row_parallel_linear_final_bias": False,
            "image_size": [image, image],
        }
        args = super().args(config) | {
            "image_length": (seen["num_positions"] - 1) // self.per_place,
            "eva_args": SEEN_ARGS | eva | to_args(seen, SEEN_NAMES),
        }
        return copied(args, {"text_processor_version": "template_version"}, config)

    def config(self, args):
        eva = args.section("eva_args")
        eva.divide("hidden_size", "num_attention_heads")
        width = eva.square("image_size")
        places = (width // eva.count("patch_size")) ** 2 + eva.count("pre_len", 1)
        seen = {"layer_norm_eps": eva.number("layernorm_epsilon", 1e-5), "hidden_act": "gelu", "dropout_prob": 0.0}
        eva = type(eva)({"in_channels": 3} | eva | {"max_sequence_length": places}, eva.path)
        config = super().config(args) | {
            "auto_map": {
                "AutoConfig": "configuration_cogvlm.CogVLMConfig",
                "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
            },
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "vision_config": seen | {"image_size": width} | to_config(eva, SEEN_NAMES),
        }
        return copied(config, {"template_version": "text_processor_version"}, args)


class CogVLM2(CogVLM):
    name = "cogvlm2"
    title = "CogVLM2"
    model_classes = ("CogVLM2Model",)
    sat_accepts: ClassVar[dict] = {}
    rules = (
        *CogVLM.rules,
        Copy(
            HF_EXPERT + "self_attn.vision_expert_query_key_value.bias",
            "mixins.rotary.vision_query_key_value_list.{k}.bias",
            "q+kv+kv",
            "column",
        ),
        Copy("model.vision.conv.weight", "mixins.eva.conv.weight", "seen seen 2 2"),
        Copy("model.vision.conv.bias", "mixins.eva.conv.bias", "seen"),
    )
    base = 500000.0
    hub_tokens: ClassVar[dict] = {"bos_token_id": 128000, "eos_token_id": 128001}
    per_place = 4

    def claims_hf(self, config):
        return self.architecture in config.listed("architectures") and "num_multi_query_heads" in config

    def experts(self, config):
        return config.each("num_hidden_layers")

    def groups(self, config):
        return config["num_attention_heads"] // config.divide("num_attention_heads", "num_multi_query_heads")

    def args(self, config):
        return super().args(config) | {"num_multi_query_heads": self.groups(config)}

    def config(self, args):
        return super().config(args) | {"num_multi_query_heads": args.count("num_multi_query_heads")}


FAMILIES = (CogVLM(), CogVLM2())
