"""Configurations both ways: which family it is, what is taken where nothing is said, and what came through with the weights."""

import json
import random
import shutil

import pytest
import torch

from liger_aot.convert import ConvertError
from liger_aot.convert import hf_to_sat
from liger_aot.convert import sat_to_hf
from liger_aot.convert._error import Problems
from liger_aot.convert._settings import Settings
from liger_aot.convert.families import FAMILIES

from checkpoints import FAMILY
from checkpoints import IDLE
from checkpoints import MODELS
from checkpoints import OWN_CODE
from checkpoints import edit
from checkpoints import identical
from checkpoints import refused
from checkpoints import save
from checkpoints import tensors

pytest_plugins = ["converted"]


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


def test_configuration_of_its_own_comes_through(hf, tmp_path):
    """What SAT's arguments cannot say is kept, and what they do say wins."""
    edit(hf / "config.json", use_cache=False, initializer_range=0.5)
    hf_to_sat(hf, tmp_path / "sat")
    edit(tmp_path / "sat/model_config.json", max_sequence_length=32)
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["use_cache"], config["initializer_range"], config["max_position_embeddings"]) == (False, 0.5, 32)


def test_keys_of_version_4_are_read(hf, tmp_path):
    edit(hf / "config.json", drop=("rope_parameters", "dtype"), rope_theta=5e5, torch_dtype="float32")
    refused(hf_to_sat, hf, "the rotary base is 500000, LLaMAModel computes with 10000")
    hf_to_sat(hf, tmp_path / "sat", allow_rope_theta=True)
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_names_that_no_file_can_hold_come_through(hf, tmp_path):
    """JSON may hold half of a pair of surrogates, which UTF-8 cannot."""
    name = "\ud800"
    edit(hf / "config.json", _name_or_path=name)
    hf_to_sat(hf, tmp_path / "sat")
    assert json.loads((tmp_path / "sat/model_config.json").read_text())["tokenizer_type"] == name


def test_names_of_classes_come_back(tmp_path):
    save(tmp_path / "hf", "vit", id2label={k: f"a {k}" for k in range(5)}, label2id={f"a {k}": k for k in range(5)})
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["id2label"]["3"] == "a 3"


def test_a_window_as_long_as_the_texts_hides_nothing(hf, tmp_path):
    edit(hf / "config.json", sliding_window=64)
    hf_to_sat(hf, tmp_path / "sat")


WINDOWS = [
    ("mistral", {"use_sliding_window": False}, True),
    ("mistral", {"layer_types": ["full_attention"] * 2}, False),
    ("mixtral", {"use_sliding_window": False}, True),
    ("mixtral", {"layer_types": ["full_attention"] * 2}, True),
    ("qwen2", {"use_sliding_window": False}, False),
    ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"] * 2}, False),
    ("llama", {"use_sliding_window": False}, False),
]


@pytest.mark.parametrize(("name", "switch", "used"), WINDOWS, ids=str)
def test_a_window_is_off_where_transformers_has_it_off(name, switch, used, tmp_path):
    """Not every model reads each switch; what sees no further than the window has other logits behind it."""
    import transformers

    model = save(tmp_path / "hf", name)
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    for side in ("hf", "sat"):
        edit(tmp_path / side / "config.json", drop=("layer_types",))
        edit(tmp_path / side / "config.json", **({"sliding_window": 8} | switch))
    windowed, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), torch.arange(20)[None]
    with torch.no_grad():
        off = (windowed(ids).logits - model(ids).logits).abs().max()
    assert (off > 0.1) == used
    for convert, side in ((hf_to_sat, "hf"), (sat_to_hf, "sat")):
        if used:
            refused(convert, tmp_path / side, "sliding_window is 8, less than max_position_embeddings 64")
        else:
            convert(tmp_path / side, tmp_path / f"from-{side}")


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
    said = {key: value for key, value in args.items() if key != "tokenizer_type"}
    return said, family.sizes(config, args), family.theta(config)


@pytest.mark.parametrize(("name", "bos", "eos"), [("llama", 1, 2), ("qwen2", None, None), ("mixtral", 1, 2)])
def test_tokens_that_are_not_said_are_those_of_transformers(name, bos, eos, tmp_path):
    """SAT's LLaMAModel takes 0 and 1 where its arguments say nothing. None at all is said as well, both ways."""
    import transformers

    keys = ("bos_token_id", "eos_token_id")
    save(tmp_path / "hf", name)
    for side, change in (("unsaid", {}), ("none", dict.fromkeys(keys))):
        shutil.copytree(tmp_path / "hf", tmp_path / side)
        edit(tmp_path / side / "config.json", drop=keys)
        edit(tmp_path / side / "config.json", **change)
        hf_to_sat(tmp_path / side, tmp_path / f"{side}-sat")
        args = json.loads((tmp_path / f"{side}-sat/model_config.json").read_text())
        read = transformers.AutoConfig.from_pretrained(tmp_path / side)
        wanted = (None, None) if side == "none" else (bos, eos)
        assert (args["bos_token_id"], args["eos_token_id"]) == (read.bos_token_id, read.eos_token_id) == wanted
        (tmp_path / f"{side}-sat/config.json").unlink()
        sat_to_hf(tmp_path / f"{side}-sat", tmp_path / f"{side}-back")
        back = transformers.AutoConfig.from_pretrained(tmp_path / f"{side}-back")
        assert (back.bos_token_id, back.eos_token_id) == wanted


@pytest.mark.parametrize(("name", "said"), [("cogvlm", (1, 2, 0)), ("cogvlm2", (128000, 128001, None))])
def test_tokens_that_cogvlm_does_not_say_are_those_of_its_code(name, said, tmp_path):
    save(tmp_path / "hf", name)
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    args = json.loads((tmp_path / "sat/model_config.json").read_text())
    assert tuple(args.get(f"{key}_token_id") for key in ("bos", "eos", "pad")) == said


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


def test_a_family_does_not_take_a_model_for_its_names(hf):
    """Granite, Helium and others have Llama's names and compute something else."""
    edit(hf / "config.json", model_type="granite")
    refused(hf_to_sat, hf, "no family for 'granite'; there are")
    refused(hf_to_sat, hf, "model_type is 'granite'; llama converts 'llama' or 'mistral' or 'qwen2' alone", family="llama")


def test_a_family_that_cannot_be_told_must_be_said(tmp_path):
    save(tmp_path / "hf", "chatglm3")
    refused(hf_to_sat, tmp_path / "hf", "may be one of several, say which: --family chatglm2 or chatglm3")


def test_a_class_of_another_family_is_refused(tmp_path):
    """ChatGLM4Model has its heads otherwise, under the same names and in the same shapes."""
    save(tmp_path / "hf", "chatglm3")
    hf_to_sat(tmp_path / "hf", tmp_path / "sat", family="chatglm3")
    (tmp_path / "sat/config.json").unlink()
    edit(tmp_path / "sat/model_config.json", model_class="ChatGLM4Model", drop=("base_scale",))
    for family, own in (("chatglm2", "ChatGLM2Model"), ("chatglm3", "ChatGLM3Model")):
        text = f"model_config.json: model_class is 'ChatGLM4Model'; {family} converts {own} alone"
        refused(sat_to_hf, tmp_path / "sat", text, family=family)


@pytest.mark.parametrize("name", ["cogvlm", "glm"])
def test_a_class_that_was_trained_is_its_family(name, tmp_path):
    save(tmp_path / "hf", name)
    hf_to_sat(tmp_path / "hf", tmp_path / "sat")
    own = json.loads((tmp_path / "sat/model_config.json").read_text())["model_class"]
    edit(tmp_path / "sat/model_config.json", model_class=f"FineTuneTrain{own}")
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
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
