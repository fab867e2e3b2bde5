"""What others do to a model's parts, before bind, after it and in other threads: the bound model follows as the plain one."""

import collections
import dataclasses
import threading
import types

import pytest
import torch
from accelerate.hooks import ModelHook
from accelerate.hooks import add_hook_to_module
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

import liger_aot
from liger_aot.bind._lazy import lazy_logits
from liger_aot.bind._swap import without_lazy

from tiny import VOCABULARY
from tiny import WIDTH
from tiny import batch
from tiny import build
from tiny import check_equal
from tiny import step


def double_output(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)


def double_input(model):
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def nothing_of_the_activation(model):
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, output: output * 0)


def another_activation(model):
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()


def another_forward_of_the_activation(model):
    act = model.model.layers[0].mlp.act_fn
    act.forward = lambda x: type(act).forward(act, x) * 2


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return output * 2


def accelerates_hook_on_the_activation(model):
    add_hook_to_module(model.model.layers[0].mlp.act_fn, Doubling())


CHANGES = [
    double_output,
    double_input,
    nothing_of_the_activation,
    another_activation,
    another_forward_of_the_activation,
    accelerates_hook_on_the_activation,
]


@pytest.mark.parametrize("options", [{}, {"linear_cross_entropy": False, "cross_entropy": True}], ids=str)
@pytest.mark.parametrize("first", ["bind", "change"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_act_once_as_on_the_plain_model(change, first, options):
    plain, bound = build("llama"), build("llama")
    before = step(plain, **batch())["loss"]
    change(plain)
    acts = [lambda m: liger_aot.bind(m, **options), change]
    for act in acts if first == "bind" else acts[::-1]:
        act(bound)
    expected = step(plain, **batch())
    assert not torch.equal(expected["loss"], before)
    check_equal(step(bound, **batch()), expected)


def test_an_activation_with_a_forward_of_its_own_is_shadowed():
    model = build("llama")
    another_forward_of_the_activation(model)
    row, other = (row for row in liger_aot.bind(model) if row.operator == "swiglu")
    assert (row.status, row.why) == ("shadowed", "this SiLUActivation has a forward of its own")
    assert other.status == "bound"


def test_a_hook_on_the_head_is_counted():
    model = build("llama")
    report = liger_aot.bind(model)
    double_output(model)
    step(model, **batch())
    assert report.counts == {"materialised: a hook on the head": 1}


@pytest.mark.parametrize("register", ["register_module_full_backward_hook", "register_module_full_backward_pre_hook"])
def test_a_hook_on_everybodys_backward_sees_what_it_does_on_the_plain_model(register):
    seen = {}
    for binding in (False, True):
        model = build("llama")
        report = liger_aot.bind(model) if binding else None
        names = {module: name for name, module in model.named_modules() if name == "lm_head" or name.endswith("act_fn")}
        calls = seen[binding] = []

        def hook(module, *gradients, names=names, calls=calls):
            if module in names:
                calls.append((names[module], gradients[-1][0].shape))

        handle = getattr(torch.nn.modules.module, register)(hook)
        try:
            step(model, **batch())
        finally:
            handle.remove()
    assert seen[True] == seen[False]
    assert len(seen[True]) == 3
    assert report.counts == {"materialised: a hook on the head": 1}


def test_a_dropout_switched_on_after_bind_is_one():
    model = build("llama")
    mlp = model.model.layers[0].mlp
    mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU())
    mlp.act_fn.p = 0.0
    liger_aot.bind(model)
    assert type(mlp).__name__ == "LigerSwiGLUMLP"
    called = []
    mlp.act_fn[0].forward = lambda x: called.append(x) or torch.nn.functional.silu(x)
    model(**batch())
    assert not called
    mlp.act_fn.p = 0.5
    model(**batch())
    assert called


def test_two_threads_have_lazy_logits_of_their_own():
    model = build("llama").train()
    liger_aot.bind(model)
    inside, done, seen = threading.Event(), threading.Event(), []

    def wait(module, args):
        if threading.current_thread() is other:
            inside.set()
            done.wait(60)

    model.model.norm.register_forward_pre_hook(wait)
    other = threading.Thread(target=lambda: model(**batch()).loss.backward())
    other.start()
    assert inside.wait(60)  # the other is about to ask its head for lazy logits
    seen.append(model(input_ids=batch()["input_ids"]).logits)
    done.set()
    other.join()
    seen.append(model(input_ids=batch()["input_ids"]).logits)
    assert all(type(logits) is torch.Tensor for logits in seen)


class Int8Linear(torch.nn.Linear):
    """A quantised layer, as far as it matters here: its weight is integers, and its forward its own."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.detach().abs().max() / 127
        whole = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(whole, requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def quantised():
    model = build("llama")
    for layer in model.model.layers:
        for name, child in list(layer.mlp.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(layer.mlp, name, Int8Linear(child))
    return model


def test_quantised_layers_keep_their_forwards_and_their_gate_is_bound():
    plain, model = quantised(), quantised()
    report = liger_aot.bind(model)
    assert [row.operator for row in report.bound if row.path.endswith("mlp")] == ["swiglu"] * 2
    check_equal(step(model, **batch()), step(plain, **batch()))


def test_what_a_forward_calls_is_looked_up_when_a_model_is_bound(monkeypatch):
    liger_aot.bind(build("llama"))
    eager = modeling_llama.eager_attention_forward
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", lambda *a, **k: tuple(x * 0.5 for x in eager(*a, **k)))
    plain, model = (build("llama") for _ in range(2))
    for m in (plain, model):
        m.set_attn_implementation("eager")
    liger_aot.bind(model)
    check_equal(step(model, **batch()), step(plain, **batch()))


Pair = collections.namedtuple("Pair", "loss logits")


@pytest.mark.parametrize("drop", [True, False])
def test_outputs_keep_their_types(drop):
    model = build("llama")
    liger_aot.bind(model)
    loss, lazy = torch.tensor(1.0), lazy_logits(model.lm_head, torch.randn(2, WIDTH))
    assert without_lazy(loss, drop) is loss
    for output in [(loss, lazy), [loss, (lazy,)], Pair(loss, lazy), {"loss": loss, "logits": lazy}]:
        plain = without_lazy(output, drop)
        assert type(plain) is type(output)
        assert ("LazyLogits" in repr(plain), "None" in repr(plain)) == (False, drop)


@dataclasses.dataclass(frozen=True)
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


@pytest.mark.parametrize("kind", [Output, types.SimpleNamespace])
@pytest.mark.parametrize("options", [{}, {"keep_logits": True}], ids=str)
def test_outputs_that_are_no_mappings_have_no_lazy_logits(kind, options):
    class Own(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None):
            logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
            return kind(loss=self.loss_function(logits, labels, VOCABULARY), logits=logits)

    model = build("llama")
    model.__class__ = Own
    report = liger_aot.bind(model, **options)
    out = model(**batch())
    assert type(out) is kind
    assert (type(out.logits) is torch.Tensor) is bool(options)
    assert (out.logits is None) is not options
    assert report.counts["fused"] == 1


def test_verify_sees_what_is_no_number():
    model = build("llama")
    liger_aot.bind(model)
    model.lm_head.weight.register_hook(lambda g: g * float("nan") if type(model.lm_head).__name__ == "LigerLMHead" else g)
    found = liger_aot.verify(model, batch())
    assert found.worst.what == "lm_head.weight"
    assert found.worst.relative == float("inf")
    assert "lm_head.weight" in str(found)


def test_verify_wants_a_model_and_a_loss():
    with pytest.raises(ValueError, match="verify: model must be bound, got a int that is not"):
        liger_aot.verify(3, {})
    model = build("llama")
    liger_aot.bind(model)
    with pytest.raises(ValueError, match="verify: model and batch must give a loss"):
        liger_aot.verify(model.model, {"input_ids": batch()["input_ids"]})
    with pytest.raises(ValueError, match=r"verify: batch must be a mapping of .*, got list"):
        liger_aot.verify(model, [batch()["input_ids"]])
    with pytest.raises(ValueError, match=r"verify: batch must be .* without skip_logits, got dict of input_ids, labels, skip_"):
        liger_aot.verify(model, {**batch(), "skip_logits": True})


def test_verify_compares_loss_and_logits_where_nothing_is_trained():
    model = build("llama")
    liger_aot.bind(model)
    model.requires_grad_(False)
    found = liger_aot.verify(model, batch())
    assert [row.what for row in found] == ["loss", "logits"]
    assert found.worst.relative < 1e-5
    assert "0: there are none" in str(found)
