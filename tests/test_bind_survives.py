"""A bound model survives what its users do with it, before and after it is bound, and unbind gives everything back."""

import copy
import gc
import io
import json
import pickle
import subprocess
import sys
import weakref

import peft
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)
import transformers
from accelerate import Accelerator
from accelerate import cpu_offload
from accelerate.hooks import ModelHook
from accelerate.hooks import add_hook_to_module
from accelerate.hooks import remove_hook_from_module
from accelerate.state import AcceleratorState
from torch.nn.utils import parametrize
from torch.nn.utils import prune
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.mixtral import modeling_mixtral

import liger_aot
from liger_aot.bind import _lazy
from liger_aot.transformers import _apply_liger_kernel_to_instance

from binding import LAYERS
from binding import bound
from binding import check_runs_bound
from binding import with_loss
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
    "ignore:While compiling, we found certain side effects",
)
ONE = {"num_hidden_layers": 1}


@pytest.fixture
def model():
    return build()


@pytest.fixture
def plain():
    """What a step of the model gives, and a change of it would give, that nobody has bound."""
    return step(build(), **batch())


def check_runs_plain(model, plain):
    with operators() as seen:
        check_identical(step(model, **batch()), plain)
    assert not seen


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


# --- What is seen of it


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


# --- Saved, copied


def test_save_pretrained_writes_the_models_own_class_and_reloads_equal(model, tmp_path):
    liger_aot.bind(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in build().modules()]
    check_identical(loaded.state_dict(), model.state_dict())
    check_identical(step(loaded.train(), **batch()), step(build(), **batch()))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("again", [pickled, saved, copy.deepcopy])
def test_pickled_saved_and_copied_models_are_bound(again, family):
    model, _ = bound(family)
    other = again(model)  # before a first step, in which transformers gives mixtral a hook that nobody can pickle
    expected = step(model, **batch())
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    check_identical(step(other, **batch()), expected)
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in model.parameters()}
    liger_aot.unbind(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in build(family).modules()]
    with operators() as seen:
        check_identical(step(other, **batch()), step(build(family), **batch()))
    assert not seen
    check_identical(step(model, **batch()), expected)


FRESH = """
import sys
import torch
model = torch.load(sys.argv[1], weights_only=False)
loss = model(**torch.load(sys.argv[2])).loss
loss.backward()
names = [type(m).__name__ for m in model.modules()]
import liger_aot
liger_aot.unbind(model)
torch.save([names, loss.detach(), model.lm_head.weight.grad, [type(m).__name__ for m in model.modules()]], sys.argv[3])
"""


def test_a_saved_model_loads_in_a_fresh_process(model, tmp_path):
    liger_aot.bind(model)
    torch.save(model, tmp_path / "model")
    torch.save(batch(), tmp_path / "batch")
    paths = [str(tmp_path / name) for name in ("model", "batch", "results")]
    done = subprocess.run([sys.executable, "-c", FRESH, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names, loss, gradient, unbound = torch.load(tmp_path / "results")
    assert names == [type(m).__name__ for m in model.modules()]
    assert unbound == [type(m).__name__ for m in build().modules()]
    expected = step(model, **batch())
    check_equal({"loss": loss, "gradient": gradient}, {"loss": expected["loss"], "gradient": expected["lm_head.weight"]})


def test_a_copys_weights_are_its_own(model, plain):
    liger_aot.bind(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    check_equal(step(model, **batch()), plain)
    assert step(other, **batch())["loss"] != plain["loss"]


def test_unbinding_the_original_leaves_its_copy_bound(model, plain):
    liger_aot.bind(model)
    other = copy.deepcopy(model)
    liger_aot.unbind(model)
    check_runs_bound(other, plain)
    check_runs_plain(model, plain)


def test_a_copied_parts_class_is_kept(model):
    liger_aot.bind(model)
    layer = copy.deepcopy(model.model.layers[0])
    assert type(layer.mlp) is type(model.model.layers[0].mlp)
    x = torch.randn(2, 5, WIDTH)
    assert torch.equal(layer.mlp(x), model.model.layers[0].mlp(x))


# --- PEFT


def adapted(model, **options):
    """The model under LoRA whose adapters are no zeros, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)
        return peft.get_peft_model(model, config)


ADAPTED = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all linear layers": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    "a norm saved": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "the head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("options", ADAPTED.values(), ids=ADAPTED)
def test_lora_before_bind(model, options):
    plain = step(adapted(build(), **options), **batch())
    model = adapted(model, **options)
    report = liger_aot.bind(model)
    check_equal(step(model, **batch()), plain)
    assert {"rms_norm", "rope"} <= {row.operator for row in report.bound}
    if "lm_head" not in options.get("modules_to_save", []):
        assert report.counts["fused"] == 1
        assert not materialised(report)
    liger_aot.unbind(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in adapted(build(), **options).modules()]
    check_identical(step(model, **batch()), plain)


@pytest.mark.parametrize("options", ADAPTED.values(), ids=ADAPTED)
def test_lora_after_bind(model, options):
    plain = step(adapted(build(), **options), **batch())
    report = liger_aot.bind(model)
    wrapped = adapted(model, **options)
    check_equal(step(wrapped, **batch()), plain)
    assert report.counts["fused"] == 1
    assert not materialised(report)
    liger_aot.unbind(model)
    assert [type(m) for m in wrapped.modules()] == [type(m) for m in adapted(build(), **options).modules()]
    check_identical(step(wrapped, **batch()), plain)


def test_a_forward_that_an_adapter_keeps_of_its_base_is_bound_and_given_back(model):
    """PEFT's AdaptionPromptModel is called by the method that its base had when it was made."""

    def prompted(model):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1)
            return peft.get_peft_model(model, config).train()

    plain = step(prompted(build()), **batch())
    model = prompted(model)
    kept = vars(model.base_model)["forward"]
    report = liger_aot.bind(model)
    check_equal(step(model, **batch()), plain)
    assert report.counts == {"fused": 1}
    assert liger_aot.verify(model, batch()).worst.relative < 1e-4
    with pytest.raises(ValueError, match="compile"):
        _apply_liger_kernel_to_instance(model, compile="eager")
    assert report.counts["fused"] == 2
    step(model, **batch())
    assert report.counts["fused"] == 3
    liger_aot.unbind(model)
    assert vars(model.base_model)["forward"] == kept
    check_identical(step(model, **batch()), plain)


def test_lora_on_the_head_before_bind_leaves_the_head_with_its_reason(model):
    options = {"target_modules": ["q_proj", "lm_head"]}
    plain = step(adapted(build(), **options), **batch())
    model = adapted(model, **options)
    report = liger_aot.bind(model)
    check_equal(step(model, **batch()), plain)
    (row,) = (row for row in report.left if "lm_head" in row.path)
    assert "lora" in row.why.lower() or "peft" in row.why.lower()
    assert report.counts["fused"] == 0
    logits = model(**batch()).logits
    assert isinstance(logits, torch.Tensor)


ON_THE_HEAD = {
    "a layer": {"target_modules": ["q_proj", "lm_head"]},
    "its weight, while it is called": {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]},
}


@pytest.mark.parametrize("options", ON_THE_HEAD.values(), ids=ON_THE_HEAD)
def test_lora_on_the_head_after_bind_materialises_and_is_counted(model, options):
    plain = step(adapted(build(), **options), **batch())
    report = liger_aot.bind(model)
    check_equal(step(adapted(model, **options), **batch()), plain)
    assert materialised(report)
    assert report.counts["fused"] == 0


def test_lora_merged_after_bind_then_unbound(model):
    liger_aot.bind(model)
    wrapped = adapted(model, **ADAPTED["all linear layers"])
    expected = step(wrapped, **batch())["loss"]
    merged = wrapped.merge_and_unload()
    with operators() as seen:
        check_equal(step(merged.requires_grad_(), **batch()) | {"loss": expected}, step(merged, **batch()))
    assert set(seen) >= LAYERS
    torch.testing.assert_close(merged(**batch()).loss, expected)
    liger_aot.unbind(merged)
    assert [type(m) for m in merged.modules()] == [type(m) for m in build().modules()]


# --- Training's other tools


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


# --- unbind, and who else is touched


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


# --- Meta


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


def test_logits_are_asked_for_by_the_lazy_class_alone(model, monkeypatch, plain):
    """What the other tests take for granted: with labels, in training, the logits are never computed."""
    monkeypatch.setattr(_lazy.LazyLogits, "compute", lambda *args, **kwargs: pytest.fail("logits were computed"))
    liger_aot.bind(model)
    check_equal(step(model, **batch()), plain)
    liger_aot.unbind(model)
    with_loss(model, lambda logits, labels, **_: F.relu(logits).sum())
    liger_aot.bind(model)
    with pytest.raises(pytest.fail.Exception):
        model(**batch())
