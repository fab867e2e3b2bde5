"""BERT and RoBERTa: HF's BertForMaskedLM and RobertaForMaskedLM, SAT's BertModel and RobertaModel.

Both normalise behind each block. SAT counts a layer from the norm that ends the one before: HF's last norm of layer i is SAT's
first of layer i + 1.
"""

from typing import ClassVar

import torch

from .._family import Family
from .._rules import Alias
from .._rules import Copy
from .._rules import Drop
from .._rules import Stack
from .._rules import Tied
from .._rules import Zeros
from .._rules import linear
from .._rules import norm

SAT, HEAD = "transformer.layers.{i}.", "mixins.bert-final.lm_head."
TOKENS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # RoBERTa's, in transformers
NO_POOLER = "SAT's class has no pooler"
NO_NEXT = "SAT's class does not predict the next sentence"


def encoder(root):
    hf = root + "encoder.layer.{i}."
    own = [f"{hf}attention.self.{x}." for x in ("query", "key", "value")]
    return (
        Copy(root + "embeddings.word_embeddings.weight", "transformer.word_embeddings.weight", "vocab hidden", "vocab"),
        Copy(root + "embeddings.position_embeddings.weight", "transformer.position_embeddings.weight", "positions hidden"),
        *norm(root + "embeddings.LayerNorm", "transformer.layers.0.input_layernorm"),
        Stack([x + "weight" for x in own], SAT + "attention.query_key_value.weight", ["hidden hidden"] * 3, "column"),
        Stack([x + "bias" for x in own], SAT + "attention.query_key_value.bias", ["hidden"] * 3, "column"),
        *linear(hf + "attention.output.dense", SAT + "attention.dense", "hidden hidden", "row"),
        *norm(hf + "attention.output.LayerNorm", SAT + "post_attention_layernorm"),
        *linear(hf + "intermediate.dense", SAT + "mlp.dense_h_to_4h", "inner hidden", "column"),
        *linear(hf + "output.dense", SAT + "mlp.dense_4h_to_h", "hidden inner", "row"),
        *norm(root + "encoder.layer.{before}.output.LayerNorm", "transformer.layers.{before+1}.input_layernorm"),
        *norm(root + "encoder.layer.{last}.output.LayerNorm", "transformer.final_layernorm"),
        Drop(root + "embeddings.position_ids"),
    )


def head(dense, layer_norm, bias, weight, root):
    """The masked language model's; its last matrix is the embedding. transformers ties its bias together with it."""
    words, own = root + "embeddings.word_embeddings.weight", weight.removesuffix("weight") + "bias"
    return (
        *linear(dense, HEAD + "dense", "hidden hidden"),
        *norm(layer_norm, HEAD + "layer_norm"),
        Copy(bias, HEAD + "decoder.bias", "vocab", when="tied"),
        Alias(own, bias, "vocab", when="tied"),
        Copy(own, HEAD + "decoder.bias", "vocab", when="not tied"),
        Drop(bias, "transformers computes with the decoder's, where the two are not tied", when="not tied"),
        Copy(weight, HEAD + "decoder.weight", "vocab hidden", when="not tied"),
        Tied(words, HEAD + "decoder.weight", "vocab hidden", weight, when="tied"),
    )


class Bert(Family):
    name = "bert"
    causal = False
    title = "BERT"
    model_types = ("bert",)
    model_classes = ("BertModel",)
    architecture = "BertForMaskedLM"
    prefix = "bert."
    old_names: ClassVar[dict] = {f"LayerNorm.{old}": f"LayerNorm.{new}" for old, new in (("gamma", "weight"), ("beta", "bias"))}
    epsilon = ("layer_norm_eps", 1e-12)
    order = "post"
    tied = True
    hf_defaults: ClassVar[dict] = {"bert": {"pad_token_id": 0}}
    hf_accepts: ClassVar[dict] = {
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute", None),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    }
    rules = (
        *encoder("bert."),
        Copy("bert.embeddings.token_type_embeddings.weight", "mixins.bert-type.type_embeddings.weight", "types hidden"),
        *head(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.bias",
            "cls.predictions.decoder.weight",
            "bert.",
        ),
        *(Drop(f"bert.pooler.dense.{p}", NO_POOLER) for p in ("weight", "bias")),
        *(Drop(f"cls.seq_relationship.{p}", NO_NEXT) for p in ("weight", "bias")),
    )

    def prepare_sat(self, model, args):
        """SAT's head has an epsilon of its own, 1e-5."""
        model.mixins["bert-final"].lm_head.layer_norm.eps = args.number("layernorm_epsilon", 1e-5)

    def sat_inputs(self, inputs):
        return super().sat_inputs(inputs)[0], {"token_type_ids": torch.zeros_like(inputs["input_ids"])}

    def sizes(self, config, args):
        sizes = super().sizes(config, args)
        return sizes | {
            "types": config.count("type_vocab_size"),
            "before": sizes["i"][:-1],
            "last": sizes["i"][-1:],
        }

    def args(self, config):
        return super().args(config) | {"num_types": config.count("type_vocab_size")}

    def config(self, args):
        return super().config(args) | {"type_vocab_size": args.count("num_types", 2), "hidden_act": "gelu"}


class Roberta(Bert):
    name = "roberta"
    title = "RoBERTa"
    model_types = ("roberta",)
    model_classes = ("RobertaModel",)
    architecture = "RobertaForMaskedLM"
    prefix = "roberta."
    hf_defaults: ClassVar[dict] = {"roberta": TOKENS}
    # Positions are counted from behind pad_token_id.
    hf_accepts: ClassVar[dict] = Bert.hf_accepts | {"pad_token_id": (1,)}
    rules = (
        *encoder("roberta."),
        Zeros(
            "roberta.embeddings.token_type_embeddings.weight",
            "types hidden",
            "add it to every row of roberta.embeddings.position_embeddings.weight and set it to zero, which computes the same",
        ),
        *head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder.weight", "roberta."),
        *(Drop(f"roberta.pooler.dense.{p}", NO_POOLER) for p in ("weight", "bias")),
    )

    def check_hf(self, config, problems):
        super().check_hf(config, problems)
        if config.count("type_vocab_size") != 1:
            problems.add(f"{config.path}: type_vocab_size is {config['type_vocab_size']}; SAT's RobertaModel has 1 alone")

    def sat_inputs(self, inputs):
        """Positions are counted from behind that of padding, 1."""
        ids, places, mask = super().sat_inputs(inputs)[0]
        return (ids, places + 2, mask), {}

    def config(self, args):
        return TOKENS | super().config(args) | {"type_vocab_size": 1}


FAMILIES = (Bert(), Roberta())
