"""GRPO and its family from logits that exist: the formula of the chunked losses, of a head that is the identity."""

import importlib
import re

import pytest
import torch

import liger_aot
from liger_aot.transformers.grpo_loss import fused_selective_log_softmax
from liger_aot.transformers.grpo_loss import triton_grpo_loss

import losses
from harness import DTYPES
from harness import check as harness_check
from harness import fixed
from losses import BATCH
from losses import CLASSES
from losses import CLIPPED
from losses import GRPO
from losses import LENGTH

apply = liger_aot.ops.GrpoLossFunction.apply
# Of the formula -> here.
NAMES = {
    "selected_token_ids": "completion_ids",
    "attention_mask": "completion_mask",
    "old_per_token_logps": "old_logp",
    "ref_per_token_logps": "ref_logp",
    "epsilon_low": "eps_low",
    "epsilon_high": "eps_high",
}
DEFAULTS = {"temperature": 1.0, "beta": 0.04, "epsilon_low": 0.2, "epsilon_high": 0.2}


def make(dtype=torch.float32, **extra):
    """(logits with a token more than there are, fixed tensors by the formula's names)."""
    given = losses.make("grpo", torch.float32)
    logits = (2 * torch.randn(BATCH, LENGTH + 1, CLASSES)).to(dtype)
    names = "selected_token_ids", "attention_mask", "advantages"
    tensors = {name: given[name].tensor for name in names}
    logps, _ = losses.token_logps(logits[:, :-1].double(), torch.eye(CLASSES).double(), None, tensors["selected_token_ids"])
    tensors["old_per_token_logps"] = (logps + 0.3 * torch.randn(BATCH, LENGTH)).float()
    tensors["ref_per_token_logps"] = (logps + 0.3 * torch.randn(BATCH, LENGTH)).float()
    return logits, tensors | extra


def formula(names, **options):
    """(loss, the share of clipped tokens, the KL)."""

    def call(logits, *tensors):
        identity, given = torch.eye(CLASSES, dtype=logits.dtype), dict(zip(names, tensors, strict=True))
        loss, *metrics = losses.grpo(logits[:, :-1], identity, **given, **{"max_completion_length": LENGTH, **options})
        return loss, *metrics[::-1]

    return call


def ours(names, function=apply, **options):
    """The same, called by keywords."""
    given = {NAMES.get(name, name): value for name, value in {**DEFAULTS, **options}.items()}
    given |= {"inplace": False, "reduce": True}

    def call(logits, *tensors):
        named = {"old_logp": None, "ref_logp": None, "completion_mask": None}
        named |= {NAMES.get(name, name): tensor for name, tensor in zip(names, tensors, strict=True)}
        loss, *metrics = function(logits, **named, **given)
        metrics = metrics if function is apply else metrics[0]
        return loss, *[m for m in metrics if m is not None][::-1]

    return call


def check(logits, tensors, function=apply, **options):
    # A log-probability is z - lse and carries the rounding of lse; a sequence's is a sum of LENGTH such numbers.
    carries = LENGTH * logits.float().logsumexp(-1).abs().max().item() / min(1, options.get("temperature", 1))
    inputs = logits, *(fixed(t) for t in tensors.values())
    return harness_check(ours(tensors, function, **options), formula(tensors, **options), *inputs, carries=carries)


CASES = [
    *({"loss_type": t, "importance_sampling_level": "sequence"} for t in CLIPPED),
    *({"loss_type": t} for t in GRPO if t != "vespo"),
    {"loss_type": "dr_grpo", "max_completion_length": 9},
    {"loss_type": "grpo", "beta": 0.0},
    {"loss_type": "grpo", "delta": 1.1, "epsilon_high": 0.05, "epsilon_low": 0.1},
    {"loss_type": "bnpo", "use_bias_correction_kl": True, "temperature": 0.7},
    {"loss_type": "dapo", "use_bias_correction_kl": True, "importance_sampling_level": "sequence", "temperature": 1.7},
    {"loss_type": "dapo", "num_items_in_batch": 31},
    {"loss_type": "cispo", "epsilon_high": 1.1},
    {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_matches_formula(options):
    check(*make(), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", CASES[::5], ids=str)
def test_dtypes(path, options, dtype):
    results = check(*make(dtype), **options)
    assert results["output 0"].dtype is torch.float32
    assert results["gradient 0"].dtype is dtype
    assert torch.equal(results["gradient 0"][:, -1], torch.zeros(BATCH, CLASSES, dtype=dtype))


def test_without_what_may_be_left_out():
    logits, tensors = make()
    for name in ("old_per_token_logps", "attention_mask"):
        rest = {k: v for k, v in tensors.items() if k != name}
        given = rest if "attention_mask" in rest else rest | {"attention_mask": torch.ones(BATCH, LENGTH)}
        inputs = logits, *rest.values()
        torch.testing.assert_close(
            ours(rest, loss_type="dapo")(*inputs), formula(given, loss_type="dapo")(logits, *given.values())
        )


@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, 1), (BATCH, LENGTH)], ids=str)
def test_ratios_of_another_sampler(shape):
    logits, tensors = make(vllm_is_ratio=0.5 + torch.rand(shape))
    check(logits, tensors, loss_type="dapo")
    check(logits, tensors, triton_grpo_loss, loss_type="vespo")


def test_vespo_computes_its_weights():
    check(*make(), triton_grpo_loss, loss_type="vespo")
    check(*make(), triton_grpo_loss, loss_type="vespo", beta=0.0, temperature=0.7)


def test_the_wrapper_is_the_function():
    logits, tensors = make()
    for options in CASES[:1] + CASES[5:7]:
        for got, want in zip(
            ours(tensors, triton_grpo_loss, **options)(logits, *tensors.values()),
            ours(tensors, **options)(logits, *tensors.values()),
            strict=True,
        ):
            assert torch.equal(got, want)


def by_name(logits, tensors):
    return {"logits": logits} | {NAMES.get(name, name): t for name, t in tensors.items()}


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_losses_of_tokens(level):
    """reduce=False: 0 where masked, and of these the mean is the loss; the KL and the clipped have no gradient."""
    logits, tensors = make()
    logits.requires_grad_()
    options = {
        "inplace": True,
        "loss_type": "bnpo",
        "importance_sampling_level": level,
        **{NAMES.get(k, k): v for k, v in DEFAULTS.items()},
    }
    whole = apply(**by_name(logits, tensors), **options)
    tokens = apply(**by_name(logits, tensors), **options, reduce=False)
    count = tensors["attention_mask"].sum()
    for each, one in zip(tokens, whole, strict=True):
        assert torch.equal(each[tensors["attention_mask"] == 0], torch.zeros(int(BATCH * LENGTH - count)))
        torch.testing.assert_close(each.sum() / count, one)
    assert [t.requires_grad for t in (*tokens, *whole)] == [True, False, False] * 2
    before = logits.detach().clone()
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (tokens[0].sum() / count, whole[0])]
    torch.testing.assert_close(*gradients)
    assert torch.equal(logits, before)
    assert apply(**by_name(logits, tensors), **{**options, "beta": 0.0})[1] is None


@pytest.mark.parametrize("loss_type", GRPO)
def test_what_the_mask_leaves_out_has_no_part(path, loss_type):
    logits, tensors = make(vllm_is_ratio=0.5 + torch.rand(BATCH, LENGTH))
    keep = tensors["attention_mask"] != 0
    want, *_ = ours(tensors, triton_grpo_loss, loss_type=loss_type)(logits, *tensors.values())
    tensors["old_per_token_logps"][~keep], tensors["ref_per_token_logps"][~keep] = -torch.inf, torch.nan
    tensors["vllm_is_ratio"][~keep], tensors["selected_token_ids"][~keep] = torch.inf, CLASSES + 7
    logits[:, :-1][~keep], logits[:, -1] = torch.nan, torch.inf
    logits.requires_grad_()
    got, *_ = ours(tensors, triton_grpo_loss, loss_type=loss_type)(logits, *tensors.values())
    assert torch.equal(got, want)
    (gradient,) = torch.autograd.grad(got, logits)
    assert torch.equal(gradient[:, :-1][~keep], torch.zeros(int((~keep).sum()), CLASSES))
    assert torch.equal(gradient[:, -1], torch.zeros(BATCH, CLASSES))


def test_selective_log_softmax():
    logits, tensors = make()
    ids, mask = tensors["selected_token_ids"], tensors["attention_mask"]
    prompt = torch.randint(CLASSES, (BATCH, 3))
    want = (logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    got = fused_selective_log_softmax(logits.requires_grad_(), torch.cat([prompt, ids], 1))
    assert not got.requires_grad
    torch.testing.assert_close(got, want)
    masked = fused_selective_log_softmax(logits, torch.cat([prompt, ids], 1), mask=torch.cat([prompt, mask], 1))
    torch.testing.assert_close(masked, want * mask)


def test_rows_are_not_copied(monkeypatch):
    """The kernel reads the logits where they are, the token that counts for nothing among them."""
    seen, module = [], importlib.import_module("liger_aot.transformers.grpo_loss")
    original = module.cross_entropy_fwd
    monkeypatch.setattr(module, "cross_entropy_fwd", lambda x, *a: seen.append(x) or original(x, *a))
    logits, tensors = make()
    ours(tensors, loss_type="grpo")(logits, *tensors.values())
    assert [x.data_ptr() for x in seen] == [logits.data_ptr()]
    assert seen[0].is_contiguous()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    logits, tensors = make()
    function = ours(tensors, loss_type="grpo", temperature=0.7)
    logits.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got, want = (f(logits, *tensors.values()) for f in (compiled, function))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(*(torch.autograd.grad(out[0], logits)[0] for out in (got, want)))


def test_no_double_backward():
    logits, tensors = make()
    loss, *_ = ours(tensors, loss_type="grpo")(logits.requires_grad_(), *tensors.values())
    with pytest.raises(RuntimeError, match="GrpoLossFunction: double backward is not supported"):
        torch.autograd.grad(loss, logits, create_graph=True)


def call(**changes):
    logits, tensors = make()
    given = by_name(logits, tensors) | {NAMES.get(k, k): v for k, v in DEFAULTS.items()} | {"inplace": False} | changes
    return apply(**given)


BAD = [
    ({"logits": torch.randn(BATCH, CLASSES)}, "logits must be (batch, length + 1, classes) in float32, float16 or bfloat16"),
    ({"logits": torch.randn(BATCH, 3, CLASSES).double()}, "got (4, 3, 50) in torch.float64"),
    ({"completion_ids": torch.zeros(BATCH, 3).long()}, "completion_ids: target must have shape (4, 6), got (4, 3)"),
    ({"completion_ids": torch.full((BATCH, LENGTH), 50)}, "GrpoLossFunction: completion_ids must be in [0, 50), got 50"),
    ({"completion_ids": None}, "completion_ids: target must be a tensor of class indices in int64, got NoneType"),
    ({"advantages": None}, "GrpoLossFunction: advantages must have shape (4,), got None"),
    ({"old_logp": torch.zeros(BATCH, 3)}, "GrpoLossFunction: old_logp must have shape (4, 6), got (4, 3)"),
    ({"completion_mask": torch.ones(BATCH)}, "GrpoLossFunction: completion_mask must have shape (4, 6), got (4,)"),
    ({"ref_logp": None}, "GrpoLossFunction: ref_logp must be given where beta is not 0, got None with beta 0.04"),
    ({"loss_type": "ppo"}, "GrpoLossFunction: loss_type must be one of grpo, bnpo, "),
    ({"loss_type": "vespo"}, "GrpoLossFunction: phi_seq must be (4,) for loss_type 'vespo', else None, got None for 'vespo'"),
    ({"phi_seq": torch.ones(BATCH)}, "phi_seq must be (4,) for loss_type 'vespo', else None, got (4,) for 'grpo'"),
    ({"loss_type": "vespo", "phi_seq": torch.ones(3)}, "phi_seq must be (4,) for loss_type 'vespo', else None, got (3,)"),
    ({"temperature": 0.0}, "GrpoLossFunction: temperature must be positive, got 0.0"),
    ({"reduce": 3}, "GrpoLossFunction: reduce must be one of True, False, got 3"),
    ({"inplace": None}, "GrpoLossFunction: inplace must be one of True, False, got None"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "text"), BAD, ids=[b[1][:60] for b in BAD])
def test_rejects(changes, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call(**changes)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (torch.zeros(BATCH).long(), "input_ids must be (batch, 6 or more), got (4,)"),
        (torch.zeros(BATCH, 5).long(), "input_ids must be (batch, 6 or more), got (4, 5)"),
        (torch.full((BATCH, LENGTH), -1), "input_ids must be in [0, 50), got -1"),
    ],
    ids=["one dimension", "short", "below 0"],
)
def test_selective_log_softmax_rejects(ids, text):
    with pytest.raises(ValueError, match=re.escape(f"fused_selective_log_softmax: {text}")):
        fused_selective_log_softmax(make()[0], ids)
