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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.distributed.tensor.parallel import SequenceParallel
from torch.distributed.tensor.parallel import parallelize_module
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import liger_aot

from binding import check_left
from binding import row
from tiny import WIDTH
from tiny import batch
from tiny import build
from tiny import check_equal
from tiny import check_identical
from tiny import operators
from tiny import step


def classes(model):
    return [type(m) for m in model.modules()]


# --- Errors


@pytest.mark.parametrize("wrong", ["llama", None, transformers.LlamaConfig(), transformers.LlamaForCausalLM], ids=repr)
def test_what_is_no_module_is_refused(wrong):
    got = "the class LlamaForCausalLM" if isinstance(wrong, type) else type(wrong).__name__
    with pytest.raises(ValueError, match=rf"bind: model must be a torch\.nn\.Module, got {got}; build the model first"):
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
    for flag, wrong in ("rope", "no"), ("swiglu", None), ("strict", 1), ("keep_logits", "False"), ("cross_entropy", 0):
        with pytest.raises(ValueError, match=f"bind: {flag} must be True or False, got {wrong!r}"):
            liger_aot.bind(model, **{flag: wrong})
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
    """A gate of relu, MLPs without a gate, norms of other formulas."""
    over_batches = build()
    over_batches.extra = nn.BatchNorm1d(4)
    for model in build(hidden_act="relu"), build("gpt2"), over_batches:
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


@pytest.fixture
def mesh(tmp_path):
    if torch.distributed.is_initialized():  # by a trainer of a test before
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_a_head_under_a_tensor_parallel_plan_is_left_with_its_reason(mesh):
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    def made():
        """What apply_tensor_parallelism does, whose arguments are others in each release."""
        model, style = build(), ALL_PARALLEL_STYLES["colwise_gather_output"]
        style.shard_param(model.lm_head, "weight", mesh)
        style.install_forward(model.lm_head, mesh)
        model.lm_head._is_hooked = True
        return model

    report = check_left(made, "lm_head")
    assert "tensor-parallel plan" in row(report, "lm_head").why


def test_of_what_parallelize_module_distributes_norms_are_bound_and_the_head_is_left(mesh):
    def made():
        model = build()
        plan = {"lm_head": ColwiseParallel(output_layouts=Replicate()), "model.norm": SequenceParallel(use_local_output=True)}
        return parallelize_module(model, mesh, plan)

    model, plain = made(), made()
    report = liger_aot.bind(model)
    assert row(report, "lm_head").why == "its weights are torch.distributed.tensor.DTensor"
    assert row(report, "model.norm").status == "bound"
    assert type(model.model.norm).__name__ == "LigerRMSNorm"
    results = [step(m, **batch()) for m in (model, plain)]
    check_equal(*({name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in each.items()} for each in results))
    assert not report.counts


def test_a_group_norm_whose_weights_are_distributed_is_left(mesh):
    norm = distribute_module(nn.GroupNorm(3, 12), mesh)
    (found,) = liger_aot.bind(nn.Sequential(norm))
    assert (found.status, found.why) == ("left", "its weights are torch.distributed.tensor.DTensor")


class Int8Tensor(torch.Tensor):
    """A quantised weight as torchao's are: one tensor around others, that computes by itself what torch asks of it."""

    @staticmethod
    def __new__(cls, whole, scale):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype, device=whole.device)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self):
        return ["whole", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Int8Tensor(**inner)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, *_ = args
            return x @ (weight.whole.to(x.dtype) * weight.scale).T
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Int8Tensor(args[0].whole, args[0].scale)
        raise NotImplementedError(f"Int8Tensor: has no {function}")


def quantise(model):
    weight = model.lm_head.weight.detach()
    scale = weight.abs().max() / 127
    model.lm_head.weight = nn.Parameter(Int8Tensor((weight / scale).round().to(torch.int8), scale), requires_grad=False)
    return model


def test_a_head_whose_weight_is_quantised_is_left_with_its_reason():
    report = check_left(lambda: quantise(build()), "lm_head")
    assert row(report, "lm_head").why.endswith("Int8Tensor")
    assert not report.counts


def test_a_head_whose_weight_is_quantised_after_bind_computes_logits(model):
    report = liger_aot.bind(model)
    check_equal(step(quantise(model), **batch()), step(quantise(build()), **batch()))
    assert report.counts == {"materialised: the head's weight is a Int8Tensor": 1}


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
    "bert": (lambda: build("bert"), "bert", "bert"),
    "gpt2": (lambda: build("gpt2"), "transformer", "transformer"),
    "llama": (lambda: build("llama"), "model", "model"),
    "a PEFT wrapper": (with_adapter, "base_model.model.model", "base_model.model.model"),
    "a prefix that names nothing": (lambda: Prefixed(build().config), "", "model"),
}


@pytest.mark.parametrize(("made", "base", "layers"), BASES.values(), ids=BASES)
def test_base_model_through_base_model_prefix(made, base, layers):
    """It is named by its path in what was given to bind, and each of its norms is bound."""
    torch.manual_seed(0)
    model = made()
    report = liger_aot.bind(model)
    assert report.base == base
    assert str(report).startswith(f"base model: {base or 'the model itself'}\n")
    norms = [found for found in report.bound if found.operator in ("rms_norm", "layer_norm")]
    assert norms
    for found in norms:
        assert type(model.get_submodule(found.path)).__name__ in ("LigerRMSNorm", "LigerLayerNorm")
        assert found.path.startswith(f"{layers}.") or not found.path.startswith(f"{base}.")
    within = sum(type(m).__name__ in ("LigerRMSNorm", "LigerLayerNorm") for m in model.get_submodule(layers).modules())
    assert within == sum(found.path.startswith(f"{layers}.") for found in norms) >= 5
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
