"""The losses of post-training, each against a plain statement of its formula, which Liger-Kernel is held to as well."""

import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import cosine_similarity
from torch.nn.functional import kl_div
from torch.nn.functional import linear
from torch.nn.functional import logsigmoid

from liger_aot import chunked_loss
from liger_aot.chunked_loss import functional
from liger_aot.ops import _linear

from harness import average
from harness import check as harness_check
from harness import fixed
from harness import run

BATCH, LENGTH, WIDTH, CLASSES = 4, 6, 16, 50
MODULES = {
    "dpo": ("dpo_loss", "DPO"),
    "cpo": ("cpo_loss", "CPO"),
    "orpo": ("orpo_loss", "ORPO"),
    "simpo": ("simpo_loss", "SimPO"),
    "kto": ("kto_loss", "KTO"),
    "grpo": ("grpo_loss", "GRPO"),
    "jsd": ("jsd_loss", "JSD"),
    "cosine": ("cosine_similarity_loss", "CosineSimilarity"),
}


# --- The formulas. What has no gradient is detached: metrics, and the reference model, whose inputs are fixed.


def token_logps(x, weight, bias, target, temperature=1.0):
    """Of the tokens that are not ignored, else 0; and which those are."""
    keep = target != -100
    logps = (linear(x, weight, bias) / temperature).log_softmax(-1)
    return torch.where(keep, logps.gather(-1, torch.where(keep, target, 0)[..., None])[..., 0], 0.0), keep


def sequences(x, weight, bias, target, mean=False):
    logps, keep = token_logps(x, weight, bias, target)
    return logps.sum(-1) / keep.sum(-1) if mean else logps.sum(-1)


def nll(x, weight, bias, target):
    logps, keep = token_logps(x, weight, bias, target)
    return -logps.sum() / keep.sum()


def paired(losses, x, weight, bias, target, mean=False, reference=(), alpha=0.0, nll_target=None):
    """losses of the log-ratios of chosen and rejected gives those of the pairs, and both rewards."""
    own, n = sequences(x, weight, bias, target, mean), len(x) // 2
    ratios = own - sequences(*reference, target, mean) if reference else own
    each, *more = losses(ratios[:n], ratios[n:])
    chosen = nll(x[:n], weight, bias, (target if nll_target is None else nll_target)[:n]) if alpha else own.new_zeros(())
    logits = linear(x, weight, bias)
    metrics = own[:n], own[n:], logits[:n].mean(), logits[n:].mean(), chosen, *more
    return each.mean() + alpha * chosen, *(m.detach() for m in metrics)


DPO = {
    "sigmoid": lambda a, b, beta, e, tau: -logsigmoid(beta * (a - b)),
    "hinge": lambda a, b, beta, e, tau: torch.clamp(1 - beta * (a - b), min=0),
    # KL of (σ, 1 - σ) of the margin from (1 - ε, ε)
    "exo_pair": lambda a, b, beta, e, tau: sum(
        (s * beta * (a - b)).sigmoid() * (logsigmoid(s * beta * (a - b)) - torch.tensor(p).double().log())
        for s, p in ((1, 1 - e), (-1, e))
    ),
    "nca_pair": lambda a, b, beta, e, tau: -logsigmoid(beta * a) - (logsigmoid(-beta * a) + logsigmoid(-beta * b)) / 2,
    "robust": lambda a, b, beta, e, tau: (
        (-(1 - e) * logsigmoid(beta * (a - b)) + e * logsigmoid(-beta * (a - b))) / (1 - 2 * e)
    ),
    "bco_pair": lambda a, b, beta, e, tau: -logsigmoid(beta * a) - logsigmoid(-beta * b),
    "sppo_hard": lambda a, b, beta, e, tau: (a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2,
    "apo_zero": lambda a, b, beta, e, tau: 1 - (beta * a).sigmoid() + (beta * b).sigmoid(),
    "apo_down": lambda a, b, beta, e, tau: (beta * a).sigmoid() + 1 - (beta * (a - b)).sigmoid(),
    "discopop": lambda a, b, beta, e, tau: torch.lerp(
        -logsigmoid(beta * (a - b)), (-beta * (a - b)).exp(), (beta * (a - b) / tau).sigmoid()
    ),
}


def dpo(
    _input,
    weight,
    target,
    bias=None,
    ref_input=None,
    ref_weight=None,
    ref_bias=None,
    beta=0.1,
    loss_type="sigmoid",
    label_smoothing=0.0,
    discopop_tau=0.05,
    average_log_prob=False,
    compute_nll_loss=False,
    alpha=1.0,
    use_ref_model=True,
):
    def losses(a, b):
        return DPO[loss_type](a, b, beta, label_smoothing, discopop_tau), beta * a, beta * b

    reference = (ref_input, ref_weight, ref_bias) if use_ref_model else ()
    alpha = alpha if compute_nll_loss else 0.0
    return paired(losses, _input, weight, bias, target, average_log_prob, reference, alpha)


def cpo(
    _input,
    weight,
    target,
    bias=None,
    beta=0.1,
    alpha=1.0,
    label_smoothing=0.0,
    gamma=0.0,
    compute_nll_loss=True,
    average_log_prob=False,
):
    def losses(a, b):
        z = beta * (a - b) - gamma
        return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z), beta * a, beta * b

    return paired(losses, _input, weight, bias, target, average_log_prob, (), alpha if compute_nll_loss else 0.0)


def simpo(*inputs, gamma=0.5, compute_nll_loss=False, **options):
    return cpo(*inputs, gamma=gamma, compute_nll_loss=compute_nll_loss, average_log_prob=True, **options)


def orpo(_input, weight, target, bias=None, nll_target=None, beta=0.1, compute_nll_loss=True):
    def losses(a, b):
        ratio = (a.exp() / (1 - a.exp())).log() - (b.exp() / (1 - b.exp())).log()
        return -beta * logsigmoid(ratio), beta * a, beta * b, logsigmoid(ratio).mean(), ratio.mean()

    return paired(losses, _input, weight, bias, target, True, (), float(compute_nll_loss), nll_target)


def kto(
    _input,
    weight,
    target,
    preference_labels,
    bias=None,
    ref_input=None,
    ref_weight=None,
    ref_bias=None,
    kl=None,
    beta=0.1,
    use_ref_model=True,
    average_log_prob=False,
):
    own = sequences(_input, weight, bias, target, average_log_prob)
    ratios = own - sequences(ref_input, ref_weight, ref_bias, target, average_log_prob) if use_ref_model else own
    sign = preference_labels * 2 - 1
    losses = 1 - (sign * beta * (ratios - (0 if kl is None else kl))).sigmoid()
    summed = own, linear(_input, weight, bias).sum((1, 2)), beta * ratios
    metrics = (m.detach()[mask].sum() for m in summed for mask in (preference_labels, ~preference_labels))
    return losses.mean(), *metrics


def grpo(
    _input,
    weight,
    selected_token_ids,
    attention_mask,
    advantages,
    bias=None,
    old_per_token_logps=None,
    ref_input=None,
    ref_weight=None,
    ref_bias=None,
    vllm_is_ratio=None,
    ref_per_token_logps=None,
    loss_type="dapo",
    beta=0.04,
    epsilon_low=0.2,
    epsilon_high=0.2,
    importance_sampling_level="token",
    temperature=1.0,
    delta=None,
    use_bias_correction_kl=False,
    use_ref_model=True,
    max_completion_length=None,
    num_items_in_batch=None,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
    vespo=(2.0, 3.0, 3.0, 2.0),
):
    m, a = attention_mask.to(_input.dtype), advantages.to(_input.dtype)[:, None]
    logps, _ = token_logps(_input, weight, bias, selected_token_ids, temperature)
    old = logps.detach() if old_per_token_logps is None else old_per_token_logps.to(_input.dtype)
    ratio, extra = (logps - old).exp(), 1
    if importance_sampling_level == "sequence":
        ratio = (((logps - old) * m).sum(-1, keepdim=True) / m.sum(-1, keepdim=True)).exp()
    if vllm_is_ratio is not None:
        extra = vllm_is_ratio.to(_input.dtype).reshape(len(m), -1)
    low, high = 1 - epsilon_low, 1 + epsilon_high
    clipped = ((ratio < low) & (a < 0)) | ((ratio > high) & (a > 0))
    if loss_type == "cispo":
        losses = -ratio.detach().clamp(max=epsilon_high) * a * logps * extra
        clipped = (ratio > epsilon_high) & (a > 0)
    elif loss_type == "sapo":
        tau = torch.where(a > 0, sapo_temperature_pos, sapo_temperature_neg)
        losses, clipped = -4 / tau * (tau * (ratio - 1)).sigmoid() * a * extra, torch.zeros(1)
    elif loss_type == "vespo":
        each = ((logps - old) * m).sum(-1, keepdim=True)
        if vllm_is_ratio is not None:
            each = each + (extra.log() * (m if extra.shape == m.shape else 1)).sum(-1, keepdim=True)
        w, (k_pos, lambda_pos, k_neg, lambda_neg) = each.exp().detach(), vespo
        k, rate = torch.where(a >= 0, k_pos, k_neg), torch.where(a >= 0, lambda_pos, lambda_neg)
        losses, clipped = -(rate - rate * w).exp() * w**k * a * logps, torch.zeros(1)
    else:
        limited = ratio if delta is None else ratio.clamp(max=delta)
        losses = -torch.minimum(limited * a, ratio.clamp(low, high) * a) * extra
    metrics = [clipped]
    if beta:
        reference = ref_per_token_logps
        if reference is None and use_ref_model:
            reference, _ = token_logps(ref_input, ref_weight, ref_bias, selected_token_ids, temperature)
        less = (logps.detach() if reference is None else reference.to(_input.dtype)) - logps
        kl = (less.exp() - less - 1) * (ratio if use_bias_correction_kl else 1)
        losses, metrics = losses + beta * kl, [kl, clipped]
    sums = (losses * m).sum(-1)
    loss = {
        "grpo": lambda: (sums / m.sum(-1)).mean(),
        "sapo": lambda: (sums / m.sum(-1)).mean(),
        "bnpo": lambda: sums.sum() / m.sum(),
        "dr_grpo": lambda: sums.sum() / (len(m) * max_completion_length),
        "luspo": lambda: sums.mean(),
    }.get(loss_type, lambda: sums.sum() / (m.sum() if num_items_in_batch is None else num_items_in_batch))()
    return loss, *((value * m).sum().detach() / m.sum() for value in metrics)


def distilled(
    soft,
    student_input,
    student_weight,
    teacher_input,
    teacher_weight,
    true_labels,
    student_bias=None,
    teacher_bias=None,
    weight_hard_loss=0.5,
    weight_soft_loss=0.5,
    beta=0.5,
    temperature=1.0,
    return_soft_hard_loss=False,
):
    keep = true_labels != -100
    student = linear(student_input, student_weight, student_bias)
    teacher = linear(teacher_input, teacher_weight, teacher_bias)
    soft_loss = soft(student[keep] / temperature, teacher[keep] / temperature, beta) / keep.sum()
    hard_loss = nll(student_input, student_weight, student_bias, true_labels)
    loss = weight_hard_loss * hard_loss + weight_soft_loss * soft_loss
    return (loss, soft_loss.detach(), hard_loss.detach()) if return_soft_hard_loss else loss


def jsd(student, teacher, beta):
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta in (0, 1):
        return kl_div(s, t, reduction="sum", log_target=True) if beta == 0 else kl_div(t, s, reduction="sum", log_target=True)
    m = (beta * t.exp() + (1 - beta) * s.exp()).log()
    return beta * (t.exp() * (t - m)).sum() + (1 - beta) * (s.exp() * (s - m)).sum()


def cosine(student, teacher, beta):
    return beta * (1 - cosine_similarity(student, teacher, dim=-1)).sum()


FORMULAS = {
    "dpo": dpo,
    "cpo": cpo,
    "orpo": orpo,
    "simpo": simpo,
    "kto": kto,
    "grpo": grpo,
    "jsd": functools.partial(distilled, jsd),
    "cosine": functools.partial(distilled, cosine),
}


# --- Inputs and cases


def head(dtype, width=WIDTH, bias=True):
    """Hidden states, weights as a head has them and a bias."""
    tensors = torch.randn(BATCH, LENGTH, width), torch.randn(CLASSES, width) / width**0.5, torch.randn(CLASSES)
    return [t.to(dtype) for t in tensors] if bias else [tensors[0].to(dtype), tensors[1].to(dtype), None]


def tokens():
    """Targets of which each sequence ignores another number."""
    target = torch.randint(CLASSES, (BATCH, LENGTH))
    for row in range(BATCH):
        target[row, : row % 3] = -100
    return target


def make(name, dtype, bias=True):
    """Tensors by the names of the function's arguments; a student's head, or the policy's, has gradients, the rest is fixed."""
    x, weight, b = head(dtype, bias=bias)
    others = head(dtype, 2 * WIDTH, bias)
    other_x, other_weight, other_b = (None if t is None else fixed(t) for t in others)
    if name in ("jsd", "cosine"):
        names = (
            "student_input",
            "student_weight",
            "teacher_input",
            "teacher_weight",
            "true_labels",
            "student_bias",
            "teacher_bias",
        )
        student, teacher = x.flatten(0, 1), fixed(others[0].flatten(0, 1))
        tensors = student, weight, teacher, other_weight, fixed(tokens().flatten()), b, other_b
        return dict(zip(names, tensors, strict=True))
    made = {"_input": x, "weight": weight, "bias": b}
    reference = {"ref_input": other_x, "ref_weight": other_weight, "ref_bias": other_b}
    if name == "grpo":
        ids, mask = torch.randint(CLASSES, (BATCH, LENGTH)), torch.ones(BATCH, LENGTH, dtype=torch.int64)
        for row in range(BATCH):
            mask[row, LENGTH - row :] = 0
        logps, _ = token_logps(x.double(), weight.double(), None if b is None else b.double(), ids)
        old = (logps + 0.3 * torch.randn(BATCH, LENGTH)).float()
        advantages = torch.tensor([1.5, -0.5, -2.0, 0.7])
        made |= {"selected_token_ids": fixed(ids), "attention_mask": fixed(mask), "advantages": fixed(advantages)}
        return made | reference | {"old_per_token_logps": fixed(old)}
    made["target"] = fixed(tokens())
    if name == "kto":
        made["preference_labels"] = fixed(torch.tensor([True, False, False, True]))
    return made | reference if name in ("dpo", "kto") else made


class Case(NamedTuple):
    name: str
    options: Mapping = MappingProxyType({})
    without: tuple = ()  # inputs that are left out
    extra: Mapping = MappingProxyType({})  # inputs of its own: what makes each
    differs: str = ""  # why Liger's numbers are others

    def __str__(self):
        given = [f"{k}={v}" for k, v in self.options.items()] + [f"no {k}" for k in self.without] + [*self.extra]
        return " ".join([self.name, *given])

    def inputs(self, dtype):
        made = make(self.name, dtype) | {k: fixed(f()) for k, f in self.extra.items()}
        return {k: None if k in self.without else v for k, v in made.items()}


REFERENCE = "ref_input", "ref_weight", "ref_bias"
EVERY_KL = "Liger takes each kl off each ratio"
PADDING = "Liger counts tokens that the mask leaves out"
CLIPPED = "grpo", "bnpo", "dr_grpo", "dapo", "luspo"
GRPO = *CLIPPED, "cispo", "sapo", "vespo"
SMOOTHING = {"exo_pair": {"label_smoothing": 0.01}, "robust": {"label_smoothing": 0.2}}


def policy(loss_type, differs="", without=(), extra=None, **options):
    options = {"loss_type": loss_type, **({"max_completion_length": 9} if loss_type == "dr_grpo" else {}), **options}
    return Case("grpo", options, without, extra or {}, differs)


def importance(*shape):
    return lambda: 0.5 + torch.rand(shape)


CASES = [
    *(Case("dpo", {"loss_type": t, **SMOOTHING.get(t, {})}) for t in DPO),
    Case("dpo", {"use_ref_model": False}, REFERENCE),
    Case("dpo", {"average_log_prob": True, "beta": 2.0}),
    Case("dpo", {"compute_nll_loss": True, "alpha": 0.3}),
    Case("dpo", {"loss_type": "discopop", "discopop_tau": 0.5}),
    Case("dpo", {}, ("bias", "ref_bias")),
    Case("cpo"),
    Case("cpo", {"label_smoothing": 0.1, "alpha": 0.5, "beta": 0.7}),
    Case("cpo", {"compute_nll_loss": False, "average_log_prob": True}),
    Case("orpo"),
    Case("orpo", {"beta": 0.5}, (), {"nll_target": tokens}),
    Case("orpo", {"compute_nll_loss": False}, ("bias",)),
    Case("simpo"),
    Case("simpo", {"gamma": 1.5, "beta": 2.0, "label_smoothing": 0.1, "compute_nll_loss": True}),
    Case("kto"),
    Case("kto", {"beta": 0.5}, (), {"kl": lambda: torch.tensor(0.8)}),
    Case("kto", {"average_log_prob": True}, ("bias",), {"kl": lambda: torch.rand(BATCH)}, EVERY_KL),
    Case("kto", {"use_ref_model": False}, REFERENCE),
    *(policy(t, PADDING if t == "luspo" else "") for t in GRPO),
    *(policy(t, PADDING if t == "luspo" else "", importance_sampling_level="sequence") for t in CLIPPED),
    policy("luspo", importance_sampling_level="sequence", use_ref_model=False, beta=0.0, without=REFERENCE),
    policy("grpo", without=("old_per_token_logps",)),
    policy("cispo", epsilon_high=1.1),
    policy("grpo", delta=1.1, epsilon_high=0.05, epsilon_low=0.1),
    policy("bnpo", use_bias_correction_kl=True, temperature=0.7),
    policy("dapo", use_bias_correction_kl=True, importance_sampling_level="sequence", temperature=1.7),
    policy("dapo", num_items_in_batch=31),
    policy("dapo", use_ref_model=False, without=REFERENCE),
    policy("dapo", beta=0.0, use_ref_model=False, without=(*REFERENCE, "bias")),
    policy("grpo", without=REFERENCE, extra={"ref_per_token_logps": lambda: -4 - torch.rand(BATCH, LENGTH)}),
    policy("sapo", sapo_temperature_pos=2.0, sapo_temperature_neg=0.5),
    *(policy("dapo", extra={"vllm_is_ratio": importance(*s)}) for s in ((BATCH,), (BATCH, 1), (BATCH, LENGTH))),
    policy("vespo", extra={"vllm_is_ratio": importance(BATCH, 1)}),
    policy("vespo", PADDING, extra={"vllm_is_ratio": importance(BATCH, LENGTH)}),
    *(Case("jsd", {"beta": beta, "return_soft_hard_loss": True}) for beta in (0.0, 0.3, 0.5, 1.0)),
    Case("jsd", {"temperature": 2.0, "weight_hard_loss": 0.2, "weight_soft_loss": 0.8}),
    Case("jsd", {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "chunk_size": 5}, ("student_bias", "teacher_bias")),
    Case("cosine", {"return_soft_hard_loss": True}),
    Case("cosine", {"beta": 1.0, "weight_hard_loss": 0.0, "chunk_size": 7, "temperature": 3.0}),
]


def flat(out):
    """A loss and what comes with it as one tuple, in which only the loss has a gradient."""
    loss, *more = out if isinstance(out, tuple) else (out,)
    more = more[0] if len(more) == 1 and isinstance(more[0], (tuple, list)) else more
    return loss, *(m.detach() for m in more)


def called(function, case, inputs):
    """function by keywords, for a harness that passes inputs by position."""
    return lambda *values: flat(function(**dict(zip(inputs, values, strict=True)), **case.options))


def formula(case, inputs):
    """chunk_size belongs to how a loss is computed, not to what."""
    options = {k: v for k, v in case.options.items() if k != "chunk_size"}
    return called(FORMULAS[case.name], case._replace(options=options), inputs)


def ours(case, inputs):
    return called(getattr(functional, f"liger_fused_linear_{case.name}"), case, inputs)


def check(function, case, inputs, slack):
    # A log-probability is z - lse and carries the rounding of lse; a sequence's is a sum of LENGTH such numbers. The hidden
    # states come first, then the weight.
    x, weight = [*inputs.values()][:2]
    carries = LENGTH * linear(x.float(), weight.float()).logsumexp(-1).abs().max().item()
    carries /= min(1, case.options.get("temperature", 1))
    return harness_check(function, formula(case, inputs), *inputs.values(), slack=slack, carries=carries)


# dlogits are rounded to 16 bits before the matmuls that make the gradients: one rounding more, as in linear_logprob.
SLACK = {torch.float32: 2.0, torch.bfloat16: 6.0}


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_formula(case, dtype):
    inputs = case.inputs(dtype)
    check(ours(case, inputs), case, inputs, SLACK[dtype])


@pytest.mark.parametrize("case", [next(c for c in CASES if c.name == n) for n in ("dpo", "grpo", "jsd")], ids=str)
def test_kernels_match_formula(interpreted, case):
    inputs = case.inputs(torch.float32)
    check(ours(case, inputs), case, inputs, 2.0)
    assert interpreted.launched


# --- Liger-Kernel


def theirs(name):
    """Liger's autograd function by keywords, not compiled."""
    module, word = MODULES[name]
    pytest.importorskip("liger_kernel", reason="liger-kernel, to compare with, is not installed")
    module = importlib.import_module(f"liger_kernel.chunked_loss.{module}")
    return getattr(module, f"LigerFusedLinear{word}Function"), getattr(module, f"LigerFusedLinear{word}Loss")


def by_keywords(name):
    """Liger's function of its positions by keywords, not compiled."""
    function, _ = theirs(name)

    def call(**given):
        defaults = {
            name: None if default is inspect.Parameter.empty else default for name, _, default in parameters(function.forward)
        }
        return function.apply(*{**defaults, **given, "compiled": False}.values())

    return call


def parameters(function):
    """(name, kind, default) of each, without what a method has before them."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if p.name not in ("self", "cls", "ctx")]


def liger(case, inputs):
    return called(by_keywords(case.name), case, inputs)


@pytest.mark.parametrize("case", [c for c in CASES if not c.differs], ids=str)
def test_liger_computes_the_same(case):
    """Liger is held to the formula, as we are: both right, both alike. It adds up chunks, one rounding more for each."""
    inputs = case.inputs(torch.float32)
    check(liger(case, inputs), case, inputs, 2.0 * BATCH)


DIFFERENT = [(c, torch.float32) for c in CASES if c.differs]
DIFFERENT += [(c, torch.bfloat16) for c in CASES if c.name == "jsd"][:3]  # Liger's softmax is rounded to 16 bits


@pytest.mark.parametrize(("case", "dtype"), DIFFERENT, ids=str)
def test_liger_computes_something_else(case, dtype):
    """Where we differ from Liger on purpose, Liger is not within the allowance: else the purpose is gone."""
    inputs = case.inputs(dtype)
    function = liger(case, inputs)
    with pytest.raises(AssertionError, match=r"error .*, allowed"):
        check(function, case, inputs, SLACK[dtype] * BATCH)


def test_weight_gradient_of_many_sequences_is_rounded_once():
    """Liger adds up the gradients of chunks in the weight's dtype: in bf16, the more chunks the less is left."""
    case, inputs = Case("cpo"), make("cpo", torch.bfloat16)
    repeated = {k: fixed(v.tensor.repeat(32, 1)) if isinstance(v, fixed) else v for k, v in inputs.items()}
    repeated["_input"] = torch.randn(32 * BATCH, LENGTH, WIDTH).bfloat16()
    truth = run(formula(case, repeated), repeated.values(), torch.float64)["gradient 1"]
    own, other = (average(run(f(case, repeated), repeated.values())["gradient 1"], truth) for f in (ours, liger))
    assert own < other / 2
    check(ours(case, repeated), case, repeated, SLACK[torch.bfloat16])


def plain(inputs):
    return {k: v.tensor if isinstance(v, fixed) else v for k, v in inputs.items()}


def test_a_sequence_without_tokens_has_no_part():
    """Its mean log-probability is 0, and so is its gradient; Liger divides 0 by 0."""
    inputs = plain(make("cpo", torch.float32))
    inputs["_input"].requires_grad_()
    inputs["target"][3] = -100
    loss, metrics = functional.liger_fused_linear_cpo(**inputs, average_log_prob=True)
    loss.backward()
    assert loss.isfinite()
    assert metrics[1][1] == 0
    assert torch.equal(inputs["_input"].grad[3], torch.zeros(LENGTH, WIDTH))
    assert inputs["_input"].grad[:3].abs().sum(-1).ne(0).any(-1).all()
    assert liger(Case("cpo", {"average_log_prob": True}), inputs)(*inputs.values())[0].isnan()
    inputs["target"][:] = -100
    assert functional.liger_fused_linear_cpo(**inputs)[0] == torch.tensor(2.0).log()


@pytest.mark.parametrize("loss_type", GRPO)
def test_what_the_mask_leaves_out_has_no_part(loss_type):
    """Infinite numbers and ids that no class has, which leave none of Liger's clipped losses finite."""
    case = policy(loss_type, extra={"vllm_is_ratio": importance(BATCH, LENGTH)})
    inputs = plain(case.inputs(torch.float32))
    keep = inputs["attention_mask"] != 0
    assert not keep.all()
    want, *_ = ours(case, inputs)(*inputs.values())
    inputs["old_per_token_logps"][~keep] = -torch.inf
    inputs["vllm_is_ratio"][~keep] = torch.inf
    inputs["selected_token_ids"][~keep] = CLASSES + 7
    inputs["_input"][~keep] = 1e6
    inputs["_input"].requires_grad_()
    got, *_ = ours(case, inputs)(*inputs.values())
    got.backward()
    assert torch.equal(got, want)
    assert torch.equal(inputs["_input"].grad[~keep], torch.zeros(int((~keep).sum()), WIDTH))
    inputs["selected_token_ids"][~keep] = 0
    inputs["vllm_is_ratio"][~keep] = 1.0
    assert liger(case, inputs)(*inputs.values())[0].isfinite() == (loss_type not in CLIPPED)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["input", "weight", "bias"])
def test_gradients_are_those_required(name, wanted):
    """One alone is the same as with the others, and the loss multiplied is the gradient multiplied."""
    inputs = plain(make(name, torch.float32))
    given = [
        next(iter(inputs)),
        [*inputs][1],
        next(k for k in inputs if k.endswith("bias") and "ref" not in k and "teacher" not in k),
    ]
    for key in given:
        inputs[key].requires_grad_()
    case = Case(name)
    leaves = [inputs[k] for k in given]
    want = torch.autograd.grad(ours(case, inputs)(*inputs.values())[0], leaves)[wanted]
    for leaf in leaves:
        leaf.requires_grad_(leaf is leaves[wanted])
    loss, *_ = ours(case, inputs)(*inputs.values())
    (got,) = torch.autograd.grad(loss * -4, leaves[wanted])
    assert torch.equal(got, want * -4)
    leaves[wanted].requires_grad_(False)
    assert not ours(case, inputs)(*inputs.values())[0].requires_grad


@pytest.mark.parametrize("name", FORMULAS)
def test_reference_and_metrics_have_no_gradient(name):
    inputs = plain(make(name, torch.float32))
    for v in inputs.values():
        if isinstance(v, torch.Tensor) and v.is_floating_point():
            v.requires_grad_()
    options = {"return_soft_hard_loss": True} if name in ("jsd", "cosine") else {}
    out = getattr(functional, f"liger_fused_linear_{name}")(**inputs, **options)
    loss, more = out[0], out[1:] if options else out[1]
    loss.backward()
    assert not any(m.requires_grad for m in more)
    for key, v in inputs.items():
        fixed_for_good = key.startswith(("ref_", "teacher_", "old_", "advantages"))
        assert v.dtype is torch.int64 or v.dtype is torch.bool or (v.grad is None) == fixed_for_good, key


def test_parts_of_a_distillation_have_no_gradient():
    """Liger's have one, which is zero."""
    case = Case("jsd", {"return_soft_hard_loss": True})
    inputs = plain(make("jsd", torch.float32))
    inputs["student_input"].requires_grad_()
    assert [x.requires_grad for x in functional.liger_fused_linear_jsd(**inputs, **case.options)] == [True, False, False]
    _, soft, _ = by_keywords("jsd")(**inputs, **case.options)
    (gradient,) = torch.autograd.grad(soft, inputs["student_input"])
    assert not gradient.any()


@pytest.mark.parametrize("chunk_size", [1, 5, 24, 1024])
def test_chunks_of_a_distillation_join(chunk_size):
    case = Case("jsd", {"chunk_size": chunk_size})
    inputs = case.inputs(torch.float32)
    check(ours(case, inputs), case, inputs, 2.0)


def test_more_dimensions_of_a_distillation():
    inputs = plain(make("jsd", torch.float32))
    want = functional.liger_fused_linear_jsd(**inputs)
    for name in "student_input", "teacher_input", "true_labels":
        inputs[name] = inputs[name].unflatten(0, (BATCH, LENGTH))
    assert torch.equal(functional.liger_fused_linear_jsd(**inputs), want)


def test_autocast():
    """The head works in the dtype that F.linear would work in; the loss is fp32."""
    for name in FORMULAS:
        inputs = plain(make(name, torch.float32))
        function = getattr(functional, f"liger_fused_linear_{name}")
        cast = {k: v.bfloat16() if torch.is_tensor(v) and v.dim() > 1 and v.is_floating_point() and "logps" not in k else v
                for k, v in inputs.items()}  # fmt: skip
        cast = {k: v.bfloat16() if k.endswith("bias") else v for k, v in cast.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = flat(function(**inputs))[0]
        assert got.dtype is torch.float32
        torch.testing.assert_close(got, flat(function(**cast))[0], rtol=1e-2, atol=0)  # metrics of logits apart, exactly


# --- Names


@pytest.mark.parametrize("name", MODULES)
def test_signatures_are_ligers(name):
    function, module = theirs(name)
    found = importlib.import_module(f"liger_aot.chunked_loss.{MODULES[name][0]}")
    assert parameters(getattr(found, function.__name__).apply) == parameters(function.forward)
    assert parameters(getattr(functional, f"liger_fused_linear_{name}")) == parameters(function.forward)
    own = getattr(chunked_loss, module.__name__)
    assert parameters(own) == parameters(module)
    assert parameters(own.forward) == parameters(module.forward)
    assert {k: v for k, v in vars(module()).items() if not k.startswith("_")}.items() <= vars(own()).items()


def test_all_of_ligers_names_are_there():
    theirs("dpo")
    import liger_kernel.chunked_loss.functional as them

    assert {n for n in vars(them) if n.startswith("liger_fused")} == {*functional.__all__}
    assert {n for n in vars(importlib.import_module("liger_kernel.chunked_loss")) if n.startswith("LigerFused")} == {
        *chunked_loss.__all__
    }


@pytest.mark.parametrize("name", MODULES)
def test_module_is_the_function(name):
    """By Liger's positions, in which some take the weight first; options by their names, which can be set later."""
    inputs = plain(make(name, torch.float32))
    own = getattr(chunked_loss, f"LigerFusedLinear{MODULES[name][1]}Loss")
    options = {"use_ref_model": True} if "ref_input" in inputs else {}
    module = own(**options, beta=0.3)
    positions = [inputs.get({"lin_weight": "weight"}.get(p, p)) for p, _, _ in parameters(module.forward)]
    want = flat(getattr(functional, f"liger_fused_linear_{name}")(**inputs, **{**module.options, "beta": 0.3}))
    for got, expected in zip(flat(module(*positions)), want, strict=True):
        assert torch.equal(got, expected)
    module.beta = 0.9
    assert not torch.equal(flat(module(*positions))[0], want[0])


# --- What is refused


def call(name, options=(), **changes):
    """A call with some inputs changed: a value, or a function of the one that was there."""

    def run(function=None):
        inputs = plain(make(name, torch.float32))
        for key, change in changes.items():
            inputs[key] = change(inputs[key]) if callable(change) else change
        return (function or getattr(functional, f"liger_fused_linear_{name}"))(**inputs, **dict(options))

    run.name, run.options, run.changes = name, dict(options), changes
    return run


DPO_TYPES = "sigmoid, hinge, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down, discopop"
# (the call, the text, what Liger makes of it: an error of any kind, or a number that another meaning gives)
REFUSED = [
    (call("dpo", {"loss_type": "ipo"}), f"dpo: loss_type must be one of {DPO_TYPES}, got 'ipo'", False),
    (
        call("dpo", {"label_smoothing": 0.1}),
        "dpo: label_smoothing must be 0 with loss_type 'sigmoid', got 0.1; exo_pair and robust use it",
        True,
    ),
    (
        call("dpo", {"loss_type": "exo_pair"}),
        "dpo: label_smoothing must be in (0, 1) with loss_type 'exo_pair', got 0.0; exo_pair and robust use it",
        False,
    ),
    (
        call("dpo", {"loss_type": "robust", "label_smoothing": 0.5}),
        "dpo: label_smoothing must be in [0, 0.5) with loss_type 'robust', got 0.5; exo_pair and robust use it",
        False,
    ),
    (call("dpo", {"beta": 0.0}), "dpo: beta must be positive, got 0.0", True),
    (call("dpo", {"discopop_tau": 0.0}), "dpo: discopop_tau must be positive, got 0.0", True),
    (
        call("dpo", ref_input=None, ref_bias=None),
        "dpo: ref_input and ref_weight must be given where use_ref_model is True, got ref_weight; give both, or "
        "use_ref_model=False",
        False,
    ),
    (
        call("dpo", {"use_ref_model": False}),
        "dpo: ref_input, ref_weight, ref_bias must be None where use_ref_model is False; set use_ref_model=True",
        True,
    ),
    (
        call("dpo", _input=lambda x: x.flatten(0, 1)),
        "dpo: _input must be (batch, length, H), got (24, 16); unflatten it, one row a sequence",
        False,
    ),
    (
        call("dpo", _input=lambda x: x[:3], target=lambda t: t[:3], ref_input=lambda x: x[:3]),
        "dpo: _input must hold pairs, chosen then rejected, got an odd batch of 3",
        False,
    ),
    (call("dpo", target=lambda t: t[:, 1:]), "dpo: target must have shape (4, 6), got (4, 5)", False),
    (call("dpo", target=lambda t: t.int()), "dpo: target must be class indices in int64, got torch.int32", True),
    (call("dpo", target=lambda t: t + 50), "target must be in [0, 50) or ignore_index -100, got ", False),
    (
        call("dpo", weight=lambda w: w[:, 1:]),
        "dpo: _input (..., H) and weight (V, H) must agree, got (4, 6, 16), (50, 15)",
        False,
    ),
    (
        call("dpo", ref_weight=lambda w: w[:, 1:]),
        "dpo: ref_input (..., H) and ref_weight (V, H) must agree, got (4, 6, 32), (50, 31)",
        False,
    ),
    (
        call("dpo", ref_input=lambda x: x[:, 1:]),
        "dpo: ref_input must be (4, 6) sequences and tokens like _input, got (4, 5)",
        False,
    ),
    (
        call("dpo", weight=lambda w: w.bfloat16()),
        "dpo: weight must be torch.float32 like _input, got torch.bfloat16; cast one or use autocast",
        False,
    ),
    (call("dpo", bias=lambda b: b[1:]), "dpo: bias must have shape (50,), got (49,)", False),
    (call("dpo", weight=lambda w: w.to("meta")), "dpo: weight must be on cpu like _input, got meta", False),
    (call("cpo", {"label_smoothing": 1.5}), "cpo: label_smoothing must be between 0 and 1, got 1.5", True),
    (call("simpo", {"label_smoothing": -0.5}), "simpo: label_smoothing must be between 0 and 1, got -0.5", True),
    (call("orpo", nll_target=tokens()[:2]), "orpo: nll_target must have shape (4, 6), got (2, 6)", False),
    (
        call("kto", preference_labels=None),
        "kto: preference_labels must be torch.bool (4,), true where desirable, got None",
        False,
    ),
    (
        call("kto", preference_labels=lambda m: m.long()),
        "kto: preference_labels must be torch.bool (4,), true where desirable, got torch.int64 (4,)",
        False,
    ),
    (
        call("kto", preference_labels=lambda m: m[1:]),
        "kto: preference_labels must be torch.bool (4,), true where desirable, got torch.bool (3,)",
        False,
    ),
    (
        call("kto", {"use_ref_model": False}, ref_bias=None),
        "kto: ref_input, ref_weight must be None where use_ref_model is False; set use_ref_model=True",
        True,
    ),
    (call("grpo", {"loss_type": "ppo"}), f"grpo: loss_type must be one of {', '.join(GRPO)}, got 'ppo'", False),
    (
        call("grpo", {"importance_sampling_level": "word"}),
        "grpo: importance_sampling_level must be one of token, sequence, got 'word'",
        False,
    ),
    *(
        (
            call("grpo", {"importance_sampling_level": "sequence", "loss_type": t}),
            f"grpo: importance_sampling_level must be 'token' with loss_type '{t}', got 'sequence'",
            False,
        )
        for t in ("cispo", "sapo", "vespo")
    ),
    (call("grpo", {"loss_type": "dr_grpo"}), "max_completion_length must be given with loss_type 'dr_grpo', got None", False),
    (
        call("grpo", {"loss_type": "sapo", "delta": 2.0}),
        f"grpo: delta must be None with loss_type 'sapo', got 2.0; {', '.join(CLIPPED)} use it",
        True,
    ),
    (call("grpo", {"delta": -1.0}), "grpo: delta must be positive, got -1.0", True),
    (call("grpo", {"temperature": 0.0}), "grpo: temperature must be positive, got 0.0", False),
    (call("grpo", {"sapo_temperature_neg": 0.0}), "grpo: sapo_temperature_neg must be positive, got 0.0", True),
    (
        call("grpo", selected_token_ids=lambda t: t[:, 1:]),
        "grpo, selected_token_ids: target must have shape (4, 6), got (4, 5)",
        False,
    ),
    (call("grpo", attention_mask=lambda m: m[:, 1:]), "grpo: attention_mask must have shape (4, 6), got (4, 5)", False),
    (call("grpo", advantages=lambda a: a[:, None]), "grpo: advantages must have shape (4,), got (4, 1)", True),
    (
        call("grpo", vllm_is_ratio=torch.ones(3)),
        "grpo: vllm_is_ratio must have shape (4,) or (4, 1) or (4, 6), got (3,)",
        False,
    ),
    (
        call("grpo", ref_per_token_logps=torch.zeros(BATCH, LENGTH)),
        "grpo: ref_input must be None where ref_per_token_logps is given; give one of the two",
        True,
    ),
    (
        call("grpo", {"use_ref_model": False}, **dict.fromkeys(REFERENCE), ref_per_token_logps=torch.zeros(BATCH, LENGTH)),
        "grpo: ref_per_token_logps must be None where use_ref_model is False; set use_ref_model=True",
        True,
    ),
    (
        call("grpo", **dict.fromkeys(REFERENCE)),
        "grpo: ref_input and ref_weight must be given where use_ref_model is True, got neither; give both, or "
        "use_ref_model=False",
        False,
    ),
    (call("jsd", {"beta": 1.5}), "jsd: beta must be between 0 and 1, got 1.5", False),
    (call("jsd", {"temperature": 0.0}), "jsd: temperature must be positive, got 0.0", True),
    (call("cosine", {"chunk_size": 0}), "cosine: chunk_size must be positive, got 0", False),
    (
        call("jsd", student_weight=lambda w: w[:40], student_bias=lambda b: b[:40], true_labels=lambda t: t % 40),
        "jsd: student_weight and teacher_weight must have one vocabulary, got 40 and 50; where the larger is padded, leave "
        "its last rows out",
        True,
    ),
    (
        call("jsd", teacher_input=lambda x: x[1:]),
        "jsd: student_input and teacher_input must have the same tokens, got (24, 16) and (23, 32)",
        False,
    ),
    (
        call("jsd", teacher_bias=lambda b: b[1:]),
        "jsd: teacher_bias must have shape (50,), got (49,)",
        False,
    ),
    (call("jsd", true_labels=lambda t: t[1:]), "jsd, true_labels: target must have shape (24,), got (23,)", False),
]


@pytest.mark.parametrize(("wrong", "text", "accepted"), REFUSED, ids=[r[1][:60] for r in REFUSED])
def test_refuses(wrong, text, accepted):
    """With what was got and what is accepted. `accepted` by Liger are options that it drops, and inputs that it misreads."""
    with pytest.raises(ValueError, match=re.escape(text)):
        wrong()
    if accepted:
        wrong(by_keywords(wrong.name))


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("DPO", {"loss_type": "ipo"}, "LigerFusedLinearDPOLoss: loss_type must be one of sigmoid, "),
        ("CPO", {"label_smoothing": 2}, "LigerFusedLinearCPOLoss: label_smoothing must be between 0 and 1, got 2"),
        ("SimPO", {"label_smoothing": 2}, "LigerFusedLinearSimPOLoss: label_smoothing must be between 0 and 1, got 2"),
        ("GRPO", {"delta": 0}, "LigerFusedLinearGRPOLoss: delta must be positive, got 0"),
        ("JSD", {"temperature": 0}, "LigerFusedLinearJSDLoss: temperature must be positive, got 0"),
        ("CosineSimilarity", {"beta": 2}, "LigerFusedLinearCosineSimilarityLoss: beta must be between 0 and 1, got 2"),
    ],
)
def test_modules_refuse_when_they_are_made(name, options, text):
    with pytest.raises(ValueError, match=text):
        getattr(chunked_loss, f"LigerFusedLinear{name}Loss")(**options)


# --- Compiling, and memory


@pytest.mark.parametrize(("name", "dynamic"), [("dpo", False), ("grpo", False), ("grpo", True), ("jsd", False)])
def test_compiles_whole(name, dynamic):
    inputs = plain(make(name, torch.float32))
    leaves = [[*inputs.values()][n].requires_grad_() for n in (0, 1)]
    function = ours(Case(name), inputs)
    want = function(*inputs.values())
    torch._dynamo.reset()
    got = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*inputs.values())
    for out in got, want:
        for leaf, gradient in zip(leaves, torch.autograd.grad(out[0], leaves), strict=True):
            leaf.seen = [*getattr(leaf, "seen", []), gradient]
    for a, b in [*zip(got, want, strict=True), *(leaf.seen for leaf in leaves)]:
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def memory():
    path = Path(__file__).parent.parent / "benchmarks" / "chunked_loss.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_chunked_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return functools.partial(module.memory, width=16, device="cpu")


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "JSD"])
def test_peak_memory_grows_with_the_chunk_and_not_with_the_tokens(name, memory, monkeypatch):
    """A token more is its hidden state, the gradient of that and some numbers; a row of a chunk more is some rows of logits."""
    classes, more = 4096, 512
    peaks = [memory(name, tokens, classes) for tokens in (512, 512 + more)]
    assert peaks[1] - peaks[0] < more * (3 * 16 * 4 + 128)
    whole = [memory(name, tokens, classes, whole=True) for tokens in (512, 512 + more)]
    assert whole[1] - whole[0] > more * classes * 4
    monkeypatch.setattr(_linear, "TILE", 64)  # rows of a chunk on a CPU, 128 before
    smaller = memory(name, 512, classes, **({"chunk_size": 192} if name == "JSD" else {}))
    assert 64 * classes * 4 < peaks[0] - smaller < 64 * classes * 4 * 10


def in_a_process(rank, file, inputs):
    """The loss of this process' half, gathered."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    half = {k: v if k in ("weight", "bias") or v is None else v[2 * rank : 2 * rank + 2] for k, v in inputs.items()}
    losses = [functional.liger_fused_linear_grpo(**half, **options, use_ref_model=False)[0] for options in NORMALISED]
    gathered = [torch.empty(len(losses)) for _ in range(2)]
    torch.distributed.all_gather(gathered, torch.stack(losses))
    if rank == 0:
        torch.save(torch.stack(gathered), f"{file}.losses")
    torch.distributed.destroy_process_group()


NORMALISED = {"loss_type": "dapo"}, {"loss_type": "cispo", "num_items_in_batch": 31}


def test_a_mean_over_tokens_is_one_over_those_of_all_processes(tmp_path):
    """The mean over processes, whose sequences have different lengths, is the loss of all sequences."""
    made = plain(make("grpo", torch.float32))
    inputs = {k: v for k, v in made.items() if k not in REFERENCE}
    torch.multiprocessing.spawn(in_a_process, (str(tmp_path / "group"), inputs), nprocs=2)
    losses = torch.load(tmp_path / "group.losses")
    for each, options in zip(losses.unbind(1), NORMALISED, strict=True):
        want, _ = functional.liger_fused_linear_grpo(**inputs, **options, use_ref_model=False)
        torch.testing.assert_close(each.mean(), want)
        assert each[0] != each[1]


def test_no_double_backward_and_no_transform():
    inputs = plain(make("jsd", torch.float32))
    inputs["student_input"].requires_grad_()
    loss = functional.liger_fused_linear_jsd(**inputs)
    with pytest.raises(RuntimeError, match="distillation: double backward is not supported"):
        torch.autograd.grad(loss, inputs["student_input"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"liger_fused_linear_jsd: torch\.func transforms are not supported"):
        torch.func.grad(lambda x: functional.liger_fused_linear_jsd(**{**inputs, "student_input": x}))(inputs["student_input"])
