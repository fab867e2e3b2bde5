"""unbind gives everything back, and no other model, class or global is touched meanwhile."""

import gc
import weakref

import pytest
import torch
import transformers
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.mixtral import modeling_mixtral

import liger_aot

from binding import LAYERS
from binding import bound
from binding import check_runs_bound
from binding import check_runs_plain
from tiny import batch
from tiny import build
from tiny import check_equal
from tiny import check_identical
from tiny import operators
from tiny import step


def snapshot(model):
    """Each module's path, class and attributes, dicts among them with their contents."""
    return [
        (path, type(m), {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in vars(m).items()})
        for path, m in model.named_modules()
    ]


def check_same_objects(got, expected):
    assert [entry[:2] for entry in got] == [entry[:2] for entry in expected]
    for (path, _, now), (_, _, then) in zip(got, expected, strict=True):
        assert list(now) == list(then), path
        for name in then:
            assert now[name][0] is then[name][0] or now[name][0] == then[name][0], f"{path}.{name}"
            if then[name][1] is not None:
                assert [(k, id(v)) for k, v in now[name][1].items()] == [(k, id(v)) for k, v in then[name][1].items()]


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "mixtral", "gpt2", "bert", "bart", "t5", "falcon_h1", "bamba"])
def test_unbind_gives_back_every_class_attribute_and_bit(family):
    model = build(family)
    expected = step(model, **batch())
    text, before = str(model), snapshot(model)
    config = model.config.to_dict()
    report = liger_aot.bind(model)
    assert report.bound
    check_equal(step(model, **batch()), expected)
    liger_aot.unbind(model)
    model.zero_grad()
    check_same_objects(snapshot(model), before)
    assert str(model) == text
    assert model.config.to_dict() == config
    with operators() as seen:
        check_identical(step(model, **batch()), expected)
    assert not seen


def test_unbinding_twice_or_what_was_never_bound_changes_nothing(model):
    before = snapshot(model)
    liger_aot.unbind(model)
    check_same_objects(snapshot(model), before)
    liger_aot.bind(model)
    liger_aot.unbind(model)
    liger_aot.unbind(model)
    check_same_objects(snapshot(model), before)


def test_bound_again_after_unbind(model, plain):
    for _ in range(2):
        liger_aot.bind(model)
        check_runs_bound(model, plain)
        liger_aot.unbind(model)
    check_runs_plain(model, plain)


GLOBALS = [
    modeling_llama,
    modeling_mixtral,
    modeling_gpt2,
    modeling_llama.LlamaRMSNorm,
    modeling_llama.LlamaMLP,
    modeling_llama.LlamaAttention,
    modeling_llama.LlamaForCausalLM,
    modeling_llama.LlamaPreTrainedModel,
    modeling_mixtral.MixtralExperts,
    transformers.PreTrainedModel,
    transformers.loss.loss_utils,
    torch,
    torch.nn,
    torch.nn.Linear,
    torch.nn.LayerNorm,
    torch.nn.Module,
    torch.nn.functional,
    torch.Tensor,
]


def of(place):
    """Its names and what they stand for; caches that fill as programs run aside."""
    return {name: value for name, value in vars(place).items() if name not in ("__warningregistry__", "__abstractmethods__")}


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_no_global_class_or_other_model_is_touched(family):
    model, other = build(family), build(family)
    expected = step(other, **batch())  # also fills what torch fills at a first use
    text, before, places = str(other), snapshot(other), [of(place) for place in GLOBALS]
    losses = dict(LOSS_MAPPING)
    liger_aot.bind(model)
    step(model, **batch())
    for place, then in zip(GLOBALS, places, strict=True):
        now = of(place)
        assert now.keys() == then.keys(), place
        assert all(now[name] is then[name] for name in then), place
    assert losses == LOSS_MAPPING
    assert str(other) == text
    other.zero_grad()
    check_same_objects(snapshot(other), before)
    with operators() as seen:
        check_identical(step(other, **batch()), expected)
        check_identical(step(build(family), **batch()), expected)
    assert not seen


def test_models_bound_differently_side_by_side(plain):
    first, second = build(), build()
    liger_aot.bind(first, swiglu=False)
    liger_aot.bind(second, rms_norm=False)
    for model, missing in (first, "swiglu_fwd"), (second, "rms_norm_fwd"):
        with operators() as seen:
            check_equal(step(model, **batch()), plain)
        assert missing not in seen
        assert len(LAYERS & set(seen)) == 4


def test_a_bound_model_is_freed_when_dropped():
    model, report = bound()
    step(model, **batch())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert report.counts["fused"] == 1
