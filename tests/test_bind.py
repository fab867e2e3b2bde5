"""A bound model computes what it computed: a model of each formula, through the kernels; and what is told of it."""

import copy
import re

import pytest
import torch

import liger_aot
from liger_aot.transformers.monkey_patch import _apply_liger_kernel_to_instance

from tiny import WIDTH
from tiny import batch
from tiny import build
from tiny import check_as_exact
from tiny import check_equal
from tiny import check_identical
from tiny import step

NORM, ROPE, LAYER_NORM = {"rms_norm_fwd", "rms_norm_bwd"}, {"rope"}, {"layer_norm_fwd", "layer_norm_bwd"}
SWIGLU, GEGLU, LOSS = {"swiglu_fwd", "swiglu_bwd"}, {"geglu_fwd", "geglu_bwd"}, {"cross_entropy_fwd", "cross_entropy_bwd"}
RELU = {"relu_squared_fwd", "relu_squared_bwd"}
ONE = {"num_hidden_layers": 1}
KERNELS = {
    "llama": (ONE, NORM | ROPE | SWIGLU | LOSS),
    "llama with biases": (ONE | {"mlp_bias": True, "attention_bias": True}, NORM | ROPE | SWIGLU | LOSS),
    "llama with tied weights": (ONE | {"tie_word_embeddings": True}, NORM | ROPE | SWIGLU | LOSS),
    "gemma2": (ONE, NORM | ROPE | GEGLU | LOSS),
    "olmo2": (ONE, NORM | ROPE | SWIGLU | LOSS),
    "phi3": (ONE, NORM | ROPE | SWIGLU | LOSS),
    "mixtral": (ONE, NORM | ROPE | SWIGLU | LOSS),
    "cohere": (ONE, LAYER_NORM | ROPE | SWIGLU | LOSS),
    "gpt2": ({"n_layer": 1}, LAYER_NORM | LOSS),
    "bart": ({}, LAYER_NORM | LOSS),
    "t5": ({}, NORM | GEGLU | LOSS),
    "nanochat": (ONE, NORM | ROPE | RELU | LOSS),
}
# In 16 bits mixtral's router chooses other experts for a rounding more or less.
CASES = [
    (name, dtype) for name in KERNELS for dtype in (torch.float32, torch.bfloat16) if (name, dtype.itemsize) != ("mixtral", 2)
]


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # masked lanes of the interpreter
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_bound_trains_as_plain_through_the_kernels(interpreted, name, dtype):
    options, kernels = KERNELS[name]

    def run(model):
        return step(model, **batch(2, 5))

    plain = build(name.split()[0], dtype=dtype, **options)
    model = copy.deepcopy(plain)
    liger_aot.bind(model)
    interpreted.launched.clear()  # of what bind tried
    if name == "mixtral":  # whose grouped_mm knows no float64
        check_equal(run(model), run(plain))
    else:
        check_as_exact(run(copy.deepcopy(plain).double()), run(plain), run(model))
    launched = set(interpreted.launched)
    assert launched >= kernels
    others = NORM | ROPE | LAYER_NORM | SWIGLU | GEGLU | RELU | LOSS
    assert launched & others == kernels


@pytest.mark.parametrize("family", ["llama", "gemma", "olmo2"])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
def test_norms_round_where_the_models_own_do(family, weight):
    model, x = build(family, dtype=torch.bfloat16), torch.randn(99, WIDTH).bfloat16()
    model.model.norm.to(weight)
    plain = model.model.norm(x)
    liger_aot.bind(model)
    assert type(model.model.norm).__name__ == "LigerRMSNorm"
    assert model.model.norm(x).dtype == plain.dtype
    assert torch.equal(model.model.norm(x), plain)


# --- The report


def test_report_has_a_row_for_each_module():
    report = liger_aot.bind(build(hidden_act="relu"))
    layers = [f"model.layers.{n}" for n in range(2)]
    paths = {
        "rms_norm": {f"{layer}.{name}" for layer in layers for name in ("input_layernorm", "post_attention_layernorm")}
        | {"model.norm"},
        "rope": {f"{layer}.self_attn" for layer in layers},
        "linear_cross_entropy": {"lm_head"},
        None: {f"{layer}.mlp" for layer in layers},
    }
    assert len(report) == sum(map(len, paths.values()))
    for operator, expected in paths.items():
        assert {row.path for row in report if row.operator == operator} == expected
    assert {row.status for row in report.bound} == {"bound"}
    assert [row.path for row in report.left] == [f"{layer}.mlp" for layer in layers]
    assert {(row.kind, row.status) for row in report.left} == {("LlamaMLP", "left")}
    assert all("relu" in row.formula and row.why for row in report.left)


def test_report_is_a_table_of_groups():
    model = build()
    model.model.layers[1].mlp.forward = lambda x: x
    report = liger_aot.bind(model)
    model(**batch())
    base, compiled, *lines = str(report).splitlines()
    assert base == "base model: model"
    assert "Inductor" in compiled
    assert [line.split()[:4] for line in lines] == [
        ["bound", "rope", "2", "x"],
        ["bound", "swiglu", "1", "x"],
        ["bound", "rms_norm", "2", "x"],
        ["bound", "rms_norm", "2", "x"],
        ["shadowed", "swiglu", "1", "x"],
        ["bound", "rms_norm", "1", "x"],
        ["bound", "linear_cross_entropy", "1", "x"],
        ["1", "x", "fused"],
    ]
    assert "model.layers.*.self_attn" in lines[0]
    assert "forward of its own" in lines[4]
    other = str(liger_aot.bind(build(), compile="liger")).splitlines()
    assert other[1] != compiled
    assert "graph" in other[1]


def test_a_batch_is_counted_once():
    model = build()
    report = liger_aot.bind(model)
    for turn in range(3):
        model(**batch())
        assert report.counts == {"fused": turn + 1}
    model.eval()(**batch())
    model(batch()["input_ids"])
    assert report.counts == {"fused": 3}


def test_a_bound_model_stays_bound_where_binding_it_anew_fails():
    model = build()
    report = liger_aot.bind(model)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="compile must be"):
        _apply_liger_kernel_to_instance(model, compile="nonsense")
    assert [type(m) for m in model.modules()] == kinds
    check_equal(step(model, **batch()), step(build(), **batch()))
    assert report.counts == {"fused": 1}


# --- verify


@pytest.mark.parametrize("family", ["llama", "gemma2", "bart", "t5", "mixtral"])
def test_verify_compares_loss_logits_and_every_gradient(family):
    model = build(family)
    liger_aot.bind(model)
    kinds = [type(m) for m in model.modules()]
    step(model, **batch())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    found = liger_aot.verify(model, batch())
    named = {row.what for row in found}
    assert {"loss", "logits"} <= named
    assert {name for name, _ in model.named_parameters()} <= named
    assert all(row.relative <= 1e-4 for row in found if "k_proj.bias" not in row.what)
    assert found.worst.relative == max(row.relative for row in found)
    for word in "loss", "logits", "gradients":
        assert re.search(rf"^{word} +\d", str(found), re.MULTILINE)
    assert [type(m) for m in model.modules()] == kinds
    check_identical({name: p.grad for name, p in model.named_parameters()}, gradients)


@pytest.mark.parametrize("path", ["model.norm", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"])
def test_verify_says_where_a_bound_model_differs(path):
    """A hook that changes one gradient by a tenth, and only while the model is bound."""
    model = build()
    liger_aot.bind(model)
    weight = model.get_submodule(path).weight
    weight.register_hook(lambda gradient: gradient * (1.1 if type(model.model.norm).__name__.startswith("Liger") else 1))
    found = liger_aot.verify(model, batch())
    assert found.worst.what == f"{path}.weight"
    assert found.worst.relative == pytest.approx(0.1, rel=1e-3)
    assert f"{path}.weight" in str(found)
    assert all(row.relative <= 1e-4 for row in found if row.what != f"{path}.weight")


@pytest.mark.parametrize("training", [True, False])
def test_verify_runs_the_fused_loss(training):
    model = build().train(training)
    report = liger_aot.bind(model)
    assert liger_aot.verify(model, batch()).worst.relative <= 1e-4
    assert report.counts["fused"] == 1
    assert model.training is training


def test_verify_sees_other_losses_and_logits():
    model = build()
    liger_aot.bind(model)
    bound = type(model.lm_head)
    model.model.norm.register_forward_hook(lambda m, args, out: out * (1.01 if type(model.lm_head) is bound else 1))
    found = {row.what: row.relative for row in liger_aot.verify(model, batch())}
    assert found["logits"] == pytest.approx(0.01, rel=0.05)
    assert found["loss"] > 1e-6


def test_verify_takes_a_bound_model_and_a_batch_with_labels():
    model = build()
    with pytest.raises(
        ValueError, match=r"verify: model must be bound, got a LlamaForCausalLM that is not; bind\(model\) first"
    ):
        liger_aot.verify(model, batch())
    liger_aot.bind(model)
    with pytest.raises(ValueError, match="verify: model and batch must give a loss, as from labels, got input_ids"):
        liger_aot.verify(model, {"input_ids": batch()["input_ids"]})
    assert type(model.model.norm).__name__ == "LigerRMSNorm"
