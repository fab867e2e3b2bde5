"""The losses of post-training: plain statements of their formulas, inputs and cases, and Liger-Kernel's by keywords."""

import functools
import importlib
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import cosine_similarity
from torch.nn.functional import kl_div
from torch.nn.functional import linear
from torch.nn.functional import logsigmoid

from liger_aot.chunked_loss import functional

from harness import check as harness_check
from harness import fixed

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


def plain(inputs):
    return {k: v.tensor if isinstance(v, fixed) else v for k, v in inputs.items()}


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
