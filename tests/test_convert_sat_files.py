"""What is refused of a SAT checkpoint: `latest`, arguments, pickles, names and shapes."""

import json
import os
import pickle
import random
import shutil
import zipfile
from collections import OrderedDict

import pytest
import torch

from liger_aot.convert import ConvertError
from liger_aot.convert import hf_to_sat
from liger_aot.convert import sat_to_hf

from checkpoints import FILE
from checkpoints import copy
from checkpoints import edit
from checkpoints import identical
from checkpoints import put
from checkpoints import refused
from checkpoints import save
from checkpoints import state
from checkpoints import tensors

pytest_plugins = ["converted"]


@pytest.mark.parametrize("tag", ["0", "-1", "global_step10", "", "²", "9" * 5000])
def test_latest_must_name_an_iteration(sat, tag):
    (sat / "latest").write_text(tag)
    refused(sat_to_hf, sat, "latest: must hold an iteration above 0 or 'release'", repr(tag)[:80])


def test_latest_must_be_there_and_name_a_folder(sat, tmp_path):
    (sat / "latest").write_text("7\n")
    refused(sat_to_hf, sat, "names '7', but there is no such folder")
    (sat / "1").rename(sat / "release")
    (sat / "latest").write_text("release\n")
    sat_to_hf(sat, tmp_path / "hf")
    (sat / "latest").unlink()
    refused(sat_to_hf, sat, "there is no file 'latest'")


def test_arguments_must_be_in_a_file(sat):
    (sat / "model_config.json").rename(sat / "args.json")
    refused(sat_to_hf, sat, f"{sat}: there is no model_config.json")


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
        ({"rope_theta": "x"}, "model_config.json: 'rope_theta' must be a number above zero, got 'x'"),
        ({"rope_theta": -5}, "model_config.json: 'rope_theta' must be a number above zero, got -5"),
        ({"eos_token_id": "x"}, "model_config.json: 'eos_token_id' must be the number of a token"),
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
    state_["mixins.0.gate_proj.weight"] = torch.zeros(3)
    state_["transformer.layers.0.attention.dense.weight_scale"] = torch.zeros(3)
    state_["mixins.lm.lm_head.weight"] = torch.zeros(100, 64)
    torch.save({"module": state_}, sat / FILE)
    refused(
        sat_to_hf,
        sat,
        "5 problems",
        "missing: transformer.final_layernorm.weight of shape [64], hidden 64",
        "unknown: mixins.ptuning.embedding of shape [3] in mp_rank_00_model_states.pt; prompt tuning",
        "unknown: mixins.0.gate_proj.weight of shape [3] in mp_rank_00_model_states.pt; mixins were numbered before SAT 0.1",
        "attention.dense.weight_scale of shape [3] in mp_rank_00_model_states.pt; of a quantised model",
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


def test_damaged_files_are_refused_by_name(sat, tmp_path):
    """The pickle inside is a program for torch's interpreter, which fails in any way where bytes of it are others."""
    put(sat)  # by torch.save, whose checksums are right
    with zipfile.ZipFile(sat / FILE) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in parts if name.endswith("/data.pkl"))
    generator, errors = random.Random(0), []
    for number in range(150):
        data = bytearray(parts[name])
        for _ in range(1 + number % 4):
            data[generator.randrange(len(data))] = generator.randrange(256)
        with zipfile.ZipFile(sat / FILE, "w") as archive:
            for other, content in parts.items():
                archive.writestr(other, bytes(data) if other == name else content)
        try:
            sat_to_hf(sat, tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
        except ConvertError as error:
            errors.append(str(error))
    assert len(errors) > 100
    assert [error for error in errors if str(sat) not in error] == []
    assert not (tmp_path / "out").exists()


def test_tensors_that_are_not_dense_are_refused(sat):
    put(sat, **{"transformer.final_layernorm.weight": torch.ones(64).to_sparse()})
    refused(sat_to_hf, sat, "transformer.final_layernorm.weight must be a dense tensor, got one that is sparse_coo on cpu")
    put(sat, **{"transformer.final_layernorm.weight": torch.ones(64, device="meta")})
    refused(sat_to_hf, sat, "transformer.final_layernorm.weight must be a dense tensor, got one that is strided on meta")


def test_parameters_are_read_as_tensors(sat, tmp_path):
    put(sat, **{"transformer.final_layernorm.weight": torch.nn.Parameter(torch.ones(64))})
    sat_to_hf(sat, tmp_path / "hf", verify=True)
    assert tensors(tmp_path / "hf")["model.norm.weight"].tolist() == [1] * 64


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


def test_files_of_sat_that_cannot_be_read(sat, llama, tmp_path):
    import numpy

    whole = (sat / FILE).read_bytes()
    (sat / FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    refused(sat_to_hf, sat, "mp_rank_00_model_states.pt: a Git LFS pointer")
    (sat / FILE).write_bytes(os.urandom(2000))
    refused(sat_to_hf, sat, "2000 bytes, not a file of torch.save, or cut off")
    (sat / FILE).write_bytes(whole[: len(whole) // 2])
    refused(sat_to_hf, sat, "not a file of torch.save, or cut off")
    torch.save({"module": state(copy(llama / "sat", tmp_path / "old"))}, sat / FILE, _use_new_zipfile_serialization=False)
    refused(sat_to_hf, sat, "written as torch did before 1.6; load it and save it once with a newer torch")
    torch.save({"module": {3: torch.zeros(1)}}, sat / FILE)
    refused(sat_to_hf, sat, "mp_rank_00_model_states.pt: names of tensors must be texts, got 3")
    torch.save({"module": {}, "loss": numpy.ones(1)}, sat / FILE)
    text = refused(sat_to_hf, sat, "mp_rank_00_model_states.pt: cannot be read: ", "numpy.dtypes.Float64DType")
    assert "weights_only" not in text
    torch.save(state_ := {"transformer.final_layernorm.weight": torch.zeros(64)}, sat / FILE)
    refused(sat_to_hf, sat, "must hold a dict with 'module', got transformer.final_layernorm.weight")
    torch.save({"module": state_ | {"x.quant_state": [1, 2]}}, sat / FILE)
    refused(sat_to_hf, sat, "x.quant_state must be a tensor, got a list; a quantised model")
    (sat / FILE).rename(sat / "1/z3_rank_00_model_states.pt")
    refused(sat_to_hf, sat, "holds partitions of ZeRO-3, not tensors")


def test_quantised_weights_of_sat_are_refused(sat):
    put(sat, **{"transformer.layers.0.attention.dense.weight": torch.zeros(64, 64, dtype=torch.uint8)})
    refused(sat_to_hf, sat, "transformer.layers.0.attention.dense.weight holds uint8")


def test_the_layout_of_old_checkpoints_is_read(llama, sat, tmp_path):
    module = state(sat)
    module["mixins.rotary.rotary_emb.inv_freq"] = module.pop("transformer.position_embeddings.inv_freq")
    for i in range(2):
        module[f"mixins.mlp.gate_proj.{i}.weight"] = module.pop(f"transformer.layers.{i}.mlp.dense_h_to_4h_gate.weight")
    torch.save({"module": module}, sat / FILE)
    edit(sat / "model_config.json", drop=("is_gated_mlp", "is_rotary_emb"))
    sat_to_hf(sat, tmp_path / "hf")
    assert identical(tensors(llama / "hf"), tensors(tmp_path / "hf")) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"layernorm_order": "pre"}, "eva_args: layernorm_order is 'pre'; CogVLMForCausalLM computes 'post' alone"),
        ({"use_final_layernorm": True}, "eva_args: use_final_layernorm is True; CogVLMForCausalLM computes False alone"),
        ({"post_len": 7}, "eva_args: post_len is 7; CogVLMForCausalLM computes 0 alone"),
    ],
    ids=str,
)
def test_a_tower_that_cogvlm_does_not_compute_is_refused(change, text, tmp_path):
    save(tmp_path / "hf", "cogvlm")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    eva = json.loads((tmp_path / "sat/model_config.json").read_text())["eva_args"]
    edit(tmp_path / "sat/model_config.json", eva_args=eva | change)
    refused(sat_to_hf, tmp_path / "sat", text)
