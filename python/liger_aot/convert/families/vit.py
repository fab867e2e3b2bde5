"""ViT: HF's ViTForImageClassification and SAT's ViTModel, whose class token is its vocabulary."""

from typing import ClassVar

import torch

from .._family import NAMES
from .._family import Family
from .._rules import Stack
from .._rules import View
from .._rules import linear
from .._rules import norm

HF, SAT = "vit.encoder.layer.{i}.", "transformer.layers.{i}."
OWN = [HF + f"attention.attention.{x}." for x in ("query", "key", "value")]


class ViT(Family):
    name = "vit"
    causal = False
    sees = True
    title = "ViT for image classification"
    model_types = ("vit",)
    model_classes = ("ViTModel",)
    architecture = "ViTForImageClassification"
    prefix = "vit."
    names: ClassVar[dict] = {
        ours: NAMES[ours] for ours in ("num_layers", "hidden_size", "num_attention_heads", "inner_hidden_size")
    }
    epsilon = ("layer_norm_eps", 1e-12)
    hf_accepts: ClassVar[dict] = {"hidden_act": ("gelu",), "qkv_bias": (True,)}
    rules = (
        View("vit.embeddings.cls_token", "transformer.word_embeddings.weight", "1 1 hidden", "1 hidden"),
        View(
            "vit.embeddings.position_embeddings", "transformer.position_embeddings.weight", "1 places hidden", "places hidden"
        ),
        *(
            View(f"vit.embeddings.patch_embeddings.projection.{p}", f"mixins.patch_embedding.proj.{p}", dims, dims)
            for p, dims in (("weight", "hidden channels patch patch"), ("bias", "hidden"))
        ),
        *norm(HF + "layernorm_before", SAT + "input_layernorm"),
        Stack([x + "weight" for x in OWN], SAT + "attention.query_key_value.weight", ["hidden hidden"] * 3, "column"),
        Stack([x + "bias" for x in OWN], SAT + "attention.query_key_value.bias", ["hidden"] * 3, "column"),
        *linear(HF + "attention.output.dense", SAT + "attention.dense", "hidden hidden", "row"),
        *norm(HF + "layernorm_after", SAT + "post_attention_layernorm"),
        *linear(HF + "intermediate.dense", SAT + "mlp.dense_h_to_4h", "inner hidden", "column"),
        *linear(HF + "output.dense", SAT + "mlp.dense_4h_to_h", "hidden inner", "row"),
        *norm("vit.layernorm", "transformer.final_layernorm"),
        *linear("classifier", "mixins.cls.classifier", "classes hidden"),
    )

    def sat_inputs(self, inputs):
        """A class token, and positions that SAT's model only asks to be there."""
        image = inputs["pixel_values"]
        token = torch.zeros(len(image), 1, dtype=torch.long, device=image.device)
        return (token, token, torch.ones(1, 1, 1, 1, device=image.device)), {"image": image}

    def sizes(self, config, args):
        return super().sizes(config, args) | {
            "channels": config.count("num_channels", 3),
            "patch": config.count("patch_size"),
            "places": (config.count("image_size") // config["patch_size"]) ** 2 + 1,
            "classes": classes(config),
        }

    def args(self, config):
        return super().args(config) | {
            "tokenizer_type": "fake",
            "vocab_size": 1,
            "max_sequence_length": (config.count("image_size") // config.count("patch_size")) ** 2 + 1,
            "image_size": [config["image_size"]] * 2,
            "patch_size": config["patch_size"],
            "pre_len": 1,
            "post_len": 0,
            "in_channels": config.count("num_channels", 3),
            "num_classes": classes(config),
        }

    def check_hf(self, config, problems):
        super().check_hf(config, problems)
        if config.get("id2label") and config.count("num_labels", classes(config)) != classes(config):
            named, count = classes(config), config["num_labels"]
            problems.add(f"{config.path}: id2label names {named} classes, num_labels is {count}; they must be as many")

    def check_sat(self, args, problems):
        super().check_sat(args, problems)
        own = (args.get("pre_len", 1), args.get("post_len", 0), args["vocab_size"])
        if own != (1, 0, 1):
            problems.add(
                f"{args.path}: pre_len, post_len and vocab_size are {own}; HF's ViT has (1, 0, 1), a class token alone"
            )

    def config(self, args):
        return super().config(args) | {
            "num_labels": args.count("num_classes", most=10**6),
            "image_size": args.square("image_size"),
            "patch_size": args.count("patch_size"),
            "num_channels": args.count("in_channels", 3),
            "hidden_act": "gelu",
            "qkv_bias": True,
        }


def classes(config):
    """transformers writes names, or nothing where there are two."""
    return len(config.section("id2label")) if config.get("id2label") else config.count("num_labels", 2)


FAMILIES = (ViT(),)
