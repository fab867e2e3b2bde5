"""A bound model as people see it: its print, the names of its classes, its state dict."""

import pytest

import liger_aot

from binding import bound


def line(model, name):
    """The line of print(model) where a class's name stands."""
    return next(text for text in str(model).splitlines() if f"{name}(" in text)


@pytest.mark.parametrize(
    ("family", "was", "formula"),
    [
        ("llama", "LlamaRMSNorm", ["llama"]),
        ("gemma", "GemmaRMSNorm", ["gemma", "1"]),
        ("olmo2", "Olmo2RMSNorm", ["gemma"]),
    ],
)
def test_print_shows_each_norm_with_formula_eps_and_the_class_it_was(family, was, formula):
    shown = line(bound(family, rms_norm_eps=3e-5)[0], "LigerRMSNorm")
    assert was in shown
    assert "3e-05" in shown
    for word in formula:
        assert word in shown.replace("3e-05", "").replace(was, "")


def test_print_shows_every_kind_of_bound_module():
    text = str(bound()[0])
    for name, was in {"LigerRMSNorm": "LlamaRMSNorm", "LigerSwiGLUMLP": "LlamaMLP"}.items():
        assert f": {name}(" in text
        assert f"was={was}" in text
        assert f": {was}(" not in text
    assert "(lm_head): LigerLMHead(" in text
    assert "LigerGEGLUMLP(" in str(bound("gemma")[0])
    assert "LigerLayerNorm(" in str(bound("gpt2")[0])


def test_attention_head_and_model_say_what_was_bound(model):
    before = [m.extra_repr() for m in (model.model.layers[0].self_attn, model.lm_head, model)]
    liger_aot.bind(model)
    attention, head, whole = (m.extra_repr() for m in (model.model.layers[0].self_attn, model.lm_head, model))
    assert "rope" in attention
    assert "loss" in head
    assert before[1] in head  # in_features and out_features are still to be seen
    assert "loss" in whole
    assert all(text in str(model) for text in (attention, head, whole))


def test_classes_are_subclasses_and_models_and_attention_keep_their_names(model):
    kinds = [type(m) for m in model.modules()]
    liger_aot.bind(model)
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds, strict=True))
    assert any(type(m) is not kind for m, kind in zip(model.modules(), kinds, strict=True))
    for module, kind in zip(model.modules(), kinds, strict=True):
        assert type(module).__module__ == kind.__module__
        if module is model or kind.__name__.endswith(("Attention", "Layer")):
            assert (type(module).__name__, type(module).__qualname__) == (kind.__name__, kind.__qualname__)


def test_state_dict_has_the_same_keys_and_storages(model):
    before = model.state_dict()
    parameters = list(model.parameters())
    liger_aot.bind(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
