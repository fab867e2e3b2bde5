"""Liger's names: the arguments that Liger-Kernel has, and the numbers that it documents."""

import importlib
import inspect
import pathlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)
import triton.language as tl
from triton.runtime import interpreter

import liger_aot
import liger_aot.transformers as names
import liger_aot.transformers.functional as L  # noqa: N812
from liger_aot.functional import CrossEntropyOutput

import formulas
from harness import check
from harness import run

# Beyond `__all__`, what stands in Liger's modules of these paths.
MODULES = {
    "rms_norm": [
        "LigerRMSNorm",
        "LigerRMSNormForGemma",
        "LigerRMSNormForGemma2",
        "LigerRMSNormForGemma3",
        "LigerRMSNormForGemma4",
        "LigerRMSNormForGlm4",
        "LigerRMSNormForMuseGlimmer",
        "LigerRMSNormForMuseGlimmerTextCentered",
        "LigerRMSNormForOlmo2",
        "LigerRMSNormForQwen3Next",
    ],
    "fused_add_rms_norm": ["LigerFusedAddRMSNorm"],
    "layer_norm": ["LigerLayerNorm"],
    "modulated_rms_norm": ["LigerModulatedRMSNorm"],
    "group_norm": ["LigerGroupNorm"],
    "dyt": ["LigerDyT"],
    "relu_squared": ["LigerReLUSquared"],
    "experimental.embedding": ["LigerEmbedding"],
    "experimental": ["LigerEmbedding"],
    "poly_norm": ["LigerPolyNorm"],
    "softmax": ["LigerSoftmax"],
    "sparsemax": ["LigerSparsemax"],
    "mhc": ["LigerMHC"],
    "multi_token_attention": ["LigerMultiTokenAttention"],
    "fused_neighborhood_attention": [f"LigerFusedNeighborhoodAttention{part}" for part in ("", "Layer", "Config")],
    "rope": ["liger_rotary_pos_emb", "liger_rotary_pos_emb_gpt_oss", "liger_rotary_pos_emb_vision"],
    "qwen2vl_mrope": ["liger_multimodal_rotary_pos_emb"],
    "llama4_rope": ["liger_llama4_text_rotary_pos_emb", "liger_llama4_vision_rotary_pos_emb"],
    "swiglu": [
        "LigerBlockSparseTop2MLP",
        "LigerExperts",
        "LigerFalconH1SwiGLUMLP",
        "LigerHunyuanV1SwiGLUMLP",
        "LigerPhi3SwiGLUMLP",
        "LigerQwen3MoeSwiGLUMLP",
        "LigerSwiGLUMLP",
        "LigerSwiGLUMLPForMuseGlimmer",
    ],
    "geglu": ["LigerGEGLUMLP", "LigerGEGLUMLPForGemma4"],
    "cross_entropy": ["LigerCrossEntropyLoss"],
    "mlp": ["LigerFalconH1MLP", "LigerMLP"],
    "tiled_mlp": ["LigerTiledGEGLUMLP", "LigerTiledSwiGLUMLP", "apply_tiled_mlp"],
    "kl_div": ["LigerKLDIVLoss"],
    "jsd": ["LigerJSD"],
    "fused_linear_jsd": ["LigerFusedLinearJSD"],
    "fused_linear_kl_div": ["LigerFusedLinearKLDivLoss"],
    "fused_ce_tvd": ["LigerFusedCETVDLoss"],
    "grpo_loss": ["fused_selective_log_softmax", "triton_grpo_loss"],
    "tvd": ["LigerTVDLoss"],
    "fused_linear_cross_entropy": ["LigerFusedLinearCrossEntropyLoss"],
    "vocab_parallel_cross_entropy": ["LigerVocabParallelCrossEntropy"],
    "functional": L.__all__,
}
NAMES = [(f"transformers.{module}", name) for module, found in MODULES.items() for name in found]
NAMES += [("transformers", name) for name in names.__all__]
FUNCTIONS = [
    "RMSNorm",
    "FusedAddRMSNorm",
    "LayerNorm",
    "ModulatedRMSNorm",
    "GroupNorm",
    "DyT",
    "ReLUSquared",
    "PolyNorm",
    "Embedding",
    "AttnRes",
    "MHCCoeffs",
    "MHCPre",
    "MHCPostRes",
    "Softmax",
    "Sparsemax",
    "MultiTokenAttention",
    "FusedNeighborhoodAttention",
    "Rope",
    "Qwen2VLMRope",
    "Llama4Rope",
    "SiLUMul",
    "FusedGateUpSiLUMul",
    "FusedMoE",
    "GELUMul",
    "CrossEntropy",
    "FusedLinearCrossEntropy",
    "KLDivLoss",
    "JSD",
    "TVDLoss",
    "FusedLinearJSD",
    "FusedLinearKLDiv",
    "FusedCETVD",
    "FusedLinearScaledCrossEntropy",
    "FusedLinearScaledCrossEntropyTP",
    "VocabParallelCE",
    "TiledMLP",
    "MLP",
]
FUNCTIONS = [*(f"Liger{name}Function" for name in FUNCTIONS), "GrpoLossFunction"]


def parameters(function):
    """(name, kind, default) of each; of a constructor or a method without self."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if p.name not in ("self", "ctx")]


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{m}.{n}" for m, n in NAMES])
def test_signature_is_ligers(module, name):
    pytest.importorskip("liger_kernel", reason="liger-kernel, to compare signatures with, is not installed")
    ours = getattr(importlib.import_module(f"liger_aot.{module}"), name)
    theirs = getattr(importlib.import_module(f"liger_kernel.{module}"), name)
    assert parameters(ours) == parameters(theirs)
    if isinstance(theirs, type) and issubclass(theirs, torch.nn.Module):
        assert parameters(ours.forward) == parameters(theirs.forward)


SURFACE = "transformers", "transformers.functional", "chunked_loss", "ops"


@pytest.mark.parametrize("module", SURFACE)
def test_every_name_of_ligers_is_here_or_listed_as_missing(module):
    """Classes and functions; those of autograd are public under ops alone."""
    theirs = pytest.importorskip(f"liger_kernel.{module}", reason="liger-kernel, to compare names with, is not installed")
    public = {n for n in vars(theirs) if n.startswith(("Liger", "liger_", "Grpo")) and callable(getattr(theirs, n))}
    if module.startswith("transformers"):
        public = {n for n in public if not n.endswith("Function")}
    public |= set(getattr(theirs, "__all__", []))
    ours = importlib.import_module(f"liger_aot.{module}")
    missing = {name for name in public if not hasattr(ours, name)}
    text = pathlib.Path(__file__).parent.parent.joinpath("docs/names.md").read_text()
    row = re.search(rf"^\| `{re.escape(module)}` \| (.*) \|$", text, re.M)
    assert missing == set(re.findall(r"`(\w+)`", row[1] if row else ""))
    assert len(missing) < len(public)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autograd_functions_apply_as_ligers(name):
    theirs = pytest.importorskip("liger_kernel.ops", reason="liger-kernel, to compare signatures with, is not installed")
    function = getattr(theirs, name)  # of autograd, or a class that picks one by the device
    expected = function.forward if issubclass(function, torch.autograd.Function) else function.apply
    assert parameters(getattr(liger_aot.ops, name).apply) == parameters(expected)
    with pytest.raises(AttributeError, match="LigerOtherFunction"):
        liger_aot.ops.LigerOtherFunction  # noqa: B018


CONFIG = SimpleNamespace(
    hidden_size=12, intermediate_size=20, hidden_act="silu", mlp_multipliers=(0.5, 2.0), hidden_activation=None
)
EXPERTS = SimpleNamespace(hidden_size=8, intermediate_size=20, moe_intermediate_size=12, hidden_act="silu", num_experts=3)
BUILD = {
    "LigerRMSNorm": (12,),
    "LigerRMSNormForGemma": (12,),
    "LigerRMSNormForGemma2": (12,),
    "LigerRMSNormForGemma3": (12,),
    "LigerRMSNormForGemma4": (12,),
    "LigerRMSNormForGlm4": (12,),
    "LigerRMSNormForMuseGlimmer": (12,),
    "LigerRMSNormForMuseGlimmerTextCentered": (12,),
    "LigerRMSNormForOlmo2": (12,),
    "LigerRMSNormForQwen3Next": (12,),
    "LigerFusedAddRMSNorm": (12,),
    "LigerLayerNorm": (12,),
    "LigerModulatedRMSNorm": (12,),
    "LigerGroupNorm": (12, 3),
    "LigerDyT": (12,),
    "LigerReLUSquared": (),
    "LigerPolyNorm": (),
    "LigerEmbedding": (9, 12, 2),
    "LigerSoftmax": (),
    "LigerSparsemax": (),
    "LigerMultiTokenAttention": (4, 6, 3),
    "LigerFusedNeighborhoodAttention": (12, 3),
    "LigerFusedNeighborhoodAttentionLayer": (12, 3),
    "LigerBlockSparseTop2MLP": (CONFIG,),
    "LigerExperts": (EXPERTS,),
    "LigerFalconH1SwiGLUMLP": (CONFIG,),
    "LigerHunyuanV1SwiGLUMLP": (CONFIG, 1),
    "LigerPhi3SwiGLUMLP": (CONFIG,),
    "LigerQwen3MoeSwiGLUMLP": (CONFIG, 16),
    "LigerSwiGLUMLP": (CONFIG,),
    "LigerSwiGLUMLPForMuseGlimmer": (CONFIG,),
    "LigerGEGLUMLP": (CONFIG,),
    "LigerGEGLUMLPForGemma4": (CONFIG,),
    "LigerMLP": (CONFIG,),
    "LigerFalconH1MLP": (CONFIG,),
    "LigerTiledSwiGLUMLP": (CONFIG, 3),
    "LigerTiledGEGLUMLP": (SimpleNamespace(hidden_size=12, intermediate_size=20, hidden_act="gelu_new"), 3),
    "LigerCrossEntropyLoss": (),
    "LigerFusedLinearCrossEntropyLoss": (),
    "LigerKLDIVLoss": (),
    "LigerJSD": (),
    "LigerFusedLinearJSD": (),
    "LigerFusedLinearKLDivLoss": (),
    "LigerFusedCETVDLoss": (),
    "LigerTVDLoss": (),
    "LigerVocabParallelCrossEntropy": (),
}
SWIGLU = [n for n in BUILD if "SwiGLU" in n or "Top2" in n or n in ("LigerMLP", "LigerFalconH1MLP")]


def build(name, *arguments, **options):
    module = next(m for m, found in MODULES.items() if name in found)
    return getattr(importlib.import_module(f"liger_aot.transformers.{module}"), name)(*(arguments or BUILD[name]), **options)


@pytest.mark.parametrize("name", BUILD)
def test_state_and_attributes_are_ligers(name):
    pytest.importorskip("liger_kernel", reason="liger-kernel, to compare modules with, is not installed")
    module = next(m for m, found in MODULES.items() if name in found)
    theirs = getattr(importlib.import_module(f"liger_kernel.transformers.{module}"), name)(*BUILD[name])
    ours = build(name)
    shapes = {k: (v.shape, v.dtype) for k, v in theirs.state_dict().items()}
    assert {k: (v.shape, v.dtype) for k, v in ours.state_dict().items()} == shapes
    assert {k for k in vars(theirs) if k != "config"} <= {*vars(ours), *ours.state_dict()}
    if "Norm" in name:
        for k, v in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[k], v), k


def norm(x, w, eps, offset, casting):
    """Where each casting mode rounds: transformers' Llama, Gemma."""
    if casting == "llama":
        xhat = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype)
        return ((offset + w.float()) * xhat.float()).to(x.dtype)
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps) * (offset + w.float())).to(x.dtype)


@pytest.mark.parametrize("casting", ["llama", "gemma", "none"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_rounds_where_liger_says_and_gives_the_dtype_of_x(casting, weight_dtype):
    x, r, w = torch.randn(5, 24).bfloat16(), torch.randn(5, 24).bfloat16(), torch.randn(24).to(weight_dtype)
    got = L.liger_rms_norm(x, w, 1e-5, 1.0, casting, True)
    assert torch.equal(got, norm(x, w, 1e-5, 1.0, casting))
    y, s = L.liger_fused_add_rms_norm(x, r, w, 1e-5, 1.0, casting, True)
    assert torch.equal(s, x + r)
    assert torch.equal(y, norm(x + r, w, 1e-5, 1.0, casting))


@pytest.mark.parametrize("name", [n for n in BUILD if "RMSNormFor" in n])
def test_norms_of_models(name):
    module, x = build(name), torch.randn(3, 12).bfloat16()
    module.weight.data.normal_()
    assert torch.equal(module(x), norm(x, module.weight, module.variance_epsilon, module.offset, module.casting_mode))


@pytest.mark.parametrize("name", ["LigerRMSNormForGemma4", "LigerRMSNormForMuseGlimmer"])
def test_norms_without_a_scale(name):
    x = torch.randn(3, 12)
    module = build(name, 12, with_scale=False)
    assert list(module.parameters()) == []
    torch.testing.assert_close(module(x), F.rms_norm(x, (12,), eps=1e-6))


def test_layer_norm_starts_without_bias():
    x, module = torch.randn(3, 12), build("LigerLayerNorm", 12, bias=True)
    assert not module.bias.any()
    torch.testing.assert_close(module(x), F.layer_norm(x, (12,), module.weight, module.bias, 1e-6))
    torch.testing.assert_close(L.liger_layer_norm(x, x[0], x[1], 1e-3), F.layer_norm(x, (12,), x[0], x[1], 1e-3))


def gated(module, x, activation=F.silu):
    """What the MLP says of itself, in torch."""
    p = dict(module.named_parameters())
    if "gate_up_proj.weight" in p:
        gate, up = F.linear(x, p["gate_up_proj.weight"]).chunk(2, -1)
        return F.linear(activation(gate) * up, p["down_proj.weight"])
    g, u, d = ("w1", "w3", "w2") if "w1.weight" in p else ("gate_proj", "up_proj", "down_proj")
    linear = lambda name, x: F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))  # noqa: E731
    gate, down = getattr(module, "gate_multiplier", 1.0), getattr(module, "down_multiplier", 1.0)
    return linear(d, activation(linear(g, x) * gate) * linear(u, x)) * down


@pytest.mark.parametrize("name", SWIGLU)
@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_mlps(name, bias):
    config = SimpleNamespace(**{**vars(CONFIG), "mlp_bias": bias})
    module, x = build(name, config), torch.randn(3, 12)
    torch.testing.assert_close(run(module, [x]), run(lambda x: gated(module, x), [x]))
    with pytest.raises(ValueError, match="SwiGLU: the config's activation must be silu or swish, got 'gelu'"):
        build(name, SimpleNamespace(**{**vars(CONFIG), "hidden_act": "gelu"}))


def test_experts():
    index, weights = torch.tensor([[2, 0], [1, 2], [1, 0], [0, 2]]), torch.rand(4, 2)
    x, module = torch.randn(4, 8), build("LigerExperts")
    for p in module.parameters():
        p.data.normal_()

    def loop(x):
        y = torch.zeros_like(x)
        for expert, (first, second) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
            token, slot = torch.where(index == expert)
            gate, up = F.linear(x[token], first).chunk(2, -1)
            y = y.index_add(0, token, F.linear(F.silu(gate) * up, second) * weights[token, slot, None])
        return y

    want = run(loop, [x])
    apply = liger_aot.ops.LigerFusedMoEFunction.apply
    for got in (lambda x: module(x, index, weights), lambda x: apply(x, *module.parameters(), index.int(), weights)):
        torch.testing.assert_close(run(got, [x]), want)
    torch.testing.assert_close(module(x.view(2, 2, 8), index, weights), loop(x).view(2, 2, 8))
    for name in ("num_local_experts", "n_routed_experts"):
        sizes = {"hidden_size": 8, "intermediate_size": 20, "hidden_act": "silu", name: 5}
        assert build("LigerExperts", SimpleNamespace(**sizes)).gate_up_proj.shape == (5, 40, 8)


@pytest.mark.parametrize(
    "config",
    ["Ernie4_5_MoeConfig", "LongcatFlashConfig", "MixtralConfig", "Qwen3MoeConfig", "DeepseekV2Config", "DeepseekV3Config"],
)
def test_experts_of_configurations_of_transformers(config):
    """Some have these names for other attributes of theirs, or of their class."""
    theirs = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel, to compare with, is not installed")
    config = getattr(pytest.importorskip("transformers"), config)()
    with torch.device("meta"):
        ours, theirs = build("LigerExperts", config), theirs.LigerExperts(config)
    assert {k: p.shape for k, p in ours.named_parameters()} == {k: p.shape for k, p in theirs.named_parameters()}


def test_gate_and_up_of_one_tensor():
    y = torch.randn(3, 24)
    for in_place in (False, True):
        given = y.clone()
        got = run(lambda y, p=in_place: liger_aot.ops.LigerFusedGateUpSiLUMulFunction.apply(y, p), [given])
        torch.testing.assert_close(got, run(lambda y: F.silu(y[:, :12]) * y[:, 12:], [y]))
        assert torch.equal(given, y)


def test_geglu_mlps():
    x = torch.randn(3, 12)
    module = build("LigerGEGLUMLP")
    torch.testing.assert_close(module(x), gated(module, x, lambda g: F.gelu(g, approximate="tanh")))
    config = SimpleNamespace(**vars(CONFIG), use_double_wide_mlp=True, num_hidden_layers=4, num_kv_shared_layers=2)
    widths = [build("LigerGEGLUMLPForGemma4", config, layer).down_proj.in_features for layer in (None, 1, 2, 3)]
    assert widths == [20, 20, 40, 40]


def rotated(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def test_rope():
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    cos, sin = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    both = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    want = rotated(q, both[0][:, None], both[1][:, None]), rotated(k, both[0][:, None], both[1][:, None])
    for got in (
        L.liger_rope(q, k, *both),
        names.liger_rotary_pos_emb(q, k, *both, torch.arange(5)[None], 1),
        names.liger_rotary_pos_emb(q, k, cos, sin, rotary_dim=16),
        liger_aot.transformers.rope.liger_rotary_pos_emb_gpt_oss(q, k, cos, sin),
    ):
        torch.testing.assert_close(got, want)
    q, k = torch.randn(5, 4, 16).bfloat16(), torch.randn(5, 4, 16).bfloat16()
    got = liger_aot.transformers.rope.liger_rotary_pos_emb_vision(q, k, both[0][0], both[1][0])
    wide = (
        rotated(q.float(), both[0][0][:, None], both[1][0][:, None]),
        rotated(k.float(), both[0][0][:, None], both[1][0][:, None]),
    )
    torch.testing.assert_close(got, tuple(w.bfloat16() for w in wide))


def test_multimodal_rope():
    """As transformers had it in Qwen2-VL, before its rotary module took the sections apart."""
    q, k, angles, sections = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 3, 2, 5, 8), [2, 3, 3]
    cos, sin = (torch.cat((t, t), -1) for t in angles)
    both = [torch.cat([m[n % 3] for n, m in enumerate(t.split(sections * 2, -1))], -1)[:, None] for t in (cos, sin)]
    want = rotated(q, *both), rotated(k, *both)
    for got in (
        L.liger_qwen2vl_mrope(q, k, cos, sin, sections),
        liger_aot.transformers.qwen2vl_mrope.liger_multimodal_rotary_pos_emb(q, k, cos, sin, sections),
        liger_aot.ops.LigerQwen2VLMRopeFunction.apply(q, k, cos, sin, sections, 1),
    ):
        torch.testing.assert_close(got, want)
    got = L.liger_qwen2vl_mrope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, sections, 2)
    torch.testing.assert_close(tuple(t.transpose(1, 2) for t in got), want)


def test_llama4_rope():
    def multiplied(x, angles):
        y = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * angles[..., :, None, :]
        return torch.view_as_real(y).flatten(-2).to(x.dtype)

    q, k = torch.randn(2, 5, 4, 16).bfloat16(), torch.randn(2, 5, 2, 16).bfloat16()
    angles = torch.randn(2, 5, 8, dtype=torch.complex64)
    want = multiplied(q, angles), multiplied(k, angles)
    torch.testing.assert_close(names.liger_llama4_text_rotary_pos_emb(q, k, angles), want)
    torch.testing.assert_close(liger_aot.ops.LigerLlama4RopeFunction.apply(q, k, angles), want)
    want = multiplied(q, angles[0]), multiplied(k, angles[0])
    for frequencies in (angles[0], angles[0][:, None], angles[:1, :, None]):
        torch.testing.assert_close(names.liger_llama4_vision_rotary_pos_emb(q, k, frequencies), want)
    cast = angles[0].real.bfloat16()  # what a model has after .to(torch.bfloat16)
    want = multiplied(q, cast.float()), multiplied(k, cast.float())
    torch.testing.assert_close(names.liger_llama4_vision_rotary_pos_emb(q, k, cast), want)


def test_sparsemax():
    x = torch.randn(3, 12)
    want = formulas.sparsemax(x.double()).float()
    torch.testing.assert_close(L.liger_sparsemax(x), want)
    torch.testing.assert_close(build("LigerSparsemax")(x), want)
    torch.testing.assert_close(liger_aot.ops.LigerSparsemaxFunction.apply(x.mT, 0), want.mT)
    torch.testing.assert_close(build("LigerSparsemax", 0)(x), formulas.sparsemax(x.mT.double()).mT.float())


def test_poly_norm():
    x, weight, bias = torch.randn(3, 12), torch.randn(3), torch.randn(1)
    want = formulas.poly_norm(1e-2)(x, weight, bias)
    torch.testing.assert_close(L.liger_poly_norm(x, weight, bias, 1e-2, False), want)
    torch.testing.assert_close(liger_aot.ops.LigerPolyNormFunction.apply(x, weight, bias, 1e-2), want)
    module = build("LigerPolyNorm", 1e-2)
    torch.testing.assert_close(module(x), formulas.poly_norm(1e-2)(x, module.weight, module.bias))


def test_modulated_rms_norm():
    x, weight = torch.randn(2, 3, 12), torch.randn(12)
    for shape in ((12,), (1, 12), (2, 12), (2, 1, 12), (2, 3, 12), (6, 12)):
        scale, shift = torch.randn(shape), torch.randn(shape)
        both = (t.view(2, 3, 12) if shape == (6, 12) else t for t in (scale, shift))
        want = formulas.modulated_rms_norm(1e-3, 1.0)(x, *both, weight)
        torch.testing.assert_close(L.liger_modulated_rms_norm(x, weight, scale, shift, 1e-3, 1.0, "gemma", False), want)
        got = liger_aot.ops.LigerModulatedRMSNormFunction.apply(x, weight, scale, shift, 1e-3, 1.0)
        torch.testing.assert_close(got, want)
        module = build("LigerModulatedRMSNorm", 12, 1e-3, 1.0, init_fn="zeros")
        torch.testing.assert_close(module(x, scale), L.liger_modulated_rms_norm(x, None, scale, None, 1e-3))
    with pytest.raises(ValueError, match="modulated_rms_norm: scale must have as many columns as x"):
        L.liger_modulated_rms_norm(x, weight, torch.randn(3, 12))


def test_multi_token_attention():
    x, w, b = torch.randn(2, 4, 9, 9), torch.randn(6, 2, 3, 5), torch.randn(6)
    module = build("LigerMultiTokenAttention", 4, 6, (3, 5), 1, (1, 2), (1, 1), 2, True, True)
    assert not module.bias.any()
    module.load_state_dict({"weight": w, "bias": b})
    options = 1, (1, 2), 1, 2
    want = formulas.multi_token_attention(x.dtype, True, padding=(1, 2), groups=2)(x, w, b)
    for got in (
        module(x),
        L.liger_multi_token_attention(x, w, b, *options, True),
        liger_aot.ops.LigerMultiTokenAttentionFunction.apply(x, w, b, *options, True),
    ):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        L.liger_multi_token_attention(x, w, None, *options),
        formulas.multi_token_attention(x.dtype, padding=(1, 2), groups=2)(x, w),
    )


def test_neighborhood_attention():
    q, k, v = torch.randn(3, 2, 3, 9, 4).unbind()
    want = formulas.neighborhood_attention(5, 2, 0.3)(q, k, v)
    torch.testing.assert_close(L.liger_fused_neighborhood_attention(q, k, v, 5, 2, 0.3), want)
    torch.testing.assert_close(liger_aot.ops.LigerFusedNeighborhoodAttentionFunction.apply(q, k, v, 5, 2, 0.3), want)
    x, config = torch.randn(2, 9, 12), build("LigerFusedNeighborhoodAttentionConfig", 12, 3, 5, 2, False, 0.5, 1e-3, 0.3)
    layer = build("LigerFusedNeighborhoodAttentionLayer", *config.to_dict().values()).eval()
    inner = layer.attention
    assert inner.q_proj.bias is None
    assert inner.dropout.p == layer.dropout.p == 0.5
    h = F.layer_norm(x, (12,), layer.layer_norm.weight, layer.layer_norm.bias, 1e-3)
    heads = (p(h).view(2, 9, 3, 4).transpose(1, 2) for p in (inner.q_proj, inner.k_proj, inner.v_proj))
    y = formulas.neighborhood_attention(5, 2, 0.3)(*heads).transpose(1, 2).reshape(2, 9, 12)
    torch.testing.assert_close(layer(x), x + inner.out_proj(y))
    assert not torch.equal(layer.train()(x), layer(x))
    assert build("LigerFusedNeighborhoodAttention", 12, 3).scale == 0.5
    with pytest.raises(NotImplementedError, match="attention_mask must be None: the window is the mask"):
        layer(x, torch.ones(2, 9))
    for bad, text in (
        ((12, 5), "hidden_size must be divisible by num_heads 5, got 12"),
        ((12, 3, 4), "kernel_size must be odd"),
    ):
        with pytest.raises(ValueError, match=f"LigerFusedNeighborhoodAttention: {text}"):
            build("LigerFusedNeighborhoodAttention", *bad)
    with pytest.raises(ValueError, match="LigerFusedNeighborhoodAttention: dilation must be at least 1, got 0"):
        build("LigerFusedNeighborhoodAttention", 12, 3, 3, 0)


def test_attn_res():
    v, query, weight = torch.randn(4, 2, 3, 12), torch.randn(12), torch.randn(12)
    want = formulas.attn_res(1e-2)(v, query, weight)
    torch.testing.assert_close(L.liger_attn_res(v, query, weight, 1e-2), want)
    torch.testing.assert_close(L.liger_attn_res(list(v), query, weight, 1e-2), want)
    torch.testing.assert_close(liger_aot.ops.LigerAttnResFunction.apply(v, query, weight, 1e-2), want)


def test_mhc():
    x, f_out, h_pre = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 6), torch.randn(2, 3, 4)
    parameters = torch.randn(24, 24), torch.randn(24), *torch.rand(3).unbind()
    options = {"tmax": 2, "rms_eps": 1e-2, "pre_eps": 0.5, "sinkhorn_eps": 1e-2, "post_mult": 3.0}
    coefficients = formulas.mhc_coeffs(**options)(x, *parameters)
    torch.testing.assert_close(L.liger_mhc_coeffs(x, *parameters, allow_fp32=True, **options), coefficients)
    got = liger_aot.ops.LigerMHCCoeffsFunction.apply(x, *parameters, True, *options.values())
    torch.testing.assert_close(got, coefficients)
    x_in, x_out = formulas.mhc_pre(x, h_pre), formulas.mhc_post_res(x, f_out, *coefficients[1:])
    torch.testing.assert_close(L.liger_mhc_apply(x, f_out, h_pre, *coefficients[1:]), x_out)
    torch.testing.assert_close(L.liger_mhc_apply(x, f_out, h_pre, *coefficients[1:], return_x_in=True), (x_out, x_in))
    torch.testing.assert_close(liger_aot.ops.LigerMHCPreFunction.apply(x, h_pre), x_in)
    torch.testing.assert_close(liger_aot.ops.LigerMHCPostResFunction.apply(x, f_out, *coefficients[1:]), x_out)
    want = formulas.mhc_post_res(x, formulas.mhc_pre(x, coefficients[0]).tanh(), *coefficients[1:])
    got = L.liger_mhc_forward(x, torch.tanh, *parameters, allow_fp32=True, return_coeffs=True, **options)
    torch.testing.assert_close(got, (want, coefficients))
    with pytest.raises(ValueError, match=r"liger_mhc_coeffs: x must be float16 or bfloat16, got .*; pass allow_fp32=True"):
        L.liger_mhc_coeffs(x, *parameters)


@pytest.mark.parametrize(("dtype", "phi_dtype"), [(torch.bfloat16, torch.float16), (torch.float32, torch.float32)], ids=str)
def test_mhc_module(dtype, phi_dtype):
    """The layer's input has its dtype, whatever the streams have."""
    layer = torch.nn.Linear(6, 6)
    module = names.LigerMHC(layer, hc=4, c=6, tmax=3, pre_eps=0.1, phi_dtype=phi_dtype, allow_fp32=dtype == torch.float32)
    x = torch.randn(2, 3, 4, 6).to(dtype)
    y = module(x)
    y.float().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    parameters = (p.float() for p in (module.phi, module.b, module.alpha_pre, module.alpha_post, module.alpha_res))
    h_pre, h_post, h_res = formulas.mhc_coeffs(3, pre_eps=0.1)(x.float(), *parameters)
    want = formulas.mhc_post_res(x.float(), layer(formulas.mhc_pre(x.float(), h_pre).to(dtype).float()), h_post, h_res)
    torch.testing.assert_close(y, want.to(dtype))
    with pytest.raises(ValueError, match=re.escape("LigerMHC: x must have shape (..., 4, 6), got (2, 3, 6, 4)")):
        module(x.mT)


def test_mhc_module_is_built_as_ligers():
    theirs = pytest.importorskip("liger_kernel.transformers.mhc", reason="liger-kernel, to compare with, is not installed")
    layer = torch.nn.Linear(6, 6)
    ours, theirs = (module.LigerMHC(layer, hc=4, c=6, tmax=3) for module in (names, theirs))
    shapes = {k: (v.shape, v.dtype) for k, v in theirs.state_dict().items()}
    assert {k: (v.shape, v.dtype) for k, v in ours.state_dict().items()} == shapes
    assert vars(theirs).keys() <= vars(ours).keys()
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding(padding_idx):
    indices, module = torch.randint(9, (3, 20)), build("LigerEmbedding", 9, 12, padding_idx)
    assert padding_idx is None or not module.weight[2].any()
    torch.nn.init.normal_(module.weight)
    want = F.embedding(indices, module.weight)
    torch.testing.assert_close(liger_aot.ops.LigerEmbeddingFunction.apply(module.weight, indices), want)
    if padding_idx is not None:
        want = want * (indices != 2)[..., None]
    got, dy = module(indices), torch.randn(3, 20, 12)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y, module.weight, dy) for y in (got, want)))


def test_gates_by_position():
    a, b = torch.randn(3, 12), torch.randn(3, 12)
    torch.testing.assert_close(L.liger_swiglu(a, b), F.silu(a) * b)
    torch.testing.assert_close(L.liger_geglu(a, b), F.gelu(a, approximate="tanh") * b)
    v, w = torch.randn(7, 12), torch.randn(12, 7)
    got = liger_aot.ops.LigerMLPFunction.apply(a, v, 2 * v, w, 0.5, 3.0)
    torch.testing.assert_close(got, 3 * F.linear(F.silu(0.5 * F.linear(a, v)) * F.linear(a, 2 * v), w))
    got = liger_aot.ops.LigerSiLUMulFunction.apply(a, b, 0.5, 2.0)
    torch.testing.assert_close(got, F.silu(a * 0.5) * b * 2.0)


def test_divergences_by_position():
    """The formulas of Liger's docstrings."""
    x, y, labels = torch.randn(8, 6).log_softmax(-1), torch.randn(8, 6).log_softmax(-1), torch.randint(6, (8,))
    labels[3] = 2
    keep = (labels != 2)[:, None]
    p, q = y.exp(), x.exp()
    kl = (p * (y - x)).sum()
    torch.testing.assert_close(L.liger_kl_div(x, p), kl / 48)
    torch.testing.assert_close(L.liger_kl_div(x, y, True, True, "sum", True, 1e-3), kl)
    few = p.where(p > 0.1, 1e-4)
    want = (few * (few.clamp(min=1e-2).log() - x)).sum() / 8
    for got in (
        L.liger_kl_div(x, few, reduction="batchmean", eps=1e-2),
        names.LigerKLDIVLoss(1e-2, reduction="batchmean")(x, few),
        liger_aot.ops.LigerKLDivLossFunction.apply(x, few, "batchmean", False, 1e-2),
    ):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(names.LigerKLDIVLoss(1e-10, None, None, "sum", True)(x, y), kl)
    log_m = (0.1 * p + 0.9 * q).log()
    want = ((0.1 * p * (y - log_m) + 0.9 * q * (x - log_m)) * keep).sum() / keep.sum()
    for got in (
        L.liger_jsd(x, y, labels, 0.1, 2),
        names.LigerJSD(0.1, 2)(x, y, labels),
        liger_aot.ops.LigerJSDFunction.apply(x, y, labels, 0.1, 2),
    ):
        torch.testing.assert_close(got, want)
    want = (0.5 * (p - q).abs() * keep).sum() / keep.sum()
    for got in (
        L.liger_tvd(p, q, labels, "batchmean", 2),
        names.LigerTVDLoss("batchmean", 2)(p, q, labels),
        liger_aot.ops.LigerTVDLossFunction.apply(p, q, labels, "batchmean", 2),
    ):
        torch.testing.assert_close(got, want)
    a, b, v, w = torch.randn(8, 4), torch.randn(8, 3), torch.randn(6, 4), torch.randn(6, 3)
    want = L.liger_jsd((a @ v.t() / 2).log_softmax(-1), (b @ w.t() / 2).log_softmax(-1), labels, 0.1, 2)
    for got in (
        L.liger_fused_linear_jsd(a, v, b, w, labels, 0.1, 2, 2.0, torch.float32),
        names.LigerFusedLinearJSD(0.1, 2, 2.0, torch.float32)(a, v, b, w, labels),
        liger_aot.ops.LigerFusedLinearJSDFunction.apply(a, v, b, w, labels, 0.1, 2, 2.0, torch.float32),
    ):
        torch.testing.assert_close(got, want)
    given = torch.rand(8, 6).requires_grad_()  # which gets no gradient
    want = (given * (given.clamp(min=0.3).log() - (a @ v.t() / 2).log_softmax(-1)) * keep).sum() / (6 * keep.sum())
    options = "mean", 2, 2.0, 0.3, torch.float32
    for got in (
        L.liger_fused_linear_kl_div(a, v, given, labels, *options),
        names.LigerFusedLinearKLDivLoss(*options)(a, v, given, labels),
        liger_aot.ops.LigerFusedLinearKLDivFunction.apply(a, v, given, labels, *options),
    ):
        assert not got.requires_grad
        torch.testing.assert_close(got, want.detach())


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x, y, h, w, labels: m.liger_cross_entropy(x, labels),
        lambda m, x, y, h, w, labels: m.liger_fused_linear_cross_entropy(h, w, labels),
        lambda m, x, y, h, w, labels: m.liger_jsd(x.log_softmax(-1), y.log_softmax(-1), labels),
        lambda m, x, y, h, w, labels: m.liger_tvd(x.softmax(-1), y.softmax(-1), labels),
        lambda m, x, y, h, w, labels: m.liger_fused_linear_jsd(h, w, h, w, labels),
        lambda m, x, y, h, w, labels: m.liger_fused_linear_kl_div(h, w, y.softmax(-1), labels),
    ],
    ids=["cross_entropy", "fused_linear_cross_entropy", "jsd", "tvd", "fused_linear_jsd", "fused_linear_kl_div"],
)
def test_no_row_that_counts(call):
    """NaN, torch's mean over nothing, and gradients of 0: docs/names.md."""
    inputs = [torch.randn(shape).requires_grad_() for shape in ((5, 4), (5, 4), (5, 3), (4, 3))]
    loss = call(L, *inputs, torch.full((5,), -100))
    assert loss.isnan()
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert not any(g.any() for g in gradients if g is not None)


LABELS = torch.tensor([3, 1, -100, 0, 2])
FUNCTIONAL, SCALED = "transformers.functional", {"use_token_scaling": True}
LOSSES = [
    *(
        (FUNCTIONAL, "liger_cross_entropy", lambda f, o, x, y, h, w: f(x, LABELS, **o), {"reduction": r})
        for r in ("mean", "none")
    ),
    *(
        (FUNCTIONAL, "liger_fused_linear_cross_entropy", lambda f, o, x, y, h, w: f(h, w, LABELS, **o), options)
        for options in ({}, {"reduction": "none"}, SCALED, SCALED | {"reduction": "none"})
    ),
    ("ops", "LigerFusedLinearCrossEntropyFunction", lambda f, o, x, y, h, w: f.apply(h, w, LABELS), {}),
    ("transformers", "LigerFusedLinearCrossEntropyLoss", lambda f, o, x, y, h, w: f()(w, h, LABELS), {}),
    *(
        (FUNCTIONAL, name, lambda f, o, x, y, h, w: f(x.softmax(-1), y.softmax(-1), **o), {"reduction": r})
        for name in ("liger_kl_div", "liger_tvd")
        for r in ("mean", "none")
    ),
    (FUNCTIONAL, "liger_jsd", lambda f, o, x, y, h, w: f(x.log_softmax(-1), y.log_softmax(-1), LABELS), {}),
    (
        FUNCTIONAL,
        "liger_fused_linear_jsd",
        lambda f, o, x, y, h, w: f(h, w, y, w.detach() @ h[:4].detach().mT @ y[:4], LABELS),
        {},
    ),
    (FUNCTIONAL, "liger_fused_linear_kl_div", lambda f, o, x, y, h, w: f(h, w, y.softmax(-1), LABELS), {}),
    ("ops", "LigerFusedCETVDFunction", lambda f, o, x, y, h, w: f.apply(x, y, LABELS), {}),
    ("ops", "LigerFusedLinearScaledCrossEntropyFunction", lambda f, o, x, y, h, w: f.apply(h, w, LABELS), {}),
    ("transformers", "LigerVocabParallelCrossEntropy", lambda f, o, x, y, h, w: f()(x[:, None], LABELS[:, None]), {}),
]


@pytest.mark.parametrize(("module", "name", "call", "options"), LOSSES, ids=[f"{e[1]} {e[3]}" for e in LOSSES])
def test_losses_and_gradients_have_ligers_dtypes(module, name, call, options, monkeypatch):
    """In 16 bits; None where a target or a teacher gets no gradient."""
    theirs = pytest.importorskip(f"liger_kernel.{module}", reason="liger-kernel, to compare with, is not installed")
    widen = interpreter._implicit_cvt  # which leaves a Python float that a kernel takes without a method that it calls
    number = lambda x: tl.tensor(interpreter.TensorHandle(np.array([x], np.float32), tl.float32), tl.float32)  # noqa: E731
    monkeypatch.setattr(interpreter, "_implicit_cvt", lambda x: number(x) if type(x) is float else widen(x))
    inputs = [torch.randn(shape).half() for shape in ((5, 4), (5, 4), (5, 3), (4, 3))]

    def dtypes(function):
        given = [t.clone().requires_grad_() for t in inputs]
        out = call(function, options, *given)
        results = out if isinstance(out, tuple) else (out,)
        gradients = torch.autograd.grad(results[0].sum(), given, allow_unused=True)
        return [t if t is None else t.dtype for t in (*results, *gradients)]

    assert dtypes(getattr(importlib.import_module(f"liger_aot.{module}"), name)) == dtypes(getattr(theirs, name))


def test_cross_entropy_and_distance_by_position():
    x, teacher, target = torch.randn(8, 9), torch.randn(8, 9).requires_grad_(), torch.randint(9, (8,))
    target[3] = 2
    want = formulas.cross_entropy_tvd(2)(x, teacher.detach(), target)
    for got in (
        liger_aot.ops.LigerFusedCETVDFunction.apply(x, teacher, target, 2),
        names.LigerFusedCETVDLoss(2)(x, teacher, target),
    ):
        assert not any(out.requires_grad for out in got)  # the teacher gets no gradient
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mode", ["global", "partition"])
def test_vocabulary_parallel_by_position(mode):
    x, target = torch.randn(4, 2, 9), torch.randint(9, (4, 2))
    target[1, 1] = 2
    options = {"ignore_index": 2, "reduction": "none"}
    for formula, smoothing in (("pytorch", 0.2), ("megatron", 0.2 * 9 / 8)):
        want = F.cross_entropy(x.flatten(0, 1), target.flatten(), label_smoothing=smoothing, **options).view(4, 2)
        got = liger_aot.ops.LigerVocabParallelCEFunction.apply(x, target, None, 2, 0.2, formula, mode)
        torch.testing.assert_close(got, want)
        module = build("LigerVocabParallelCrossEntropy", 2, 0.2, "none", formula, mode)
        assert torch.equal(module(x, target), got)


def losses():
    x, w, b = torch.randn(8, 6), torch.randn(9, 6), torch.randn(9)
    target, ce_weight = torch.randint(9, (8,)), torch.rand(9)
    target[3] = 4
    return x, w, b, target, ce_weight


def test_cross_entropy_by_position():
    x, _, _, target, ce_weight = losses()
    x = torch.randn(8, 9)
    got = L.liger_cross_entropy(x, target, ce_weight, None, 4, None, "sum", 0.1, 1e-2, 5.0, True, True, True)
    z, keep = 5.0 * torch.tanh(x / 5.0), target != 4
    z_loss = 1e-2 * torch.logsumexp(z, 1).square()[keep].sum()
    want = F.cross_entropy(z, target, ce_weight, ignore_index=4, reduction="sum", label_smoothing=0.1) + z_loss
    torch.testing.assert_close(got.loss, want)
    torch.testing.assert_close(got.z_loss, z_loss)
    torch.testing.assert_close(got.token_accuracy, (z.argmax(1) == target)[keep].float().mean())
    assert torch.equal(got.predicted_tokens, z.argmax(1).where(keep, -1))
    module = names.LigerCrossEntropyLoss(ce_weight, 4, 1e-2, 0.1, "sum", 5.0, True, True, True)
    assert all(torch.equal(a, b) for a, b in zip(module(x, target), got, strict=True))
    four = liger_aot.ops.LigerCrossEntropyFunction.apply(x, target, ce_weight, 4, 1e-2, 0.1, "sum", 5.0)
    assert four[1:] == (None, None, None)
    assert torch.equal(four[0], got.loss)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_fused_linear_cross_entropy_by_position(reduction):
    x, w, b, target, ce_weight = losses()
    options = ce_weight, 4, 0.0, 0.1, reduction, 5.0

    def reference(x, w, b):
        z = 5.0 * torch.tanh(F.linear(x, w, b) / 5.0)
        return F.cross_entropy(z, target, ce_weight, ignore_index=4, reduction=reduction, label_smoothing=0.1)

    module = names.LigerFusedLinearCrossEntropyLoss(*options, accum_dtype=torch.float32)
    want = run(reference, (x, w, b))
    torch.testing.assert_close(
        run(lambda x, w, b: L.liger_fused_linear_cross_entropy(x, w, target, b, *options), (x, w, b)), want
    )
    torch.testing.assert_close(run(lambda x, w, b: module(w, x, target, b), (x, w, b)), want)
    four = liger_aot.ops.LigerFusedLinearCrossEntropyFunction.apply(x, w, target, b, *options, False, None, False, True)
    torch.testing.assert_close(four[0], reference(x, w, b))
    assert four[1] is None
    assert four[2] is not None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_token_scaling(reduction, weighted):
    """Each token's loss times the probability of its target, which is a constant to the gradient."""
    x, w, b, target, ce_weight = losses()
    target[4:] = F.linear(x, w, b).argmax(1)[4:]
    ce_weight = ce_weight if weighted else None

    def reference(x, w, b):
        z = 5.0 * torch.tanh(F.linear(x, w, b) / 5.0)
        probability = z.softmax(1).gather(1, target[:, None])[:, 0].detach()
        loss = F.cross_entropy(z, target, ce_weight, ignore_index=4, reduction="none") * probability
        divisor = (torch.ones(9) if ce_weight is None else ce_weight)[target][target != 4].sum()
        return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / divisor}[reduction]

    options = {"ignore_index": 4, "softcap": 5.0, "reduction": reduction, "use_token_scaling": True}
    got = run(lambda x, w, b: L.liger_fused_linear_cross_entropy(x, w, target, b, ce_weight, **options), (x, w, b))
    torch.testing.assert_close(got, run(reference, (x, w, b)))
    if not weighted:
        flags = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}
        out = L.liger_fused_linear_cross_entropy(x, w, target, b, lse_square_scale=0.1, **options, **flags)
        plain = {"reduction": reduction, "ignore_index": 4, "softcap": 5.0}
        stats = liger_aot.linear_cross_entropy(x, w, target, linear_bias=b, lse_square_scale=0.1, **plain, **flags)
        assert isinstance(out, CrossEntropyOutput)
        torch.testing.assert_close(out[2:], stats[2:])
        torch.testing.assert_close(out.loss, reference(x, w, b) + out.z_loss)


def test_token_scaling_of_16_bits():
    """The probability is that of the logits in fp32, not of a loss that was rounded."""
    x, w = torch.randn(64, 16).bfloat16(), torch.randn(99, 16).bfloat16()
    target = F.linear(x, w).argmax(1)

    def reference(x, w):
        loss = F.cross_entropy(F.linear(x, w), target, reduction="none")
        return loss * (-loss.detach()).exp()

    options = {"reduction": "none", "use_token_scaling": True}
    # A loss carries the rounding of its lse; dlogits are rounded to 16 bits before the matmuls, and the gradients after them.
    carries = F.linear(x.float(), w.float()).logsumexp(-1).max().item()
    check(lambda *t: L.liger_fused_linear_cross_entropy(*t, target, **options), reference, x, w, slack=4.0, carries=carries)


X, W, Y = torch.randn(4, 8), torch.randn(8), torch.randint(8, (4,))
BAD = [
    (
        lambda: build("LigerExperts", SimpleNamespace(hidden_size=8, intermediate_size=8, hidden_act="silu")),
        "LigerExperts: the config must have one of num_experts, num_local_experts, n_routed_experts, got SimpleNamespace",
    ),
    (lambda: L.liger_rms_norm(X, W, 1e-6, 0.0, "lama"), "rms_norm: casting must be one of none, gemma, llama, got 'lama'"),
    (lambda: L.liger_rms_norm(X, W, 1e-6, in_place="yes"), "liger_rms_norm: in_place must be one of True, False, got 'yes'"),
    (lambda: build("LigerRMSNorm", 8, row_mode=3), "LigerRMSNorm: row_mode must be one of None, True, False, got 3"),
    (lambda: build("LigerRMSNorm", 8, init_fn="one"), "LigerRMSNorm: init_fn must be one of 'ones', 'zeros', got 'one'"),
    (
        lambda: build("LigerRMSNorm", 8, casting_mode="x"),
        "LigerRMSNorm: casting_mode must be one of 'none', 'gemma', 'llama', got 'x'",
    ),
    (lambda: build("LigerLayerNorm", 8, impl="cutile"), "LigerLayerNorm: impl must be one of None, got 'cutile'"),
    (
        lambda: build("LigerCrossEntropyLoss", softcap=0.0),
        "LigerCrossEntropyLoss: softcap must be above 0 and finite, or None, got 0.0",
    ),
    (
        lambda: build("LigerCrossEntropyLoss", label_smoothing=2),
        "LigerCrossEntropyLoss: label_smoothing must be between 0 and 1, got 2",
    ),
    (
        lambda: build("LigerFusedLinearCrossEntropyLoss", reduction="avg"),
        "LigerFusedLinearCrossEntropyLoss: reduction must be one of 'mean', 'sum', 'none', got 'avg'",
    ),
    (
        lambda: L.liger_fused_linear_cross_entropy(X, X, Y, accum_dtype=torch.float64),
        "liger_fused_linear_cross_entropy: accum_dtype must be one of None, torch.float32, torch.bfloat16, torch.float16, "
        "got torch.float64",
    ),
    (
        lambda: L.liger_fused_linear_cross_entropy(X, X, Y, chunk_mem_const=0),
        "liger_fused_linear_cross_entropy: chunk_mem_const must be a positive integer, got 0",
    ),
    (
        lambda: L.liger_rope(X[None, None], X[None, None], X, X, rotary_dim=3),
        "rope: rotary_dim must be 8 or 16, as cos is 8 wide, got 3",
    ),
    (
        lambda: names.liger_llama4_text_rotary_pos_emb(*torch.ones(2, 1, 3, 2, 4), torch.ones(1, 5, 2, dtype=torch.complex64)),
        "liger_llama4_text_rotary_pos_emb: freqs_cis must have 3 rows, one a token, got (1, 5, 2); cut it to the sequence",
    ),
    (
        lambda: liger_aot.ops.LigerLlama4RopeFunction.apply(X, X, X, 64),
        "LigerLlama4RopeFunction: BLOCK_SIZE must be one of None, got 64",
    ),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[b[1][:60] for b in BAD])
def test_rejects(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


def test_refuses_what_it_does_not_compute():
    x, w, _, target, ce_weight = losses()
    with pytest.raises(
        NotImplementedError, match="use_token_scaling must have reduction sum or none with both ce_weight and lse"
    ):
        L.liger_fused_linear_cross_entropy(x, w, target, None, ce_weight, lse_square_scale=0.1, use_token_scaling=True)
