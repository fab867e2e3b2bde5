"""What bind is given, wrong things among it: bound as far as is right, the rest left for a reason, or a named error."""

import functools
import random
import types
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import liger_aot

from tiny import WIDTH
from tiny import batch
from tiny import build
from tiny import check_as_exact
from tiny import check_equal
from tiny import check_identical
from tiny import operators
from tiny import step


@pytest.fixture
def model():
    return build()


def rows(report, path):
    return [row for row in report if row.path == path]


def row(report, path):
    (found,) = rows(report, path)
    return found


def classes(model):
    return [type(m) for m in model.modules()]


def with_norm(kind, *args, **options):
    """A llama, and the same bound, whose last norm is another."""

    def made():
        model = build(**options)
        weight = model.model.norm.weight
        model.model.norm = kind(*args)
        if getattr(model.model.norm, "weight", None) is not None:
            model.model.norm.weight = weight
        return model.train()

    return made


def check_left(made, path, bound_elsewhere="model.layers.0.input_layernorm"):
    """The module at path keeps its class, for a reason; the rest is bound, and computes what it did."""
    model = made()
    kind = type(model.get_submodule(path))
    report = liger_aot.bind(model)
    assert type(model.get_submodule(path)) is kind
    for found in rows(report, path):
        assert found.status != "bound"
        assert found.why
    assert row(report, bound_elsewhere).status == "bound"
    check_equal(step(model, **batch()), step(made(), **batch()))
    return report


# --- Errors


@pytest.mark.parametrize("wrong", ["llama", None, transformers.LlamaConfig(), transformers.LlamaForCausalLM], ids=repr)
def test_what_is_no_module_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"bind: model must be a torch\.nn\.Module, got {type(wrong).__name__}"):
        liger_aot.bind(wrong)


def test_a_bound_model_is_refused_and_stays_as_it_is(model):
    liger_aot.bind(model)
    kinds = classes(model)
    for part in model, model.model, model.model.norm, nn.Sequential(model):
        with pytest.raises(ValueError, match=r"bound.*unbind"):
            liger_aot.bind(part)
    assert classes(model) == kinds


def test_unknown_options_are_refused(model):
    kinds = classes(model)
    with pytest.raises(TypeError, match="rmsnorm"):
        liger_aot.bind(model, rmsnorm=True)
    with pytest.raises(TypeError):
        liger_aot.bind(model, True)
    with pytest.raises(ValueError, match=r"compile must be 'inductor' or 'liger', got 'eager'"):
        liger_aot.bind(model, compile="eager")
    with pytest.raises(ValueError, match=r"linear_cross_entropy.*cross_entropy.*both"):
        liger_aot.bind(model, cross_entropy=True)
    assert classes(model) == kinds


def with_a_forward_of_an_mlp():
    model = build()
    model.model.layers[1].mlp.forward = lambda x: x
    return model


def with_eager_experts():
    model = build("mixtral")
    model.set_experts_implementation("eager")
    return model


# What an operator computes, or is a head, and is left all the same.
MISSED = {
    "a forward of its own": (with_a_forward_of_an_mlp, ["LlamaMLP", "forward of its own", "swiglu"], ["LlamaRMSNorm"]),
    "float64": (lambda: build(dtype=torch.float64), ["LlamaMLP", "LlamaRMSNorm", "float32"], []),
    "eager experts": (with_eager_experts, ["MixtralExperts", "set_experts_implementation"], ["MixtralRMSNorm"]),
    "a quantised head": (lambda: with_head(QuantizedLinear(WIDTH, 97, bias=False)), ["QuantizedLinear"], ["LlamaMLP"]),
}


@pytest.mark.parametrize(("made", "shown", "hidden"), MISSED.values(), ids=MISSED)
def test_strict_raises_with_the_rows_and_leaves_the_model_unbound(made, shown, hidden):
    model = made()
    kinds, attributes = classes(model), [list(vars(m)) for m in model.modules()]
    with pytest.raises(RuntimeError) as raised:
        liger_aot.bind(model, strict=True)
    assert all(text in str(raised.value) for text in shown)
    assert not any(text in str(raised.value) for text in hidden)
    assert classes(model) == kinds
    assert [list(vars(m)) for m in model.modules()] == attributes


def test_strict_binds_where_nothing_is_left(model):
    report = liger_aot.bind(model, strict=True)
    assert report.bound
    assert not report.left


def test_strict_says_nothing_of_what_no_operator_computes():
    """A gate of relu, MLPs without a gate, norms of other formulas, a rope of the other sign."""
    grouped = build()
    grouped.extra = nn.GroupNorm(2, 4)
    for model in build(hidden_act="relu"), build("gpt2"), build("nanochat"), grouped:
        report = liger_aot.bind(model, strict=True)
        assert report.bound
        assert report.left
        assert all(found.operator is None and found.why for found in report.left)


def test_strict_is_about_what_was_asked_for():
    report = liger_aot.bind(with_a_forward_of_an_mlp(), strict=True, swiglu=False, geglu=False)
    assert {found.operator for found in report.bound} == {"rms_norm", "rope", "linear_cross_entropy"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["model.norm", "model.layers.1.mlp", "lm_head"])
def test_an_exception_in_the_middle_leaves_every_old_class(model, error, place):
    """The module refuses another class when the others have theirs already."""
    module = model.get_submodule(place)

    def refuse(self, name, value):
        if name == "__class__" and isinstance(value, type) and value is not own:
            raise error("no other class")
        super(own, self).__setattr__(name, value)

    own = type(type(module).__name__, (type(module),), {"__setattr__": refuse, "forward": type(module).forward})
    module.__class__ = own
    kinds, attributes = classes(model), [list(vars(m)) for m in model.modules()]
    with pytest.raises(error, match="no other class"):
        liger_aot.bind(model)
    assert classes(model) == kinds
    assert [list(vars(m)) for m in model.modules()] == attributes
    with operators() as seen:
        check_identical(step(model, **batch()), step(build(), **batch()))
    assert not seen


def test_a_model_with_nothing_to_bind_gets_an_empty_report():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    report = liger_aot.bind(model)
    assert not report.bound
    assert classes(model) == [nn.Sequential, nn.Linear, nn.ReLU]
    assert str(report)


def test_flags_take_off_one_operator_each(model):
    for flag in "rms_norm", "rope", "swiglu", "linear_cross_entropy":
        report = liger_aot.bind(model, **{flag: False})
        others = {"rms_norm", "rope", "swiglu", "linear_cross_entropy"} - {flag}
        assert {found.operator for found in report.bound} == others
        with operators() as seen:
            step(model, **batch())
        assert {name.removesuffix("_fwd") for name in seen if name.endswith("_fwd")} & {flag, *others} == others
        liger_aot.unbind(model)
    report = liger_aot.bind(build("gemma"), geglu=False)
    assert "geglu" not in {found.operator for found in report.bound}
    report = liger_aot.bind(build("gpt2"), layer_norm=False)
    assert "layer_norm" not in {found.operator for found in report.bound}


# --- Bound by others


@pytest.fixture
def ligers(monkeypatch):
    """liger-kernel's patch of one instance, which also changes transformers' and torch's globals: those are given back."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    for place in modeling_llama, torch.nn.functional:
        for name, value in vars(place).items():
            if not name.startswith("__"):
                monkeypatch.setattr(place, name, value)
    return _apply_liger_kernel_to_instance


def test_bound_by_liger_kernel_is_shadowed(model, ligers):
    ligers(model)
    kinds, attributes = classes(model), [dict(vars(m)) for m in model.modules()]
    report = liger_aot.bind(model)
    for path in "model.norm", "model.layers.0.input_layernorm", "model.layers.1.mlp", "lm_head":
        found = row(report, path)
        assert found.status == "shadowed", found
        assert "forward" in found.why
    assert classes(model) == kinds or not report.bound
    liger_aot.unbind(model)
    assert classes(model) == kinds
    for module, then in zip(model.modules(), attributes, strict=True):
        assert vars(module).keys() == then.keys()
        assert all(vars(module)[name] is then[name] for name in then if name not in ("training",))


@pytest.mark.parametrize("path", ["model.norm", "model.layers.1.mlp", "model.layers.0.self_attn", "lm_head", ""])
def test_an_instances_own_forward_is_shadowed_and_still_called(path):
    def made():
        model = build()
        module = model.get_submodule(path)
        calls = []

        def forward(*args, **kwargs):
            calls.append(path)
            return type(build().get_submodule(path)).forward(module, *args, **kwargs)

        module.forward = forward
        return model, calls

    (model, calls), (plain, _) = made(), made()
    own = model.get_submodule(path).forward
    report = liger_aot.bind(model)
    shadowed = [found for found in report if found.status == "shadowed"]
    assert [found.path for found in shadowed] == [path or "lm_head"]
    assert "forward" in shadowed[0].why
    check_equal(step(model, **batch()), step(plain, **batch()))
    assert calls
    liger_aot.unbind(model)
    assert model.get_submodule(path).forward is own


def test_a_partial_forward_is_shadowed(model):
    model.model.norm.forward = functools.partial(LlamaRMSNorm.forward, model.model.norm)
    assert row(liger_aot.bind(model), "model.norm").status == "shadowed"


def test_an_instances_forward_that_is_its_classs_own_does_not_stand_in_the_way(model):
    model.model.norm.forward = types.MethodType(LlamaRMSNorm.forward, model.model.norm)
    assert row(liger_aot.bind(model), "model.norm").status == "bound"
    with operators() as seen:
        check_equal(step(model, **batch()), step(build(), **batch()))
    assert seen.count("rms_norm_fwd") == 5
    liger_aot.unbind(model)
    with operators() as seen:
        check_identical(step(model, **batch()), step(build(), **batch()))
    assert not seen


# --- Heads


class QuantizedLinear(nn.Linear):
    """As bitsandbytes' are: a Linear by class, with weights of another form."""

    def forward(self, x):
        scale = self.weight.abs().amax() / 127
        return x @ ((self.weight / scale).round() * scale).T


def with_head(head):
    model = build()
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model.train()


def test_a_quantised_head_is_left_with_its_reason():
    report = check_left(lambda: with_head(QuantizedLinear(WIDTH, 97, bias=False)), "lm_head")
    assert "QuantizedLinear" in row(report, "lm_head").why
    assert not report.counts


def test_layers_that_are_no_linear_but_act_as_such_are_recognised():
    """transformers' Conv1D, and a quantised layer of torch's that is no nn.Linear by class."""
    found = row(liger_aot.bind(build("gpt2")), "transformer.h.0.mlp")
    assert (found.status, found.formula) == ("left", "2 linears, gelu_tanh")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(build().eval(), {nn.Linear}, dtype=torch.qint8)
    ids = batch()["input_ids"]
    expected = model(ids).logits
    report = liger_aot.bind(model)
    assert row(report, "model.layers.0.mlp").status == "bound"
    assert not isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    assert "quantized" in row(report, "lm_head").why
    check_equal({"logits": model(ids).logits}, {"logits": expected})


def test_a_head_that_is_no_linear_layer_is_left_with_its_reason():
    def made():
        model = build()
        model.lm_head = nn.Sequential(model.lm_head)
        return model

    report = check_left(made, "lm_head")
    assert "Sequential" in row(report, "lm_head").why


class ScaledHead(nn.Linear):
    """A Linear by class, with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_head_with_a_forward_of_its_own_is_left():
    check_left(lambda: with_head(ScaledHead(WIDTH, 97, bias=False)), "lm_head")


def test_a_head_under_a_tensor_parallel_plan_is_left_with_its_reason(tmp_path):
    from torch.distributed import destroy_process_group
    from torch.distributed import init_process_group
    from torch.distributed import is_initialized
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    def made():
        """What apply_tensor_parallelism does, whose arguments are others in each release."""
        model, style = build(), ALL_PARALLEL_STYLES["colwise_gather_output"]
        style.shard_param(model.lm_head, "weight", mesh)
        style.install_forward(model.lm_head, mesh)
        model.lm_head._is_hooked = True
        return model

    if is_initialized():  # by a trainer of a test before
        destroy_process_group()
    init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        report = check_left(made, "lm_head")
        assert "tensor" in row(report, "lm_head").why
    finally:
        destroy_process_group()


def test_a_model_without_a_head_is_bound_all_the_same():
    for family, missing in ("llama", "lm_head"), ("bert", "cls"):
        model = build(family).base_model
        report = liger_aot.bind(model)
        assert {"rms_norm", "rope", "swiglu"} <= {r.operator for r in report.bound} or family == "bert"
        assert report.bound
        assert not [found for found in report if missing in found.path]
        ids = batch()["input_ids"]
        expected = build(family).base_model(ids).last_hidden_state
        check_equal({"states": model(ids).last_hidden_state}, {"states": expected})


def test_a_classifier_is_bound_without_its_head():
    def made():
        torch.manual_seed(0)
        config = build().config
        config.num_labels = 3
        return transformers.LlamaForSequenceClassification(config).train()

    model, inputs = made(), {"input_ids": batch()["input_ids"], "labels": torch.tensor([0, 2])}
    report = liger_aot.bind(model)
    assert {"rms_norm", "rope", "swiglu"} == {found.operator for found in report.bound}
    check_equal(step(model, **inputs), step(made(), **inputs))
    assert isinstance(model(**inputs).logits, torch.Tensor)


def test_half_of_a_model_on_meta(model):
    model.model.layers[1].to("meta")
    model.lm_head.to("meta")
    report = liger_aot.bind(model)
    assert not report.left
    assert row(report, "model.layers.1.mlp").status == row(report, "lm_head").status == "bound"
    for part in model.model.layers[1], model.lm_head:
        part.to_empty(device="cpu")
    model.load_state_dict(build().state_dict())
    check_equal(step(model, **batch()), step(build(), **batch()))


# --- Names that lie, and formulas that differ where nobody looks


def norm_named(name, compute, eps=1e-6, **members):
    """A class of that name whose forward is compute(self, x)."""

    def init(self, size=WIDTH):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        return compute(self, hidden_states)

    return type(name, (nn.Module,), {"__init__": init, "forward": forward, **members})


def unit(x, eps):
    return x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def llama(m, x, of=None, weight=None):
    """Llama's norm but for one thing."""
    y = unit(x, m.variance_epsilon) if of is None else of.float()
    return (m.weight if weight is None else weight) * y.to(x.dtype)


def scale(x, eps, dim=-1):
    return x.float() * torch.rsqrt(x.float().square().mean(dim, keepdim=True) + eps)


IMPOSTORS = {
    "offset 2": lambda m, x: ((2.0 + m.weight.float()) * unit(x, m.variance_epsilon)).to(x.dtype),
    "no eps": lambda m, x: llama(m, x, unit(x, 0.0)),
    "eps outside the root": lambda m, x: llama(
        m, x, x / (x.float().square().mean(-1, keepdim=True).sqrt() + m.variance_epsilon)
    ),
    "eps ten times": lambda m, x: llama(m, x, unit(x, 10 * m.variance_epsilon)),
    "sum, not mean": lambda m, x: llama(m, x, unit(x, m.variance_epsilon) / x.shape[-1] ** 0.5),
    "of the wrong dimension": lambda m, x: llama(m, x, scale(x, m.variance_epsilon, dim=-2)),
    "half the features": lambda m, x: llama(m, x, torch.cat([unit(x[..., :16], 1e-6), x[..., 16:]], -1)),
    "centred": lambda m, x: llama(m, x, unit(x.float() - x.float().mean(-1, keepdim=True), m.variance_epsilon)),
    "one part in a thousand": lambda m, x: llama(m, x, 1.001 * unit(x, m.variance_epsilon)),
    "clamped": lambda m, x: llama(m, x, unit(x, m.variance_epsilon).clamp(-2.5, 2.5)),
    "in training otherwise": lambda m, x: llama(m, x, unit(x, m.variance_epsilon) * (2 if m.training else 1)),
    "in evaluation otherwise": lambda m, x: llama(m, x, unit(x, m.variance_epsilon) * (1 if m.training else 2)),
    "dropout": lambda m, x: llama(m, x, nn.functional.dropout(unit(x, m.variance_epsilon), 0.05, m.training)),
    "weight unused": lambda m, x: llama(m, x, weight=1 + 0 * m.weight),
    "square of the weight": lambda m, x: llama(m, x, weight=m.weight**2),
    "another rounding": lambda m, x: m.weight * x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype),
}


def test_without_the_difference_an_impostor_is_bound():
    model = with_norm(norm_named("LlamaRMSNorm", llama))()
    assert row(liger_aot.bind(model), "model.norm").status == "bound"


@pytest.mark.parametrize("compute", [pytest.param(f, id=name) for name, f in IMPOSTORS.items()])
def test_a_module_named_as_a_norm_with_another_formula_is_left(compute):
    made = with_norm(norm_named("LlamaRMSNorm", compute))
    model = made()
    report = liger_aot.bind(model)
    assert type(model.model.norm).__name__ == "LlamaRMSNorm"
    assert row(report, "model.norm").status == "left"
    assert row(report, "model.norm").why
    if "dropout" not in compute.__code__.co_names:
        check_equal(step(model, **batch()), step(made(), **batch()))


def test_a_norm_of_any_name_with_the_formula_is_bound():
    kind = norm_named("Whatever", lambda m, x: m.weight * unit(x, m.variance_epsilon).to(x.dtype))
    made = with_norm(kind)
    model = made()
    report = liger_aot.bind(model)
    assert row(report, "model.norm").status == "bound"
    assert type(model.model.norm).__name__ == "LigerRMSNorm"
    check_equal(step(model, **batch()), step(made(), **batch()))


def test_a_norm_with_an_optional_second_argument_is_left():
    def init(self, size=WIDTH):
        nn.Module.__init__(self)
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, hidden_states, gate=None):
        if gate is not None:
            hidden_states = hidden_states * nn.functional.silu(gate)
        return llama(self, hidden_states)

    kind = type("LlamaRMSNorm", (nn.Module,), {"__init__": init, "forward": forward})
    check_left(with_norm(kind), "model.norm")


@pytest.mark.parametrize("extra", [{}, {"mamba_rms_norm": True}], ids=str)
def test_gated_norms_of_mamba_are_left(extra):
    for family in "bamba", "falcon_h1":
        options = extra if family == "falcon_h1" else {}
        model = build(family, **options)
        liger_aot.bind(model)
        assert not [
            m for m in model.modules() if "Gated" in type(m).__mro__[1].__name__ and type(m).__name__.startswith("Liger")
        ]
        check_equal(step(model, **batch()), step(build(family, **options), **batch()))


class ScaledNorm(nn.Module):
    """The formula is another for each instance."""

    def __init__(self, multiplier):
        super().__init__()
        self.weight, self.variance_epsilon, self.multiplier = nn.Parameter(torch.ones(WIDTH)), 1e-6, multiplier

    def forward(self, hidden_states):
        return llama(self, hidden_states, self.multiplier * unit(hidden_states, self.variance_epsilon))


class ScaledMLP(LlamaMLP):
    def __init__(self, config, multipliers):
        super().__init__(config)
        self.first, self.second = multipliers

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x) * self.first) * self.up_proj(x)) * self.second


class ListedMLP(ScaledMLP):
    """The multipliers are kept where nobody takes them for plain attributes."""

    def __init__(self, config, multipliers):
        super().__init__(config, multipliers)
        self.multipliers = list(multipliers)

    first = property(lambda self: self.multipliers[0], lambda self, value: None)
    second = property(lambda self: self.multipliers[1], lambda self, value: None)


class LayeredMLP(ScaledMLP):
    """The multipliers are a matter of the layer's number."""

    def __init__(self, config, multipliers):
        super().__init__(config, multipliers)
        self.layer_idx = int(multipliers != (1.0, 1.0))
        del self.first, self.second

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * (1.5 if self.layer_idx else 1.0)


@pytest.mark.parametrize("kind", [ScaledMLP, ListedMLP, LayeredMLP])
@pytest.mark.parametrize("order", [1, -1])
def test_multipliers_that_differ_per_instance(kind, order):
    def made():
        model = build()
        for layer, multipliers in zip(model.model.layers, [(1.0, 1.0), (0.5, 1.5)][::order], strict=True):
            mlp = kind(model.config, multipliers)
            mlp.load_state_dict(layer.mlp.state_dict())
            layer.mlp = mlp
        model.model.layers[1].input_layernorm = ScaledNorm(1.0 if order == 1 else 0.5)
        model.model.layers[0].input_layernorm = ScaledNorm(0.5 if order == 1 else 1.0)
        return model.train()

    model = made()
    report = liger_aot.bind(model)
    plain, scaled = (0, 1)[::order]
    assert row(report, f"model.layers.{plain}.mlp").status == "bound"
    assert row(report, f"model.layers.{scaled}.mlp").status == "left"
    assert row(report, "model.layers.0.input_layernorm").status == ("left" if order == 1 else "bound")
    assert row(report, "model.layers.1.input_layernorm").status == ("bound" if order == 1 else "left")
    assert row(report, f"model.layers.{plain}.mlp").operator == "swiglu"
    check_equal(step(model, **batch()), step(made(), **batch()))


@pytest.mark.parametrize("multipliers", [[1.0, 1.0], [0.5, 1.5]], ids=str)
def test_falcon_h1_and_its_multipliers(multipliers):
    options = {"mlp_multipliers": multipliers}
    model = build("falcon_h1", **options)
    liger_aot.bind(model)
    check_equal(step(model, **batch()), step(build("falcon_h1", **options), **batch()))


def test_nanochats_rope_of_the_other_sign_is_left():
    model = build("nanochat")
    report = liger_aot.bind(model)
    found = row(report, "model.layers.0.self_attn")
    assert (found.status, found.operator) == ("left", None)
    assert found.why
    check_equal(step(model, **batch()), step(build("nanochat"), **batch()))


def test_a_rope_swapped_in_by_others_is_seen(model, monkeypatch):
    """The function is that which the attention finds among its globals when it is bound."""
    own = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, unsqueeze_dim=1: own(q, k, cos, -sin))
    plain = step(build(), **batch())
    report = liger_aot.bind(model)
    assert row(report, "model.layers.0.self_attn").status == "left"
    check_equal(step(model, **batch()), plain)


@pytest.mark.parametrize(
    "act", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "relu", "relu2", "tanh", "sigmoid"]
)
def test_every_activation_is_bound_as_itself_or_left(act):
    model = build(hidden_act=act)
    report = liger_aot.bind(model)
    operator = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}.get(act)
    found = row(report, "model.layers.0.mlp")
    assert (found.status, found.operator) == (("bound", operator) if operator else ("left", None))
    check_equal(step(model, **batch()), step(build(hidden_act=act), **batch()))


def test_dropout_within_an_mlp_is_kept():
    def run(model):
        torch.manual_seed(3)
        return step(model.train(), **batch())

    model = build("t5", dropout_rate=0.5)
    liger_aot.bind(model)
    check_equal(run(model), run(build("t5", dropout_rate=0.5)))
    assert run(model)["loss"] != run(build("t5"))["loss"]


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "phi3", "t5", "gpt2"])
@pytest.mark.parametrize("kept", ["norms in float32", "all in bfloat16"])
def test_mixtures_of_dtypes_round_as_plain_does(family, kept):
    def made():
        model = build(family, dtype=torch.bfloat16)
        if kept == "norms in float32":
            for module in model.modules():
                if "Norm" in type(module).__name__:
                    module.float()
        return model

    def run(model):
        return step(model, **batch())

    try:
        plain = run(made())
    except RuntimeError:  # where a model refuses the mixture, bound refuses it as well
        model = made()
        liger_aot.bind(model)
        with pytest.raises(RuntimeError):
            run(model)
        return
    model = made()
    liger_aot.bind(model)
    check_as_exact(run(made().double()), plain, run(model))


def test_float64_models_are_left_with_their_reason():
    model = build(dtype=torch.float64)
    report = liger_aot.bind(model)
    check_equal(step(model, **batch()), step(build(dtype=torch.float64), **batch()))
    assert all(found.why for found in report.left)


def test_one_norm_used_twice_is_bound_once(model):
    model.model.layers[0].post_attention_layernorm = model.model.layers[0].input_layernorm
    plain = build()
    plain.model.layers[0].post_attention_layernorm = plain.model.layers[0].input_layernorm
    liger_aot.bind(model)
    check_equal(step(model, **batch()), step(plain, **batch()))
    liger_aot.unbind(model)
    assert classes(model) == classes(plain)


def test_modules_that_cannot_run_alone_are_left(model):
    """A probe may raise anything; that is no reason for bind to."""

    class Odd(LlamaRMSNorm):
        def forward(self, hidden_states):
            raise LookupError("not today") if hidden_states.shape[0] != 2 or hidden_states.shape[1] != 11 else None

    model.model.norm.__class__ = Odd
    report = liger_aot.bind(model)
    found = row(report, "model.norm")
    assert found.status == "left"
    assert "LookupError" in found.why


BROKEN = {
    "rms_norm_fwd": "model.norm",
    "rms_norm_bwd": "model.norm",
    "swiglu_fwd": "model.layers.0.mlp",
    "swiglu_bwd": "model.layers.0.mlp",
    "rope": "model.layers.0.self_attn",
}


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # masked lanes of the interpreter
@pytest.mark.parametrize("fault", ["writes nothing", "raises"])
@pytest.mark.parametrize(("kernel", "path"), BROKEN.items(), ids=str)
def test_an_operator_that_fails_on_this_device_is_not_bound(interpreted, monkeypatch, kernel, path, fault):
    launch = interpreted.launch

    def broken(name, *args, **constants):
        if name != kernel:
            return launch(name, *args, **constants)
        if fault == "raises":
            raise NotImplementedError(f"{name}: no variant for this device")
        return None

    monkeypatch.setattr(interpreted, "launch", broken)
    report = liger_aot.bind(build(num_hidden_layers=1))
    found = row(report, path)
    assert found.status == "left"
    assert ("no variant for this device" in found.why) is (fault == "raises")
    others = {"model.norm", "model.layers.0.mlp", "model.layers.0.self_attn"} - {path}
    assert {row(report, other).status for other in others} == {"bound"}


# --- The caller's world


def world():
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [np.asarray(part).tolist() for part in np.random.get_state()],
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def check_same_world(before):
    after = world()
    assert torch.equal(after.pop("torch"), before.pop("torch"))
    assert after == before


@pytest.mark.parametrize("family", ["llama", "t5", "mixtral", "falcon_h1"])
def test_random_states_are_untouched(family):
    model = build(family, **({"dropout_rate": 0.5} if family == "t5" else {}))
    torch.manual_seed(11), random.seed(11), np.random.seed(11)
    before = world()
    liger_aot.bind(model)
    check_same_world(dict(before))
    liger_aot.verify(model, batch())
    check_same_world(dict(before))
    liger_aot.unbind(model)
    check_same_world(dict(before))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_neither_parameters_nor_modes_are_touched(family):
    model = build(family)
    model.get_input_embeddings().requires_grad_(False)
    next(iter(model.children())).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    needed = [p.requires_grad for p in model.parameters()]
    liger_aot.bind(model)
    check_identical(model.state_dict(), state)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needed
    assert all(p.grad is None for p in model.parameters())


SURROUNDINGS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_what_is_bound_does_not_depend_on_where_bind_is_called(model, surroundings):
    expected = list(liger_aot.bind(build()))
    with surroundings():
        report = liger_aot.bind(model)
    assert list(report) == expected
    check_equal(step(model, **batch()), step(build(), **batch()))


def test_what_is_bound_does_not_depend_on_the_default_dtype(model):
    expected = list(liger_aot.bind(build()))
    torch.set_default_dtype(torch.bfloat16)
    try:
        report = liger_aot.bind(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert list(report) == expected
    check_equal(step(model, **batch()), step(build(), **batch()))


def test_a_model_in_evaluation_is_bound_for_training_too(model):
    report = liger_aot.bind(model.eval())
    assert not report.left
    check_equal(step(model.train(), **batch()), step(build(), **batch()))


# --- The seeds, by their names


class Prefixed(transformers.LlamaForCausalLM):
    base_model_prefix = "nothing"


def with_adapter():
    return peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


BASES = {
    "bert": (lambda: build("bert"), "bert"),
    "gpt2": (lambda: build("gpt2"), "transformer"),
    "llama": (lambda: build("llama"), "model"),
    "a PEFT wrapper": (with_adapter, "base_model.model.model"),
    "a prefix that names nothing": (lambda: Prefixed(build().config), "model"),
}


@pytest.mark.parametrize(("made", "base"), BASES.values(), ids=BASES)
def test_base_model_through_base_model_prefix(made, base):
    torch.manual_seed(0)
    model = made()
    report = liger_aot.bind(model)
    norms = [found for found in report.bound if found.operator in ("rms_norm", "layer_norm")]
    assert [found for found in norms if found.path.startswith(f"{base}.")]
    assert all(model.get_submodule(found.path) for found in norms)
    torch.manual_seed(0)
    check_equal(step(model.train(), **batch()), step(made().train(), **batch()))


def test_module_names_shown_after_binding_an_instance(model):
    liger_aot.bind(model)
    text = str(model)
    for name in "LigerRMSNorm(", "LigerSwiGLUMLP(", "LigerLMHead(":
        assert name in text
    for name in "(norm): LlamaRMSNorm", "(mlp): LlamaMLP", "(lm_head): Linear":
        assert name not in text
    assert {type(m).__name__ for m in model.modules()} >= {"LigerRMSNorm", "LigerSwiGLUMLP", "LigerLMHead"}
    assert "Liger" not in str(build())


def test_kwargs_everywhere(model):
    plain = build()
    layer, own = model.model.layers[0], plain.model.layers[0]
    liger_aot.bind(model)
    x = torch.randn(2, 11, WIDTH)
    angles = plain.model.rotary_emb(x, torch.arange(11)[None])
    check_equal(
        {
            "norm": layer.input_layernorm(hidden_states=x),
            "mlp": layer.mlp(x=x),
            "attention": layer.self_attn(hidden_states=x, position_embeddings=angles, attention_mask=None)[0],
            "head": model.lm_head(input=x),
            "loss": model(labels=batch()["labels"], input_ids=batch()["input_ids"], use_cache=False).loss,
        },
        {
            "norm": own.input_layernorm(hidden_states=x),
            "mlp": own.mlp(x=x),
            "attention": own.self_attn(hidden_states=x, position_embeddings=angles, attention_mask=None)[0],
            "head": plain.lm_head(input=x),
            "loss": plain(labels=batch()["labels"], input_ids=batch()["input_ids"], use_cache=False).loss,
        },
    )


@pytest.mark.parametrize("path", ["model.norm", "model.layers.0.mlp", "lm_head"])
def test_a_wrong_keyword_is_refused_as_ever(model, path):
    liger_aot.bind(model)
    module, x = model.get_submodule(path), torch.randn(2, WIDTH)
    for args, kwargs in ((), {"nonsense": x}), ((), {}), ((x, x), {}), ((x,), {"nonsense": x}):
        with pytest.raises(TypeError):
            module(*args, **kwargs)


def test_cross_entropy_behind_loss_function_in_current_transformers():
    for flags in {}, {"linear_cross_entropy": False, "cross_entropy": True}:
        model = build()
        loss_function = model.loss_function
        liger_aot.bind(model, **flags)
        assert model.loss_function is loss_function  # transformers' own, and what it calls is taken over
        with operators() as seen:
            check_equal(step(model, **batch()), step(build(), **batch()))
        assert ("linear_cross_entropy_fwd" in seen) is (not flags)
        assert ("cross_entropy_fwd" in seen) is bool(flags)
