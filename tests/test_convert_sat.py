"""Converted checkpoints run by SwissArmyTransformer itself: the same model in both frameworks, every parameter drawn at random.

CogVLM's model code is in no package: both of its sides are small references of our own.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from liger_aot.convert import hf_to_sat
from liger_aot.convert import sat_to_hf
from liger_aot.convert import set_rope_theta

from checkpoints import FAMILY
from checkpoints import FILE
from checkpoints import MODELS
from checkpoints import answer
from checkpoints import identical
from checkpoints import load_sat
from checkpoints import needs_sat
from checkpoints import run_hf
from checkpoints import run_sat
from checkpoints import save
from checkpoints import tensors
from checkpoints import tokens
from checkpoints import with_image
from references import SATCogVLM

OWN = ("cogvlm", "cogvlm2")
# Where SAT multiplies and adds in another order than transformers does: matrices the other way round, experts one by one.
OTHER_ORDER = ("gpt2", "mixtral")


class Pair:
    """One model in both frameworks, and how each is run."""

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        self.hf = save(folder / "hf", name)
        hf_to_sat(folder / "hf", folder / "sat", family=FAMILY.get(name, "auto"), allow_rope_theta=True)
        self.args = json.loads((folder / "sat/model_config.json").read_text())
        self.ids = tokens(self.args["vocab_size"])
        self.image = torch.randn(2, 3, 32, 32)
        if name.startswith("roberta"):
            self.ids[self.ids == 1] = 3  # padding, which RoBERTa counts positions around
        self.both_ways = "bert" in name
        self.extra = {}  # beside what every model takes
        if name.startswith("bert"):
            self.extra = {"token_type_ids": torch.zeros_like(self.ids)}
        if name in OWN:
            torch.manual_seed(2)
            self.extra = with_image(self.hf.config, self.ids)
        self.sat = self.load(folder / "sat")

    def load(self, folder):
        if self.name in OWN:
            model = SATCogVLM(self.args).eval()
            model.load_state_dict(torch.load(folder / FILE, weights_only=True)["module"], strict=True)
            return model
        model = load_sat(folder)
        if "bert" in self.name:
            model.mixins["bert-final"].lm_head.layer_norm.eps = 1e-12  # SAT's is 1e-5, whatever the configuration says
        return model

    @torch.no_grad()
    def of_hf(self):
        if self.name == "vit":
            return self.hf(self.image).logits
        if self.name == "chatglm-6b":
            return self.hf(self.ids, answer(self.ids))
        return self.hf(self.ids, **self.extra) if self.name in OWN else run_hf(self.hf, self.ids)

    @torch.no_grad()
    def of_sat(self):
        ids, length = self.ids, self.ids.shape[1]
        if self.name == "vit":
            places = torch.arange(17)[None].expand(2, -1)
            return self.sat(torch.zeros(2, 1, dtype=torch.long), places, torch.ones(1, 1, 17, 17), image=self.image)[0]
        if self.name == "chatglm-6b":
            return self.sat(ids, answer(ids), torch.ones(1, 1, length, length).tril())[0]
        if self.name.startswith("roberta"):
            return self.sat(ids, torch.arange(2, length + 2)[None].expand(2, -1), torch.ones(1, 1, length, length))[0]
        if self.name in OWN:
            return self.sat(ids, **self.extra)
        return run_sat(self.sat, ids, causal=not self.both_ways, **self.extra)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[] if name in OWN else [needs_sat]) for name in MODELS])
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


def test_both_frameworks_compute_the_same(pair):
    ours, theirs = pair.of_sat(), pair.of_hf()
    off = (ours - theirs).abs().max().item() / theirs.abs().max().item()
    assert off <= 1e-5
    if not pair.name.startswith(OTHER_ORDER):
        assert off == 0


READERS = ["llama", "llama-mha", "mistral", "qwen2", "gpt2", "bert", "roberta", "glm", "chatglm2", "mixtral"]


@pytest.mark.parametrize("pair", [pytest.param(name, marks=needs_sat) for name in READERS], indirect=True)
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_is_unseen_by_both(pair, left):
    """Only what sees something is compared: what sees nothing is an average of everything in SAT."""
    ids, length = pair.ids, pair.ids.shape[1]
    seen = torch.ones_like(ids)
    seen[0, :5] = seen[1, :2] = 0
    seen = seen if left else seen.flip(-1)
    places = (seen.cumsum(-1) - 1).clamp(min=0) + 2 * pair.name.startswith("roberta")
    mask = torch.ones(length, length) if pair.both_ways else torch.ones(length, length).tril()
    with torch.no_grad():
        theirs = pair.hf(input_ids=ids, attention_mask=seen, position_ids=places).logits[seen.bool()]
        ours = pair.sat(ids, places, mask * seen[:, None, None], **pair.extra)[0][seen.bool()]
        unmasked = pair.sat(ids, places, mask[None, None], **pair.extra)[0][seen.bool()]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    if pair.both_ways or left:
        assert (unmasked - theirs).abs().max() > 0.1 * theirs.abs().max()


@pytest.mark.parametrize("pair", ["cogvlm", "cogvlm2", pytest.param("chatglm-6b", marks=needs_sat)], indirect=True)
@pytest.mark.parametrize("kind", ["left", "right", "context"])
def test_masks_are_the_same_to_models_of_the_hub(pair, kind):
    """Padding, and a context that sees itself both ways, as ChatGLM-6B has it. The picture begins behind the first token."""
    ids, length = pair.ids, pair.ids.shape[1]
    visible = torch.ones_like(ids)
    if kind != "context":
        visible[0, -5:] = visible[1, -2:] = 0
    visible = visible.flip(-1) if kind == "left" else visible
    seen = torch.ones(length, length).tril() * visible[:, None, None]
    if kind == "context":
        seen[:, :, :, : length - 7] = 1
    extra = {"positions": answer(ids)} if pair.name == "chatglm-6b" else pair.extra
    rows = visible.bool()
    with torch.no_grad():
        theirs, causal = pair.hf(ids, **extra, seen=seen)[rows], pair.hf(ids, **extra)[rows]
        ours = pair.sat(ids, answer(ids), seen)[0] if pair.name == "chatglm-6b" else pair.sat(ids, **extra, seen=seen)
    assert (ours[rows] - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert torch.allclose(causal, theirs, atol=1e-3 * theirs.abs().max().item()) == (kind == "right")


@pytest.mark.parametrize("pair", [pytest.param(name, marks=needs_sat) for name in READERS], indirect=True)
def test_positions_that_begin_later_are_the_same_to_both(pair):
    ids, length = pair.ids, pair.ids.shape[1]
    places = torch.arange(7, 7 + length).expand(2, -1)
    mask = torch.ones(1, 1, length, length)
    with torch.no_grad():
        theirs = pair.hf(input_ids=ids, position_ids=places).logits
        ours = pair.sat(ids, places, mask if pair.both_ways else mask.tril(), **pair.extra)[0]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    absolute = pair.both_ways or pair.name == "gpt2"
    assert torch.allclose(ours, pair.of_sat(), atol=1e-3) != absolute


def test_the_file_holds_what_the_model_has(pair):
    """SAT itself loads without complaint what lacks or has too many names."""
    held = torch.load(pair.folder / "sat" / FILE, weights_only=True)["module"]
    assert held.keys() == pair.sat.state_dict().keys()
    assert not [key for key, tensor in pair.sat.state_dict().items() if tensor.shape != held[key].shape]


def test_every_tensor_counts(pair):
    """Logits follow each tensor of the file: none is carried to a place that is not used."""
    before = pair.of_sat()
    unmoved = []
    for key, tensor in pair.sat.state_dict().items():
        if key.endswith("inv_freq") and pair.name == "chatglm-6b":
            continue  # SAT's class neither loads nor needs it
        kept = tensor.clone()
        with torch.no_grad():
            tensor.mul_(1.5).add_(0.1)
        forget_angles(pair.sat)
        unmoved += [key] * torch.equal(pair.of_sat(), before)
        with torch.no_grad():
            tensor.copy_(kept)
    forget_angles(pair.sat)
    assert torch.equal(pair.of_sat(), before)
    assert unmoved == []


def forget_angles(model):
    """SAT keeps sines and cosines once it has computed them."""
    for module in model.modules():
        if type(module).__name__ == "FastRotaryEmbedding":
            module._seq_len_cached = 0


def test_both_frameworks_compute_the_same_on_the_way_back(pair, tmp_path):
    """What SAT has changed since, HF has after the conversion."""
    torch.manual_seed(3)
    state = OrderedDict(torch.load(pair.folder / "sat" / FILE, weights_only=True)["module"])
    for key, tensor in state.items():
        if not key.endswith("inv_freq"):
            tensor.add_(0.01 * torch.randn_like(tensor))
    shutil.copytree(pair.folder / "sat", tmp_path / "sat")
    torch.save({"module": state}, tmp_path / "sat" / FILE)
    # ChatGLM2 and 3 by the names of transformers: it has the code that computes them, not the names that came with the weights.
    family = {"chatglm2": "glm", "chatglm3": "glm"}.get(pair.name, FAMILY.get(pair.name, "auto"))
    sat_to_hf(tmp_path / "sat", tmp_path / "hf", family=family, allow_rope_theta=True)
    trained = Pair.__new__(Pair)
    trained.__dict__ |= pair.__dict__
    trained.sat = pair.load(tmp_path / "sat")
    if pair.name in (*OWN, "chatglm-6b"):
        trained.hf = type(pair.hf)(pair.hf.config).eval()
        trained.hf.load_state_dict(tensors(tmp_path / "hf"), strict=True)
    else:
        trained.hf = type(pair.hf).from_pretrained(tmp_path / "hf").eval()
    ours, theirs = trained.of_sat(), trained.of_hf()
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert not torch.allclose(ours, pair.of_sat(), atol=1e-2)


@needs_sat
@pytest.mark.parametrize("name", ["llama", "llama-mha", "legacy", "mixtral"])
def test_a_lost_rotary_base_is_repaired(name, tmp_path):
    """In 16 bits SAT computes with the base in its code: no error, no warning, other numbers."""
    kind = "llama" if name == "legacy" else name
    theta = 1e4 if name == "mixtral" else 5e5  # SAT's own are 1e6 and 1e4
    model = save(tmp_path / "hf", kind, rope_parameters={"rope_type": "default", "rope_theta": theta})
    hf_to_sat(tmp_path / "hf", tmp_path / "sat", allow_rope_theta=True)
    if name == "legacy":
        rewrite(tmp_path / "sat", legacy)
    ids, sat = tokens(model.config.vocab_size), load_sat(tmp_path / "sat")
    wanted = run_hf(model, ids)
    assert (run_sat(sat, ids) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    half = sat.half()
    forget_angles(half)
    assert (run_sat(half, ids) - wanted).abs().max() > 0.2 * wanted.abs().max()
    set_rope_theta(half, theta)
    rounded = (run_hf(model.half(), ids) - wanted).abs().max()
    assert (run_sat(half, ids) - wanted).abs().max() <= 4 * rounded


def test_set_rope_theta_wants_a_model_of_sat():
    with pytest.raises(ValueError, match="set_rope_theta: model must be a SAT model with rotary embeddings"):
        set_rope_theta(torch.nn.Linear(2, 2), 5e5)


@needs_sat
@pytest.mark.parametrize(
    "name", ["llama-mha", pytest.param("llama", marks=pytest.mark.slow), pytest.param("qwen2", marks=pytest.mark.slow)]
)
def test_sat_runs_model_parallel_files(name, tmp_path):
    """Two processes, each with its own file; the vocabulary is split from 1000 on."""
    model = save(tmp_path / "hf", name)
    hf_to_sat(tmp_path / "hf", tmp_path / "sat", mp=2)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from checkpoints import load_sat, run_sat, tokens
model = load_sat(sys.argv[2])
logits = run_sat(model, tokens(int(sys.argv[3])))
if torch.distributed.get_rank() == 0:
    torch.save(logits, sys.argv[4])
"""
    arguments = [Path(__file__).parent, tmp_path / "sat", model.config.vocab_size, tmp_path / "logits"]
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            env=os.environ | together | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    wanted = run_hf(model, tokens(model.config.vocab_size))
    assert (torch.load(tmp_path / "logits") - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def rewrite(folder, change):
    """In another layout, by change(module, args), which returns the arguments."""
    module = torch.load(folder / FILE, weights_only=True)["module"]
    args = json.loads((folder / "model_config.json").read_text())
    (folder / "model_config.json").write_text(json.dumps(change(module, args)))
    torch.save({"module": module}, folder / FILE)


def legacy(module, args):
    """Llama in the layout of older checkpoints: gate and rotary embedding are mixins."""
    module["mixins.rotary.rotary_emb.inv_freq"] = module.pop("transformer.position_embeddings.inv_freq")
    for i in range(2):
        module[f"mixins.mlp.gate_proj.{i}.weight"] = module.pop(f"transformer.layers.{i}.mlp.dense_h_to_4h_gate.weight")
    return {key: value for key, value in args.items() if key not in ("is_gated_mlp", "is_rotary_emb")}


def chatglm2_gated(module, args):
    for i in range(2):
        layer, mixin = f"transformer.layers.{i}.mlp.dense_h_to_4h", f"mixins.mlp.w2.{i}.weight"
        module[f"{layer}_gate.weight"] = module.pop(mixin)
    return args | {"model_class": "ChatGLM2Model", "is_gated_mlp": True}


def chatglm4(module, args):
    """Halves of a head turn, not neighbours, and the gate is the layer's."""
    rows = [head * 16 + row for head in range(6) for row in [0, 2, 4, 6, 1, 3, 5, 7, *range(8, 16)]]
    for i in range(2):
        for p in ("weight", "bias"):
            key = f"transformer.layers.{i}.attention.query_key_value.{p}"
            module[key] = module[key][[*rows, *range(96, 128)]]
        layer, mixin = f"transformer.layers.{i}.mlp.dense_h_to_4h.weight", f"mixins.mlp.w2.{i}.weight"
        module[layer], module[mixin] = module[mixin], module[layer]
    return args | {"model_class": "ChatGLM4Model"}


@needs_sat
@pytest.mark.parametrize(("name", "change"), [("llama", legacy), ("glm", chatglm2_gated), ("glm", chatglm4)])
def test_other_layouts_of_sat_are_read(name, change, tmp_path):
    """Made by hand; SAT's class for it says that it is the same model."""
    model = save(tmp_path / "hf", name)
    hf_to_sat(tmp_path / "hf", tmp_path / "sat", family=FAMILY.get(name, "auto"))
    rewrite(tmp_path / "sat", change)
    ids, wanted = tokens(128), run_hf(model, tokens(128))
    assert (run_sat(load_sat(tmp_path / "sat"), ids) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    sat_to_hf(tmp_path / "sat", tmp_path / "back", family=FAMILY.get(name, "auto"))
    assert identical(tensors(tmp_path / "hf"), tensors(tmp_path / "back")) == []
