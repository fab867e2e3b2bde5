"""Every way into the binder: a Trainer's callback, the auto class, Liger's functions by model type, answering for liger_kernel,
layers for the kernels library, and the report of a configuration."""

import contextvars
import functools
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import kernels
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import Llama4TextConfig
from transformers import LlamaForCausalLM
from transformers import PreTrainedModel
from transformers import TrainerCallback
from transformers.models.bitnet.modeling_bitnet import BitNetRMSNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import liger_aot
from liger_aot.__main__ import main
from liger_aot.transformers import AutoLigerKernelForCausalLM
from liger_aot.transformers import apply_liger_kernel_to_granite
from liger_aot.transformers import apply_liger_kernel_to_llama
from liger_aot.transformers import is_transformers_available
from liger_aot.transformers import kernel_layers
from liger_aot.transformers import monkey_patch
from liger_aot.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
from liger_aot.transformers.monkey_patch import _apply_liger_kernel
from liger_aot.transformers.monkey_patch import _apply_liger_kernel_to_instance
from liger_aot.transformers.monkey_patch import bind_new_models

import training
from tiny import DECODER
from tiny import batch
from tiny import build
from tiny import check_equal
from tiny import check_identical
from tiny import operators
from tiny import step

HERE = Path(__file__).parent
LAYERS = {"rms_norm", "layer_norm", "group_norm", "gated_rms_norm", "rope", "swiglu", "geglu", "relu_squared"}


def bound(report):
    return {row.operator for row in report.bound}


def is_bound(model):
    return "LigerRMSNorm" in repr(model)


@pytest.fixture
def asked(monkeypatch):
    """The options of each call of bind, of which none is made."""
    calls = []
    monkeypatch.setattr(monkey_patch, "bind", lambda model, **options: calls.append(options))
    return calls


def alone(code, site, *arguments):
    """What code prints, in an interpreter that sees this directory of packages alone."""
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{HERE}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-S", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=HERE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def without(folder, *packages):
    """A directory of everything that is installed here but these."""
    site = folder / "site-packages"
    site.mkdir()
    (site / "liger_aot").symlink_to(Path(liger_aot.__file__).parent)
    for installed in [Path(p) for p in sys.path if p.endswith("-packages")]:
        for entry in installed.iterdir():
            if not entry.name.startswith(packages) and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    return site


# --- a Trainer


def check_curve(got, expected):
    for name, values in expected.items():
        assert got[name] == pytest.approx(values, rel=1e-5), name


@functools.cache
def plain_curve(family):
    with tempfile.TemporaryDirectory() as folder:
        return training.train(folder, build(family))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "granite", "olmo2", "gpt2"])
def test_trainer_with_the_callback_learns_as_without(family, tmp_path):
    callback = liger_aot.LigerCallback()
    check_curve(training.train(tmp_path, build(family), [callback]), plain_curve(family))
    assert {"linear_cross_entropy"} < bound(callback.report)
    assert callback.report.counts == {"fused": training.STEPS * training.ACCUMULATED}


def test_the_callback_passes_options_on(tmp_path):
    callback = liger_aot.LigerCallback(rope=False, linear_cross_entropy=False, cross_entropy=True)
    check_curve(training.train(tmp_path, build(), [callback]), plain_curve("llama"))
    assert bound(callback.report) == {"rms_norm", "swiglu", "cross_entropy"}
    with pytest.raises(
        TypeError, match=r"LigerCallback: options must be those of bind, rms_norm, .*, strict; got model, ropes"
    ):
        liger_aot.LigerCallback(ropes=False, model=None)
    with pytest.raises(ValueError, match="LigerCallback: use_liger_kernel must be False, got True"):
        training.train(tmp_path, build(), [liger_aot.LigerCallback()], use_liger_kernel=True)


def test_each_model_of_model_init_is_bound(tmp_path):
    built = []

    def model_init():
        built.append(build())
        return built[-1]

    callback = liger_aot.LigerCallback()
    check_curve(training.train(tmp_path, None, [callback], model_init), plain_curve("llama"))
    assert len(built) == 2
    assert all(map(is_bound, built))


def test_a_bound_model_is_bound_anew_once(tmp_path):
    """Not again as training begins: the report from then on counts."""
    reports = []

    class Watch(TrainerCallback):
        def on_init_end(self, *args, **kwargs):
            reports.append(callback.report)

        on_train_begin = on_init_end

    model = build()
    liger_aot.bind(model, rope=False)
    callback = liger_aot.LigerCallback()
    check_curve(training.train(tmp_path, model, [callback, Watch()]), plain_curve("llama"))
    assert "rope" in bound(callback.report)
    assert all(report is callback.report for report in reports)
    assert len(reports) == 2


def test_a_callback_is_pickled_with_its_report(tmp_path):
    callback = liger_aot.LigerCallback(rope=False)
    training.train(tmp_path, build(), [callback])
    other = pickle.loads(pickle.dumps(callback))
    assert (other.options, list(other.report)) == (callback.options, list(callback.report))
    assert other.report.counts == callback.report.counts
    model = build()
    training.train(tmp_path, model, [other])
    assert is_bound(model)


def test_trl_with_the_callback_learns_as_without(tmp_path):
    callback = liger_aot.LigerCallback()
    with operators() as names:
        got = training.fine_tune(tmp_path, build(), [callback])
    check_curve(got, training.fine_tune(tmp_path, build()))
    assert {"rms_norm_fwd", "rms_norm_bwd", "swiglu_bwd"} < {*names}


# --- the auto class


@pytest.fixture
def saved(tmp_path):
    build().save_pretrained(tmp_path)
    return tmp_path


def test_auto_class(saved):
    plain = AutoModelForCausalLM.from_pretrained(saved).train()
    model = AutoLigerKernelForCausalLM.from_pretrained(saved, rope=False, dtype=torch.float32).train()
    assert type(model).__mro__[1] is LlamaForCausalLM
    with operators() as names:
        got = step(model, **batch())
    check_equal(got, step(plain, **batch()))
    assert not any("rope" in name for name in names)
    assert any("rms_norm" in name for name in names)
    model, info = AutoLigerKernelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert is_bound(model)
    assert not info["missing_keys"]


def test_auto_class_of_a_type_that_liger_has_not():
    model = AutoLigerKernelForCausalLM.from_config(build("gpt2").config, layer_norm=True)
    assert "LigerLayerNorm" in repr(model)
    assert "LigerLayerNorm" not in repr(AutoLigerKernelForCausalLM.from_config(model.config, layer_norm=False))


def test_what_is_no_flag_goes_to_transformers(saved):
    model = AutoLigerKernelForCausalLM.from_pretrained(saved, attn_implementation="eager", rms_norm=False)
    assert model.config._attn_implementation == "eager"
    assert not is_bound(model)
    with pytest.raises(RuntimeError, match="bind: strict"):
        AutoLigerKernelForCausalLM.from_pretrained(saved, dtype=torch.float64, strict=True)
    model = AutoLigerKernelForCausalLM.from_config(model.config, keep_logits=True, compile="liger").train()
    assert isinstance(model(**batch()).logits, torch.Tensor)
    with pytest.raises(TypeError, match="rmsnorm"):
        AutoLigerKernelForCausalLM.from_config(model.config, rmsnorm=False)


# --- Liger's functions


def theirs():
    return pytest.importorskip(
        "liger_kernel.transformers.monkey_patch", reason="liger-kernel, to compare with, is not installed"
    )


def test_model_types_and_functions_are_ligers():
    table = theirs().MODEL_TYPE_TO_APPLY_LIGER_FN
    assert MODEL_TYPE_TO_APPLY_LIGER_FN.keys() == table.keys()
    for model_type, function in table.items():
        ours = MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]
        assert ours is getattr(monkey_patch, function.__name__)
        expected = [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        assert [(p.name, p.kind, p.default) for p in inspect.signature(ours).parameters.values()] == expected, model_type


@pytest.mark.parametrize("model_type", MODEL_TYPE_TO_APPLY_LIGER_FN)
def test_defaults_are_those_of_ligers_function(model_type, asked):
    """What Liger's function has on is on; what it has no flag for is off, unless it hands flags on to its inner models."""
    function = theirs().MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]
    flags = {p.name: p.default for p in inspect.signature(function).parameters.values() if isinstance(p.default, bool)}
    inner = model_type in ("internvl", "llava", "smolvlm")
    expected = {name: flags.get(name, inner) for name in LAYERS}
    expected["cross_entropy"] = flags.get("cross_entropy", False)
    expected["linear_cross_entropy"] = flags.get("fused_linear_cross_entropy", False)
    MODEL_TYPE_TO_APPLY_LIGER_FN[model_type](model=torch.nn.Identity())
    assert asked == [expected]


def test_kwargs_everywhere(asked):
    """Every flag of every function, by keyword and in any order, reaches bind; so do llava's for its inner models."""
    for model_type, function in MODEL_TYPE_TO_APPLY_LIGER_FN.items():
        names = [name for name in inspect.signature(function).parameters if name in LAYERS]
        function(**dict.fromkeys(reversed(names), False), model=torch.nn.Identity())
        options = asked.pop()
        assert not any(options[name] for name in names), model_type
    MODEL_TYPE_TO_APPLY_LIGER_FN["llava"](model=torch.nn.Identity(), rope=False)
    assert not asked[0]["rope"]
    assert asked[0]["rms_norm"]


def test_function_binds_what_its_flags_say():
    model = build()
    report = apply_liger_kernel_to_llama(rope=False, swiglu=False, model=model)
    assert bound(report) == {"rms_norm", "linear_cross_entropy"}
    report = apply_liger_kernel_to_llama(True, True, False, model=model)
    assert bound(report) == {"rms_norm", "rope", "swiglu", "cross_entropy"}, "the last call holds"
    check_equal(step(model, **batch()), step(build(), **batch()))


def test_instance_by_its_type():
    assert bound(_apply_liger_kernel_to_instance(model=build())) == {"rms_norm", "rope", "swiglu", "linear_cross_entropy"}
    assert bound(_apply_liger_kernel_to_instance(build("granite"))) == {"rms_norm", "rope", "swiglu", "cross_entropy"}
    assert "layer_norm" in bound(_apply_liger_kernel_to_instance(build("gpt2")))
    report = _apply_liger_kernel_to_instance(build(), rms_norm=False, keep_logits=True)
    assert bound(report) == {"rope", "swiglu", "linear_cross_entropy"}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: apply_liger_kernel_to_llama(cross_entropy=True, model=build()), ValueError, "cannot both be True"),
        (
            lambda: _apply_liger_kernel_to_instance(build("gpt2"), cross_entropy=True),
            ValueError,
            "both be True, got them for gpt2",
        ),
        (
            lambda: apply_liger_kernel_to_granite(fused_linear_cross_entropy=True, model=build()),
            ValueError,
            "granite; set fused",
        ),
        (
            lambda: apply_liger_kernel_to_llama(geglu=True, model=build()),
            TypeError,
            r"to_llama: .*'geglu'; it takes \(rope=True",
        ),
        (lambda: _apply_liger_kernel_to_instance(build(), rmsnorm=False), TypeError, "flags must be of rope, .*; got rmsnorm"),
        (
            lambda: apply_liger_kernel_to_llama(),
            RuntimeError,
            r"call apply_liger_kernel_to_llama\(model=model\) or liger_aot.bind",
        ),
        (lambda: _apply_liger_kernel("qwen2_vl_text"), RuntimeError, r"call apply_liger_kernel_to_qwen2_vl\(model=model\)"),
        (lambda: _apply_liger_kernel_to_instance(3), ValueError, "bind: model must be a torch.nn.Module, got int"),
        (lambda: _apply_liger_kernel("gpt2"), RuntimeError, r"call _apply_liger_kernel_to_instance\(model=model\)"),
    ],
)
def test_rejects(call, error, text):
    with pytest.raises(error, match=text):
        call()


# --- models that are built later


def test_new_models_are_bound_while_it_is_open(saved):
    theirs = dict(vars(PreTrainedModel))
    config = build().config
    with bind_new_models():
        apply_liger_kernel_to_llama(rope=False)
        torch.manual_seed(0)
        models = [
            LlamaForCausalLM(config),
            AutoModelForCausalLM.from_config(config),
            AutoModelForCausalLM.from_pretrained(saved),
        ]
        models += [LlamaForCausalLM.from_pretrained(saved, output_loading_info=True)[0]]
        others = [build("gemma")]
        with pytest.raises(RuntimeError, match="bind_new_models: must not be open already"):
            bind_new_models()
    assert dict(vars(PreTrainedModel)) == theirs
    torch.manual_seed(0)
    others += [LlamaForCausalLM(config), AutoModelForCausalLM.from_pretrained(saved)]
    check_identical(models[0].state_dict(), others[1].state_dict())
    plain = step(others[-1].train(), **batch())
    assert not any(map(is_bound, others))
    for model in models:
        model.load_state_dict(others[-1].state_dict())
        with operators() as names:
            check_equal(step(model.train(), **batch()), plain)
        assert {"rms_norm_fwd", "swiglu_fwd"} < {*names}
        assert not any("rope" in name for name in names)
    with pytest.raises(RuntimeError, match="must be given, got none"):
        apply_liger_kernel_to_llama()


def test_new_models_of_a_type_with_two_names_are_bound():
    config = Llama4TextConfig(**DECODER, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, moe_layers=[])
    with bind_new_models():
        MODEL_TYPE_TO_APPLY_LIGER_FN["llama4"]()
        assert is_bound(AutoModelForCausalLM.from_config(config))


def test_new_models_are_bound_inside_others(tmp_path):
    """A model whose type was asked for, in one whose was not; and what fails to load leaves nothing behind."""
    import transformers

    config = transformers.LlavaConfig(
        text_config=build().config,
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4
        ),
    )
    with bind_new_models() as handle:
        apply_liger_kernel_to_llama()
        with pytest.raises(OSError, match="nowhere"):
            LlamaForCausalLM.from_pretrained(tmp_path / "nowhere")
        model = transformers.LlavaForConditionalGeneration(config)
        model.save_pretrained(tmp_path)
        loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
        handle.close()
    for outer in (model, loaded):
        assert is_bound(outer.model.language_model)
        assert "loss=liger" not in repr(outer)


def test_loaded_models_are_bound_when_their_weights_are_there(saved, monkeypatch):
    """The inner model of the type, then the model."""
    devices, bind = [], monkey_patch.bind
    monkeypatch.setattr(
        monkey_patch, "bind", lambda model, **options: devices.append(model.device.type) or bind(model, **options)
    )
    with bind_new_models():
        apply_liger_kernel_to_llama()
        LlamaForCausalLM.from_pretrained(saved)
    assert devices == ["cpu", "cpu"]


# --- answering for liger_kernel


def test_as_liger_is_refused_where_liger_is_installed():
    theirs()
    before = [*sys.meta_path]
    with pytest.raises(RuntimeError, match=r"liger-kernel must not be installed, found .*liger_kernel.*; uninstall it, or"):
        liger_aot.as_liger()
    assert sys.meta_path == before


@pytest.fixture(scope="module")
def as_liger(tmp_path_factory):
    folder = tmp_path_factory.mktemp("as_liger")
    out = alone("import sys, training; training.main(sys.argv[1])", without(folder, "liger_kernel"), folder)
    return json.loads(out.splitlines()[-1])


def test_use_liger_kernel_reaches_us(as_liger, tmp_path):
    """With skip_logits in its evaluation, too."""
    check_curve(as_liger["train"], plain_curve("llama"))
    assert "LigerRMSNorm" in as_liger["train"]["model"]
    assert "LigerLMHead" in as_liger["train"]["model"]
    check_curve(as_liger["logits"], plain_curve("llama"))


def test_trls_use_liger_kernel_reaches_us(as_liger, tmp_path):
    check_curve(as_liger["fine_tune"], training.fine_tune(tmp_path, build()))
    assert "LigerSwiGLUMLP" in as_liger["fine_tune"]["model"]
    assert "LigerLMHead" not in as_liger["fine_tune"]["model"], "TRL asks for no fused loss: it has its own"


def test_as_liger_is_undone(as_liger):
    assert as_liger["available"] == [False, True, False]
    assert as_liger["left"] == []


def test_modules_of_liger_kernel_are_ours(tmp_path):
    """By any path, and never loaded twice."""
    code = """if True:
        import importlib.util, sys
        import liger_aot, liger_aot.transformers.rms_norm as ours
        spec, finders = ours.__spec__, [*sys.meta_path]
        with liger_aot.as_liger():
            import liger_kernel.transformers.rms_norm as theirs
            from liger_kernel.transformers import LigerRMSNorm, apply_liger_kernel_to_llama
            from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance
            assert theirs is ours and ours.__spec__ is spec and LigerRMSNorm is ours.LigerRMSNorm
            assert importlib.util.find_spec("liger_kernel.transformers.nothing") is None
            assert importlib.util.find_spec("liger_kernel.ops.utils") is None
            import liger_kernel.ops
            from liger_kernel.ops import LigerRMSNormFunction, rms_norm
            from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction as same
            from liger_kernel.megatron import LigerMegatronRMSNorm
            assert LigerRMSNormFunction is same is rms_norm.LigerRMSNormFunction is liger_aot.ops.LigerRMSNormFunction
            assert not hasattr(liger_kernel.ops.rms_norm, "rms_norm_forward") and not hasattr(liger_kernel.ops, "swiglu")
            assert LigerMegatronRMSNorm is liger_aot.megatron.LigerMegatronRMSNorm
            assert not hasattr(liger_aot.ops.rms_norm, "LigerRMSNormFunction")
            try:
                liger_aot.as_liger()
            except RuntimeError as error:
                print(error)
        assert importlib.util.find_spec("liger_kernel") is None and sys.meta_path == finders
        assert "transformers" not in sys.modules
    """
    out = alone(code, without(tmp_path, "liger_kernel"))
    assert out == "as_liger: must not be open already; close the other one first\n"


def test_transformers_is_optional(tmp_path):
    code = """if True:
        import liger_aot, liger_aot.transformers
        from liger_aot.transformers import *
        for name in ("LigerCallback", "AutoLigerKernelForCausalLM"):
            try:
                getattr(liger_aot.transformers, name)
            except ImportError as error:
                print(error)
        print(liger_aot.transformers.is_transformers_available())
    """
    out = alone(code, without(tmp_path, "transformers"))
    remedy = "needs transformers, which is not installed: pip install 'liger-aot[transformers]'"
    assert out.splitlines() == [f"LigerCallback {remedy}", f"AutoLigerKernelForCausalLM {remedy}", "False"]
    assert is_transformers_available()


# --- layers for the kernels library


def hooked(kind, name):
    return kernels.use_kernel_forward_from_hub(name)(type(kind.__name__, (kind,), {}))


def kernelize(module, mode=kernels.Mode.TRAINING):
    with kernels.use_kernel_mapping(kernel_layers.kernel_mapping(), inherit_mapping=False):
        kernels.kernelize(module, mode=mode, device="cpu")


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GptOssRMSNorm, GemmaRMSNorm, BitNetRMSNorm], ids=lambda kind: kind.__name__)
def test_one_hook_covers_several_formulas(kind):
    """To the bit, in bf16, where the formulas differ."""
    norms = torch.nn.ModuleList(hooked(kind, "RMSNorm")(32) for _ in range(2)).bfloat16()
    x = torch.randn(3, 7, 32).bfloat16()
    for norm in norms:
        norm.weight.data.normal_()
    plain = [norm(x) for norm in norms]
    kernelize(norms)
    with operators() as names:
        assert all(torch.equal(norm(x), y) for norm, y in zip(norms, plain, strict=True))
        norms[0](x)
    assert names.count("rms_norm_fwd") >= 3


def test_a_hosts_own_formula_is_kept():
    class Other(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    norm, x = torch.nn.Sequential(hooked(Other, "RMSNorm")(32)), torch.randn(3, 32)
    plain = norm(x)
    kernelize(norm)
    assert torch.equal(norm(x), plain)


def test_layers_train_and_leave_compiled_models_to_inductor():
    config = build().config
    kind = hooked(LlamaMLP, "SwiGLUMLP")
    mlp, x = torch.nn.Sequential(kind(config)), torch.randn(3, config.hidden_size, requires_grad=True)
    (plain,) = torch.autograd.grad(mlp(x).square().sum(), x)
    kernelize(mlp)
    with operators() as names:
        (ours,) = torch.autograd.grad(mlp(x).square().sum(), x)
    check_equal({"x": ours}, {"x": plain})
    assert "swiglu_bwd" in names
    kernelize(mlp, kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE)
    assert mlp[0].forward.__func__ is kind.forward


def test_ours_go_before_transformers_own_on_a_gpu():
    """Which are registered anew at each set_use_kernels, for every capability."""
    tree = kernels.layer._interval_tree.IntervalTree()
    for device in kernel_layers.kernel_mapping()["RMSNorm"]:
        if isinstance(device, kernels.Device):
            tree.insert(device.properties.min_capability, device.properties.max_capability, "ours")
    tree.insert(0, sys.maxsize, "transformers'")
    assert [tree.find_smallest_interval(c) for c in (70, 75, 80, 90, 121)] == ["transformers'", *["ours"] * 4]


# --- explain


def test_explain_a_model_type(capsys):
    assert main(["explain", "llama"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("LlamaForCausalLM\n")
    assert re.search(r"bound +rms_norm +32 x LlamaRMSNorm", out)


@pytest.mark.parametrize("name", ["", "config.json"])
def test_explain_a_configuration(saved, name, capsys):
    assert main(["explain", str(saved / name), "--json", "--set", "rope=False"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["operator"] for row in rows if row["status"] == "bound"} == {"rms_norm", "swiglu", "linear_cross_entropy"}


def test_explain_takes_the_class_that_is_named_or_has_a_head(tmp_path, capsys):
    config = build().config
    config.architectures = ["LlamaForTokenClassification"]
    config.save_pretrained(tmp_path)
    kinds = {
        "roformer": "RoFormerForCausalLM",
        "t5": "T5ForConditionalGeneration",
        "albert": "AlbertForMaskedLM",
        "vit": "ViTModel",
        "qwen3_5": "Qwen3_5ForConditionalGeneration",
    }
    for model, kind in {**kinds, str(tmp_path): "LlamaForTokenClassification"}.items():
        assert main(["explain", model]) == 0
        assert capsys.readouterr().out.split("\n", 1)[0] == kind


def test_explain_rejects(capsys):
    assert main(["explain", "lama"]) == 2
    assert "a model type that transformers knows, a config.json or the folder of one, got 'lama'" in capsys.readouterr().err
    assert main(["explain", "llama", "8x64", "--arch", "90"]) == 2
    assert "for a model, shapes, --arch must not be given" in capsys.readouterr().err
    assert main(["explain", "llama", "--set", "compile=liger", "ropes=1"]) == 2
    assert "--set must name options of bind, rms_norm, layer_norm, group_norm," in capsys.readouterr().err
    assert main(["explain", "llama", "--set", "rope=no"]) == 1
    assert "bind: rope must be True or False, got 'no'" in capsys.readouterr().err
    assert main(["explain", "fsmt", "--set", "strict=True"]) == 1
    assert "Embedding" in capsys.readouterr().err
    assert main(["explain", "nemotron"]) == 1
    assert (
        "explain: transformers must be able to build the model, but for nemotron it raised TypeError" in capsys.readouterr().err
    )


# --- the page


PAGE = (HERE.parent / "docs" / "transformers.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), ids=lambda code: code.split("\n", 1)[0])
def test_the_page_runs(code, saved, tmp_path):
    """Each piece of it, given what it does not make itself."""
    model, rows = build(), [training.example(i) for i in range(4)]
    optimizer = torch.optim.AdamW(model.parameters())
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=training.padded)
    given = {"model": model, "path": saved, "folder": tmp_path, "dataset": rows, "collate": training.padded, "torch": torch}
    given |= {"loader": loader, "optimizer": optimizer, "liger_aot": liger_aot, "AutoModelForCausalLM": AutoModelForCausalLM}
    if "as_liger" in code:
        theirs()
        with pytest.raises(RuntimeError, match="liger-kernel must not be installed"):
            exec(code, given)
        return
    # The kernels library keeps its mapping in a context variable.
    contextvars.copy_context().run(exec, code, given)
    assert is_bound(given["model"]) == ("kernel_mapping" not in code)
