"""Rotary frequencies: no weights, but all that some SAT checkpoints know of their base."""

import json

import pytest
import torch

from liger_aot.convert import hf_to_sat
from liger_aot.convert import sat_to_hf

from checkpoints import FAMILY
from checkpoints import FILE
from checkpoints import edit
from checkpoints import identical
from checkpoints import put
from checkpoints import put_hf
from checkpoints import refused
from checkpoints import save
from checkpoints import state
from checkpoints import tensors

pytest_plugins = ["converted"]


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


def test_old_buffers_are_held_to_the_configuration(hf, tmp_path):
    values = 1 / 10000 ** (torch.arange(0, 16, 2).float() / 16)
    put_hf(hf, {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": values.clone() for i in range(2)})
    hf_to_sat(hf, tmp_path / "sat")
    put_hf(hf, {"model.layers.1.self_attn.rotary_emb.inv_freq": 1 / 500000 ** (torch.arange(0, 16, 2).float() / 16)})
    refused(hf_to_sat, hf, "model.layers.1.self_attn.rotary_emb.inv_freq: not the frequencies of rope_theta 10000")


def test_a_ratio_of_chatglm3_comes_back(tmp_path):
    """Its code multiplies 10000 by it and does not read the buffer that it registers, which is of 10000 whatever the ratio."""
    key, values = (
        "transformer.rotary_pos_emb.inv_freq",
        [1 / theta ** (torch.arange(0, 8, 2).float() / 8) for theta in (1e4, 5e5)],
    )
    save(tmp_path / "hf", "chatglm3")
    edit(tmp_path / "hf/config.json", rope_ratio=50)
    hf_to_sat(tmp_path / "hf", tmp_path / "sat", family="chatglm3", verify=True)
    assert json.loads((tmp_path / "sat/model_config.json").read_text())["base_scale"] == 50
    assert torch.equal(state(tmp_path / "sat")["mixins.attn.rotary_pos_emb.inv_freq"], values[1])
    sat_to_hf(tmp_path / "sat", tmp_path / "back", verify=True)
    assert json.loads((tmp_path / "back/config.json").read_text())["rope_ratio"] == 50
    assert identical(tensors(tmp_path / "hf"), tensors(tmp_path / "back")) == []
    (tmp_path / "sat/config.json").unlink()
    sat_to_hf(tmp_path / "sat", tmp_path / "alone", family="chatglm3", verify=True)
    assert json.loads((tmp_path / "alone/config.json").read_text())["rope_ratio"] == 50
    hf_to_sat(tmp_path / "alone", tmp_path / "again", family="chatglm3", verify=True)
    assert identical(state(tmp_path / "sat"), state(tmp_path / "again")) == []
    put_hf(tmp_path / "hf", {key: values[1]})
    hf_to_sat(tmp_path / "hf", tmp_path / "scaled", family="chatglm3")
    put_hf(tmp_path / "hf", {key: 1 / 7e4 ** (torch.arange(0, 8, 2).float() / 8)})
    refused(hf_to_sat, tmp_path / "hf", f"{key}: not the frequencies of rope_theta 500000 or 10000", family="chatglm3")


@pytest.mark.parametrize(("name", "theta"), [("glm", 123457.0), ("glm", 1e6 / 3), ("chatglm3", 123457.0)])
def test_a_base_that_is_no_round_number_comes_back(name, theta, tmp_path):
    save(tmp_path / "hf", name)
    change = {"rope_parameters": {"rope_theta": theta}} if name == "glm" else {"rope_ratio": theta / 1e4}
    edit(tmp_path / "hf/config.json", **change)
    hf_to_sat(tmp_path / "hf", tmp_path / "sat", family=name)
    sat_to_hf(tmp_path / "sat", tmp_path / "back", family=name)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config.get("rope_theta", 1e4 * config.get("rope_ratio", 1)) == pytest.approx(theta, rel=1e-11)


def test_a_base_that_is_said_is_that_of_the_frequencies(sat):
    """Which of the two is wrong nobody can tell."""
    edit(sat / "model_config.json", rope_theta=5e5)
    texts = ["inv_freq: the frequencies of rotary base 10000, and model_config.json says rope_theta 500000"]
    refused(sat_to_hf, sat, *texts)
    refused(sat_to_hf, sat, *texts, allow_rope_theta=True)


def test_frequencies_of_every_layer_are_written_for_cogvlm(tmp_path):
    """Its code on the hub has them as persistent buffers: without them transformers leaves memory as it was."""
    save(tmp_path / "hf", "cogvlm2")
    put_hf(tmp_path / "hf", {}, drop=[f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)])
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    for i in range(2):
        found = tensors(tmp_path / "back")[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"]
        assert torch.equal(found, 1 / 500000 ** (torch.arange(0, 16, 2).float() / 16))


def test_dtype_casts_all_but_the_frequencies(llama, tmp_path):
    hf_to_sat(llama / "hf", tmp_path / "sat", dtype="float16", verify=True)
    kinds = {key: tensor.dtype for key, tensor in state(tmp_path / "sat").items()}
    assert kinds.pop("transformer.position_embeddings.inv_freq") is torch.float32
    assert set(kinds.values()) == {torch.float16}


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


def test_a_rotary_dimension_that_is_odd_is_refused(tmp_path):
    save(tmp_path / "hf", "glm", hidden_size=72, head_dim=18)
    refused(hf_to_sat, tmp_path / "hf", "their dimension must be even, got 9", family="glm")
