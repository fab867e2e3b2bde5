"""What is refused of a Hugging Face checkpoint, and what is read of old ones."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file

from liger_aot.convert import ConvertError
from liger_aot.convert import hf_to_sat
from liger_aot.convert import sat_to_hf

from checkpoints import COGVLM
from checkpoints import FAMILY
from checkpoints import copy
from checkpoints import edit
from checkpoints import identical
from checkpoints import put
from checkpoints import put_hf
from checkpoints import refused
from checkpoints import save
from checkpoints import state
from checkpoints import tensors

pytest_plugins = ["converted"]


def test_everything_that_does_not_fit_is_listed(hf):
    put_hf(
        hf,
        {"model.layers.0.mlp.extra.weight": torch.zeros(2), "model.layers.1.mlp.up_proj.weight": torch.zeros(90, 64)},
        drop=("model.norm.weight", "model.layers.0.self_attn.k_proj.weight"),
    )
    refused(
        hf_to_sat,
        hf,
        "4 problems, nothing was written",
        "missing: model.norm.weight of shape [64], hidden 64",
        "missing: model.layers.0.self_attn.k_proj.weight of shape [32, 64], kv 32 by hidden 64",
        "unknown: model.layers.0.mlp.extra.weight of shape [2] in model.safetensors",
        "mis-shaped: model.layers.1.mlp.up_proj.weight is [90, 64] in model.safetensors; config.json says [88, 64]: inner 88",
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; SAT's LLaMAModel computes 'silu' alone"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"head_dim": 32}, "head_dim 32 times num_attention_heads 4 must be hidden_size 64"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "rope_type is 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"is_causal": False}, "is_causal is False; SAT's LLaMAModel computes True alone"),
        ({"rope_parameters": None, "rope_theta": 10**400}, "'rope_theta' must be a number above zero, got 1000"),
        ({"rope_parameters": None, "rope_theta": -5}, "'rope_theta' must be a number above zero, got -5"),
        ({"rms_norm_eps": 10**400}, "'rms_norm_eps' must be a number above zero, got 1000"),
        ({"_name_or_path": {"a": 1}}, "'_name_or_path' must be a text, got {'a': 1}"),
        ({"eos_token_id": "x"}, "'eos_token_id' must be the number of a token, or a list of them, got 'x'"),
        ({"bos_token_id": [1, None]}, "'bos_token_id' must be the number of a token, or a list of them, got [1, None]"),
        ({"num_key_value_heads": 3}, "'num_attention_heads' 4 must be divisible by 'num_key_value_heads' 3"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types lists 3 layers, num_hidden_layers is 2"),
        ({"sliding_window": 32}, "sliding_window is 32, less than max_position_embeddings 64"),
        ({"num_key_value_heads": 4}, "k_proj.weight is [32, 64] in model.safetensors; config.json says [64, 64]: kv 64"),
        ({"vocab_size": 129}, "model.embed_tokens.weight is [128, 64] in model.safetensors; config.json says [129, 64]"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2.mlp.up_proj.weight"),
        ({"num_hidden_layers": 1}, "unknown: model.layers.1.mlp.up_proj.weight"),
        ({"num_hidden_layers": "2"}, "'num_hidden_layers' must be a whole number above zero, got '2'"),
        ({"num_attention_heads": 5, "head_dim": None}, "'hidden_size' 64 must be divisible by 'num_attention_heads' 5"),
        ({"rms_norm_eps": None}, "'rms_norm_eps' must be a number above zero, got None"),
        ({"model_type": "mamba"}, "no family for 'mamba'; there are"),
        ({"quantization_config": {"bits": 4}}, "has a quantization_config"),
        (
            {"tie_word_embeddings": True},
            "lm_head.weight [128, 64] in model.safetensors differs from model.embed_tokens.weight [128, 64] in model.safe",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_configurations_that_sat_does_not_compute(hf, change, text):
    edit(hf / "config.json", **change)
    refused(hf_to_sat, hf, text)


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("mistral", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; SAT's LLaMAModel computes 'silu' alone"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; SAT's LLaMAModel computes 'silu' alone"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; SAT's MixtralModel computes 'silu' alone"),
        ("glm", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; SAT's ChatGLM3Model computes 'silu' alone"),
        ("cogvlm", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; SAT's CogVLMModel computes 'silu' alone"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu'; SAT's GPT2Model computes 'gelu_new' alone"),
        ("bert", {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; SAT's BertModel computes 'gelu' alone"),
        ("roberta", {"hidden_act": "relu"}, "hidden_act is 'relu'; SAT's RobertaModel computes 'gelu' alone"),
        ("vit", {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; SAT's ViTModel computes 'gelu' alone"),
        ("glm", {"attention_bias": False}, "attention_bias is False; SAT's ChatGLM3Model computes True alone"),
        ("glm", {"partial_rotary_factor": 1.0, "rope_parameters": {"rope_theta": 1e4}}, "partial_rotary_factor is 1.0"),
        ("vit", {"qkv_bias": False}, "qkv_bias is False; SAT's ViTModel computes True alone"),
        ("vit", {"num_labels": 7}, "id2label names 5 classes, num_labels is 7"),
        ("bert", {"is_decoder": True}, "is_decoder is True"),
        ("bert", {"is_causal": True}, "is_causal is True; SAT's BertModel computes False or None alone"),
        ("gpt2", {"is_causal": False}, "is_causal is False; SAT's GPT2Model computes True alone"),
        ("roberta", {"pad_token_id": 0}, "pad_token_id is 0; SAT's RobertaModel computes 1 alone"),
        (
            "cogvlm",
            {"vision_config": COGVLM["vision_config"] | {"hidden_act": "quick_gelu"}},
            "hidden_act is 'quick_gelu'; SAT's",
        ),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("roberta", {"type_vocab_size": 2}, "type_vocab_size is 2; SAT's RobertaModel has 1 alone"),
        ("mistral", {"sliding_window": 32}, "sliding_window is 32, less than max_position_embeddings 64"),
        ("mixtral", {"sliding_window": 32}, "sliding_window is 32, less than max_position_embeddings 64"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "layer_types": None}, "sliding_window is 32, less than"),
        ("mixtral", {"rope_parameters": {"rope_theta": 1e4}}, "the rotary base is 10000, MixtralModel computes with 1000000"),
        ("glm", {"head_dim": 32}, "head_dim 32 times num_attention_heads 4 must be hidden_size 64"),
        ("chatglm-6b", {"position_encoding_2d": False}, "position_encoding_2d is False"),
        ("chatglm2", {"rmsnorm": False}, "rmsnorm is False"),
        ("chatglm2", {"rope_ratio": 500}, "rope_ratio is 500"),
        ("chatglm2", {"multi_query_group_num": 3}, "'num_attention_heads' 4 must be divisible by 'multi_query_group_num' 3"),
        ("cogvlm2", {"num_multi_query_heads": 3}, "'num_attention_heads' 4 must be divisible by 'num_multi_query_heads' 3"),
        (
            "mixtral",
            {"num_local_experts": 50001},
            "'num_hidden_layers' 2 times 'num_local_experts' 50001 must be at most 100000",
        ),
    ],
)
def test_what_other_families_do_not_compute(name, change, text, tmp_path):
    save(tmp_path / "hf", name)
    edit(tmp_path / "hf/config.json", **change)
    refused(hf_to_sat, tmp_path / "hf", text, family=FAMILY.get(name, "auto"))


def test_dtypes_that_become_one_tensor_must_be_one(hf, tmp_path):
    """SAT has q, k and v in one tensor; HF has ChatGLM's gate and up in one."""
    key = "model.layers.0.self_attn.q_proj.weight"
    put_hf(hf, {key: tensors(hf)[key].half()})
    text = f"{key} is float16 in model.safetensors, model.layers.0.self_attn.k_proj.weight is float32 in model.safetensors"
    refused(hf_to_sat, hf, f"{text}, and they become one tensor; --dtype casts them all")
    hf_to_sat(hf, tmp_path / "sat", dtype="float32", verify=True)
    save(tmp_path / "glm", "glm")
    hf_to_sat(tmp_path / "glm", tmp_path / "glm-sat", family="glm")
    key = "mixins.mlp.w2.0.weight"
    put(tmp_path / "glm-sat", **{key: state(tmp_path / "glm-sat")[key].half()})
    refused(sat_to_hf, tmp_path / "glm-sat", f"{key} is float16", "mlp.dense_h_to_4h.weight is float32", "become one tensor")


def test_overflow_of_a_cast_is_an_error(hf):
    put_hf(hf, {"model.norm.weight": torch.full((64,), 1e6)})
    refused(hf_to_sat, hf, "model.safetensors: model.norm.weight does not fit into float16; --dtype", dtype="float16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_a_cast_would_lose_is_refused(tmp_path, dtype):
    source = tmp_path / "hf"
    save(source)
    state = {key: tensor.clone() for key, tensor in tensors(source).items()}
    key = next(iter(state))
    state[key].view(-1)[0] = torch.finfo(torch.float32).max
    save_file(state, source / "model.safetensors")
    with pytest.raises(ConvertError, match=f"model.safetensors: {key} does not fit into {dtype}; --dtype"):
        hf_to_sat(source, tmp_path / "sat", dtype=dtype)
    assert not (tmp_path / "sat").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_cast_makes_zero_is_counted(hf, tmp_path, ranks):
    tensor = torch.full((64,), 1e-8)
    tensor[:3] = torch.tensor([0.0, 1.0, 6e-5])
    put_hf(hf, {"model.norm.weight": tensor})
    there = str(hf_to_sat(hf, tmp_path / "sat", verify=True, mp=ranks))
    cast = str(hf_to_sat(hf, tmp_path / "cast", dtype="float16", verify=True, mp=ranks))
    back = str(sat_to_hf(tmp_path / "sat", tmp_path / "back", dtype="float16", verify=True))
    assert "became zero" not in there
    assert "are bit for bit what was read, all finite" in there
    assert "61 numbers that were not zero became zero in float16" in cast
    assert "61 numbers that were not zero became zero in float16" in back
    for report in (cast, back):
        assert "are bit for bit what was read after the cast to float16, all finite" in report
    assert "became zero" not in str(hf_to_sat(hf, tmp_path / "wide", dtype="bfloat16"))


def test_missing_entries_of_the_configuration(hf):
    edit(hf / "config.json", drop=("hidden_size",))
    refused(hf_to_sat, hf, "config.json: 'hidden_size' is missing")
    (hf / "config.json").write_text("{")
    refused(hf_to_sat, hf, "config.json: not JSON")
    (hf / "config.json").write_text('{"a":' * 100000)
    refused(hf_to_sat, hf, "config.json: not JSON")
    (hf / "config.json").unlink()
    refused(hf_to_sat, hf, "there is no config.json")


def test_files_that_are_missing_or_no_safetensors(hf, llama, tmp_path):
    refused(hf_to_sat, tmp_path / "hf/nowhere", "no such folder")
    (hf / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    refused(hf_to_sat, hf, "model.safetensors: a Git LFS pointer", "git lfs pull")
    (hf / "model.safetensors").write_bytes((llama / "hf/model.safetensors").read_bytes()[:5000])
    refused(hf_to_sat, hf, "model.safetensors: not a safetensors file, or cut off")
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    refused(hf_to_sat, hf, "holds pickles alone (pytorch_model.bin)")
    (hf / "pytorch_model.bin").unlink()
    refused(hf_to_sat, hf, "neither model.safetensors nor model.safetensors.index.json")


def test_two_sets_of_weights_are_refused(tmp_path):
    source = tmp_path / "hf"
    save(source)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ConvertError, match=r"holds both model\.safetensors and model\.safetensors\.index\.json"):
        hf_to_sat(source, tmp_path / "sat")
    assert not (tmp_path / "sat").exists()


def test_an_index_that_does_not_hold(llama, tmp_path):
    sat_to_hf(llama / "sat", tmp_path / "in", max_shard_size="100KB")
    index = json.loads((tmp_path / "in/model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra"] = "model-00001-of-00004.safetensors"
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"] |= {"model.extra": names[0], "model.more": names[0]}
    edit(tmp_path / "in/model.safetensors.index.json", weight_map=index["weight_map"])
    texts = [f"puts model.{key} into {names[0]}, which does not hold it" for key in ("extra", "more")]
    refused(hf_to_sat, tmp_path / "in", "2 problems", *texts)
    (tmp_path / "in" / names[1]).unlink()
    refused(hf_to_sat, tmp_path / "in", f"names files that are not there: {names[1]}")


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ([], "must hold an object, got a list"),
        ({"metadata": {}}, "'weight_map' is missing"),
        ({"weight_map": None}, "'weight_map' must hold an object, got None"),
        ({"weight_map": ["model.safetensors"]}, "'weight_map' must hold an object, got ['model.safetensors']"),
        ({"weight_map": "x"}, "'weight_map' must hold an object, got 'x'"),
        ({"weight_map": {"model.norm.weight": 3}}, "must put model.norm.weight into a file beside it, got 3"),
        ({"weight_map": {"model.norm.weight": None}}, "must put model.norm.weight into a file beside it, got None"),
        ({"weight_map": {"model.norm.weight": "../model.safetensors"}}, "into a file beside it, got '../model.safetensors'"),
        ({"weight_map": {"model.norm.weight": ""}}, "into a file beside it, got ''"),
    ],
    ids=str,
)
def test_an_index_of_a_wrong_type(hf, index, text):
    (hf / "model.safetensors").rename(hf / "model-00001-of-00001.safetensors")
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(hf_to_sat, hf, "model.safetensors.index.json", text)


def test_tensors_that_the_index_does_not_name(llama, tmp_path):
    sat_to_hf(llama / "sat", tmp_path / "in", max_shard_size="100KB")
    index = json.loads((tmp_path / "in/model.safetensors.index.json").read_text())["weight_map"]
    name = index.pop("model.norm.weight")
    edit(tmp_path / "in/model.safetensors.index.json", weight_map=index)
    text = f"{name}: holds model.norm.weight, which model.safetensors.index.json does not put there"
    refused(hf_to_sat, tmp_path / "in", text)


@pytest.mark.parametrize("name", ["qweight", "weight_scale", "weight.absmax"])
def test_quantised_weights_are_refused(hf, name):
    put_hf(hf, {"model.norm.weight": torch.zeros(64, dtype=torch.int8), f"model.layers.0.mlp.up_proj.{name}": torch.zeros(2)})
    text = f"up_proj.{name} of shape [2] in model.safetensors; of a quantised model"
    refused(hf_to_sat, hf, "model.norm.weight holds int8 in model.safetensors", text)


def test_adapters_of_peft_are_refused(hf):
    put_hf(hf, {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)})
    refused(hf_to_sat, hf, "lora_A.weight", "LoRA, which must be merged first")


@pytest.mark.parametrize(("convert", "side"), [(hf_to_sat, "hf"), (sat_to_hf, "sat")])
def test_adapters_beside_the_model_are_refused(llama, tmp_path, convert, side):
    """transformers adds them to the model that it loads from the folder."""
    copy(llama / side, tmp_path / "in")
    (tmp_path / "in/adapter_config.json").write_text("{}")
    refused(convert, tmp_path / "in", "adapter_config.json: LoRA adapters of PEFT lie beside the model; merge them first")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_refused(hf, sat, value):
    """SAT loads it without a word."""
    put_hf(hf, {"model.norm.weight": torch.full((64,), value)})
    refused(hf_to_sat, hf, "model.safetensors: model.norm.weight holds NaN or infinity")
    put(sat, **{"mixins.lm.lm_head.weight": torch.full((128, 64), value)})
    refused(sat_to_hf, sat, "mp_rank_00_model_states.pt: mixins.lm.lm_head.weight holds NaN or infinity")


def test_names_of_a_base_model_are_taken(hf, tmp_path, llama):
    save_file({key.removeprefix("model."): tensor for key, tensor in tensors(hf).items()}, hf / "model.safetensors")
    assert "20 names, old ones or of a base model, were read as today's: " in str(hf_to_sat(hf, tmp_path / "sat"))
    assert identical(state(llama / "sat"), state(tmp_path / "sat")) == []


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_names_of_old_files_are_taken(name, tmp_path):
    """As bert-base-uncased has them on the hub: gamma and beta, and its base model without the prefix."""
    save(tmp_path / "hf", name)
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    kept = tensors(tmp_path / "hf")
    old = {
        re.sub("LayerNorm.weight$", "LayerNorm.gamma", re.sub("LayerNorm.bias$", "LayerNorm.beta", key)): tensor
        for key, tensor in kept.items()
    }
    assert len(old.keys() - kept.keys()) >= 10
    for case, prefix in (("old", ""), ("base", f"{name}.")):
        copy(tmp_path / "hf", tmp_path / case)
        save_file({key.removeprefix(prefix): tensor for key, tensor in old.items()}, tmp_path / case / "model.safetensors")
        report = hf_to_sat(tmp_path / case, tmp_path / f"{case}-sat", verify=True)
        assert "names, old ones or of a base model, were read as today's: " in str(report)
        assert identical(state(tmp_path / "sat"), state(tmp_path / f"{case}-sat")) == []
    key = f"{name}.embeddings.LayerNorm.weight"
    put_hf(tmp_path / "old", {key: kept[key]})
    refused(hf_to_sat, tmp_path / "old", f"unknown: {name}.embeddings.LayerNorm.gamma of shape [64]")


def test_a_row_of_types_is_refused_unless_it_is_zero(tmp_path):
    save(tmp_path / "hf", "roberta")
    key = "roberta.embeddings.token_type_embeddings.weight"
    put_hf(tmp_path / "hf", {key: torch.ones(1, 64)})
    refused(
        hf_to_sat, tmp_path / "hf", f"{key} is not zero", "add it to every row of roberta.embeddings.position_embeddings.weight"
    )


def test_what_has_no_place_in_sat_is_said(tmp_path):
    save(tmp_path / "hf", "bert")
    put_hf(
        tmp_path / "hf",
        {"bert.pooler.dense.weight": torch.ones(64, 64), "bert.embeddings.position_ids": torch.arange(64)[None]},
    )
    assert "left out: bert.pooler.dense.weight; SAT's class has no pooler" in str(hf_to_sat(tmp_path / "hf", tmp_path / "sat"))
