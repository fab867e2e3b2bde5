"""Liger's names of layers: norms, gates, experts, rotary embeddings and others give the numbers that Liger-Kernel documents."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)

import liger_aot
import liger_aot.transformers as names
import liger_aot.transformers.functional as L  # noqa: N812

import formulas
from harness import run
from ligers import BUILD
from ligers import CONFIG
from ligers import build

SWIGLU = [n for n in BUILD if "SwiGLU" in n or "Top2" in n or n in ("LigerMLP", "LigerFalconH1MLP")]


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
