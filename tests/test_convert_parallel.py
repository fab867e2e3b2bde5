"""Files of several ranks of model parallelism."""

import re

import pytest
import torch

from liger_aot.convert import hf_to_sat
from liger_aot.convert import sat_to_hf

from checkpoints import FAMILY
from checkpoints import IDLE
from checkpoints import MODELS
from checkpoints import edit
from checkpoints import identical
from checkpoints import load_sat
from checkpoints import needs_sat
from checkpoints import refused
from checkpoints import save
from checkpoints import state
from checkpoints import tensors

pytest_plugins = ["converted"]


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


def ranks_of(folder):
    files = sorted((folder / "1").iterdir())
    return [torch.load(file, weights_only=True)["module"] for file in files]


@needs_sat
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("cogvlm", "cogvlm2", "llama-mqa")])
def test_ranks_hold_what_sats_classes_cut(name, tmp_path):
    """Every number of every file: SAT's modules cut themselves. A vocabulary of 1000 or more is cut with its embedding."""
    save(tmp_path / "hf", name, **({} if name == "vit" else {"vocab_size": 1024}))
    for folder, mp in (("one", 1), ("two", 2)):
        hf_to_sat(tmp_path / "hf", tmp_path / folder, mp=mp, family=FAMILY.get(name, "auto"), allow_rope_theta=True)
    model, wanted, kinds = load_sat(tmp_path / "one"), [state(tmp_path / "one") for _ in range(2)], set()
    from sat import mpu

    for module_name, module in model.named_modules():
        if not isinstance(module, mpu.ColumnParallelLinear | mpu.RowParallelLinear | mpu.VocabParallelEmbedding):
            continue
        kinds.add(type(module))
        for part, cut in zip(("weight", "bias"), module.partition(2), strict=True):
            for rank, tensor in enumerate(cut):
                wanted[rank][f"{module_name}.{part}"] = tensor
    assert kinds >= {mpu.ColumnParallelLinear, mpu.RowParallelLinear}
    assert (mpu.VocabParallelEmbedding in kinds) == (name != "vit")
    for ours, theirs in zip(ranks_of(tmp_path / "two"), wanted, strict=True):
        assert identical(ours, theirs) == []


# How SAT's code of CogVLM cuts its tensors, which no package carries: along which dimension, and of which parts next to each
# other every rank has its share of each. All others every rank holds.
LAYER = r"(transformer|mixins\.eva\.vit_model\.transformer)\.layers\.\d+\."
OWN_LAYER, SEEN_LAYER = r"transformer\.layers\.\d+\.", r"mixins\.eva\.vit_model\.transformer\.layers\.\d+\."
CUT = {
    r"transformer\.word_embeddings\.weight": (0, "one"),
    rf"{OWN_LAYER}attention\.query_key_value\.weight": (0, "heads"),
    r"mixins\.rotary\.vision_query_key_value_list\.\d+\.(weight|bias)": (0, "heads"),
    rf"{SEEN_LAYER}attention\.query_key_value\.(weight|bias)": (0, "three"),
    rf"{LAYER}mlp\.dense_h_to_4h\.(weight|bias)": (0, "one"),
    r"mixins\.mlp\.(gate_proj|vision_gate_proj|vision_dense_h_to_4h_list)\.\d+\.weight": (0, "one"),
    r"mixins\.lm\.lm_head\.weight": (0, "one"),
    rf"{LAYER}(attention\.dense|mlp\.dense_4h_to_h)\.weight": (1, "one"),
    r"mixins\.(rotary\.vision_dense_list|mlp\.vision_dense_4h_to_h_list)\.\d+\.weight": (1, "one"),
}


def share(tensor, dim, strides, rank, ranks):
    """One rank's rows, or columns, of each of the parts, whose sizes are as the strides."""
    unit, begin, mine = tensor.shape[dim] // sum(strides), 0, []
    for stride in strides:
        width = unit * stride // ranks
        mine += range(begin + rank * width, begin + (rank + 1) * width)
        begin += unit * stride
    return tensor.index_select(dim, torch.tensor(mine))


@pytest.mark.parametrize(("name", "ranks"), [("cogvlm", 2), ("cogvlm", 4), ("cogvlm2", 2)])
def test_ranks_hold_what_cogvlms_code_cuts(name, ranks, tmp_path):
    save(tmp_path / "hf", name, vocab_size=1024)
    hf_to_sat(tmp_path / "hf", tmp_path / "one")
    hf_to_sat(tmp_path / "hf", tmp_path / "ranks", mp=ranks)
    whole, strides = (
        state(tmp_path / "one"),
        {"one": [1], "three": [1, 1, 1], "heads": [4, 2, 2] if name == "cogvlm2" else [4, 4, 4]},
    )
    cuts = {key: cut for key in whole for pattern, cut in CUT.items() if re.fullmatch(pattern, key)}
    assert [pattern for pattern in CUT if not any(re.fullmatch(pattern, key) for key in whole)] == []
    for rank, ours in enumerate(ranks_of(tmp_path / "ranks")):
        wanted = dict(whole)
        for key, (dim, kind) in cuts.items():
            wanted[key] = share(whole[key], dim, strides[kind], rank, ranks)
        assert identical(ours, wanted) == []


@needs_sat
@pytest.mark.parametrize("strides", [[1], [1, 1, 1], [4, 2, 2]], ids=str)
@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_are_those_of_sats_classes(strides, ranks, llama):
    """What the test above holds CogVLM to, whose modules are of these two classes."""
    load_sat(llama / "sat")  # begins SAT's process groups, without which it makes no such module
    from sat.mpu import ColumnParallelLinear
    from sat.mpu import RowParallelLinear

    column = ColumnParallelLinear(6, 96, stride=strides if len(set(strides)) > 1 else len(strides))
    row = RowParallelLinear(96, 6)
    for tensor in (column.weight, column.bias, row.weight, row.bias):
        torch.nn.init.normal_(tensor)
    weights, biases = column.partition(ranks)
    for rank in range(ranks):
        assert torch.equal(weights[rank], share(column.weight, 0, strides, rank, ranks))
        assert torch.equal(biases[rank], share(column.bias, 0, strides, rank, ranks))
        assert torch.equal(row.partition(ranks)[0][rank], share(row.weight, 1, [1], rank, ranks))
        assert torch.equal(row.partition(ranks)[1][rank], row.bias)
    kept = column.weight.clone()
    column.weight.data.zero_()
    column.merge(weights, biases)
    assert torch.equal(column.weight, kept)


def test_vocabulary_below_1000_is_held_by_every_rank(tmp_path):
    for name, rows in {"llama": 128, "llama-mha": 512}.items():
        save(tmp_path / name, name)
        hf_to_sat(tmp_path / name, tmp_path / f"{name}-sat", mp=2)
        assert len(state(tmp_path / f"{name}-sat")["transformer.word_embeddings.weight"]) == rows


def test_model_parallel_files_must_match(llama, tmp_path):
    hf_to_sat(llama / "hf", tmp_path / "sat", mp=2)
    second = tmp_path / "sat/1/mp_rank_01_model_states.pt"
    module = torch.load(second, weights_only=True)["module"]
    torch.save({"module": module | {"transformer.final_layernorm.weight": torch.zeros(64)}}, second)
    text = "mp_rank_01_model_states.pt: transformer.final_layernorm.weight: every rank must hold the same numbers, and rank 0"
    refused(sat_to_hf, tmp_path / "sat", "1 problem", text)
    torch.save({"module": module | {"mixins.lm.lm_head.weight": torch.zeros(63, 64)}}, second)
    text = "mp_rank_01_model_states.pt: mixins.lm.lm_head.weight: the shapes of the ranks differ: [64, 64] in rank 0, [63, 64]"
    refused(sat_to_hf, tmp_path / "sat", text)
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
