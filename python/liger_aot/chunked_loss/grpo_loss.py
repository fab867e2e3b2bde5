"""Group relative policy optimisation (arXiv:2402.03300), and the policy losses of the same ratio that followed it."""

import math

import torch
from torch import Tensor

from ..functional import linear_logprob
from ..ops._loss import check_classes
from ._base import Loss
from ._base import check_positive
from ._base import check_reference
from ._base import check_sequences
from ._base import reference_logps

CLIPPED = "grpo", "bnpo", "dr_grpo", "dapo", "luspo"  # on both sides, and with an upper limit on the ratio if asked
TOKEN_LEVEL = "cispo", "sapo", "vespo"
LOSSES = *CLIPPED, *TOKEN_LEVEL
LEVELS = "token", "sequence"


def check_options(op, loss_type, level, sapo_pos, sapo_neg, temperature, delta):
    if loss_type not in LOSSES:
        raise ValueError(f"{op}: loss_type must be one of {', '.join(LOSSES)}, got {loss_type!r}")
    if level not in LEVELS:
        raise ValueError(f"{op}: importance_sampling_level must be one of {', '.join(LEVELS)}, got {level!r}")
    if level == "sequence" and loss_type in TOKEN_LEVEL:
        raise ValueError(f"{op}: importance_sampling_level must be 'token' with loss_type {loss_type!r}, got 'sequence'")
    check_positive(op, sapo_temperature_pos=sapo_pos, sapo_temperature_neg=sapo_neg, temperature=temperature)
    if delta is not None:
        check_positive(op, delta=delta)
        if loss_type not in CLIPPED:
            raise ValueError(f"{op}: delta must be None with loss_type {loss_type!r}, got {delta}; {', '.join(CLIPPED)} use it")


def check_values(op, shape, **tensors):
    """What is known of each token or sequence; shapes of one number a sequence are (batch,) or (batch, 1)."""
    batch, length = shape
    accepted = {"advantages": [(batch,)], "vllm_is_ratio": [(batch,), (batch, 1), (batch, length)]}
    for name, tensor in tensors.items():
        shapes = accepted.get(name, [(batch, length)])
        got = None if tensor is None else tuple(tensor.shape)
        if got not in shapes and not (got is None and name not in ("advantages", "attention_mask")):
            raise ValueError(f"{op}: {name} must have shape {' or '.join(map(str, shapes))}, got {got}")


@torch.no_grad()
def gamma_weights(log_ratio, advantages, vllm_is_ratio, k_pos, lambda_pos, k_neg, lambda_neg):
    """VESPO's e^λ · w^k · e^(-λ·w) of the ratio w of each whole sequence, (batch, 1)."""
    lowest, highest = math.log(1e-8), 20.0
    log_w = log_ratio.clamp(-highest, highest).sum(-1, keepdim=True)
    if vllm_is_ratio is not None:
        log_w = log_w + vllm_is_ratio.log().clamp(lowest, highest).sum(-1, keepdim=True)
    log_w = log_w.clamp(lowest, highest)
    k = torch.where(advantages >= 0, k_pos, k_neg)
    rate = torch.where(advantages >= 0, lambda_pos, lambda_neg).clamp(min=1e-4)
    return (rate + k * log_w - rate * log_w.exp()).exp()


def policy_losses(loss_type, logps, ratio, advantages, epsilon_low, epsilon_high, delta, slopes, weights):
    """The losses of tokens, or of sequences (batch, 1), and which of them are clipped."""
    if loss_type == "sapo":
        slope = torch.where(advantages > 0, *slopes)
        return -(slope * (ratio - 1)).sigmoid() * 4 / slope * advantages, torch.zeros_like(ratio, dtype=torch.bool)
    if loss_type == "vespo":
        return -weights * advantages * logps, torch.zeros_like(ratio, dtype=torch.bool)
    if loss_type == "cispo":  # the limit is epsilon_high itself, not 1 + epsilon_high
        losses = -ratio.clamp(max=epsilon_high).detach() * advantages * logps
        return losses, (ratio > epsilon_high) & (advantages > 0)
    low, high = 1 - epsilon_low, 1 + epsilon_high
    limited = ratio if delta is None else ratio.clamp(max=delta)
    losses = -torch.min(limited * advantages, ratio.clamp(low, high) * advantages)
    return losses, ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))


def masked(keep, ids, advantages, vllm_is_ratio):
    """What the mask leaves out counts nowhere, be it infinite: it is set to what has no effect."""
    ids, advantages = torch.where(keep, ids, -100), advantages.detach()[:, None].float()
    if vllm_is_ratio is not None:
        vllm_is_ratio = vllm_is_ratio.detach().reshape(keep.shape[0], -1)
        if vllm_is_ratio.shape == keep.shape:
            vllm_is_ratio = torch.where(keep, vllm_is_ratio, 1.0)
    return ids, advantages, vllm_is_ratio


def log_ratios(logps, old, keep):
    """(batch, length): log(π / π_old), 0 without old and for what is masked."""
    return torch.where(keep, logps - (logps if old is None else old).detach(), 0.0)


def token_losses(
    logps,
    log_ratio,
    keep,
    advantages,
    reference,
    vllm_is_ratio,
    weights,
    loss_type,
    level,
    limits,
    slopes,
    beta,
    use_bias_correction_kl,
):
    """(losses, KL or None where beta is 0, which are clipped) of tokens; or of sequences, (batch, 1), what is of a sequence.

    weights are VESPO's, of each sequence.
    """
    if level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True) / keep.float().sum(-1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()
    losses, clipped = policy_losses(loss_type, logps, ratio, advantages, *limits, slopes, weights)
    if vllm_is_ratio is not None and loss_type != "vespo":
        losses = losses * vllm_is_ratio
    if beta == 0:
        return losses, None, clipped
    less = torch.where(keep, reference.detach() - logps, 0.0)
    kl = less.exp() - less - 1
    if use_bias_correction_kl:
        kl = kl * ratio
    return losses + beta * kl, kl, clipped


def mean_of_tokens(metric, mask):
    return (metric.detach() * mask).sum() / mask.sum().clamp(min=1)


def tokens_of_all(mask, num_items_in_batch):
    """The number of tokens that a sum is divided by, so that the mean over processes is the mean over all their tokens."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if num_items_in_batch is not None:
        total = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
    else:
        total = mask.sum()
        if distributed:
            torch.distributed.all_reduce(total)
    return (total / torch.distributed.get_world_size() if distributed else total).clamp(min=1)


def average(loss_type, losses, mask, max_completion_length, num_items_in_batch):
    """What each loss type divides by: this is where most of them differ."""
    sums = (losses * mask).sum(-1)
    if loss_type in ("grpo", "sapo"):
        return (sums / mask.sum(-1).clamp(min=1)).mean()
    if loss_type == "bnpo":
        return sums.sum() / mask.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return sums.mean() / max_completion_length
    if loss_type == "luspo":
        return sums.mean()
    return sums.sum() / tokens_of_all(mask, num_items_in_batch)


def liger_fused_linear_grpo(
    _input: Tensor,
    weight: Tensor,
    selected_token_ids: Tensor,
    attention_mask: Tensor,
    advantages: Tensor,
    bias: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    beta: float = 0.04,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    temperature: float = 1.0,
    compiled: bool = True,
    use_ref_model: bool = True,
    chunk_size: int = 1,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    num_items_in_batch: Tensor | int | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The policy loss of completions whose tokens attention_mask keeps, plus beta times the KL of the reference (estimator k3).

    _input is (batch, length, H), selected_token_ids, attention_mask and the log-probabilities (batch, length), advantages
    (batch,), vllm_is_ratio (batch,), (batch, 1) or (batch, length). The ratio π / π_old, 1 without old_per_token_logps, is of
    each token, or the geometric mean of a sequence's (GSPO, arXiv:2507.18071). Losses: grpo (2402.03300, mean over sequences of
    means), bnpo (mean over the batch's tokens), dr_grpo (2503.20783, over batch · max_completion_length), dapo (2503.14476,
    over num_items_in_batch, else the tokens of all processes), luspo (2602.05261, mean over sequences of sums), with delta as
    in 2505.07291; cispo (2506.13585), sapo (2511.20347), vespo (2602.10693). The reference is ref_per_token_logps, or a head.
    Metrics: the KL if beta is not 0, the share of clipped tokens.
    """
    op = "liger_fused_linear_grpo"
    check_options(
        op,
        loss_type,
        importance_sampling_level,
        sapo_temperature_pos,
        sapo_temperature_neg,
        temperature,
        delta,
    )
    if loss_type == "dr_grpo" and max_completion_length is None:
        raise ValueError(f"{op}: max_completion_length must be given with loss_type 'dr_grpo', got None")
    check_sequences(op, "_input", _input, weight, bias)
    ids = check_classes(f"{op}, selected_token_ids", selected_token_ids, _input.shape[:2], _input)
    check_values(
        op,
        ids.shape,
        attention_mask=attention_mask,
        advantages=advantages,
        ref_per_token_logps=ref_per_token_logps,
        old_per_token_logps=old_per_token_logps,
        vllm_is_ratio=vllm_is_ratio,
    )
    if ref_per_token_logps is None or not use_ref_model:
        others = {"ref_bias": ref_bias, "ref_per_token_logps": ref_per_token_logps}
        check_reference(op, use_ref_model, ref_input, ref_weight, **others)
    elif ref_input is not None:
        raise ValueError(f"{op}: ref_input must be None where ref_per_token_logps is given; give one of the two")

    keep = attention_mask != 0
    ids, advantages, vllm_is_ratio = masked(keep, ids, advantages, vllm_is_ratio)
    logps, _, _ = linear_logprob(_input, weight, ids, bias=bias, temperature=temperature)
    log_ratio = log_ratios(logps, old_per_token_logps, keep)
    weights, reference = None, None
    if loss_type == "vespo":
        shapes = vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg
        weights = gamma_weights(log_ratio, advantages, vllm_is_ratio, *shapes)
    if beta != 0:
        reference = ref_per_token_logps if use_ref_model else logps
        if reference is None:
            reference = reference_logps(op, ref_input, ref_weight, ref_bias, ids, temperature=temperature)
    limits, slopes = (epsilon_low, epsilon_high, delta), (sapo_temperature_pos, sapo_temperature_neg)
    how = loss_type, importance_sampling_level, limits, slopes, beta, use_bias_correction_kl
    losses, kl, clipped = token_losses(logps, log_ratio, keep, advantages, reference, vllm_is_ratio, weights, *how)
    mask = keep.float()
    loss = average(loss_type, losses, mask, max_completion_length, num_items_in_batch)
    return loss, tuple(mean_of_tokens(m, mask) for m in (kl, clipped) if m is not None)


class LigerFusedLinearGRPOFunction:
    apply = staticmethod(liger_fused_linear_grpo)


class LigerFusedLinearGRPOLoss(Loss):
    """liger_fused_linear_grpo."""

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        check_options(
            "LigerFusedLinearGRPOLoss",
            loss_type,
            importance_sampling_level,
            sapo_temperature_pos,
            sapo_temperature_neg,
            temperature,
            delta,
        )
        super().__init__(
            beta=beta,
            compiled=compiled,
            use_ref_model=use_ref_model,
            chunk_size=chunk_size,
            epsilon_low=epsilon_low,
            epsilon_high=epsilon_high,
            loss_type=loss_type,
            max_completion_length=max_completion_length,
            importance_sampling_level=importance_sampling_level,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            temperature=temperature,
            delta=delta,
            use_bias_correction_kl=use_bias_correction_kl,
            vespo_k_pos=vespo_k_pos,
            vespo_lambda_pos=vespo_lambda_pos,
            vespo_k_neg=vespo_k_neg,
            vespo_lambda_neg=vespo_lambda_neg,
        )

    def forward(
        self,
        _input,
        lin_weight,
        selected_token_ids,
        attention_mask,
        advantages,
        bias=None,
        ref_per_token_logps=None,
        old_per_token_logps=None,
        ref_input=None,
        ref_weight=None,
        ref_bias=None,
        vllm_is_ratio=None,
        num_items_in_batch=None,
    ):
        return liger_fused_linear_grpo(
            _input,
            lin_weight,
            selected_token_ids,
            attention_mask,
            advantages,
            bias,
            ref_per_token_logps,
            old_per_token_logps,
            ref_input,
            ref_weight,
            ref_bias,
            vllm_is_ratio=vllm_is_ratio,
            num_items_in_batch=num_items_in_batch,
            **self.options,
        )
