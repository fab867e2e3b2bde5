"""Liger's names: each is here with the arguments, state and attributes that Liger-Kernel's has, and refuses what is wrong."""

import importlib
import inspect
import pathlib
import re
from types import SimpleNamespace

import pytest
import torch

import liger_aot
import liger_aot.transformers as names
import liger_aot.transformers.functional as L  # noqa: N812

from ligers import BUILD
from ligers import MODULES
from ligers import build

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
