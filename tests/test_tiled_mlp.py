"""Tiled MLPs: the same as the whole, in the memory of a part."""

from types import SimpleNamespace

import pytest
import torch

import liger_aot
from liger_aot._demo import peak_memory
from liger_aot.ops import apply_tiled_mlp
from liger_aot.transformers import LigerGEGLUMLP
from liger_aot.transformers import LigerSwiGLUMLP
from liger_aot.transformers import LigerTiledGEGLUMLP
from liger_aot.transformers import LigerTiledSwiGLUMLP

CONFIGS = {
    act: SimpleNamespace(hidden_size=12, intermediate_size=20, hidden_act=act, mlp_bias=True) for act in ("silu", "gelu")
}
PAIRS = {"silu": (LigerSwiGLUMLP, LigerTiledSwiGLUMLP), "gelu": (LigerGEGLUMLP, LigerTiledGEGLUMLP)}
EVERY = pytest.mark.parametrize("act", PAIRS)


def pair(act, num_shards=None):
    torch.manual_seed(0)
    whole, tiled = PAIRS[act][0](CONFIGS[act]), PAIRS[act][1](CONFIGS[act], num_shards)
    tiled.load_state_dict(whole.state_dict())
    return whole, tiled


def gradients(module, x, frozen=()):
    for name, p in module.named_parameters():
        p.requires_grad_(name not in frozen)
    x = x.clone().requires_grad_()
    y = module(x)
    wanted = {"x": x, **{n: p for n, p in module.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad(y.square().sum(), wanted.values())
    return {"y": y.detach()} | dict(zip(wanted, found, strict=True))


@EVERY
@pytest.mark.parametrize("shape", [(7, 12), (2, 7, 12), (1, 1, 12), (2, 30, 12), (0, 12)], ids=str)
@pytest.mark.parametrize("num_shards", [None, 1, 3, 50])
def test_equals_the_whole(act, shape, num_shards):
    whole, tiled = pair(act, num_shards)
    x = torch.randn(shape)
    # Both round alike; the sums over tokens of the parameters' gradients are taken in another order.
    torch.testing.assert_close(gradients(tiled, x), gradients(whole, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "num_shards", "parts"), [(30, None, [10, 10, 10]), (5, None, [5]), (7, 3, [3, 3, 1])])
def test_parts(tokens, num_shards, parts):
    seen = []
    apply_tiled_mlp(lambda module, part: seen.append(part.shape[-2]) or part, None, torch.randn(2, tokens, 12), num_shards)
    assert seen == parts


def test_frozen_parameters_get_no_gradient():
    whole, tiled = pair("silu", 2)
    x, frozen = torch.randn(2, 6, 12), ("up_proj.weight", "down_proj.weight")
    torch.testing.assert_close(gradients(tiled, x, frozen), gradients(whole, x, frozen))
    assert tiled.up_proj.weight.grad is None


def test_dropout_is_drawn_once():
    """The second forward, that of the backward, drops what the first dropped."""
    x = torch.rand(8, 12, requires_grad=True)
    y = apply_tiled_mlp(lambda module, part: torch.nn.functional.dropout(part, 0.5), None, x, 2)
    (kept,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, x * kept)
    assert 0 < (kept == 0).sum() < kept.numel()


@EVERY
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(act, dynamic):
    whole, tiled = pair(act, 3)
    torch._dynamo.reset()
    compiled = torch.compile(tiled, fullgraph=True, backend="aot_eager")
    for tokens in (9, 14) if dynamic else (9,):
        x = torch.randn(2, tokens, 12)
        if (
            dynamic
        ):  # under dynamic=True torch 2.13 does not compile two checkpoints of a function that has a float as a default
            torch._dynamo.mark_dynamic(x, 1)
        y = compiled(x)
        torch.testing.assert_close(y, whole(x))
        y.sum().backward()
        torch.testing.assert_close(tiled.up_proj.weight.grad, torch.autograd.grad(whole(x).sum(), whole.up_proj.weight)[0])
        tiled.zero_grad()


def test_exports():
    whole, tiled = pair("silu", 3)
    x = torch.randn(2, 9, 12)
    program = torch.export.export(tiled.eval(), (x,))
    torch.testing.assert_close(program.module()(x), whole(x))


def test_peak_memory_is_that_of_a_part():
    config = SimpleNamespace(hidden_size=16, intermediate_size=512, hidden_act="silu")
    x = torch.randn(1, 2048, 16)

    def peak(module):
        return peak_memory(lambda: module(x.clone().requires_grad_()).sum().backward(), "cpu")

    whole, tiled = peak(LigerSwiGLUMLP(config)), peak(LigerTiledSwiGLUMLP(config, 16))
    assert whole > 3 * 2048 * 512 * 4  # gate, up and their product
    # A part's forward and backward: at most gate, up, product and the gradient of each.
    assert tiled < 6 * 2048 // 16 * 512 * 4 + 12 * x.numel() * 4 + 6 * 16 * 512 * 4


def test_bad_input():
    x = torch.randn(4, 12)
    with pytest.raises(ValueError, match=r"num_shards must be at least 1, got 0"):
        apply_tiled_mlp(LigerSwiGLUMLP.forward, pair("silu")[0], x, 0)
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., tokens, hidden size\), got \(4,\)"):
        apply_tiled_mlp(LigerSwiGLUMLP.forward, pair("silu")[0], x[:, 0])
    with pytest.raises(ValueError, match="must be silu or swish, got 'gelu'"):
        LigerTiledSwiGLUMLP(CONFIGS["gelu"])
    with pytest.raises(ValueError, match="must be gelu, gelu_new or gelu_pytorch_tanh, got 'silu'"):
        LigerTiledGEGLUMLP(CONFIGS["silu"])


def test_ligers_function():
    whole, tiled = pair("silu", 2)
    x = torch.randn(5, 12)
    got = liger_aot.ops.LigerTiledMLPFunction.apply(LigerSwiGLUMLP.forward, tiled, x, 2, list(tiled.parameters()))
    torch.testing.assert_close(got, whole(x))
