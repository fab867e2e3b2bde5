"""Low-rank adapters in a SAT checkpoint: refused, or merged."""

import math

import pytest
import torch

from liger_aot.convert import hf_to_sat
from liger_aot.convert import sat_to_hf

from checkpoints import FILE
from checkpoints import identical
from checkpoints import load_sat
from checkpoints import needs_sat
from checkpoints import put
from checkpoints import refused
from checkpoints import run_hf
from checkpoints import run_sat
from checkpoints import save
from checkpoints import state
from checkpoints import tensors
from checkpoints import tokens

pytest_plugins = ["converted"]


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


def test_adapters_of_sats_older_mixin_are_named(sat):
    """LoRAMixin keeps its matrices apart from the weights."""
    put(sat, **{f"mixins.lora.lora_linear.1.Q_{x}": torch.ones(shape) for x, shape in (("A", (4, 64)), ("B", (64, 4)))})
    hint = "; LoRA, which must be merged first"
    refused(sat_to_hf, sat, *(f"unknown: mixins.lora.lora_linear.1.Q_{x} of shape" for x in "AB"), f"states.pt{hint}")


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


QKV, DENSE = "transformer.layers.1.attention.query_key_value", "transformer.layers.1.attention.dense"


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({f"{QKV}.matrix_B.2": torch.zeros(31, 4)}, [f"{QKV}: B A of shapes", "do not make up the weight's [128, 64]"]),
        ({f"{QKV}.matrix_A.0": torch.zeros(4, 63)}, ["[4, 63])", "do not make up the weight's [128, 64]"]),
        ({f"{QKV}.matrix_A.1": torch.zeros(5, 64)}, ["([32, 4], [5, 64])", "do not make up the weight's [128, 64]"]),
        (
            {f"{QKV}.matrix_B.2": torch.zeros(32, 4, dtype=torch.uint8)},
            [f"{QKV}.matrix_B.2 must be there, a matrix in floating"],
        ),
        (
            {f"{QKV}.original.weight": torch.zeros(128, 64, dtype=torch.uint8)},
            [f"{QKV}.original.weight must be there, a matrix"],
        ),
        ({f"{QKV}.matrix_B.3": torch.zeros(32, 4)}, [f"{QKV}.matrix_A.3 must be there"]),
        ({f"{QKV}.matrix_A.7": torch.zeros(4, 64)}, [f"{QKV}.matrix_A.3 must be there", f"{QKV}.matrix_B.3 must be there"]),
        (
            {f"{DENSE}.matrix_A.0": torch.zeros(0, 64), f"{DENSE}.matrix_B.0": torch.zeros(64, 0)},
            [f"{DENSE}.matrix_A.0 must be"],
        ),
        ({f"{DENSE}.original.weight_scale": torch.zeros(1)}, [f"unknown: {DENSE}.weight_scale of shape [1]", "quantised"]),
        ({f"{DENSE}.original.weight": torch.full((64, 64), math.nan)}, [f"{DENSE}.weight holds NaN or infinity"]),
        ({f"{DENSE}.matrix_A.0": torch.full((4, 64), math.inf)}, [f"{DENSE}.weight holds NaN or infinity"]),
    ],
)
def test_adapters_that_do_not_fit_are_refused(sat, change, texts):
    adapt(sat)
    put(sat, **change)
    refused(sat_to_hf, sat, f"{sat}", *texts, merge_lora=True, lora_alpha=1.0)


def test_all_adapters_that_do_not_fit_are_named(sat):
    adapt(sat)
    put(
        sat,
        **{
            f"{QKV}.matrix_B.2": torch.zeros(31, 4),
            f"{DENSE}.matrix_B.0": torch.zeros(60, 4),
            f"{DENSE}.weight": torch.ones(1),
        },
    )
    texts = [f"{sat / FILE}, whose LoRA adapters are to be merged: 3 problems, nothing was written"]
    texts += [f"{QKV}: B A of shapes", f"{DENSE}: B A of shapes [([60, 4], [4, 64])] do not make up the weight's [64, 64]"]
    texts += [f"holds {DENSE}.weight beside {DENSE}.original.weight"]
    refused(sat_to_hf, sat, *texts, merge_lora=True, lora_alpha=1.0)


def test_adapters_in_several_ranks_are_refused(llama, tmp_path):
    """SAT cuts them as well, and says nowhere how."""
    hf_to_sat(llama / "hf", tmp_path / "sat", mp=2)
    for rank in range(2):
        file = tmp_path / f"sat/1/mp_rank_{rank:02d}_model_states.pt"
        module = torch.load(file, weights_only=True)["module"]
        module[f"{DENSE}.original.weight"] = module.pop(f"{DENSE}.weight")
        module |= {f"{DENSE}.matrix_A.0": torch.zeros(4, 32), f"{DENSE}.matrix_B.0": torch.zeros(64, 4)}
        torch.save({"module": module}, file)
    text = "LoRA adapters in 2 model-parallel files; merge them in SAT first"
    refused(sat_to_hf, tmp_path / "sat", text, merge_lora=True, lora_alpha=1.0)


@needs_sat
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_are_merged_as_sat_computes_with_them(name, tmp_path):
    """SAT's own layers with adapters; fewer heads of keys than of queries or as many, a bias beside the weight or none."""
    model = save(tmp_path / "hf", name)
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    sat = load_sat(tmp_path / "sat")
    from sat.model.finetune.lora2 import LoraMixin

    sat.add_mixin("lora", LoraMixin(2, 4, lora_alpha=8), reinit=True)
    for key, parameter in sat.named_parameters():
        if "matrix_" in key:
            torch.nn.init.normal_(parameter, 0, 0.15)
    ids = tokens(model.config.vocab_size)
    wanted = run_sat(sat, ids)
    torch.save({"module": sat.state_dict()}, tmp_path / "sat" / FILE)
    sat_to_hf(tmp_path / "sat", tmp_path / "back", merge_lora=True, lora_alpha=8)
    ours = run_hf(type(model).from_pretrained(tmp_path / "back").eval(), ids)
    assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (run_hf(model, ids) - wanted).abs().max() > 0.1 * wanted.abs().max()
