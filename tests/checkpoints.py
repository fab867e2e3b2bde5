"""Small models of transformers with every parameter drawn at random, saved; and SAT on a CPU to hold them to."""

import os
import sys
import types

import torch
import transformers

TOKENS, BATCH = 19, 2
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
# name: (model class, configuration). More than one of a kind where SAT's format differs.
MODELS = {
    "llama": ("LlamaForCausalLM", SMALL),
    "llama-mha": ("LlamaForCausalLM", SMALL | OTHERS),
    "llama-mqa": ("LlamaForCausalLM", SMALL | {"num_key_value_heads": 1}),
    "llama-tied": ("LlamaForCausalLM", SMALL | {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", SMALL | {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", SMALL | {"use_sliding_window": False}),
    "qwen2-tied": ("Qwen2ForCausalLM", SMALL | {"use_sliding_window": False, "tie_word_embeddings": True}),
}


def build(name, dtype=torch.float32, **over):
    """In evaluation, with SAT's way of attention, and no parameter at a value that hides a mistake."""
    cls, config = MODELS[name]
    model_class = getattr(transformers, cls)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**config, **over})).to(dtype).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(0, 0.15)
            if "norm" in key.lower() and key.endswith("weight"):
                parameter.add_(1)
    return model


def save(folder, name="llama", dtype=torch.float32, **over):
    model = build(name, dtype, **over)
    model.save_pretrained(folder)
    return model


def tensors(folder):
    """Of every safetensors file, name to tensor."""
    from safetensors.torch import load_file

    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def identical(ours, theirs):
    """Of two dicts of tensors, the names of those that are not the same in every bit."""
    odd = sorted(ours.keys() ^ theirs.keys())
    return odd + [key for key in sorted(ours.keys() & theirs.keys()) if not same_bits(ours[key], theirs[key])]


def same_bits(a, b):
    raw = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b)]
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(*raw)


def rotary(x, cos, sin, position_ids, interleaved=False, inplace=False, **unused):
    """What SAT's Triton kernel computes, of x [batch, heads, length, dim] in place of it: the kernel asks for a GPU."""
    width = cos.shape[1] * 2
    c, s = cos[position_ids][:, None], sin[position_ids][:, None]
    first, second = (x[..., 0:width:2], x[..., 1:width:2]) if interleaved else x[..., :width].chunk(2, -1)
    turned = first * c - second * s, first * s + second * c
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    out = x if inplace else x.clone()
    out[..., :width] = joined
    return out


def load_sat(folder):
    """SAT's own loader, from the configuration we wrote."""
    os.environ.setdefault("SAT_LOGLEVEL", "ERROR")
    name = "sat.model.position_embedding.triton_rotary"
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].apply_rotary = rotary
    import sat.model

    model, _ = sat.model.AutoModel.from_pretrained(str(folder))
    return model.eval()


def run_hf(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def run_sat(model, ids, causal=True, **more):
    length = ids.shape[1]
    mask = torch.ones(1, 1, length, length)
    positions = torch.arange(length)[None].expand(len(ids), -1)
    with torch.no_grad():
        return model(ids, positions, mask.tril() if causal else mask, **more)[0]


def tokens(vocabulary):
    torch.manual_seed(1)
    return torch.randint(0, vocabulary, (BATCH, TOKENS))
