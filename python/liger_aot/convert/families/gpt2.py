"""GPT-2: HF's GPT2LMHeadModel and SAT's GPT2Model. HF's Conv1D holds its weights the other way round."""

from typing import ClassVar

from .._family import Family
from .._rules import Copy
from .._rules import Drop
from .._rules import Tied
from .._rules import Transpose
from .._rules import norm

HF, SAT = "transformer.h.{i}.", "transformer.layers.{i}."


def conv(hf, sat, dims, mp):
    return (
        Transpose(f"{HF}{hf}.weight", f"{SAT}{sat}.weight", dims, mp),
        Copy(f"{HF}{hf}.bias", f"{SAT}{sat}.bias", dims.split()[0], "" if mp == "row" else mp),
    )


class GPT2(Family):
    name = "gpt2"
    title = "GPT-2"
    model_types = ("gpt2",)
    model_classes = ("GPT2Model",)
    architecture = "GPT2LMHeadModel"
    prefix = "transformer."
    names: ClassVar[dict] = {
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "vocab_size": "vocab_size",
        "max_sequence_length": "n_positions",
    }
    epsilon = ("layer_norm_epsilon", 1e-5)
    tied = True
    hf_defaults: ClassVar[dict] = {"gpt2": {"bos_token_id": 50256, "eos_token_id": 50256}}
    hf_accepts: ClassVar[dict] = {
        "activation_function": ("gelu_new",),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    rules = (
        Copy("transformer.wte.weight", "transformer.word_embeddings.weight", "vocab hidden", "vocab"),
        Copy("transformer.wpe.weight", "transformer.position_embeddings.weight", "positions hidden"),
        *norm(HF + "ln_1", SAT + "input_layernorm"),
        *conv("attn.c_attn", "attention.query_key_value", "hidden+hidden+hidden hidden", "column"),
        *conv("attn.c_proj", "attention.dense", "hidden hidden", "row"),
        *norm(HF + "ln_2", SAT + "post_attention_layernorm"),
        *conv("mlp.c_fc", "mlp.dense_h_to_4h", "inner hidden", "column"),
        *conv("mlp.c_proj", "mlp.dense_4h_to_h", "hidden inner", "row"),
        *norm("transformer.ln_f", "transformer.final_layernorm"),
        Copy("lm_head.weight", "mixins.gpt2-final.lm_head.weight", "vocab hidden", when="not tied"),
        Tied("transformer.wte.weight", "mixins.gpt2-final.lm_head.weight", "vocab hidden", "lm_head.weight", when="tied"),
        Drop(HF + "attn.bias"),
        Drop(HF + "attn.masked_bias"),
    )

    def sizes(self, config, args):
        sizes = super().sizes(config, args)
        return sizes | {"inner": config.count("n_inner", 4 * sizes["hidden"])}

    def args(self, config):
        return super().args(config) | {"inner_hidden_size": config.count("n_inner", 4 * config["n_embd"])}

    def config(self, args):
        four = 4 * args.count("hidden_size")
        inner = args.count("inner_hidden_size", four)
        return super().config(args) | {"n_inner": None if inner == four else inner, "activation_function": "gelu_new"}


FAMILIES = (GPT2(),)
