"""Small models of transformers with every parameter drawn at random, saved and changed; and SAT on a CPU to hold them to."""

import json
import os
import re
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from safetensors.torch import save_file

from liger_aot.convert import ConvertError
from liger_aot.convert._verify import apply_rotary
from liger_aot.convert._verify import drop_stale_groups
from liger_aot.convert.families import FAMILIES

from references import Frequencies
from references import HubChatGLM
from references import HubCogVLM

needs_sat = pytest.mark.skipif(
    not any((Path(path) / "sat/model/official").is_dir() for path in sys.path),
    reason="SwissArmyTransformer is not installed: pip install --no-deps SwissArmyTransformer==0.4.12",
)
FILE = "1/mp_rank_00_model_states.pt"
TOKENS, BATCH = 19, 2
NORM = re.compile(r"(norm|ln_\w|LayerNorm)\d?\.weight$")
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
OTHERS = {"num_key_value_heads": 4, "vocab_size": 1024, "rms_norm_eps": 1e-5}
GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 128,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "layer_norm_epsilon": 1e-6,
}
MHA = {key: SMALL[key] for key in SMALL if key != "num_key_value_heads"}
BERT = MHA | {"layer_norm_eps": 1e-12}
ROBERTA = BERT | {"type_vocab_size": 1, "max_position_embeddings": 66}
# Gate and up are one matrix in HF, two in SAT: at this width a processor multiplies both by the same blocks.
GLM = SMALL | {"intermediate_size": 128, "head_dim": 16, "attention_bias": True, "pad_token_id": 0, "eos_token_id": 1}
VIT = {
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
MIXTRAL = SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
CHATGLM = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "position_encoding_2d": True,
    "num_layers": 2,
    "hidden_size": 64,
    "inner_hidden_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_sequence_length": 64,
    "layernorm_epsilon": 1e-5,
    "bos_token_id": 124,
    "eos_token_id": 125,
    "mask_token_id": 126,
    "gmask_token_id": 127,
    "pad_token_id": 3,
}
COGVLM = MHA | {
    "architectures": ["CogVLMForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vision_config": {
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "num_positions": 17,
        "in_channels": 3,
        "patch_size": 4,
        "image_size": 16,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "dropout_prob": 0.0,
    },
}
for own in ("cogvlm", "cogvlm2"):  # in SAT's code the tower is 1792 wide; small models have small ones
    FAMILIES[own].width = COGVLM["vision_config"]["hidden_size"]
# name: (model class, configuration). More than one of a kind where SAT's format differs.
MODELS = {
    "llama": ("LlamaForCausalLM", SMALL),
    "llama-mha": ("LlamaForCausalLM", SMALL | OTHERS),
    "llama-mqa": ("LlamaForCausalLM", SMALL | {"num_key_value_heads": 1}),
    "llama-tied": ("LlamaForCausalLM", SMALL | {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", SMALL | {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", SMALL | {"use_sliding_window": False}),
    "qwen2-tied": ("Qwen2ForCausalLM", SMALL | {"use_sliding_window": False, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False, "n_inner": 96, "vocab_size": 1024}),
    "bert": ("BertForMaskedLM", BERT),
    "bert-untied": ("BertForMaskedLM", BERT | {"tie_word_embeddings": False, "vocab_size": 1024}),
    "roberta": ("RobertaForMaskedLM", ROBERTA),
    "roberta-untied": ("RobertaForMaskedLM", ROBERTA | {"tie_word_embeddings": False}),
    "glm": ("GlmForCausalLM", GLM),
    "glm-base": (
        "GlmForCausalLM",
        GLM | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
    ),
    "chatglm2": ("GlmForCausalLM", GLM),
    "chatglm3": ("GlmForCausalLM", GLM | {"num_key_value_heads": 4}),
    "mixtral": ("MixtralForCausalLM", MIXTRAL),
    "vit": ("ViTForImageClassification", VIT),
    "chatglm-6b": (HubChatGLM, CHATGLM),
    "cogvlm": (HubCogVLM, COGVLM),
    "cogvlm2": (HubCogVLM, COGVLM | {"num_multi_query_heads": 2}),
}
OWN_CODE = {"chatglm2", "chatglm3", "chatglm-6b", "cogvlm", "cogvlm2"}  # which transformers does not have
# Of each, what HF holds and nobody computes with: transformers takes the decoder's bias where it is not tied.
IDLE = {"bert-untied": {"cls.predictions.bias"}, "roberta-untied": {"lm_head.bias"}}
# SAT's classes for them; where a family cannot be seen from the configuration, it is named.
FAMILY = {"glm": "glm", "glm-base": "glm", "chatglm2": "chatglm2", "chatglm3": "chatglm3"}
# The names and the configuration of code that comes with the weights, for what transformers computes under names of its own.
REMOTE = {
    r"^model\.embed_tokens": "transformer.embedding.word_embeddings",
    r"^model\.norm": "transformer.encoder.final_layernorm",
    r"^lm_head": "transformer.output_layer",
    r"^model\.layers": "transformer.encoder.layers",
    r"self_attn\.o_proj": "self_attention.dense",
    r"mlp\.gate_up_proj": "mlp.dense_h_to_4h",
    r"mlp\.down_proj": "mlp.dense_4h_to_h",
}


def build(name, dtype=torch.float32, **over):
    """In evaluation, with SAT's way of attention, and no parameter at a value that hides a mistake."""
    cls, config = MODELS[name]
    torch.manual_seed(0)
    if isinstance(cls, str):
        model_class = getattr(transformers, cls)
        model = model_class(model_class.config_class(**{**config, **over})).to(dtype).eval()
    else:
        model = cls({**config, **over}).to(dtype).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(0, 0.15)
            if NORM.search(key):
                parameter.add_(1)
        for module in model.modules():
            if isinstance(module, Frequencies):
                module.inv_freq = module.exact()
        if name.startswith("roberta"):  # SAT has no place for the type's row
            model.roberta.embeddings.token_type_embeddings.weight.zero_()
    return model


def save(folder, name="llama", dtype=torch.float32, **over):
    model = build(name, dtype, **over)
    if name in ("chatglm2", "chatglm3"):
        save_remote(folder, model)
    elif not isinstance(MODELS[name][0], str):
        write(folder, model.state_dict(), model.config)
    else:
        model.save_pretrained(folder)
    return model


def write(folder, state, config):
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def save_remote(folder, model):
    state, config = model.state_dict(), model.config
    for i in range(config.num_hidden_layers):
        for p in ("weight", "bias"):
            own = [state.pop(f"model.layers.{i}.self_attn.{x}_proj.{p}") for x in "qkv"]
            state[f"model.layers.{i}.self_attention.query_key_value.{p}"] = torch.cat(own)
    for pattern, text in REMOTE.items():
        state = {re.sub(pattern, text, key): tensor for key, tensor in state.items()}
    state["transformer.rotary_pos_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0, 8, 2).float() / 8)
    entries = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.head_dim,
        "multi_query_attention": True,
        "multi_query_group_num": config.num_key_value_heads,
        "padded_vocab_size": config.vocab_size,
        "seq_length": config.max_position_embeddings,
        "layernorm_epsilon": config.rms_norm_eps,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_residual_connection_post_layernorm": False,
        "original_rope": True,
        "post_layer_norm": True,
        "rmsnorm": True,
        "pad_token_id": 0,
    }
    write(folder, state, entries)


def tensors(folder):
    """Of every safetensors file, name to tensor."""
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def identical(ours, theirs):
    """Of two dicts of tensors, the names of those that are not the same in every bit."""
    odd = sorted(ours.keys() ^ theirs.keys())
    return odd + [key for key in sorted(ours.keys() & theirs.keys()) if not same_bits(ours[key], theirs[key])]


def same_bits(a, b):
    raw = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b)]
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(*raw)


def copy(source, target):
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())
    return target


def edit(path, drop=(), **change):
    entries = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in entries.items() if key not in drop}))


def state(folder):
    return torch.load(folder / FILE, weights_only=True)["module"]


def put(folder, **change):
    torch.save({"module": OrderedDict(state(folder) | change)}, folder / FILE)


def put_hf(folder, change, drop=()):
    kept = {key: tensor for key, tensor in (tensors(folder) | change).items() if key not in drop}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def refused(convert, source, *texts, **options):
    """The message has every text, and nothing is there afterwards that was not before."""
    target = source.parent / "out"
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(ConvertError) as raised:
        convert(source, target, **options)
    for text in texts:
        assert text in str(raised.value), str(raised.value)
    assert sorted(source.parent.rglob("*")) == before
    return str(raised.value)


def load_sat(folder):
    """SAT's own loader, from the configuration we wrote."""
    os.environ.setdefault("SAT_LOGLEVEL", "ERROR")
    name = "sat.model.position_embedding.triton_rotary"
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].apply_rotary = apply_rotary
    import sat.model

    drop_stale_groups()
    model, _ = sat.model.AutoModel.from_pretrained(str(folder))
    return model.eval()


def run_hf(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def answer(ids):
    """ChatGLM-6B's two positions, of a text of which the last 7 tokens are the answer."""
    length = ids.shape[1]
    first = torch.arange(length).clamp(max=length - 7)
    second = (torch.arange(length) - (length - 8)).clamp(min=0)
    return torch.stack([first, second])[None].expand(len(ids), -1, -1)


def with_image(config, ids):
    """What CogVLM's models take beside the tokens: a picture, behind the first token, and which token is what."""
    seen, two = config["vision_config"], "num_multi_query_heads" in config
    patches = (seen["num_positions"] - 1) // (4 if two else 1)
    in_image = torch.zeros_like(ids, dtype=torch.bool)
    in_image[:, 1 : patches + 3] = True
    by_expert = in_image.clone()
    by_expert[:, patches + 2] = False  # the mark of the end is text
    steps = torch.ones_like(ids)
    steps[:, 0] = 0
    steps[:, 3 : patches + 2] = 0  # all patches share a position
    image = torch.randn(len(ids), seen["in_channels"], seen["image_size"], seen["image_size"])
    return {"positions": steps.cumsum(-1), "image": image, "in_image": in_image, "by_expert": by_expert}


def run_sat(model, ids, causal=True, **more):
    length = ids.shape[1]
    mask = torch.ones(1, 1, length, length)
    positions = torch.arange(length)[None].expand(len(ids), -1)
    with torch.no_grad():
        return model(ids, positions, mask.tril() if causal else mask, **more)[0]


def tokens(vocabulary):
    torch.manual_seed(1)
    return torch.randint(0, vocabulary, (BATCH, TOKENS))
