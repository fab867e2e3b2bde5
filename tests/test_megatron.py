"""Megatron-Core on these operators, over stubs of the symbols that are replaced: computed in plain torch, as Megatron does."""

import importlib
import inspect
import logging
import sys
import types
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)
from torch.testing._internal.distributed.fake_pg import FakeStore

import liger_aot.megatron
from liger_aot.megatron import LigerMegatronCrossEntropy
from liger_aot.megatron import LigerMegatronRMSNorm
from liger_aot.megatron import LigerMegatronSwiGLU
from liger_aot.megatron import apply_liger_kernel_to_megatron

from harness import run

STUBS = {
    "megatron.core.parallel_state": """
        GROUP = None
        def get_tensor_model_parallel_group(check_initialized=True):
            assert GROUP is not None or not check_initialized
            return GROUP
    """,
    "megatron.core.transformer.torch_norm": """
        import torch
        class WrappedTorchNorm:
            def __new__(cls, config, hidden_size, eps=1e-5):
                norm = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
                return norm(hidden_size, eps=eps)
    """,
    "megatron.core.transformer.transformer_block": """
        from megatron.core.transformer.torch_norm import WrappedTorchNorm
        LayerNormImpl = WrappedTorchNorm
    """,
    "megatron.core.models.backends": """
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy as _fused_ce
        from megatron.core.transformer.torch_norm import WrappedTorchNorm
        class LocalSpecProvider:
            def layer_norm(self, rms_norm=False, for_qk=False, has_residual=False):
                return WrappedTorchNorm if rms_norm else ("layer norm", for_qk, has_residual)
    """,
    "megatron.core.fusions.fused_cross_entropy": """
        import torch.nn.functional as F
        def fused_vocab_parallel_cross_entropy(vocab_parallel_logits, target, tp_group):
            z = vocab_parallel_logits.float().flatten(0, 1)
            return F.cross_entropy(z, target.flatten(), reduction="none").view(target.shape)
    """,
    "megatron.core.tensor_parallel.cross_entropy": """
        import torch.nn.functional as F
        def vocab_parallel_cross_entropy(logits, target, label_smoothing=0.0, tp_group=None):
            z, n = logits.float().flatten(0, 1), logits.shape[-1]
            options = {"reduction": "none", "label_smoothing": label_smoothing * n / (n - 1)}
            return F.cross_entropy(z, target.flatten(), **options).view(target.shape)
    """,
    "megatron.core.tensor_parallel": "from .cross_entropy import vocab_parallel_cross_entropy",
    "megatron.core.fusions.fused_bias_swiglu": """
        import torch
        import torch.nn.functional as F
        seen = []
        class SwiGLUFunction:
            @staticmethod
            def apply(input, fp8_input_store, cpu_offload_input):
                seen.append((fp8_input_store, cpu_offload_input))
                gate, up = input.chunk(2, -1)
                return F.silu(gate) * up
        def bias_swiglu_impl(input, bias, fp8_input_store=False, cpu_offload_input=False):
            x = input.view(-1, input.shape[-1])
            out = SwiGLUFunction.apply(x if bias is None else x + bias, fp8_input_store, cpu_offload_input)
            return out.view(*input.shape[:-1], -1)
    """,
    "megatron.core.late": "from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy as late",
}
EVERYTHING = {"rms_norm": True, "cross_entropy": True, "swiglu": True}
CONFIG = SimpleNamespace(normalization="RMSNorm")


@pytest.fixture
def megatron(tmp_path, monkeypatch):
    """Gives each module of the stubs; what was imported is forgotten afterwards."""
    for name, text in STUBS.items():
        path = tmp_path.joinpath(*name.split("."))
        if any(other.startswith(f"{name}.") for other in STUBS):
            path /= "__init__"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(inspect.cleandoc(f"\n{text}"))
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda name: importlib.import_module(f"megatron.core.{name}")
    for name in [n for n in sys.modules if n.partition(".")[0] == "megatron"]:
        del sys.modules[name]


def symbols(megatron):
    """All that may be replaced, and every copy of it."""
    return [
        megatron("models.backends").LocalSpecProvider.layer_norm,
        megatron("transformer.transformer_block").LayerNormImpl,
        megatron("fusions.fused_cross_entropy").fused_vocab_parallel_cross_entropy,
        megatron("models.backends")._fused_ce,
        megatron("tensor_parallel.cross_entropy").vocab_parallel_cross_entropy,
        megatron("tensor_parallel").vocab_parallel_cross_entropy,
        megatron("fusions.fused_bias_swiglu").SwiGLUFunction,
    ]


def changed(before, after):
    return [a is not b for a, b in zip(before, after, strict=True)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [True, True, False, False, False, False, False]),
        ({"rms_norm": False}, [False] * 7),
        ({"rms_norm": False, "cross_entropy": True}, [False, False, True, True, True, True, False]),
        ({"rms_norm": False, "swiglu": True}, [False] * 6 + [True]),
        (EVERYTHING, [True] * 7),
    ],
    ids=str,
)
def test_replaces_what_is_asked_and_puts_it_back(megatron, options, expected):
    before = symbols(megatron)
    with apply_liger_kernel_to_megatron(**options):
        now = symbols(megatron)
        assert changed(before, now) == expected
        assert [s.__wrapped__ for s, c in zip(now, expected, strict=True) if c] == [
            s for s, c in zip(before, expected, strict=True) if c
        ]
        again = apply_liger_kernel_to_megatron(**options)
        assert changed(now, symbols(megatron)) == [False] * 7
        again.close()
        assert changed(now, symbols(megatron)) == [False] * 7
    assert changed(before, symbols(megatron)) == [False] * 7


def test_what_is_imported_later_is_put_back_too(megatron):
    own = megatron("tensor_parallel.cross_entropy").vocab_parallel_cross_entropy
    with apply_liger_kernel_to_megatron(cross_entropy=True):
        assert megatron("late").late.__wrapped__ is own
    assert megatron("late").late is own


def test_what_somebody_else_replaced_since_is_left(megatron, caplog):
    block = megatron("transformer.transformer_block")
    handle = apply_liger_kernel_to_megatron()
    block.LayerNormImpl = theirs = object()
    handle.close()
    assert block.LayerNormImpl is theirs
    assert "transformer_block.LayerNormImpl is left as it is: somebody has replaced it since" in caplog.text
    assert not hasattr(megatron("models.backends").LocalSpecProvider.layer_norm, "__wrapped__")


def test_says_what_it_did(megatron, caplog):
    caplog.set_level(logging.INFO, "liger_aot")
    apply_liger_kernel_to_megatron()
    assert "megatron.core.models.backends.LocalSpecProvider.layer_norm has been replaced by liger_aot" in caplog.text
    apply_liger_kernel_to_megatron()
    assert "transformer_block.LayerNormImpl has been replaced already" in caplog.text


def test_a_norm_of_other_libraries_is_left(megatron, caplog):
    caplog.set_level(logging.INFO, "liger_aot")
    block = megatron("transformer.transformer_block")
    block.LayerNormImpl = theirs = type("TENorm", (), {})
    apply_liger_kernel_to_megatron()
    assert block.LayerNormImpl is theirs
    assert "TENorm" in caplog.text
    assert "not torch's norm, and is left as it is" in caplog.text


@pytest.mark.parametrize(
    ("module", "name", "options"),
    [
        ("models.backends", "LocalSpecProvider", {}),
        ("transformer.transformer_block", "LayerNormImpl", {}),
        ("fusions.fused_cross_entropy", "fused_vocab_parallel_cross_entropy", {"cross_entropy": True}),
        ("tensor_parallel.cross_entropy", "vocab_parallel_cross_entropy", {"cross_entropy": True}),
        ("fusions.fused_bias_swiglu", "SwiGLUFunction", {"swiglu": True}),
    ],
)
def test_a_symbol_that_moved_is_an_error_and_nothing_is_changed(megatron, monkeypatch, module, name, options):
    before = symbols(megatron)
    with monkeypatch.context() as context:
        context.delattr(megatron(module), name)
        text = f"apply_liger_kernel_to_megatron: megatron.core.{module}.{name}.* must be there, got AttributeError: .*leave out"
        with pytest.raises(ImportError, match=text):
            apply_liger_kernel_to_megatron(**options)
    assert changed(before, symbols(megatron)) == [False] * 7


class Refusing(types.ModuleType):
    """A module one name of which cannot be set."""

    refused = None

    def __setattr__(self, name, value):
        if name == self.refused:
            raise AttributeError(f"{name} is read-only")
        super().__setattr__(name, value)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("models.backends", "_fused_ce"),  # a copy, after the first of its option's places
        ("tensor_parallel.cross_entropy", "vocab_parallel_cross_entropy"),
        ("fusions.fused_bias_swiglu", "SwiGLUFunction"),
    ],
)
def test_what_was_replaced_before_a_module_refuses_is_put_back(megatron, monkeypatch, caplog, module, name):
    before = symbols(megatron)
    megatron(module).__class__ = Refusing
    monkeypatch.setattr(Refusing, "refused", name)
    with pytest.raises(AttributeError, match=f"{name} is read-only"):
        apply_liger_kernel_to_megatron(**EVERYTHING)
    assert changed(before, symbols(megatron)) == [False] * 7
    assert "somebody has replaced it" not in caplog.text


def test_without_megatron():
    with pytest.raises(ImportError, match="got ModuleNotFoundError: No module named 'megatron'; install megatron-core"):
        apply_liger_kernel_to_megatron()


def test_does_not_replace_what_liger_kernel_replaced(megatron):
    megatron("fusions.fused_bias_swiglu").SwiGLUFunction.__liger_patched__ = True
    before = symbols(megatron)
    with pytest.raises(RuntimeError, match="SwiGLUFunction must be Megatron's own, got liger-kernel's; call one of the two"):
        apply_liger_kernel_to_megatron(swiglu=True)
    assert changed(before, symbols(megatron)) == [False] * 7


# --- numbers


def check(function, original, *inputs):
    """fp32 on both sides, rounded in another order."""
    torch.testing.assert_close(run(function, inputs), run(original, inputs))


def test_norms(megatron):
    provider, block = megatron("models.backends").LocalSpecProvider(), megatron("transformer.transformer_block")
    torchs = block.LayerNormImpl
    apply_liger_kernel_to_megatron()
    assert provider.layer_norm(rms_norm=True, for_qk=True) is provider.layer_norm(True) is LigerMegatronRMSNorm
    assert provider.layer_norm(False, True, has_residual=True) == ("layer norm", True, True)
    for build in (provider.layer_norm(rms_norm=True), block.LayerNormImpl):
        norm, plain = build(config=CONFIG, hidden_size=24, eps=1e-3), torchs(CONFIG, 24, 1e-3)
        assert isinstance(norm, LigerMegatronRMSNorm)
        norm.weight.data.normal_()
        plain.load_state_dict(norm.state_dict())
        check(norm, plain, torch.randn(5, 2, 24))
        x = torch.randn(5, 2, 24).bfloat16()
        assert torch.equal(norm.bfloat16()(x), F.rms_norm(x.float(), (24,), norm.weight.float(), 1e-3).bfloat16())
    other = block.LayerNormImpl(config=SimpleNamespace(normalization="LayerNorm"), hidden_size=24)
    assert type(other) is torch.nn.LayerNorm
    assert issubclass(block.LayerNormImpl, torchs)


def test_norm_of_a_weight_centered_at_zero():
    for norm in (
        LigerMegatronRMSNorm(SimpleNamespace(layernorm_zero_centered_gamma=True, sequence_parallel=True), (3, 8)),
        LigerMegatronRMSNorm(SimpleNamespace(sequence_parallel=True), (3, 8), zero_centered_gamma=True),
    ):
        assert norm.weight.sequence_parallel is True
        assert not norm.weight.any()
        norm.weight.data.normal_()
        check(norm, lambda x, norm=norm: F.rms_norm(x, (3, 8), 1 + norm.weight, 1e-5), torch.randn(5, 3, 8))
    assert LigerMegatronRMSNorm(CONFIG, 8).weight.sequence_parallel is False
    with pytest.raises(ValueError, match=r"LigerMegatronRMSNorm: config\.normalization must be 'RMSNorm', got 'LayerNorm'"):
        LigerMegatronRMSNorm(SimpleNamespace(normalization="LayerNorm"), 8)


def test_cross_entropy(megatron):
    fused, unfused = symbols(megatron)[2:5:2]
    apply_liger_kernel_to_megatron(cross_entropy=True)
    _, _, new_fused, copy, new_unfused, package, _ = symbols(megatron)
    x, target = 3 * torch.randn(4, 2, 9), torch.randint(9, (4, 2))
    kept = x.clone()
    for call in (new_fused, copy):
        check(partial(call, target=target, tp_group=None), partial(fused, target=target, tp_group=None), x)
    for options in ({}, {"label_smoothing": 0.2}):
        for call in (new_unfused, package):
            check(partial(call, target=target, **options), partial(unfused, target=target, **options), x)
    assert torch.equal(x, kept)
    assert new_fused(x.bfloat16(), target).dtype == torch.float32
    target[1, 0], target[2, 1] = -1, -100
    x.requires_grad_()
    losses = new_unfused(x, target)
    losses.sum().backward()
    assert (losses == 0).nonzero().tolist() == [[1, 0], [2, 1]]
    assert (x.grad == 0).all(-1).nonzero().tolist() == [[1, 0], [2, 1]]


def test_cross_entropy_is_over_megatrons_group(megatron):
    """A group of two whose processes have the same logits: a gather repeats this one's."""
    if torch.distributed.is_initialized():  # by a trainer of another file
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        group = torch.distributed.group.WORLD
        x, target = torch.randn(4, 2, 9), torch.randint(9, (4, 2)) + 9
        want = F.cross_entropy(x.repeat(1, 1, 2).flatten(0, 1), target.flatten(), reduction="none").view(4, 2)
        apply_liger_kernel_to_megatron(cross_entropy=True)
        _, _, fused, _, unfused, *_ = symbols(megatron)
        torch.testing.assert_close(fused(x, target, group), want)
        torch.testing.assert_close(LigerMegatronCrossEntropy()(x, target, group), want)
        megatron("parallel_state").GROUP = group
        torch.testing.assert_close(unfused(x, target), want)
    finally:
        torch.distributed.destroy_process_group()


def test_swiglu(megatron, caplog):
    caplog.set_level(logging.INFO, "liger_aot")
    module = megatron("fusions.fused_bias_swiglu")
    call, own = module.bias_swiglu_impl, module.SwiGLUFunction
    plain = lambda x: F.silu(x[..., :6]) * x[..., 6:]  # noqa: E731
    apply_liger_kernel_to_megatron(swiglu=True)
    x = torch.randn(5, 2, 12)
    check(lambda x: call(x, None), plain, x)
    assert module.seen == []
    for flags in ((True, False), (False, True), (True, False)):
        check(lambda x, flags=flags: call(x, None, *flags), plain, x)
    assert module.seen == [(True, False), (False, True), (True, False)]
    assert caplog.text.count("SwiGLU is computed by Megatron's own code: the input is kept in fp8") == 1
    assert caplog.text.count("SwiGLU is computed by Megatron's own code: the input is kept on the CPU") == 1
    assert module.SwiGLUFunction.__wrapped__ is own


def test_swiglu_module(megatron):
    impl, x, bias = megatron("fusions.fused_bias_swiglu").bias_swiglu_impl, torch.randn(5, 2, 12), torch.randn(12)
    module = LigerMegatronSwiGLU(impl)
    check(module, lambda x: impl(x, None), x)
    check(lambda x, b: module(x, b), impl, x, bias)
    assert torch.equal(module(x[0]), LigerMegatronSwiGLU()(x[0]))
    for arguments, reason in (
        ((bias,), "there is a bias"),
        ((None, True), "the input is kept in fp8"),
        ((None, False, True), "the input is kept on the CPU"),
    ):
        with pytest.raises(NotImplementedError, match=f"LigerMegatronSwiGLU: {reason}.*pass Megatron's bias_swiglu_impl"):
            LigerMegatronSwiGLU()(x, *arguments)
    for shape in ((12,), (5, 11), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match=r"LigerMegatronSwiGLU: input must have shape \(tokens, 2·n\) or"):
            module(torch.randn(shape))


# --- names


@pytest.mark.parametrize("name", liger_aot.megatron.__all__)
def test_signature_is_ligers(name):
    theirs = pytest.importorskip("liger_kernel.megatron", reason="liger-kernel, to compare signatures with, is not installed")
    assert sorted(liger_aot.megatron.__all__) == sorted(theirs.__all__)

    def parameters(function):
        return [(p.name, p.kind.name, p.default) for p in inspect.signature(function).parameters.values()]

    ours, theirs = getattr(liger_aot.megatron, name), getattr(theirs, name)
    assert parameters(ours) == parameters(theirs)
    if isinstance(ours, type):
        assert parameters(ours.forward) == parameters(theirs.forward)
        paths = [c.__module__.partition(".")[2] for c in (ours, theirs)]
        assert paths[0] == paths[1]
