"""Checkpoints of transformers to SAT's format and back, without SAT installed: names, bytes, files, and what is refused."""

import errno
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from liger_aot.__main__ import main
from liger_aot.convert import ConvertError
from liger_aot.convert import hf_to_sat
from liger_aot.convert import sat_to_hf
from liger_aot.convert._error import Problems
from liger_aot.convert._map import document
from liger_aot.convert._rules import Frequencies
from liger_aot.convert._rules import Tied
from liger_aot.convert._rules import expand
from liger_aot.convert._settings import Settings
from liger_aot.convert.families import FAMILIES

from checkpoints import COGVLM
from checkpoints import FAMILY
from checkpoints import IDLE
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
    assert set(identical(tensors(tmp_path / "hf"), tensors(tmp_path / "back"))) == IDLE.get(name, set())


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
    assert set(identical(model.state_dict(), again.state_dict())) == IDLE.get(name, set())
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
    assert set(identical(tensors(tmp_path / "hf"), tensors(tmp_path / "back"))) == IDLE.get(name, set())


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
    refused(hf_to_sat, hf, "model.safetensors: model.norm.weight does not fit into float16; --dtype", dtype="float16")


def test_tokenizer_files_come_through(hf, tmp_path):
    also = ("tokenizer.spm", "merges.bpe", "additional_chat_templates/tools.jinja")
    (hf / "additional_chat_templates").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "LICENSE", "chat_template.jinja", *also):
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
        *also,
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


@pytest.mark.parametrize(
    ("convert", "moment"), [("hf_to_sat", "carry"), ("hf_to_sat", "compare_logits"), ("sat_to_hf", "compare_logits")]
)
def test_a_killed_run_leaves_nothing_loadable(llama, tmp_path, convert, moment):
    source = llama / convert[:3].strip("_")
    script = f"""
import os, signal
from liger_aot.convert import _convert
_convert.{moment} = lambda *unused: os.kill(os.getpid(), signal.SIGKILL)
_convert.{convert}({str(source)!r}, {str(tmp_path / "out")!r}, verify=True)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    assert list(left.rglob("*.pt" if convert == "hf_to_sat" else "*.safetensors"))
    for back, text in ((sat_to_hf, "latest|model_config"), (hf_to_sat, "config.json|safetensors")):
        with pytest.raises(ConvertError, match=rf"there is no.* '?({text})|there is neither"):
            back(left, tmp_path / "again")
    {"hf_to_sat": hf_to_sat, "sat_to_hf": sat_to_hf}[convert](source, tmp_path / "out")  # is not in the way


def test_a_run_killed_with_an_index_leaves_nothing_loadable(llama, tmp_path):
    """Several shards, whose index is written before the check that the run dies in."""
    script = f"""
import os, signal
from liger_aot.convert import _convert
_convert.compare_back = lambda *unused: os.kill(os.getpid(), signal.SIGKILL)
_convert.sat_to_hf({str(llama / "sat")!r}, {str(tmp_path / "out")!r}, verify=True, max_shard_size="100KB")
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left / "model.safetensors.index.json").is_file()
    with pytest.raises(ConvertError, match=r"there is no config\.json"):
        hf_to_sat(left, tmp_path / "again")


def test_what_another_run_left_is_not_in_the_way(hf, tmp_path):
    """Processes have numbers of others before them."""
    (tmp_path / f".sat.partial-{os.getpid()}").mkdir()
    hf_to_sat(hf, tmp_path / "sat")


def test_what_a_killed_run_left_in_a_folder_is_not_in_the_way(hf, tmp_path):
    """What is inside may also be of a run that still goes on: it is left there."""
    (tmp_path / "sat/.sat.partial-0123abcd/1").mkdir(parents=True)
    hf_to_sat(hf, tmp_path / "sat")
    assert (tmp_path / "sat/.sat.partial-0123abcd/1").is_dir()
    assert (tmp_path / "sat/latest").is_file()


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


@pytest.mark.parametrize("convert", [hf_to_sat, sat_to_hf])
def test_a_folder_that_is_there_stays_and_is_filled(llama, tmp_path, convert, monkeypatch):
    """It may be a mount point, or where somebody's shell is: nothing can be renamed onto it."""
    (tmp_path / "out").mkdir(mode=0o750)
    before = (tmp_path / "out").stat()
    monkeypatch.chdir(tmp_path / "out")
    convert(llama / convert.__name__[:3].strip("_"), ".")
    after = (tmp_path / "out").stat()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert (tmp_path / "out" / ("latest" if convert is hf_to_sat else "config.json")).is_file()
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    {hf_to_sat: sat_to_hf, sat_to_hf: hf_to_sat}[convert](tmp_path / "out", tmp_path / "again")


def test_what_makes_it_a_checkpoint_moves_last(hf, tmp_path, monkeypatch):
    """Into a folder that is there files move one by one; an error in between leaves it as it was."""
    (tmp_path / "sat").mkdir()
    moved, rename = [], Path.rename

    def note(path, target):
        if target.name == "latest" and len(moved) < 9:
            moved.extend([path.name for path in (tmp_path / "sat").iterdir() if not path.name.startswith(".")] + [""] * 9)
            raise OSError("disk on fire")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", note)
    with pytest.raises(OSError, match="disk on fire"):
        hf_to_sat(hf, tmp_path / "sat")
    assert {"1", "model_config.json", "config.json"} <= set(moved)
    assert list((tmp_path / "sat").iterdir()) == []


def test_a_folder_that_somebody_filled_meanwhile_is_left_alone(hf, tmp_path, monkeypatch):
    from liger_aot.convert import _convert

    (tmp_path / "sat").mkdir()
    monkeypatch.setattr(_convert, "carry", lambda *unused: (tmp_path / "sat/theirs").write_text("") and [])
    with pytest.raises(ConvertError, match="sat: was empty, and no longer is"):
        hf_to_sat(hf, tmp_path / "sat")
    assert [path.name for path in (tmp_path / "sat").iterdir()] == ["theirs"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(hf, tmp_path, there):
    (tmp_path / "far").mkdir()
    if there:
        (tmp_path / "far/sat").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far/sat")
    hf_to_sat(hf, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far/sat/latest").is_file()


def test_a_failed_run_takes_back_the_folders_it_made(hf, tmp_path, monkeypatch):
    from liger_aot.convert import _convert

    monkeypatch.setattr(_convert, "carry", lambda *unused: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hf_to_sat(hf, tmp_path / "a/b/sat")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file's blocks cannot be reserved")
def test_room_on_the_disk_is_taken_before_anything_is_copied(hf, sat, tmp_path, monkeypatch):
    """What is copied into a mapped file without blocks ends the process with SIGBUS where the disk is full."""
    from liger_aot.convert._hf import HFWriter
    from liger_aot.convert._sat import SATWriter

    plan = {"a": ((1024, 1024), torch.float32)}
    HFWriter(tmp_path, plan, 10**9)
    SATWriter(tmp_path, [plan])
    for path in (tmp_path / "model.safetensors", tmp_path / FILE):
        assert path.stat().st_blocks * 512 >= path.stat().st_size > 2**22

    def full(*unused):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    for convert, source, name in ((hf_to_sat, hf, FILE), (sat_to_hf, sat, "model.safetensors")):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ConvertError, match=rf"{name}: needs [\d,]+ bytes: No space left on device"):
            convert(source, tmp_path / "out")
        assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_with_too_little_room_is_seen_first(hf, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert re.search(r"out: needs [\d,]{5,} bytes, and .* has 1,000 left", refused(hf_to_sat, hf, "needs"))


@pytest.mark.parametrize("bit", [1, -(2**31)], ids=["last", "sign of zero"])
def test_verification_notices_one_bit(bit, hf, tmp_path, monkeypatch):
    from liger_aot.convert import _convert

    fill, key = _convert.fill, "model.layers.1.mlp.down_proj.weight"
    tensor = tensors(hf)[key]
    tensor[3, 5] = 0
    put_hf(hf, {key: tensor})

    def spoil(target, pieces, origin):
        fill(target, pieces, origin)
        if origin.endswith("model.layers.1.mlp.down_proj.weight"):
            target.view(torch.int32)[3, 5] ^= bit

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


@pytest.mark.parametrize("name", ["llama", "glm"])
@pytest.mark.parametrize(
    ("scaling", "text"),
    [
        ({"rope_type": "linear", "factor": 2.0}, "rope_type is 'linear'"),
        ({"rope_type": "default", "rope_theta": 5e5}, "the rotary base is 500000"),
    ],
)
def test_of_two_sections_the_one_of_transformers_is_read(name, scaling, text, tmp_path):
    """config.json may hold rope_scaling beside rope_parameters, and transformers computes with the former."""
    import transformers

    save(tmp_path / "hf", name)
    edit(tmp_path / "hf/config.json", rope_scaling=scaling)
    read = transformers.AutoConfig.from_pretrained(tmp_path / "hf").rope_parameters
    assert scaling.items() <= read.items()
    if name == "glm" and "rope_theta" in scaling:  # ChatGLM3Model is told its base
        report = hf_to_sat(tmp_path / "hf", tmp_path / "sat", family="glm")
        assert json.loads((tmp_path / "sat/model_config.json").read_text())["base_scale"] == 50, report
    else:
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
    (hf / "config.json").write_text('{"a":' * 100000)
    refused(hf_to_sat, hf, "config.json: not JSON")
    (hf / "config.json").unlink()
    refused(hf_to_sat, hf, "there is no config.json")


def test_names_that_no_file_can_hold_come_through(hf, tmp_path):
    """JSON may hold half of a pair of surrogates, which UTF-8 cannot."""
    name = "\ud800"
    edit(hf / "config.json", _name_or_path=name)
    hf_to_sat(hf, tmp_path / "sat")
    assert json.loads((tmp_path / "sat/model_config.json").read_text())["tokenizer_type"] == name


def test_a_rotary_dimension_that_is_odd_is_refused(tmp_path):
    save(tmp_path / "hf", "glm", hidden_size=72, head_dim=18)
    refused(hf_to_sat, tmp_path / "hf", "their dimension must be even, got 9", family="glm")


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
    index["weight_map"] |= {"model.extra": names[0], "model.more": names[0]}
    edit(tmp_path / "in/model.safetensors.index.json", weight_map=index["weight_map"])
    texts = [f"puts model.{key} into {names[0]}, which does not hold it" for key in ("extra", "more")]
    refused(hf_to_sat, tmp_path / "in", "2 problems", *texts)
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
    assert "20 names, old ones or of a base model, were read as today's: " in str(hf_to_sat(hf, tmp_path / "sat"))
    assert identical(state(llama / "sat"), state(tmp_path / "sat")) == []


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
        ("mixtral", {"rope_parameters": {"rope_theta": 1e4}}, "the rotary base is 10000, MixtralModel computes with 1e+06"),
        ("glm", {"head_dim": 32}, "head_dim 32 times num_attention_heads 4 must be hidden_size 64"),
        ("chatglm-6b", {"position_encoding_2d": False}, "position_encoding_2d is False"),
        ("chatglm2", {"rmsnorm": False}, "rmsnorm is False"),
        ("chatglm2", {"rope_ratio": 500}, "rope_ratio is 500"),
        ("chatglm2", {"multi_query_group_num": 3}, "'num_attention_heads' 4 must be divisible by 'multi_query_group_num' 3"),
        ("cogvlm2", {"num_multi_query_heads": 3}, "'num_attention_heads' 4 must be divisible by 'num_multi_query_heads' 3"),
    ],
)
def test_what_other_families_do_not_compute(name, change, text, tmp_path):
    save(tmp_path / "hf", name)
    edit(tmp_path / "hf/config.json", **change)
    refused(hf_to_sat, tmp_path / "hf", text, family=FAMILY.get(name, "auto"))


def test_a_family_does_not_take_a_model_for_its_names(hf):
    """Granite, Helium and others have Llama's names and compute something else."""
    edit(hf / "config.json", model_type="granite")
    refused(hf_to_sat, hf, "no family for 'granite'; there are")
    refused(hf_to_sat, hf, "model_type is 'granite'; llama converts 'llama' or 'mistral' or 'qwen2' alone", family="llama")


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OWN_CODE])
def test_what_is_not_said_is_what_transformers_takes(name, tmp_path):
    """Without any one entry the configuration is refused, or is the one that transformers reads."""
    import transformers

    save(tmp_path / "hf", name)
    path, taken = tmp_path / "hf/config.json", []
    entries = Settings(json.loads(path.read_text()), path)
    (family,) = (family for family in FAMILIES.values() if family.claims_hf(entries))
    for key in entries.keys() - {"model_type"}:
        path.write_text(json.dumps({other: value for other, value in entries.items() if other != key}))
        try:
            ours = computed(family, family.filled(Settings(json.loads(path.read_text()), path)))
        except ConvertError:
            continue
        try:
            read = transformers.AutoConfig.from_pretrained(tmp_path / "hf").to_dict()
        except (ValueError, TypeError, KeyError):  # transformers refuses it
            continue
        assert ours == computed(family, Settings(read, path)), key
        taken.append(key)
    assert len(taken) > 5


def computed(family, config):
    """All that a configuration says of what is computed."""
    problems = Problems("config.json")
    family.check_hf(config, problems)
    problems.end()
    args = Settings(family.args(config), "args")
    said = {key: value for key, value in args.items() if not key.endswith("_token_id") and key != "tokenizer_type"}
    return said, family.sizes(config, args), family.theta(config)


@pytest.mark.parametrize("name", ["mistral", "mixtral", "qwen2", "glm"])
def test_defaults_of_transformers_are_taken(name, tmp_path):
    """Those that are not everybody's: 8 or 2 heads of keys, Mistral's window of 4096, Mixtral's base."""
    default = {"mistral": 8, "mixtral": 8, "qwen2": 32, "glm": 2}[name]
    save(tmp_path / "hf", name, num_attention_heads=32, num_key_value_heads=default, hidden_size=128, head_dim=4)
    edit(tmp_path / "hf/config.json", drop=["num_key_value_heads"] + ["rope_parameters"] * (name == "mixtral"))
    hf_to_sat(tmp_path / "hf", tmp_path / "sat", family=FAMILY.get(name, "auto"))
    sat_to_hf(tmp_path / "sat", tmp_path / "back", family=FAMILY.get(name, "auto"))
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["num_key_value_heads"] == default
    if name == "mixtral":
        assert config["rope_theta"] == 1e6
    if name == "mistral":
        edit(tmp_path / "hf/config.json", drop=["sliding_window"], max_position_embeddings=8192)
        refused(hf_to_sat, tmp_path / "hf", "sliding_window is 4096, less than max_position_embeddings 8192")


def test_what_came_through_says_what_transformers_takes(tmp_path):
    """Mistral's configuration without an entry for the window has one of 4096."""
    save(tmp_path / "hf", "mistral")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    edit(tmp_path / "sat/config.json", drop=["sliding_window"])
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["sliding_window"] == 4096
    edit(tmp_path / "sat/model_config.json", max_sequence_length=8192)
    text = "config.json: sliding_window is 4096, less than max_position_embeddings 8192"
    refused(sat_to_hf, tmp_path / "sat", text)


@pytest.mark.parametrize(
    ("weight_map", "text"),
    [
        (["model.safetensors"], "'weight_map' must hold an object, got ['model.safetensors']"),
        ("x", "'weight_map' must hold an object, got 'x'"),
        ({"model.norm.weight": 3}, "must put model.norm.weight into a file beside it, got 3"),
        ({"model.norm.weight": None}, "must put model.norm.weight into a file beside it, got None"),
        ({"model.norm.weight": "../model.safetensors"}, "into a file beside it, got '../model.safetensors'"),
        ({"model.norm.weight": ""}, "into a file beside it, got ''"),
    ],
    ids=str,
)
def test_an_index_of_a_wrong_type(hf, weight_map, text):
    (hf / "model.safetensors").rename(hf / "model-00001-of-00001.safetensors")
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(hf_to_sat, hf, "model.safetensors.index.json", text)


def test_tensors_that_the_index_does_not_name(llama, tmp_path):
    sat_to_hf(llama / "sat", tmp_path / "in", max_shard_size="100KB")
    index = json.loads((tmp_path / "in/model.safetensors.index.json").read_text())["weight_map"]
    name = index.pop("model.norm.weight")
    edit(tmp_path / "in/model.safetensors.index.json", weight_map=index)
    text = f"{name}: holds model.norm.weight, which model.safetensors.index.json does not put there"
    refused(hf_to_sat, tmp_path / "in", text)


@pytest.mark.parametrize(("convert", "side"), [(hf_to_sat, "hf"), (sat_to_hf, "sat")])
def test_adapters_beside_the_model_are_refused(llama, tmp_path, convert, side):
    """transformers adds them to the model that it loads from the folder."""
    copy(llama / side, tmp_path / "in")
    (tmp_path / "in/adapter_config.json").write_text("{}")
    refused(convert, tmp_path / "in", "adapter_config.json: LoRA adapters of PEFT lie beside the model; merge them first")


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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_refused(hf, sat, value):
    """SAT loads it without a word."""
    put_hf(hf, {"model.norm.weight": torch.full((64,), value)})
    refused(hf_to_sat, hf, "model.safetensors: model.norm.weight holds NaN or infinity")
    put(sat, **{"mixins.lm.lm_head.weight": torch.full((128, 64), value)})
    refused(sat_to_hf, sat, "mp_rank_00_model_states.pt: mixins.lm.lm_head.weight holds NaN or infinity")


# -- bad input: SAT's side


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


def test_model_parallel_files_must_match(llama, tmp_path):
    hf_to_sat(llama / "hf", tmp_path / "sat", mp=2)
    second = tmp_path / "sat/1/mp_rank_01_model_states.pt"
    module = torch.load(second, weights_only=True)["module"]
    torch.save({"module": module | {"transformer.final_layernorm.weight": torch.zeros(64)}}, second)
    refused(sat_to_hf, tmp_path / "sat", "transformer.final_layernorm.weight: every rank must hold the same numbers")
    torch.save({"module": module | {"mixins.lm.lm_head.weight": torch.zeros(63, 64)}}, second)
    refused(sat_to_hf, tmp_path / "sat", "mixins.lm.lm_head.weight: the shapes of the ranks differ")
    key = "transformer.layers.0.mlp.dense_4h_to_h.weight"
    torch.save({"module": module | {key: module[key].to(torch.uint8)}}, second)
    refused(sat_to_hf, tmp_path / "sat", f"{key}: the dtypes of the ranks differ: float32, uint8", dtype="float32")
    key = "transformer.position_embeddings.inv_freq"
    torch.save({"module": module | {key: module[key] / 2}}, second)
    refused(sat_to_hf, tmp_path / "sat", f"{key}: every rank must hold the same numbers")
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


@pytest.mark.parametrize("mp", [1, 2])
@pytest.mark.parametrize("vocabulary", [128, 1024])
def test_a_head_of_the_same_numbers_is_tied_where_the_configuration_says_so(mp, vocabulary, tmp_path):
    """Below 1000 every rank holds the embedding, and a part of the head."""
    for name, tied in (("llama", False), ("llama-tied", True)):
        save(tmp_path / name, name, vocab_size=vocabulary)
        put_hf(
            tmp_path / name, {} if tied else {"lm_head.weight": tensors(tmp_path / name)["model.embed_tokens.weight"].clone()}
        )
        hf_to_sat(tmp_path / name, tmp_path / f"{name}-sat", mp=mp)
        sat_to_hf(tmp_path / f"{name}-sat", tmp_path / f"{name}-back", verify=True)
        assert json.loads((tmp_path / f"{name}-back/config.json").read_text())["tie_word_embeddings"] == tied
        assert identical(tensors(tmp_path / name), tensors(tmp_path / f"{name}-back")) == []


def test_a_head_of_other_zeros_is_written(tmp_path):
    save(tmp_path / "hf", "llama-tied")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    words, head = torch.full((128, 64), 0.5), torch.full((128, 64), 0.5)
    words[0], head[0] = 0.0, -0.0
    put(tmp_path / "sat", **{"transformer.word_embeddings.weight": words, "mixins.lm.lm_head.weight": head})
    edit(tmp_path / "sat/config.json", tie_word_embeddings=True)
    sat_to_hf(tmp_path / "sat", tmp_path / "back", verify=True)
    assert bool(tensors(tmp_path / "back")["lm_head.weight"][0].signbit().all())


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


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, -1.0, 0.0, True, "8"], ids=str)
def test_alpha_must_be_a_number_above_zero(sat, alpha):
    adapt(sat)
    text = f"--lora-alpha must be a number above zero, got {alpha!r}"
    refused(sat_to_hf, sat, text, merge_lora=True, lora_alpha=alpha)


def test_options_for_adapters_are_not_dropped(sat):
    refused(sat_to_hf, sat, "--merge-lora was given, and there are no LoRA adapters", merge_lora=True, lora_alpha=1.0)
    refused(sat_to_hf, sat, "--lora-alpha is for --merge-lora, which was not given", lora_alpha=1.0)


def test_a_weight_beside_the_one_of_its_adapters_is_refused(sat):
    adapt(sat)
    found = next(name for name in state(sat) if name.endswith("original.weight"))
    key = found.replace("original.", "")
    put(sat, **{key: state(sat)[found]})
    refused(sat_to_hf, sat, f"holds {key} beside {found}", merge_lora=True, lora_alpha=1)


def test_adapters_that_do_not_fit_are_refused(sat):
    adapt(sat)
    key = "transformer.layers.1.attention.query_key_value"
    put(sat, **{f"{key}.matrix_B.2": torch.zeros(31, 4)})
    refused(sat_to_hf, sat, f"{key}: B A of shapes", "do not make up the weight's [128, 64]", merge_lora=True, lora_alpha=1.0)
    put(sat, **{f"{key}.matrix_B.2": torch.zeros(32, 4, dtype=torch.uint8)})
    refused(
        sat_to_hf,
        sat,
        f"{key}: matrix_A.k and matrix_B.k must come in pairs, in floating point",
        merge_lora=True,
        lora_alpha=1.0,
    )
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


def test_progress_is_a_bar_on_a_terminal(llama, tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    hf_to_sat(llama / "hf", tmp_path / "sat", progress=terminal)
    frames = terminal.getvalue().split("\r\x1b[K")
    assert re.match(r"#{20} 100%  \S+ of \S+ MB, \S+ MB/s, 0 s left", frames[-2]), frames[-2]
    assert frames[-1] == ""
    assert len(frames) > 10


def test_what_verification_is_to_see_is_not_dropped(llama, tmp_path):
    (tmp_path / "in").mkdir()
    source = copy(llama / "hf", tmp_path / "in/hf")
    (tmp_path / "text").write_text("a b")
    refused(hf_to_sat, source, f"{tmp_path / 'text'} is for --verify, which was not given", text=tmp_path / "text")
    refused(hf_to_sat, source, f"{tmp_path / 'none'}: no such file", text=tmp_path / "none", verify=True)
    refused(hf_to_sat, source, "--verify of llama takes --text", image=tmp_path / "text", verify=True)
    sat = copy(llama / "sat", tmp_path / "in/sat")
    refused(sat_to_hf, sat, "--verify of llama takes --text", image=tmp_path / "text", verify=True)
    save(tmp_path / "in/vit", "vit")
    refused(hf_to_sat, tmp_path / "in/vit", "--verify of vit takes --image, a picture", text=tmp_path / "text", verify=True)


@pytest.mark.parametrize("option", ["text", "image"])
@pytest.mark.parametrize("name", ["cogvlm", "chatglm-6b"])
def test_what_nothing_would_read_is_refused(name, option, tmp_path):
    save(tmp_path / "hf", name)
    (tmp_path / "file").write_text("a text")
    text = f"file: --verify of {name} runs neither side: the code of C"
    refused(hf_to_sat, tmp_path / "hf", text, verify=True, **{option: tmp_path / "file"})


@pytest.mark.parametrize("arguments", [["--mp", "0"], ["--mp", "3"], ["--dtype", "float16", "--mp", "100"]], ids=" ".join)
def test_command_says_why_and_returns_2(llama, tmp_path, capsys, arguments):
    assert main(["convert", "hf2sat", str(llama / "hf"), str(tmp_path / "sat"), *arguments]) == 2
    assert capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["big", "9" * 5000], ids=["big", "long"])
def test_command_checks_its_arguments(llama, tmp_path, capsys, size):
    assert main(["convert", "sat2hf", str(llama / "sat"), str(tmp_path / "hf"), "--max-shard-size", size]) == 2
    assert "must be like 5GB" in capsys.readouterr().err


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


@pytest.mark.parametrize(("one", "other"), [("llama", "qwen2"), ("qwen2", "mistral")])
def test_a_configuration_of_others_that_came_through_is_refused(one, other, tmp_path):
    """Qwen2 has a bias for q, k and v, Llama and Mistral have none: transformers would drop it, or draw it at random."""
    save(tmp_path / "hf", one)
    save(tmp_path / "other", other)
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    shutil.copyfile(tmp_path / "other/config.json", tmp_path / "sat/config.json")
    text = f"model_config.json: use_qkv_bias is {one == 'qwen2'}; {tmp_path / 'sat/config.json'} is of {other!r}"
    refused(
        sat_to_hf, tmp_path / "sat", text, f"for which it is {other == 'qwen2'}; put the weights' own there, or take it away"
    )


def test_a_configuration_of_another_family_is_left_out_and_said(sat, tmp_path):
    edit(sat / "config.json", model_type="gpt2")
    assert "config.json was left out: it is of 'gpt2', the weights of llama" in str(sat_to_hf(sat, tmp_path / "hf"))
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "llama"


def test_code_that_came_through_is_named_as_it_was(tmp_path):
    """CogVLM's configuration says which of the files beside it is its code."""
    save(tmp_path / "hf", "cogvlm")
    own = {"AutoModelForCausalLM": "mine.Model"}
    edit(tmp_path / "hf/config.json", auto_map=own)
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["auto_map"] == own


def test_what_came_through_is_named_where_it_does_not_fit(sat):
    edit(sat / "config.json", head_dim=32)
    refused(sat_to_hf, sat, f"{sat / 'config.json'}: head_dim 32 times num_attention_heads 4 must be hidden_size 64")


def test_the_configuration_that_came_through_says_the_family(tmp_path):
    """ChatGLM3Model is GLM-4 of transformers and ChatGLM3; each comes back as it went."""
    for name in ("glm", "glm-base", "chatglm2", "chatglm3"):
        save(tmp_path / name, name)
        hf_to_sat(tmp_path / name, tmp_path / f"{name}-sat", family=FAMILY[name])
        sat_to_hf(tmp_path / f"{name}-sat", tmp_path / f"{name}-back")
        assert identical(tensors(tmp_path / name), tensors(tmp_path / f"{name}-back")) == []
    (tmp_path / "glm-sat/config.json").unlink()
    assert sat_to_hf(tmp_path / "glm-sat", tmp_path / "alone").family == "chatglm3"


def test_a_class_of_another_family_is_refused(tmp_path):
    """ChatGLM4Model has its heads otherwise, under the same names and in the same shapes."""
    save(tmp_path / "hf", "chatglm3")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat", family="chatglm3")
    (tmp_path / "sat/config.json").unlink()
    edit(tmp_path / "sat/model_config.json", model_class="ChatGLM4Model", drop=("base_scale",))
    for family, own in (("chatglm2", "ChatGLM2Model"), ("chatglm3", "ChatGLM3Model")):
        text = f"model_config.json: model_class is 'ChatGLM4Model'; {family} converts {own} alone"
        refused(sat_to_hf, tmp_path / "sat", text, family=family)


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
    assert "SAT's code has 1792 as the width of the tower" in str(hf_to_sat(tmp_path / "hf", tmp_path / "sat"))
    eva = json.loads((tmp_path / "sat/model_config.json").read_text())["eva_args"]
    edit(tmp_path / "sat/model_config.json", eva_args=eva | change)
    refused(sat_to_hf, tmp_path / "sat", text)


def test_names_of_classes_come_back(tmp_path):
    save(tmp_path / "hf", "vit", id2label={k: f"a {k}" for k in range(5)}, label2id={f"a {k}": k for k in range(5)})
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["id2label"]["3"] == "a 3"


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


@pytest.mark.parametrize("name", ["cogvlm", "glm"])
def test_a_class_that_was_trained_is_its_family(name, tmp_path):
    save(tmp_path / "hf", name)
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    own = json.loads((tmp_path / "sat/model_config.json").read_text())["model_class"]
    edit(tmp_path / "sat/model_config.json", model_class=f"FineTuneTrain{own}")
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
    with pytest.raises(ConvertError, match=f"model.safetensors: {key} does not fit into {dtype}; --dtype"):
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
