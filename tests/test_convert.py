"""Checkpoints of transformers to SAT's format and back, without SAT installed: every family's rules."""

import json
from pathlib import Path

import pytest
import torch

from liger_aot.convert import hf_to_sat
from liger_aot.convert import sat_to_hf
from liger_aot.convert._map import document
from liger_aot.convert._rules import Frequencies
from liger_aot.convert._rules import Tied
from liger_aot.convert._rules import expand
from liger_aot.convert._settings import Settings
from liger_aot.convert.families import FAMILIES

from checkpoints import FAMILY
from checkpoints import FILE
from checkpoints import IDLE
from checkpoints import MODELS
from checkpoints import edit
from checkpoints import identical
from checkpoints import save
from checkpoints import state
from checkpoints import tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_the_same_in_every_bit(name, dtype, tmp_path):
    save(tmp_path / "hf", name, dtype)
    family = FAMILY.get(name, "auto")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True, family=family)
    (tmp_path / "sat/config.json").unlink()  # the way of a checkpoint that SAT itself wrote
    sat_to_hf(tmp_path / "sat", tmp_path / "back", verify=True, family=family)
    assert set(identical(tensors(tmp_path / "hf"), tensors(tmp_path / "back"))) == IDLE.get(name, set())


@pytest.mark.parametrize("name", FAMILIES)
def test_rules_name_every_tensor_once(name):
    rules = [rule for rule in FAMILIES[name].rules if not rule.when]
    names = [name for rule in rules for name in rule.sat]
    assert len(names) == len(set(names))


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


def test_documentation_has_the_rules():
    """docs/convert.md ends with what `python -m liger_aot convert map` prints."""
    text = (Path(__file__).parent.parent / "docs/convert.md").read_text()
    assert text.endswith(document(FAMILIES.values()) + "\n")
    assert "twelve families" in text
    assert len(FAMILIES) == 12
