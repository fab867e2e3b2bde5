"""Checkpoints of transformers to SAT's format and back, without SAT installed: names, bytes, files, and what is refused."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from liger_aot.__main__ import main
from liger_aot.convert import ConvertError
from liger_aot.convert import hf_to_sat
from liger_aot.convert import sat_to_hf
from liger_aot.convert._map import document
from liger_aot.convert._rules import Frequencies
from liger_aot.convert._rules import Tied
from liger_aot.convert._rules import expand
from liger_aot.convert._settings import Settings
from liger_aot.convert.families import FAMILIES

from checkpoints import FAMILY
from checkpoints import MODELS
from checkpoints import identical
from checkpoints import save
from checkpoints import tensors

OWN_CODE = {"chatglm2", "chatglm3", "chatglm-6b", "cogvlm", "cogvlm2"}  # which transformers does not have
FILE = "1/mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save(folder / "hf")
    hf_to_sat(folder / "hf", folder / "sat")
    return folder


@pytest.fixture
def hf(llama, tmp_path):
    return copy(llama / "hf", tmp_path / "hf")


@pytest.fixture
def sat(llama, tmp_path):
    return copy(llama / "sat", tmp_path / "sat")


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
    from safetensors.torch import save_file

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_the_same_in_every_bit(name, dtype, tmp_path):
    save(tmp_path / "hf", name, dtype)
    family = FAMILY.get(name, "auto")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True, family=family)
    (tmp_path / "sat/config.json").unlink()  # the way of a checkpoint that SAT itself wrote
    sat_to_hf(tmp_path / "sat", tmp_path / "back", verify=True, family=family)
    assert identical(tensors(tmp_path / "hf"), tensors(tmp_path / "back")) == []


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OWN_CODE])
def test_configuration_comes_back(name, tmp_path):
    """Whatever transformers computes with, from what SAT's arguments say alone."""
    import transformers

    model = save(tmp_path / "hf", name)
    family = FAMILY.get(name, "auto")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat", family=family)
    (tmp_path / "sat/config.json").unlink()
    sat_to_hf(tmp_path / "sat", tmp_path / "back", family=family)
    again = getattr(transformers, MODELS[name][0]).from_pretrained(tmp_path / "back").eval()
    inputs = (torch.randn(1, 3, 32, 32),) if name == "vit" else (torch.arange(20)[None],)
    assert identical(model.state_dict(), again.state_dict()) == []
    again.load_state_dict(model.state_dict(), assign=True)  # how a convolution is computed depends on where its weights lie
    with torch.no_grad():
        assert torch.equal(model(*inputs).logits, again(*inputs).logits)
    ours, theirs = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("back", "hf"))
    if ours["model_type"] == theirs["model_type"]:
        named = {"transformers_version", "torch_dtype", "rope_theta", "use_cache", "layer_types"}
        assert {key: ours[key] for key in ours.keys() & theirs.keys() - named} == {
            key: theirs[key] for key in ours.keys() & theirs.keys() - named
        }


@pytest.mark.parametrize("name", MODELS)
def test_model_parallel_files_come_back(name, tmp_path):
    save(tmp_path / "hf", name)
    family = FAMILY.get(name, "auto")
    if name == "llama-mqa":
        refused(hf_to_sat, tmp_path / "hf", "kv_heads 1 cannot be divided by 2", mp=2)
        return
    hf_to_sat(tmp_path / "hf", tmp_path / "sat", mp=2, verify=True, family=family)
    assert sorted(path.name for path in (tmp_path / "sat/1").iterdir()) == [
        "mp_rank_00_model_states.pt",
        "mp_rank_01_model_states.pt",
    ]
    sat_to_hf(tmp_path / "sat", tmp_path / "back", verify=True, family=family)
    assert identical(tensors(tmp_path / "hf"), tensors(tmp_path / "back")) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_rules_name_every_tensor_once(name):
    rules = [rule for rule in FAMILIES[name].rules if not rule.when]
    names = [name for rule in rules for name in rule.sat]
    assert len(names) == len(set(names))


def test_vocabulary_below_1000_is_held_by_every_rank(tmp_path):
    for name, rows in {"llama": 128, "llama-mha": 512}.items():
        save(tmp_path / name, name)
        hf_to_sat(tmp_path / name, tmp_path / f"{name}-sat", mp=2)
        assert len(state(tmp_path / f"{name}-sat")["transformer.word_embeddings.weight"]) == rows


def test_files_are_read_by_their_own_libraries(llama, tmp_path):
    from safetensors import safe_open

    sat_to_hf(llama / "sat", tmp_path / "back", max_shard_size="100KB")
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(llama / "hf").values())
    assert len(set(index["weight_map"].values())) > 2
    for key, name in index["weight_map"].items():
        with safe_open(tmp_path / "back" / name, "pt") as file:
            assert key in file.keys()  # noqa: SIM118 (not a dict)
    assert identical(tensors(llama / "hf"), tensors(tmp_path / "back")) == []
    assert state(llama / "sat")["transformer.position_embeddings.inv_freq"].dtype is torch.float32


def test_sharded_sources_are_read(llama, tmp_path):
    sat_to_hf(llama / "sat", tmp_path / "shards", max_shard_size="100KB")
    hf_to_sat(tmp_path / "shards", tmp_path / "sat")
    assert identical(state(llama / "sat"), state(tmp_path / "sat")) == []


def test_dtype_casts_all_but_the_frequencies(llama, tmp_path):
    hf_to_sat(llama / "hf", tmp_path / "sat", dtype="float16", verify=True)
    kinds = {key: tensor.dtype for key, tensor in state(tmp_path / "sat").items()}
    assert kinds.pop("transformer.position_embeddings.inv_freq") is torch.float32
    assert set(kinds.values()) == {torch.float16}


def test_overflow_of_a_cast_is_an_error(hf):
    put_hf(hf, {"model.norm.weight": torch.full((64,), 1e6)})
    refused(hf_to_sat, hf, "transformer.final_layernorm.weight", "float16", dtype="float16")


def test_tokenizer_files_come_through(hf, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "LICENSE", "chat_template.jinja"):
        (hf / name).write_text(f"of {name}")
    report = hf_to_sat(hf, tmp_path / "sat")
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
        assert name in report.files


def test_configuration_of_its_own_comes_through(hf, tmp_path):
    """What SAT's arguments cannot say is kept, and what they do say wins."""
    edit(hf / "config.json", use_cache=False, initializer_range=0.5)
    hf_to_sat(hf, tmp_path / "sat")
    edit(tmp_path / "sat/model_config.json", max_sequence_length=32)
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["use_cache"], config["initializer_range"], config["max_position_embeddings"]) == (False, 0.5, 32)


@pytest.mark.parametrize("moment", ["filling", "closing"])
def test_a_killed_run_leaves_nothing_loadable(llama, tmp_path, moment):
    script = f"""
import os, sys
from liger_aot.convert import hf_to_sat, _convert, _sat
def die(*unused):
    os._exit(9)
if {moment!r} == "filling":
    _convert.carry = die
else:
    os.replace = die
hf_to_sat({str(llama / "hf")!r}, {str(tmp_path / "sat")!r})
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert not (tmp_path / "sat").exists()
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert not (left[0] / "latest").exists()


def test_a_failed_run_leaves_nothing(hf, tmp_path, monkeypatch):
    from liger_aot.convert import _convert

    monkeypatch.setattr(_convert, "carry", lambda *unused: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hf_to_sat(hf, tmp_path / "sat")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_target_with_something_in_it_is_left_alone(hf, tmp_path):
    (tmp_path / "sat").mkdir()
    (tmp_path / "sat/notes").write_text("mine")
    with pytest.raises(ConvertError, match="must not exist, or be an empty folder"):
        hf_to_sat(hf, tmp_path / "sat")
    assert (tmp_path / "sat/notes").read_text() == "mine"
    (tmp_path / "sat/notes").unlink()
    hf_to_sat(hf, tmp_path / "sat")


def test_verification_notices_one_bit(hf, tmp_path, monkeypatch):
    from liger_aot.convert import _convert

    fill = _convert.fill

    def spoil(key, target, pieces):
        fill(key, target, pieces)
        if key == "transformer.layers.1.mlp.dense_4h_to_h.weight":
            target.view(torch.int32)[3, 5] ^= 1

    monkeypatch.setattr(_convert, "fill", spoil)
    refused(hf_to_sat, hf, "verification failed", "model.layers.1.mlp.down_proj.weight differs", verify=True)


# -- bad input: Hugging Face's side


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
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
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
            "lm_head.weight differs from model.embed_tokens.weight, while tie_word_embeddings is true",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_configurations_that_sat_does_not_compute(hf, change, text):
    edit(hf / "config.json", **change)
    refused(hf_to_sat, hf, text)


def test_a_window_as_long_as_the_texts_hides_nothing(hf, tmp_path):
    edit(hf / "config.json", sliding_window=64)
    hf_to_sat(hf, tmp_path / "sat")


def test_keys_of_version_4_are_read(hf, tmp_path):
    edit(hf / "config.json", drop=("rope_parameters", "dtype"), rope_theta=5e5, torch_dtype="float32")
    refused(hf_to_sat, hf, "the rotary base is 500000, LLaMAModel computes with 10000")
    hf_to_sat(hf, tmp_path / "sat", allow_rope_theta=True)
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_missing_entries_of_the_configuration(hf):
    edit(hf / "config.json", drop=("hidden_size",))
    refused(hf_to_sat, hf, "config.json: 'hidden_size' is missing")
    (hf / "config.json").write_text("{")
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


def test_an_index_that_does_not_hold(llama, tmp_path):
    sat_to_hf(llama / "sat", tmp_path / "in", max_shard_size="100KB")
    index = json.loads((tmp_path / "in/model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra"] = "model-00001-of-00004.safetensors"
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.extra"] = names[0]
    edit(tmp_path / "in/model.safetensors.index.json", weight_map=index["weight_map"])
    refused(hf_to_sat, tmp_path / "in", f"puts model.extra into {names[0]}, which does not hold it")
    (tmp_path / "in" / names[1]).unlink()
    refused(hf_to_sat, tmp_path / "in", f"names files that are not there: {names[1]}")


def test_quantised_weights_are_refused(hf):
    put_hf(hf, {"model.norm.weight": torch.zeros(64, dtype=torch.int8), "model.layers.0.mlp.up_proj.qweight": torch.zeros(2)})
    refused(
        hf_to_sat, hf, "model.norm.weight holds int8", "up_proj.qweight of shape [2] in model.safetensors; of a quantised model"
    )


def test_adapters_of_peft_are_refused(hf):
    put_hf(hf, {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)})
    refused(hf_to_sat, hf, "lora_A.weight", "LoRA, which must be merged first")


def test_old_buffers_are_held_to_the_configuration(hf, tmp_path):
    values = 1 / 10000 ** (torch.arange(0, 16, 2).float() / 16)
    put_hf(hf, {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": values.clone() for i in range(2)})
    hf_to_sat(hf, tmp_path / "sat")
    put_hf(hf, {"model.layers.1.self_attn.rotary_emb.inv_freq": 1 / 500000 ** (torch.arange(0, 16, 2).float() / 16)})
    refused(hf_to_sat, hf, "model.layers.1.self_attn.rotary_emb.inv_freq: not the frequencies of rope_theta 10000")


def test_names_of_a_base_model_are_taken(hf, tmp_path, llama):
    from safetensors.torch import save_file

    save_file({key.removeprefix("model."): tensor for key, tensor in tensors(hf).items()}, hf / "model.safetensors")
    assert "'model.'" in str(hf_to_sat(hf, tmp_path / "sat"))
    assert identical(state(llama / "sat"), state(tmp_path / "sat")) == []


# -- bad input: SAT's side


@pytest.mark.parametrize("tag", ["0", "-1", "global_step10", "", "²"])
def test_latest_must_name_an_iteration(sat, tag):
    (sat / "latest").write_text(tag)
    refused(sat_to_hf, sat, "latest: must hold an iteration above 0 or 'release'", repr(tag))


def test_latest_must_be_there_and_name_a_folder(sat, tmp_path):
    (sat / "latest").write_text("7\n")
    refused(sat_to_hf, sat, "names '7', but there is no such folder")
    (sat / "1").rename(sat / "release")
    (sat / "latest").write_text("release\n")
    sat_to_hf(sat, tmp_path / "hf")
    (sat / "latest").unlink()
    refused(sat_to_hf, sat, "there is no file 'latest'")


@pytest.mark.parametrize("key", ["model_class", "num_layers", "hidden_size", "num_attention_heads", "vocab_size"])
def test_arguments_must_be_there(sat, key):
    edit(sat / "model_config.json", drop=(key,))
    refused(sat_to_hf, sat, f"model_config.json: {key!r} is missing")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"layernorm_order": "post"}, "layernorm_order is 'post'; LlamaForCausalLM computes 'pre' alone"),
        ({"use_bias": True}, "use_bias is True"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"num_experts": 4}, "num_experts is 4"),
        ({"hidden_size_per_attention_head": 32}, "hidden_size_per_attention_head is 32"),
        (
            {"num_multi_query_heads": 4},
            "query_key_value.weight is [128, 64] in mp_rank_00_model_states.pt; model_config.json says [192, 64]",
        ),
        ({"num_multi_query_heads": 1}, "model_config.json says [96, 64]: q 64 + kv 16 + kv 16"),
        ({"inner_hidden_size": 96}, "says [96, 64]: inner 96"),
        ({"model_class": "T5Model"}, "no family for 'T5Model'; there are"),
        ({"model_parallel_size": 2}, "mp_rank_01_model_states.pt must be there; 1 found: mp_rank_00"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit(sat, change, text):
    edit(sat / "model_config.json", **change)
    (sat / "config.json").unlink()
    refused(sat_to_hf, sat, text)


def test_names_and_shapes_of_sat_are_all_listed(sat):
    state_ = state(sat)
    state_.pop("transformer.final_layernorm.weight")
    state_["mixins.ptuning.embedding"] = torch.zeros(3)
    state_["mixins.lm.lm_head.weight"] = torch.zeros(100, 64)
    torch.save({"module": state_}, sat / FILE)
    refused(
        sat_to_hf,
        sat,
        "3 problems",
        "missing: transformer.final_layernorm.weight of shape [64], hidden 64",
        "unknown: mixins.ptuning.embedding of shape [3] in mp_rank_00_model_states.pt; prompt tuning",
        "mis-shaped: mixins.lm.lm_head.weight is [100, 64] in mp_rank_00_model_states.pt; model_config.json says [128, 64]",
    )


class Foreign:
    ran = False

    def __reduce__(self):
        return (setattr, (Foreign, "ran", True))


def test_no_pickle_is_executed(sat):
    torch.save({"module": {}, "args": Foreign()}, sat / FILE)
    assert "setattr" in refused(sat_to_hf, sat, "mp_rank_00_model_states.pt: refused, because reading it could run code")
    (sat / FILE).write_bytes(pickle.dumps(Foreign()))
    refused(sat_to_hf, sat, "not a file of torch.save, or cut off")
    assert not Foreign.ran


def test_classes_in_a_pickle_are_named(sat):
    import argparse

    torch.save({"module": state(sat), "args": argparse.Namespace(a=1)}, sat / FILE)
    refused(sat_to_hf, sat, "it names argparse.Namespace")


def test_what_deepspeed_saves_beside_the_weights_is_read(sat, tmp_path):
    import random

    import numpy

    torch.save(
        {
            "module": state(sat),
            "optimizer": None,
            "iteration": 7,
            "ds_config": {"train_batch_size": 1},
            "param_shapes": [OrderedDict(a=torch.Size([2]))],
            "random_rng_state": random.getstate(),
            "np_rng_state": numpy.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
        },
        sat / FILE,
    )
    sat_to_hf(sat, tmp_path / "hf")


def test_files_of_sat_that_cannot_be_read(sat):
    whole = (sat / FILE).read_bytes()
    (sat / FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    refused(sat_to_hf, sat, "mp_rank_00_model_states.pt: a Git LFS pointer")
    (sat / FILE).write_bytes(os.urandom(2000))
    refused(sat_to_hf, sat, "2000 bytes, not a file of torch.save, or cut off")
    (sat / FILE).write_bytes(whole[: len(whole) // 2])
    refused(sat_to_hf, sat, "not a file of torch.save, or cut off")
    torch.save(state_ := {"transformer.final_layernorm.weight": torch.zeros(64)}, sat / FILE)
    refused(sat_to_hf, sat, "must hold a dict with 'module', got transformer.final_layernorm.weight")
    torch.save({"module": state_ | {"x.quant_state": [1, 2]}}, sat / FILE)
    refused(sat_to_hf, sat, "x.quant_state must be a tensor, got a list; a quantised model")
    (sat / FILE).rename(sat / "1/z3_rank_00_model_states.pt")
    refused(sat_to_hf, sat, "holds partitions of ZeRO-3, not tensors")


def test_model_parallel_files_must_match(llama, tmp_path):
    hf_to_sat(llama / "hf", tmp_path / "sat", mp=2)
    second = tmp_path / "sat/1/mp_rank_01_model_states.pt"
    module = torch.load(second, weights_only=True)["module"]
    torch.save({"module": module | {"transformer.final_layernorm.weight": torch.zeros(64)}}, second)
    refused(sat_to_hf, tmp_path / "sat", "transformer.final_layernorm.weight: every rank must hold the same numbers")
    torch.save({"module": module | {"mixins.lm.lm_head.weight": torch.zeros(63, 64)}}, second)
    refused(sat_to_hf, tmp_path / "sat", "mixins.lm.lm_head.weight: the shapes of the ranks differ")
    torch.save({"module": module | {"extra": torch.zeros(63, 64)}}, second)
    refused(sat_to_hf, tmp_path / "sat", "mp_rank_01_model_states.pt: holds other names than rank 0: extra")
    edit(tmp_path / "sat/model_config.json", model_parallel_size=1)
    refused(sat_to_hf, tmp_path / "sat", "model_parallel_size is 1", "2 found: mp_rank_00")
    second.unlink()
    refused(sat_to_hf, tmp_path / "sat", "query_key_value.weight is [64, 64]", "[128, 64]: q 64 + kv 32 + kv 32")


@pytest.mark.parametrize(("change", "mp"), [({}, 3), ({"intermediate_size": 90}, 4), ({"vocab_size": 1030}, 4)], ids=str)
def test_what_cannot_be_divided_is_refused(tmp_path, change, mp):
    save(tmp_path / "hf", "llama-mha", **change)
    refused(hf_to_sat, tmp_path / "hf", f"cannot be divided by {mp}, the number of ranks", mp=mp)


def test_quantised_weights_of_sat_are_refused(sat):
    put(sat, **{"transformer.layers.0.attention.dense.weight": torch.zeros(64, 64, dtype=torch.uint8)})
    refused(sat_to_hf, sat, "transformer.layers.0.attention.dense.weight holds uint8")


def test_a_rotary_base_that_sat_would_lose(tmp_path):
    save(tmp_path / "hf", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    refused(hf_to_sat, tmp_path / "hf", "the rotary base is 500000, LLaMAModel computes with 10000", "--allow-rope-theta")
    report = hf_to_sat(tmp_path / "hf", tmp_path / "sat", allow_rope_theta=True)
    assert "set_rope_theta(model, 500000)" in str(report)
    assert json.loads((tmp_path / "sat/model_config.json").read_text())["rope_theta"] == 5e5
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    edit(tmp_path / "sat/model_config.json", drop=("rope_theta",))  # as SAT itself writes it
    refused(sat_to_hf, tmp_path / "sat", "the rotary base is 500000", "--allow-rope-theta takes the file's")
    sat_to_hf(tmp_path / "sat", tmp_path / "again", allow_rope_theta=True)
    for side in ("back", "again"):
        assert json.loads((tmp_path / side / "config.json").read_text())["rope_theta"] == 5e5


def test_frequencies_rounded_to_16_bits_or_missing_are_read(sat, tmp_path):
    key = "transformer.position_embeddings.inv_freq"
    exact = state(sat)[key]
    for side, rounded in {"half": exact.half(), "bf16": exact.bfloat16(), "was": exact.bfloat16().float()}.items():
        put(sat, **{key: rounded})
        sat_to_hf(sat, tmp_path / side)
    module = state(sat)
    module.pop(key)
    torch.save({"module": module}, sat / FILE)
    assert f"{key} is missing; rope_theta 10000" in str(sat_to_hf(sat, tmp_path / "none"))
    for side in ("half", "bf16", "was", "none"):
        assert json.loads((tmp_path / side / "config.json").read_text())["rope_theta"] == 1e4


def test_frequencies_that_are_none_are_refused(sat):
    key = "transformer.position_embeddings.inv_freq"
    for wrong in (torch.rand(8), torch.ones(7), torch.full((8,), torch.nan)):
        put(sat, **{key: wrong})
        refused(sat_to_hf, sat, f"{key}: [{len(wrong)}]", "no frequencies of a rotary embedding of 16 dimensions")


def test_a_head_that_was_trained_apart_is_written(tmp_path):
    save(tmp_path / "hf", "llama-tied")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    put(tmp_path / "sat", **{"mixins.lm.lm_head.weight": torch.ones(128, 64)})
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(tensors(tmp_path / "back")["lm_head.weight"], torch.ones(128, 64))


def test_a_tied_head_written_twice_is_read(tmp_path):
    save(tmp_path / "hf", "llama-tied")
    put_hf(tmp_path / "hf", {"lm_head.weight": tensors(tmp_path / "hf")["model.embed_tokens.weight"].clone()})
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tensors(tmp_path / "back")


def test_a_tied_head_without_its_embedding_is_listed(tmp_path):
    save(tmp_path / "hf", "llama-tied")
    put_hf(tmp_path / "hf", {"lm_head.weight": torch.zeros(128, 64)}, drop=("model.embed_tokens.weight",))
    refused(
        hf_to_sat, tmp_path / "hf", "1 problem, nothing was written", "missing: model.embed_tokens.weight of shape [128, 64]"
    )


def test_the_layout_of_old_checkpoints_is_read(llama, sat, tmp_path):
    module = state(sat)
    module["mixins.rotary.rotary_emb.inv_freq"] = module.pop("transformer.position_embeddings.inv_freq")
    for i in range(2):
        module[f"mixins.mlp.gate_proj.{i}.weight"] = module.pop(f"transformer.layers.{i}.mlp.dense_h_to_4h_gate.weight")
    torch.save({"module": module}, sat / FILE)
    edit(sat / "model_config.json", drop=("is_gated_mlp", "is_rotary_emb"))
    sat_to_hf(sat, tmp_path / "hf")
    assert identical(tensors(llama / "hf"), tensors(tmp_path / "hf")) == []


# -- LoRA


def adapt(folder, rank=4):
    """Adapters as SAT's LoRA has them, on the fused weight and on one that is not; what the weights are with them, alpha 8."""
    module, merged = state(folder), {}
    for name, parts in {"attention.query_key_value": [64, 32, 32], "attention.dense": [64]}.items():
        name = f"transformer.layers.1.{name}"
        weight = module.pop(f"{name}.weight")
        module[f"{name}.original.weight"] = weight
        deltas = []
        for k, rows in enumerate(parts):
            a, b = torch.randn(rank, weight.shape[1]), torch.randn(rows, rank)
            module |= {f"{name}.matrix_A.{k}": a, f"{name}.matrix_B.{k}": b}
            deltas.append(b @ a)
        merged[f"{name}.weight"] = weight + torch.cat(deltas) * 8 / rank
    torch.save({"module": module}, folder / FILE)
    return merged


def test_adapters_are_refused_or_merged(sat, llama, tmp_path):
    merged = adapt(sat)
    refused(sat_to_hf, sat, "LoRA adapters that are not merged, of 2 weights", "--merge-lora --lora-alpha A")
    refused(sat_to_hf, sat, "needs --lora-alpha", merge_lora=True)
    report = sat_to_hf(sat, tmp_path / "hf", merge_lora=True, lora_alpha=8.0, verify=True)
    assert "LoRA adapters of 2 weights were merged, alpha 8" in str(report)
    assert "SAT would need the adapters' own model" in str(report)
    ours, before = tensors(tmp_path / "hf"), tensors(llama / "hf")
    fused = torch.cat([ours[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"])
    torch.testing.assert_close(fused, merged["transformer.layers.1.attention.query_key_value.weight"], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        ours["model.layers.1.self_attn.o_proj.weight"], merged["transformer.layers.1.attention.dense.weight"], rtol=0, atol=1e-5
    )
    touched = {f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkvo"}
    assert set(identical(ours, before)) == touched


def test_adapters_that_do_not_fit_are_refused(sat):
    adapt(sat)
    key = "transformer.layers.1.attention.query_key_value"
    put(sat, **{f"{key}.matrix_B.2": torch.zeros(31, 4)})
    refused(sat_to_hf, sat, f"{key}: B A of shapes", "do not make up the weight's [128, 64]", merge_lora=True, lora_alpha=1.0)
    put(sat, **{f"{key}.original.weight": torch.zeros(128, 64, dtype=torch.uint8)})
    refused(sat_to_hf, sat, f"{key}.original.weight must be there, in floating point", merge_lora=True, lora_alpha=1.0)


# -- the command


def test_command(llama, tmp_path, capsys):
    assert main(["convert", "hf2sat", str(llama / "hf"), str(tmp_path / "sat"), "--verify", "--dtype", "bfloat16"]) == 0
    captured = capsys.readouterr()
    assert "verified" in captured.out
    assert "100%" in captured.err
    assert main(["convert", "sat2hf", str(tmp_path / "sat"), str(tmp_path / "hf"), "--max-shard-size", "1MB"]) == 0
    assert main(["convert", "map", "llama"]) == 0
    assert "transformer.word_embeddings.weight" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--mp", "0"], ["--mp", "3"], ["--dtype", "float16", "--mp", "100"]], ids=" ".join)
def test_command_says_why_and_returns_2(llama, tmp_path, capsys, arguments):
    assert main(["convert", "hf2sat", str(llama / "hf"), str(tmp_path / "sat"), *arguments]) == 2
    assert capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "text"), [(["--max-shard-size", "big"], "must be like 5GB")], ids=str)
def test_command_checks_its_arguments(llama, tmp_path, capsys, arguments, text):
    assert main(["convert", "sat2hf", str(llama / "sat"), str(tmp_path / "hf"), *arguments]) == 2
    assert text in capsys.readouterr().err


def test_python_arguments_are_checked(llama, tmp_path):
    with pytest.raises(ConvertError, match="dtype must be one of float32, float16, bfloat16, got 'int8'"):
        hf_to_sat(llama / "hf", tmp_path / "sat", dtype="int8")
    with pytest.raises(ConvertError, match=r"family must be auto or one of .*llama.*, got 'lama'"):
        hf_to_sat(llama / "hf", tmp_path / "sat", family="lama")
    with pytest.raises(ConvertError, match="mp must be a whole number from 1 to 99, got True"):
        hf_to_sat(llama / "hf", tmp_path / "sat", mp=True)


def test_without_safetensors_it_says_what_to_install(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConvertError, match=r"needs safetensors: pip install 'liger-aot\[convert\]'"):
        hf_to_sat(llama / "hf", tmp_path / "sat")


def test_neither_sat_nor_transformers_is_imported(llama, tmp_path):
    script = f"""
import sys
from liger_aot.convert import hf_to_sat, sat_to_hf
hf_to_sat({str(llama / "hf")!r}, {str(tmp_path / "sat")!r})
sat_to_hf({str(tmp_path / "sat")!r}, {str(tmp_path / "hf")!r})
assert not sys.modules.keys() & {{"sat", "transformers"}}, sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6, 8e6, 123456.0])
def test_the_base_is_found_in_the_frequencies(theta, dtype):
    from liger_aot.convert._rules import base_of
    from liger_aot.convert._rules import frequencies

    values = frequencies(128, theta).to(dtype)
    assert base_of(values, 128, [1e4, theta]) == theta
    found = base_of(values, 128, [])
    assert found == pytest.approx(theta, rel=0.02 if dtype is not torch.float32 else 1e-4)
    values[5] *= 1.1
    assert base_of(values, 128, [1e4, theta]) is None


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("llama", {}, "sat is not installed"),
        ("llama", {"mp": 2}, "one process cannot run model-parallel files"),
        ("cogvlm", {}, "the code of CogVLM comes with its weights"),
        ("chatglm-6b", {}, "the code of ChatGLM comes with its weights"),
    ],
)
def test_verification_says_what_it_could_not_check(name, options, why, tmp_path, monkeypatch):
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "sat" else find(name))
    save(tmp_path / "hf", name)
    report = str(hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True, **options))
    assert "not verified by running: " in report
    assert why in report
    assert "bit for bit" in report


def test_documentation_has_the_rules():
    """docs/convert.md ends with what `python -m liger_aot convert map` prints."""
    text = (Path(__file__).parent.parent / "docs/convert.md").read_text()
    assert text.endswith(document(FAMILIES.values()) + "\n")
    assert "twelve families" in text
    assert len(FAMILIES) == 12


@pytest.mark.parametrize("name", FAMILIES)
def test_rules_tell_both_sides_shapes(name, tmp_path):
    """What a rule computes has the shapes that it declares, on tensors without contents."""
    config = read_args(name, tmp_path)
    family = FAMILIES[name]
    sizes = family.sizes(config, Settings(family.args(config), "args")) | {"rope_theta": 1e4}
    for item in expand(family.rules, sizes):
        if not item.sat or isinstance(item.rule, Frequencies):
            continue
        on_hf, on_sat = (
            [torch.empty(shape, device="meta") for shape in shapes] for shapes in (item.hf_shapes, item.sat_shapes)
        )
        there = [torch.cat(pieces).shape for pieces in item.to_sat(on_hf)]
        assert tuple(map(tuple, there)) == item.sat_shapes, item
        if not isinstance(item.rule, Tied):
            back = [torch.cat(pieces).shape for pieces in item.to_hf(on_sat)]
            assert tuple(map(tuple, back)) == item.hf_shapes, item


def read_args(name, folder):
    model = name if name in MODELS else "llama"
    save(folder / "hf", model)
    entries = json.loads((folder / "hf/config.json").read_text())
    return Settings(entries, folder / "hf/config.json")


def test_rows_in_halves_are_put_in_pairs(tmp_path):
    """ChatGLM4Model turns the first half of a head against the second, where HF turns neighbours."""
    save(tmp_path / "hf", "glm")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat", family="glm")
    module, order = state(tmp_path / "sat"), [0, 2, 4, 6, 1, 3, 5, 7, *range(8, 16)]
    rows = torch.tensor([head * 16 + row for head in range(6) for row in order] + list(range(96, 128)))
    for i in range(2):
        for p in ("weight", "bias"):
            key = f"transformer.layers.{i}.attention.query_key_value.{p}"
            module[key] = module[key][rows]
        gate, up = f"mixins.mlp.w2.{i}.weight", f"transformer.layers.{i}.mlp.dense_h_to_4h.weight"
        module[gate], module[up] = module[up], module[gate]
    torch.save({"module": module}, tmp_path / "sat" / FILE)
    edit(tmp_path / "sat/model_config.json", model_class="ChatGLM4Model", drop=("base_scale",))
    sat_to_hf(tmp_path / "sat", tmp_path / "back", verify=True)
    assert identical(tensors(tmp_path / "hf"), tensors(tmp_path / "back")) == []


def test_a_family_that_cannot_be_told_must_be_said(tmp_path):
    save(tmp_path / "hf", "chatglm3")
    refused(hf_to_sat, tmp_path / "hf", "may be one of several, say which: --family chatglm2 or chatglm3")


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


def test_a_class_that_was_trained_is_its_family(tmp_path):
    save(tmp_path / "hf", "cogvlm")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    edit(tmp_path / "sat/model_config.json", model_class="FineTuneTrainCogVLMModel")
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    assert identical(tensors(tmp_path / "hf"), tensors(tmp_path / "back")) == []


def test_frequencies_of_every_layer_are_written_for_cogvlm(tmp_path):
    """Its code on the hub has them as persistent buffers: without them transformers leaves memory as it was."""
    save(tmp_path / "hf", "cogvlm2")
    put_hf(tmp_path / "hf", {}, drop=[f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)])
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    for i in range(2):
        found = tensors(tmp_path / "back")[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"]
        assert torch.equal(found, 1 / 500000 ** (torch.arange(0, 16, 2).float() / 16))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "glm", "chatglm3", "vit", "cogvlm2", "mixtral", "chatglm-6b"])
def test_any_configuration_is_converted_or_refused(name, tmp_path):
    """No entry of either configuration, of another type or size, gets further than a ConvertError."""
    save(tmp_path / "hf", name)
    family = FAMILY.get(name, "auto")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat", family=family)
    (tmp_path / "sat/config.json").unlink()
    generator = random.Random(name)
    for side, file, convert in (("hf", "config.json", hf_to_sat), ("sat", "model_config.json", sat_to_hf)):
        path = tmp_path / side / file
        entries = json.loads(path.read_text())
        for key, value in entries.items():
            wrong = generator.choice([None, "x", -1, 0, 1.5, [], {}, True, 10**9, [[1]], {"a": {"b": 1}}])
            path.write_text(json.dumps(entries | {key: wrong}))
            unless_refused(convert, tmp_path / side, tmp_path / "out", family)
            for inner in value if isinstance(value, dict) else ():
                path.write_text(json.dumps(entries | {key: value | {inner: wrong}}))
                unless_refused(convert, tmp_path / side, tmp_path / "out", family)
        path.write_text(json.dumps(entries))


def unless_refused(convert, source, target, family):
    try:
        convert(source, target, family=family)
        shutil.rmtree(target)
    except ConvertError:
        assert not target.exists()


def test_two_sets_of_weights_are_refused(tmp_path):
    source = tmp_path / "hf"
    save(source)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ConvertError, match=r"holds both model\.safetensors and model\.safetensors\.index\.json"):
        hf_to_sat(source, tmp_path / "sat")
    assert not (tmp_path / "sat").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_a_cast_would_lose_is_refused(tmp_path, dtype):
    source = tmp_path / "hf"
    save(source)
    state = {key: tensor.clone() for key, tensor in tensors(source).items()}
    key = next(iter(state))
    state[key].view(-1)[0] = torch.finfo(torch.float32).max
    save_file(state, source / "model.safetensors")
    with pytest.raises(ConvertError, match=f"{key}: does not fit into {dtype}; --dtype"):
        hf_to_sat(source, tmp_path / "sat", dtype=dtype)
    assert not (tmp_path / "sat").exists()


def test_a_carried_configuration_scales_and_quantises_nothing(tmp_path):
    source = tmp_path / "hf"
    save(source)
    hf_to_sat(source, tmp_path / "sat")
    path = tmp_path / "sat" / "config.json"
    carried = json.loads(path.read_text())
    path.write_text(
        json.dumps({**carried, "rope_scaling": {"type": "linear", "factor": 4.0}, "quantization_config": {"bits": 4}})
    )
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert not {"rope_scaling", "quantization_config"} & written.keys()
