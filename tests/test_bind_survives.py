"""A bound model survives what training does with it: checkpointing, accelerate, hooks, changed weights, meta tensors, casts."""

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate import cpu_offload
from accelerate.hooks import ModelHook
from accelerate.hooks import add_hook_to_module
from accelerate.hooks import remove_hook_from_module
from accelerate.state import AcceleratorState
from torch.nn.utils import parametrize
from torch.nn.utils import prune

import liger_aot

from binding import bound
from binding import check_runs_bound
from binding import check_runs_plain
from tiny import WIDTH
from tiny import batch
from tiny import build
from tiny import check_as_exact
from tiny import check_equal
from tiny import check_identical
from tiny import materialised
from tiny import operators
from tiny import step

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing.*deprecated",  # as transformers itself, PEFT and people still call it
    "ignore:For backward hooks to be called",
)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("first", ["bind", "checkpointing"])
def test_gradient_checkpointing(model, plain, reentrant, first):
    steps = [
        lambda: liger_aot.bind(model),
        lambda: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant}),
    ]
    for act in steps if first == "bind" else reversed(steps):
        act()
    with operators() as seen:
        check_equal(step(model, **batch()), plain)
    assert seen.count("swiglu_fwd") == 4  # each layer's once more in backward
    liger_aot.unbind(model)
    check_identical(step(model, **batch()), plain)


def test_an_optimizer_made_before_bind_trains_on(plain):
    def train(model, act):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for turn in range(4):
            if turn == 2:
                act(model)
            losses.append(step(model, **batch())["loss"])
            optimizer.step()
        return torch.stack(losses)

    torch.testing.assert_close(train(build(), liger_aot.bind), train(build(), lambda model: None), rtol=1e-4, atol=0)


def test_generates_as_plain():
    def generate(model):
        return model.eval().generate(batch()["input_ids"], max_new_tokens=5, do_sample=False, use_cache=True)

    model, _ = bound()
    with operators() as seen:
        assert torch.equal(generate(model), generate(build()))
    assert "rms_norm_fwd" in seen


class Counter(ModelHook):
    def __init__(self):
        self.count = 0

    def pre_forward(self, module, *args, **kwargs):
        self.count += 1
        return args, kwargs


def parts(model):
    layer = model.model.layers[1]
    return [layer.input_layernorm, layer.self_attn, layer.mlp, model.lm_head, model]


@pytest.mark.parametrize("first", ["hook", "bind"])
@pytest.mark.parametrize("last", ["unhook", "unbind"])
def test_accelerates_hooks_fire_and_leave_nothing_of_the_bound_forward(model, plain, first, last):
    hooks = [Counter() for _ in parts(model)]

    def hook():
        for module, each in zip(parts(model), hooks, strict=True):
            add_hook_to_module(module, each)

    def unhook():
        for module in parts(model):
            remove_hook_from_module(module)

    def do(*acts):
        for act in acts:
            act()

    def bind():
        liger_aot.bind(model)

    def unbind():
        liger_aot.unbind(model)

    do(*([hook, bind] if first == "hook" else [bind, hook]))
    check_runs_bound(model, plain)
    assert all(each.count for each in hooks)
    if last == "unhook":
        do(unbind)
        for each in hooks:
            each.count = 0
        check_runs_plain(model, plain)
        assert all(each.count for each in hooks)
        do(unhook)
    else:
        do(unhook)
        for each in hooks:
            each.count = 0
        check_runs_bound(model, plain)
        assert not any(each.count for each in hooks)
        do(unbind)
    assert [type(m) for m in model.modules()] == [type(m) for m in build().modules()]
    check_runs_plain(model, plain)


@pytest.mark.parametrize("first", ["offload", "bind"])
def test_accelerates_cpu_offload(model, first):
    plain = build().eval()
    with torch.no_grad():
        expected = {"loss": plain(**batch()).loss, "logits": plain(**batch()).logits}
    acts = [lambda: cpu_offload(model, execution_device=torch.device("cpu")), lambda: liger_aot.bind(model)]
    for act in acts if first == "offload" else reversed(acts):
        act()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with torch.no_grad(), operators() as seen:
        check_equal({"loss": model.eval()(**batch()).loss, "logits": model(**batch()).logits}, expected)
        check_equal({"loss": model.train()(**batch()).loss}, {"loss": expected["loss"]})
    assert {"rms_norm_fwd", "rope_fwd", "swiglu_fwd", "linear_cross_entropy_fwd"} <= set(seen)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    remove_hook_from_module(model, recurse=True)
    liger_aot.unbind(model)
    check_identical(step(model.train(), **batch()), step(build(), **batch()))


@pytest.mark.parametrize("first", ["hook", "bind"])
def test_users_hooks_fire_and_may_change_what_passes(first):
    def run(model, act):
        fired = []

        def before(module, args):
            fired.append("before")

        def after(module, args, output):
            fired.append("after")
            return output * 2 if module is not model.lm_head else None

        def grown(module, grad_input, grad_output):
            fired.append("backward")

        layer = model.model.layers[0]
        if first == "bind":
            act(model)
        for module in (layer.mlp, layer.input_layernorm, model.lm_head):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
        layer.mlp.register_full_backward_hook(grown)
        if first == "hook":
            act(model)
        return step(model, **batch()), fired

    plain, expected = run(build(), lambda model: None)
    got, fired = run(build(), liger_aot.bind)
    check_equal(got, plain)
    assert fired.count("backward") == expected.count("backward") == 1
    assert fired[: len(expected) - 1] == expected[:-1]  # the head may be called again, for the loss


def test_a_hook_on_the_head_sees_logits(model):
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.mean().item()))
    report = liger_aot.bind(model)
    model(**batch())
    plain = build()
    hidden = plain.model(batch()["input_ids"]).last_hidden_state
    assert seen[0] == pytest.approx(plain.lm_head(hidden).mean().item(), rel=1e-4)
    assert materialised(report)


def test_a_backward_hook_on_the_head_breaks_nothing(model, plain):
    model.lm_head.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    liger_aot.bind(model)
    check_equal(step(model, **batch()), plain)


@pytest.fixture
def new_accelerator():
    """A process has one state, whatever an Accelerator asks for later."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("first", ["prepare", "bind"])
@pytest.mark.usefixtures("new_accelerator")
def test_accelerators_mixed_precision(first):
    """prepare gives the model a forward of its instance: bound after it, the model's loss stays its own."""

    def run(acts):
        model = build()
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        for act in acts:
            act(accelerator, model)
        return step(model, **batch()), accelerator, model

    def prepare(accelerator, model):
        assert accelerator.prepare(model) is model

    def bind(accelerator, model):
        liger_aot.bind(model)

    plain, _, _ = run([prepare])
    got, accelerator, model = run([prepare, bind] if first == "prepare" else [bind, prepare])
    for name, expected in plain.items():
        assert got[name].dtype == expected.dtype
        assert (got[name] - expected).norm() <= 2e-2 * expected.norm() + 1e-6, name
    liger_aot.unbind(model)
    check_identical(step(model, **batch()), plain)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    with operators() as seen:
        check_identical(step(model, **batch()), step(build(), **batch()))
    assert not seen


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(module):
    parametrize.register_parametrization(module, "weight", Doubled())


def pruned(module):
    prune.custom_from_mask(module, "weight", torch.arange(module.weight.numel()).view(module.weight.shape) % 3 > 0)


@pytest.mark.parametrize("path", ["lm_head", "model.layers.0.mlp.up_proj", "model.norm"])
@pytest.mark.parametrize("change", [parametrized, pruned])
@pytest.mark.parametrize("first", ["change", "bind"])
def test_parametrized_and_pruned_weights(change, first, path):
    def run(*acts):
        model = build()
        for act in acts:
            act(model)
        return step(model, **batch()), model

    def change_it(model):
        change(model.get_submodule(path))

    plain, other = run(change_it)
    got, model = run(*((change_it, liger_aot.bind) if first == "change" else (liger_aot.bind, change_it)))
    check_equal(got, plain)
    liger_aot.unbind(model)
    check_identical(step(model, **batch()), plain)
    assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in other.modules()]


def test_a_resized_vocabulary(model):
    plain = build()
    report = liger_aot.bind(model)
    for each in model, plain:
        torch.manual_seed(5)
        each.resize_token_embeddings(120)
    check_equal(step(model, **batch()), step(plain, **batch()))
    assert model.lm_head.out_features == 120
    assert type(model.lm_head).__name__ == "LigerLMHead"
    assert report.counts == {"fused": 1}
    liger_aot.unbind(model)
    assert type(model.lm_head) is torch.nn.Linear
    assert vars(model.lm_head).keys() == vars(plain.lm_head).keys()
    check_identical(step(model, **batch()), step(plain, **batch()))


def test_another_head_in_the_place_of_the_bound_one_is_counted(model, plain):
    report = liger_aot.bind(model)
    head = torch.nn.Linear(WIDTH, 97, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    check_equal(step(model, **batch()), plain)
    assert report.counts == {"unbound: another head than the one that was bound": 1}
    assert "unbound: another head" in str(report)


def test_a_meta_initialised_model_binds_is_materialised_and_trains(plain):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(build().config)
    report = liger_aot.bind(model)
    assert {"rms_norm", "rope", "swiglu", "linear_cross_entropy"} == {row.operator for row in report.bound}
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    model.load_state_dict(build().state_dict())
    model.model.rotary_emb.inv_freq.copy_(build().model.rotary_emb.inv_freq)  # in no state dict
    check_runs_bound(model.train(), plain)


def test_cast_after_bind():
    def run(model):
        return step(model, **batch())

    model, _ = bound()
    check_as_exact(run(build(dtype=torch.bfloat16).double()), run(build(dtype=torch.bfloat16)), run(model.bfloat16()))
