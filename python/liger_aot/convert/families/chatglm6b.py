"""ChatGLM-6B: the names of the code that comes with its weights, and SAT's ChatGLMModel.

HF keeps q, k and v of each head together. SAT did as well until July 2023; its own transform_param.py still copies the weight
as it is, which is wrong since.
"""

from typing import ClassVar

from .._family import NAMES
from .._family import Family
from .._rules import Copy
from .._rules import Frequencies
from .._rules import Heads
from .._rules import linear
from .._rules import norm

HF, SAT = "transformer.layers.{i}.", "transformer.layers.{i}."


class ChatGLM6B(Family):
    name = "chatglm-6b"
    title = "ChatGLM-6B"
    model_types = ("chatglm",)
    model_classes = ("ChatGLMModel",)
    architecture = "ChatGLMForConditionalGeneration"
    foreign = "the code of ChatGLM comes with its weights, and code that comes with weights is not run here"
    prefix = "transformer."
    hf_accepts: ClassVar[dict] = {"position_encoding_2d": (True,), "pre_seq_len": (None,), "quantization_bit": (0, None)}
    names: ClassVar[dict] = {ours: ours for ours in NAMES}
    epsilon = ("layernorm_epsilon", 1e-5)
    order = "post"
    rope_share = 2
    rules = (
        Copy("transformer.word_embeddings.weight", "transformer.word_embeddings.weight", "vocab hidden", "vocab"),
        *norm(HF + "input_layernorm", SAT + "input_layernorm"),
        Heads(
            HF + "attention.query_key_value.weight",
            SAT + "attention.query_key_value.weight",
            "hidden+hidden+hidden hidden",
            "column",
        ),
        Heads(HF + "attention.query_key_value.bias", SAT + "attention.query_key_value.bias", "hidden+hidden+hidden", "column"),
        *linear(HF + "attention.dense", SAT + "attention.dense", "hidden hidden", "row"),
        *norm(HF + "post_attention_layernorm", SAT + "post_attention_layernorm"),
        *linear(HF + "mlp.dense_h_to_4h", SAT + "mlp.dense_h_to_4h", "inner hidden", "column"),
        *linear(HF + "mlp.dense_4h_to_h", SAT + "mlp.dense_4h_to_h", "hidden inner", "row"),
        *norm("transformer.final_layernorm", "transformer.final_layernorm"),
        Copy("lm_head.weight", "mixins.chatglm-final.lm_head.weight", "vocab hidden", "column"),
        Frequencies(HF + "attention.rotary_emb.inv_freq", "mixins.chatglm-attn.rotary_emb.inv_freq", write=True),
    )

    def claims_hf(self, config):
        return super().claims_hf(config) and "inner_hidden_size" in config

    def theta(self, config):
        return 10000.0

    def set_theta(self, config, theta):
        """Both sides compute with 10000, whatever the files say."""

    def config(self, args):
        return super().config(args) | {"architectures": ["ChatGLMModel"], "position_encoding_2d": True}


FAMILIES = (ChatGLM6B(),)
