"""--verify: bit by bit, and by running both frameworks where they are installed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from liger_aot.convert import ConvertError
from liger_aot.convert import hf_to_sat
from liger_aot.convert import sat_to_hf
from liger_aot.convert.families import FAMILIES

from checkpoints import FAMILY
from checkpoints import FILE
from checkpoints import MODELS
from checkpoints import copy
from checkpoints import load_sat
from checkpoints import needs_sat
from checkpoints import put_hf
from checkpoints import refused
from checkpoints import save
from checkpoints import state
from checkpoints import tensors

pytest_plugins = ["converted"]


@pytest.mark.parametrize("bit", [1, -(2**31)], ids=["last", "sign of zero"])
def test_verification_notices_one_bit(bit, hf, tmp_path, monkeypatch):
    from liger_aot.convert import _convert

    fill, key = _convert.fill, "model.layers.1.mlp.down_proj.weight"
    tensor = tensors(hf)[key]
    tensor[3, 5] = 0
    put_hf(hf, {key: tensor})

    def spoil(target, pieces, origin):
        zeros = fill(target, pieces, origin)
        if origin.endswith("model.layers.1.mlp.down_proj.weight"):
            target.view(torch.int32)[3, 5] ^= bit
        return zeros

    monkeypatch.setattr(_convert, "fill", spoil)
    refused(hf_to_sat, hf, "verification failed", "model.layers.1.mlp.down_proj.weight differs", verify=True)


@pytest.mark.parametrize("convert", [hf_to_sat, sat_to_hf])
def test_verification_notices_one_bit_of_the_frequencies(convert, tmp_path, monkeypatch):
    """They are no weights, and what is written of them is checked all the same; only CogVLM's have a place in both."""
    from liger_aot.convert import _convert

    fill, written = _convert.fill, []
    save(tmp_path / "hf", "cogvlm")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")

    def spoil(target, pieces, origin):
        zeros = fill(target, pieces, origin)
        if target.shape == (8,):
            target.view(torch.int32)[3] ^= 1
            written.append(target)
        return zeros

    monkeypatch.setattr(_convert, "fill", spoil)
    key = {hf_to_sat: "mixins.rotary.rotary_emb.inv_freq", sat_to_hf: "model.layers.1.self_attn.rotary_emb.inv_freq"}[convert]
    source = tmp_path / convert.__name__[:3].strip("_")
    refused(convert, source, "verification failed", f"{key} differs from the frequencies of rotary base 10000", verify=True)
    assert written


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


def alone(script, *arguments):
    """What a process of its own prints, in which no framework was imported before."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_sat
@pytest.mark.parametrize("lacks", ["einops", "requests", "colorsys"])
def test_a_framework_that_cannot_be_imported_was_not_run(lacks, tmp_path):
    """pip installs SAT without what it imports; the last stands for what nobody knows yet."""
    script = """
import sys
from liger_aot.convert import hf_to_sat
if sys.argv[3] == "colorsys":  # SAT does not need it: as if it did
    import importlib
    find = importlib.import_module
    def wrong(name, *more, **options):
        if name == "sat.model":
            raise ModuleNotFoundError("No module named 'colorsys'", name="colorsys")
        return find(name, *more, **options)
    importlib.import_module = wrong
else:
    sys.modules[sys.argv[3]] = None
print(hf_to_sat(sys.argv[1], sys.argv[2], verify=True))
"""
    save(tmp_path / "hf")
    report = alone(script, tmp_path / "hf", tmp_path / "sat", lacks)
    (line,) = (line for line in report.splitlines() if "not verified by running: " in line)
    assert "not verified by running: sat is installed, and cannot be imported: " in line
    remedy = (
        "pip install colorsys" if lacks == "colorsys" else "pip install numpy tqdm einops requests && pip install --no-deps S"
    )
    assert remedy in line
    assert lacks in line
    assert "bit for bit" in report
    assert (tmp_path / "sat/latest").is_file()


@needs_sat
@pytest.mark.parametrize("before", [False, True], ids=["fresh", "with a group and a kernel"])
def test_verification_leaves_the_process_as_it_was(before, tmp_path):
    """All but SAT and transformers being imported."""
    script = """
import os, random, sys, types
import numpy, torch
from liger_aot.convert import hf_to_sat, sat_to_hf
kernel = "sat.model.position_embedding.triton_rotary"
os.environ.pop("SAT_LOGLEVEL", None)
torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
if sys.argv[2] == "True":
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    os.environ["SAT_LOGLEVEL"] = "CRITICAL"
    sys.modules[kernel] = types.ModuleType(kernel)
    sys.modules[kernel].apply_rotary = None
    import sat.model

def state():
    rotary = sys.modules.get(kernel + "_embeddings")
    parallel = sys.modules.get("sat.mpu.initialize")
    return [torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()), dict(os.environ),
            sys.modules.get(kernel), sys.argv[2] == "True" and rotary.apply_rotary, torch.distributed.is_initialized(),
            parallel is not None and parallel.model_parallel_is_initialized()]

was = state()
for way, source, target in ((hf_to_sat, "hf", "sat"), (sat_to_hf, "sat", "back")):
    assert "note: verified by running: " in str(way(f"{sys.argv[1]}/{source}", f"{sys.argv[1]}/{target}", verify=True))
    for one, other in zip(was, state(), strict=True):
        assert one == other, (way, str(one)[:200], str(other)[:200])
"""
    save(tmp_path / "hf")
    alone(script, tmp_path, before)


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


@needs_sat
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize("name", ["llama", "glm"])
def test_verification_runs_both_with_the_frequencies_that_were_decided_on(name, kind, tmp_path):
    """A model that was saved in 16 bits has them rounded, and one may lack them; transformers computes them exactly."""
    save(tmp_path / "hf", name)
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    module = state(tmp_path / "sat")
    (key,) = (key for key in module if key.endswith("inv_freq"))
    module = {key: tensor.to(kind) for key, tensor in module.items()} if kind else module
    if kind is None:
        module.pop(key)
    torch.save({"module": module}, tmp_path / "sat" / FILE)
    report = str(sat_to_hf(tmp_path / "sat", tmp_path / "back", verify=True))
    assert "random tokens differ by 0 of the largest" in report
    assert "; both with the exact frequencies of rotary base 10000" in report


@needs_sat
def test_verification_runs_where_sats_process_group_is_gone(tmp_path):
    """SAT keeps what it made of it."""
    save(tmp_path / "hf")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    load_sat(tmp_path / "sat")
    torch.distributed.destroy_process_group()
    assert "verified by running" in str(hf_to_sat(tmp_path / "hf", tmp_path / "again", verify=True))


@needs_sat
def test_verification_does_not_excuse_other_tensors(tmp_path, monkeypatch):
    """What SAT's class has and no rule writes is missing to SAT's loader."""
    save(tmp_path / "hf")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    load_sat(tmp_path / "sat")  # with what takes the place of its kernel
    import sat.model

    init = sat.model.official.LLaMAModel.__init__

    def more(self, *arguments, **options):
        init(self, *arguments, **options)
        self.register_buffer("scale_freq", torch.ones(2))

    monkeypatch.setattr(sat.model.official.LLaMAModel, "__init__", more)
    with pytest.raises(ConvertError, match=r"sat cannot run it: ValueError: Missing keys for inference: \['scale_freq'\]"):
        hf_to_sat(tmp_path / "hf", tmp_path / "again", verify=True)


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
