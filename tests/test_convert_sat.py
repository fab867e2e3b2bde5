"""Converted checkpoints run by SwissArmyTransformer itself: the same model in both frameworks, every parameter drawn at random.

CogVLM's model code is in no package: both of its sides are small references of our own.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from references import SATCogVLM
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from liger_aot.convert import ConvertError
from liger_aot.convert import hf_to_sat
from liger_aot.convert import sat_to_hf
from liger_aot.convert import set_rope_theta
from liger_aot.convert._parallel import Layout
from liger_aot.convert._parallel import local_shape

from checkpoints import FAMILY
from checkpoints import MODELS
from checkpoints import answer
from checkpoints import identical
from checkpoints import load_sat
from checkpoints import run_hf
from checkpoints import run_sat
from checkpoints import save
from checkpoints import tensors
from checkpoints import tokens
from checkpoints import with_image

needs_sat = pytest.mark.skipif(
    not any((Path(path) / "sat/model/official").is_dir() for path in sys.path),
    reason="SwissArmyTransformer is not installed: pip install --no-deps SwissArmyTransformer==0.4.12",
)
OWN = ("cogvlm", "cogvlm2")
# Where SAT multiplies and adds in another order than transformers does: matrices the other way round, experts one by one.
OTHER_ORDER = ("gpt2", "mixtral")
FILE = "1/mp_rank_00_model_states.pt"


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
        bert = self.name.startswith("bert")
        more = {"token_type_ids": torch.zeros_like(ids)} if bert else {}
        return run_sat(self.sat, ids, causal=not bert, **more)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[] if name in OWN else [needs_sat]) for name in MODELS])
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


def split_by_sat(name, model):
    """How the class of the module that holds a parameter splits it."""
    module, _, own = name.rpartition(".")
    kind = {"ColumnParallelLinear": "column", "RowParallelLinear": "row", "VocabParallelEmbedding": "column"}.get(
        type(model.get_submodule(module)).__name__, ""
    )
    return "" if kind == "row" and own == "bias" else kind


@needs_sat
@pytest.mark.parametrize("name", [name for name in MODELS if name not in OWN and name != "llama-mqa"])
def test_ranks_split_what_sats_classes_split(name, tmp_path):
    """A vocabulary of 1000 or more is split with its embedding."""
    save(tmp_path / "hf", name, **({} if name == "vit" else {"vocab_size": 1024}))
    for folder, mp in (("one", 1), ("two", 2)):
        hf_to_sat(tmp_path / "hf", tmp_path / folder, mp=mp, family=FAMILY.get(name, "auto"), allow_rope_theta=True)
    whole, part = (torch.load(tmp_path / folder / FILE, weights_only=True)["module"] for folder in ("one", "two"))
    model, found = load_sat(tmp_path / "one"), []
    for key, tensor in whole.items():
        found.append(split_by_sat(key, model))
        assert part[key].shape == local_shape(tensor.shape, Layout(found[-1], ()), 2), key
    assert {"column", "row", ""} <= set(found)


def test_both_frameworks_compute_the_same(pair):
    ours, theirs = pair.of_sat(), pair.of_hf()
    off = (ours - theirs).abs().max().item() / theirs.abs().max().item()
    assert off <= 1e-5
    if not pair.name.startswith(OTHER_ORDER):
        assert off == 0


# Those that transformers itself computes from tokens.
READERS = ["llama", "llama-mha", "mistral", "qwen2", "gpt2", "bert", "roberta", "glm", "chatglm2", "mixtral"]


@pytest.mark.parametrize("pair", [pytest.param(name, marks=needs_sat) for name in READERS], indirect=True)
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_is_unseen_by_both(pair, left):
    """Only what sees something is compared: what sees nothing is an average of everything in SAT."""
    ids, length = pair.ids, pair.ids.shape[1]
    seen = torch.ones_like(ids)
    seen[0, :5] = seen[1, :2] = 0
    seen = seen if left else seen.flip(-1)
    both_ways = "bert" in pair.name
    places = (seen.cumsum(-1) - 1).clamp(min=0) + 2 * pair.name.startswith("roberta")
    mask = torch.ones(length, length) if both_ways else torch.ones(length, length).tril()
    more = {"token_type_ids": torch.zeros_like(ids)} if pair.name.startswith("bert") else {}
    with torch.no_grad():
        theirs = pair.hf(input_ids=ids, attention_mask=seen, position_ids=places).logits[seen.bool()]
        ours = pair.sat(ids, places, mask * seen[:, None, None], **more)[0][seen.bool()]
        unmasked = pair.sat(ids, places, mask[None, None], **more)[0][seen.bool()]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    if both_ways or left:
        assert (unmasked - theirs).abs().max() > 0.1 * theirs.abs().max()


@pytest.mark.parametrize("pair", [pytest.param(name, marks=needs_sat) for name in READERS], indirect=True)
def test_positions_that_begin_later_are_the_same_to_both(pair):
    ids, length = pair.ids, pair.ids.shape[1]
    places = torch.arange(7, 7 + length).expand(2, -1)
    both_ways = "bert" in pair.name
    mask = torch.ones(1, 1, length, length)
    more = {"token_type_ids": torch.zeros_like(ids)} if pair.name.startswith("bert") else {}
    with torch.no_grad():
        theirs = pair.hf(input_ids=ids, position_ids=places).logits
        ours = pair.sat(ids, places, mask if both_ways else mask.tril(), **more)[0]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    absolute = both_ways or pair.name == "gpt2"
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


@needs_sat
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta", "glm", "mixtral", "vit"])
def test_verification_runs_both(name, tmp_path):
    save(tmp_path / "hf", name)
    there = hf_to_sat(tmp_path / "hf", tmp_path / "sat", family=FAMILY.get(name, "auto"), verify=True)
    back = sat_to_hf(tmp_path / "sat", tmp_path / "back", family=FAMILY.get(name, "auto"), verify=True)
    for report in (there, back):
        assert "verified by running: logits of " in str(report)
        assert "100.0% agree on the first choice" in str(report)
        assert ("loss" in str(report)) == (name != "vit")


def as_pretraining(folder):
    """BERT with its pooler and the prediction of the next sentence, as it was trained."""
    import transformers

    torch.manual_seed(0)
    transformers.BertForPreTraining(transformers.BertConfig(**MODELS["bert"][1])).save_pretrained(folder)


def as_base_model(folder):
    """GPT-2 without its tied head, as the hub has it."""
    save(folder, "gpt2")
    state = {key.removeprefix("transformer."): tensor for key, tensor in tensors(folder).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    rename(folder, ["GPT2Model"])


def without_architectures(folder):
    save(folder, "qwen2")
    rename(folder, None)


def rename(folder, architectures):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": architectures}))


@needs_sat
@pytest.mark.parametrize("make", [as_pretraining, as_base_model, without_architectures])
def test_verification_takes_the_model_with_the_head_that_was_converted(make, tmp_path):
    make(tmp_path / "hf")
    assert "verified by running: " in str(hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True))
    assert "verified by running: " in str(sat_to_hf(tmp_path / "sat", tmp_path / "back", verify=True))


@needs_sat
def test_verification_says_what_a_framework_has_against_it(tmp_path):
    save(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"use_cache": "never"}))
    with pytest.raises(
        ConvertError, match=r"sat: verification failed, nothing was written\n  transformers cannot run it: .*use_cache"
    ):
        hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True)
    del config["model_type"]
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    report = hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True, family="llama")
    assert "not verified by running: " in str(report)
    assert "has no model_type, by which transformers chooses the model" in str(report)


@needs_sat
def test_verification_says_that_sat_lacks_a_class_of_the_users(tmp_path):
    save(tmp_path / "hf", "glm")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    config = json.loads((tmp_path / "sat/model_config.json").read_text()) | {"model_class": "FineTuneChatGLM3Model"}
    (tmp_path / "sat/model_config.json").write_text(json.dumps(config))
    report = sat_to_hf(tmp_path / "sat", tmp_path / "back", verify=True)
    assert "not verified by running: SAT has no FineTuneChatGLM3Model, which derives from one of its classes" in str(report)


@needs_sat
def test_verification_notices_a_little(tmp_path, monkeypatch):
    """Ten times what rounding makes of these models, a hundredth of what a wrong tensor does."""
    from liger_aot.convert.families import FAMILIES

    def spoil(family, model, args):
        model.mixins["lm"].lm_head.weight.data.mul_(1 + 2e-5)

    monkeypatch.setattr(type(FAMILIES["llama"]), "prepare_sat", spoil)
    save(tmp_path / "hf")
    with pytest.raises(ConvertError, match=r"differ by 2e-05 of the largest(.|\n)*at most 1e-05 is rounding"):
        hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True)


@needs_sat
@pytest.mark.parametrize(
    ("convert", "moment"),
    [("hf_to_sat", "sat.training.model_io.load_checkpoint"), ("sat_to_hf", "liger_aot.convert._verify.loss")],
)
def test_a_run_killed_while_both_run_leaves_nothing_loadable(convert, moment, tmp_path):
    save(tmp_path / "hf")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    (tmp_path / "out").mkdir()
    (tmp_path / "tmp").mkdir()
    script = f"""
import importlib, os, signal
from liger_aot import convert
from liger_aot.convert import _verify
from checkpoints import load_sat
load_sat({str(tmp_path / "sat")!r})
def die(*unused, **options):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(importlib.import_module({moment.rpartition(".")[0]!r}), {moment.rpartition(".")[2]!r}, die)
convert.{convert}({str(tmp_path / convert[:3].strip("_"))!r}, {str(tmp_path / "out/x")!r}, verify=True)
"""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": path}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "out").iterdir()
    last, also = {"hf_to_sat": ("latest", "model_config.json"), "sat_to_hf": ("config.json", "model.safetensors")}[convert]
    assert (left / also).is_file()
    assert not (left / last).exists()
    for folder in (left, *(tmp_path / "tmp").iterdir()):
        with pytest.raises((OSError, ValueError)):
            load_sat(folder)
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder)


@needs_sat
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_verification_holds_casts_to_what_was_cast(dtype, tmp_path):
    save(tmp_path / "hf")
    there = hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True)
    back = sat_to_hf(tmp_path / "sat", tmp_path / "back", dtype=dtype, verify=True)
    again = hf_to_sat(tmp_path / "hf", tmp_path / "cast", dtype=dtype, verify=True)
    for report in (there, back, again):
        assert "random tokens differ by 0 of the largest" in str(report)


@needs_sat
def test_verification_notices_a_wrong_place(tmp_path, monkeypatch):
    """Bits may all be there and in the wrong place: gate and up exchanged both ways come back as they were."""
    from liger_aot.convert._rules import Copy
    from liger_aot.convert.families import FAMILIES

    family = FAMILIES["llama"]
    swapped = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    rules = []
    for rule in family.rules:
        name = next((part for part in swapped if part in "".join(rule.hf)), None)
        moved = (
            rule
            if name is None
            else Copy(rule.hf[0].replace(name, swapped[name]), rule.sat[0], rule.sat_dims[0], rule.mp, rule.when)
        )
        rules.append(moved)
    monkeypatch.setattr(type(family), "rules", tuple(rules))
    save(tmp_path / "hf")
    with pytest.raises(ConvertError, match=r"verification failed, nothing was written\n  logits of 62 random tokens differ by"):
        hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True)
    assert not (tmp_path / "sat").exists()


@needs_sat
def test_verification_reads_the_users_text(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers import models
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "it", "for", "long"]
    model = models.WordLevel({word: k for k, word in enumerate(["[UNK]", *words])} | {"far": 500}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    save(tmp_path / "hf")
    (tmp_path / "text").write_text("the cat looked at a mat and sat on it")
    with pytest.raises(ConvertError, match="--text needs a tokenizer there"):
        hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True, text=tmp_path / "text")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "hf")
    for got, text in enumerate(["", "the"]):
        (tmp_path / "short").write_text(text)
        with pytest.raises(ConvertError, match=rf"short: must be two tokens or more, got {got}"):
            hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True, text=tmp_path / "short")
    (tmp_path / "short").write_text("far far")
    with pytest.raises(ConvertError, match="hf: its tokenizer makes token 500, of vocab_size 128"):
        hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True, text=tmp_path / "short")
    report = hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True, text=tmp_path / "text")
    assert f"logits of 10 tokens of {tmp_path / 'text'}" in str(report)
    assert "loss" in str(report)
    assert "10 tokens" in str(sat_to_hf(tmp_path / "sat", tmp_path / "back", verify=True, text=tmp_path / "text"))


@needs_sat
@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": "{}", "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}'},
        {"tokenizer_config.json": "[]"},
        {"tokenizer.json": "garbage", "tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'},
    ],
    ids=str,
)
def test_verification_says_that_a_tokenizer_is_none(files, tmp_path):
    save(tmp_path / "hf")
    (tmp_path / "text").write_text("the cat sat")
    for name, text in files.items():
        (tmp_path / "hf" / name).write_text(text)
    with pytest.raises(ConvertError, match="hf: --text needs a tokenizer there: "):
        hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True, text=tmp_path / "text")
    assert not (tmp_path / "sat").exists()


@needs_sat
def test_verification_runs_what_deepspeed_saved(tmp_path):
    """SAT's own loader refuses the state of numpy's generator, which was read before without running anything."""
    import numpy

    save(tmp_path / "hf")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    module = torch.load(tmp_path / "sat" / FILE, weights_only=True)["module"]
    torch.save({"module": module, "iteration": 7, "np_rng_state": numpy.random.get_state()}, tmp_path / "sat" / FILE)
    assert "verified by running: " in str(sat_to_hf(tmp_path / "sat", tmp_path / "back", verify=True))


@needs_sat
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"vocab_size": 3, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}, "random tokens differ by 0"),
        ({"max_position_embeddings": 2}, "not verified by running: texts of max_sequence_length 2 are too short to compare"),
    ],
    ids=str,
)
def test_verification_of_the_smallest_models(change, text, tmp_path):
    save(tmp_path / "hf", **change)
    assert text in str(hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True))


@needs_sat
def test_verification_sees_the_users_picture(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pillow, which opens pictures, is not installed")
    save(tmp_path / "hf", "vit")
    image.effect_noise((50, 40), 60).convert("RGB").save(tmp_path / "noise.png")
    settings = tmp_path / "hf/preprocessor_config.json"
    for text, why in {"{": "not JSON", '{"image_mean": [0.5]}': "three numbers, got", '{"image_std": "x"}': "got 'x'"}.items():
        settings.write_text(text)
        with pytest.raises(ConvertError, match=f"preprocessor_config.json: .*{why}"):
            hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True, image=tmp_path / "noise.png")
    settings.unlink()
    (tmp_path / "none.png").write_text("no picture")
    with pytest.raises(ConvertError, match=r"none.png: not a picture that pillow reads"):
        hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True, image=tmp_path / "none.png")
    report = hf_to_sat(tmp_path / "hf", tmp_path / "sat", verify=True, image=tmp_path / "noise.png")
    assert f"logits of {tmp_path / 'noise.png'} differ by" in str(report)


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
