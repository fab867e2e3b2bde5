"""GRPO and its family from logits that exist, by Liger-Kernel's names; chunked_loss makes them from hidden states."""

import torch

from .._op import Function
from .._op import needs_grad
from ..chunked_loss import grpo_loss as policy
from ..chunked_loss._base import check_positive
from ..ops._check import FLOATS
from ..ops._check import check_indices
from ..ops._check import looks_at
from ..ops._loss import check_classes
from ._names import one_of

IGNORED = -100
# Not the functions of ops, which Dynamo cannot trace before their first call.
cross_entropy_fwd, cross_entropy_bwd = (getattr(torch.ops.liger, f"cross_entropy_{way}").default for way in ("fwd", "bwd"))


class TokenLogprobFunction(Function):
    @staticmethod
    def forward(ctx, logits, ids, scale):
        loss, lse, _ = cross_entropy_fwd(logits, ids, None, IGNORED, 0.0, None, 0.0, scale, False)
        ctx.save_for_backward(logits, ids, lse)
        ctx.scale = scale
        return -loss

    @staticmethod
    def backward(ctx, dlogps):
        Function.once("GrpoLossFunction")
        logits, ids, lse = ctx.saved_tensors
        return cross_entropy_bwd(-dlogps, logits, ids, None, lse, None, IGNORED, 0.0, None, 0.0, ctx.scale), None, None


def token_logps(op, name, logits, ids, temperature):
    """(batch, length): log softmax(logits / temperature) of ids, 0 where these are -100; the last token of logits has none."""
    if not torch.compiler.is_compiling() and looks_at(ids):
        check_indices(op, name, ids, logits.shape[-1], ignored=IGNORED)
    # That token is a row to ignore: without it the rows are not evenly spaced, and the kernel would get a copy of them.
    rows = torch.nn.functional.pad(ids, (0, 1), value=IGNORED).flatten()
    flat, scale = logits.flatten(0, 1), 1.0 / temperature
    if needs_grad(op, logits):
        logps = TokenLogprobFunction.apply(flat, rows, scale)
    else:
        logps = -cross_entropy_fwd(flat, rows, None, IGNORED, 0.0, None, 0.0, scale, False)[0]
    return logps.view(logits.shape[:2])[:, :-1]


def check_logits(op, logits):
    if logits.dtype not in FLOATS or logits.dim() != 3 or not logits.shape[1]:
        raise ValueError(
            f"{op}: logits must be (batch, length + 1, classes) in float32, float16 or bfloat16, got {tuple(logits.shape)} in "
            f"{logits.dtype}"
        )


class GrpoLossFunction:
    @staticmethod
    def apply(
        logits,
        old_logp,
        ref_logp,
        completion_ids,
        advantages,
        completion_mask,
        temperature,
        beta,
        eps_low,
        eps_high,
        inplace,
        loss_type="grpo",
        max_completion_length=None,
        reduce=True,
        importance_sampling_level="token",
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vllm_is_ratio=None,
        delta=None,
        use_bias_correction_kl=False,
        num_items_in_batch=None,
        phi_seq=None,
    ):
        """(loss, KL or None where beta is 0, share of clipped tokens); those of each token where not reduce.

        logits is (batch, length + 1, classes), of which the last token counts for nothing; what else is of tokens has shape
        (batch, length), phi_seq, VESPO's weights, (batch,) or (batch, 1). The losses are those of
        chunked_loss.functional.liger_fused_linear_grpo. Only logits get a gradient, of a loss alone.
        """
        op = "GrpoLossFunction"
        slopes = sapo_temperature_pos, sapo_temperature_neg
        policy.check_options(op, loss_type, importance_sampling_level, *slopes, temperature, delta)
        one_of(op, "inplace", inplace, (True, False))
        one_of(op, "reduce", reduce, (True, False))
        check_logits(op, logits)
        batch, length = logits.shape[0], logits.shape[1] - 1
        ids = check_classes(f"{op}, completion_ids", completion_ids, (batch, length), logits)
        tokens = {"old_logp": old_logp, "ref_logp": ref_logp, "completion_mask": completion_mask}
        policy.check_values(op, (batch, length), advantages=advantages, vllm_is_ratio=vllm_is_ratio, **tokens)
        if beta != 0 and ref_logp is None:
            raise ValueError(f"{op}: ref_logp must be given where beta is not 0, got None with beta {beta}")
        if (phi_seq is None) == (loss_type == "vespo") or (phi_seq is not None and phi_seq.numel() != batch):
            got = None if phi_seq is None else tuple(phi_seq.shape)
            raise ValueError(f"{op}: phi_seq must be ({batch},) for loss_type 'vespo', else None, got {got} for {loss_type!r}")
        if max_completion_length is None:
            max_completion_length = length

        keep = torch.ones_like(ids, dtype=torch.bool) if completion_mask is None else completion_mask != 0
        ids, advantages, vllm_is_ratio = policy.masked(keep, ids, advantages, vllm_is_ratio)
        logps = token_logps(op, "completion_ids", logits, ids, temperature)
        weights = None if phi_seq is None else phi_seq.detach().reshape(batch, 1).float()
        how = loss_type, importance_sampling_level, (eps_low, eps_high, delta), slopes, beta, use_bias_correction_kl
        log_ratio = policy.log_ratios(logps, old_logp, keep)
        losses, kl, clipped = policy.token_losses(logps, log_ratio, keep, advantages, ref_logp, vllm_is_ratio, weights, *how)
        mask = keep.float()
        if not reduce:
            return losses * mask, None if kl is None else kl.detach() * mask, clipped * mask
        loss = policy.average(loss_type, losses, mask, max_completion_length, num_items_in_batch)
        return loss, None if kl is None else policy.mean_of_tokens(kl, mask), policy.mean_of_tokens(clipped, mask)


@torch.no_grad()
def fused_selective_log_softmax(logits: torch.Tensor, input_ids: torch.Tensor, temperature: float = 0.9, mask=None):
    """(batch, length): the log-probabilities of the last tokens of input_ids under logits (batch, length + 1, classes)."""
    op = "fused_selective_log_softmax"
    check_positive(op, temperature=temperature)
    check_logits(op, logits)
    shape = logits.shape[0], logits.shape[1] - 1
    if input_ids.dim() != 2 or input_ids.shape[1] < shape[1]:
        raise ValueError(f"{op}: input_ids must be (batch, {shape[1]} or more), got {tuple(input_ids.shape)}")
    ids = input_ids[:, input_ids.shape[1] - shape[1] :]
    ids = check_classes(f"{op}, input_ids", ids, shape, logits)
    if mask is not None:
        mask = mask[:, mask.shape[1] - shape[1] :]
        policy.check_values(op, shape, mask=mask)
        ids = torch.where(mask != 0, ids, IGNORED)
    return token_logps(op, "input_ids", logits, ids, temperature)


def triton_grpo_loss(
    logits,
    old_logp,
    ref_logp,
    completion_ids,
    advantages,
    completion_mask=None,
    temperature=0.9,
    beta=0.04,
    eps_low=0.2,
    eps_high=0.4,
    inplace=True,
    loss_type="dapo",
    max_completion_length=None,
    importance_sampling_level="token",
    reduce=False,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
    vllm_is_ratio=None,
    delta=None,
    use_bias_correction_kl=False,
    num_items_in_batch=None,
    vespo_k_pos=2.0,
    vespo_lambda_pos=3.0,
    vespo_k_neg=3.0,
    vespo_lambda_neg=2.0,
):
    """GrpoLossFunction, with VESPO's weights computed; with reduce (loss, [KL if beta is not 0, share of clipped tokens])."""
    phi_seq = None
    if loss_type == "vespo":
        logps = fused_selective_log_softmax(logits, completion_ids, temperature, completion_mask)
        keep = torch.ones_like(logps, dtype=torch.bool) if completion_mask is None else completion_mask != 0
        _, a, ratio = policy.masked(keep, completion_ids, advantages, vllm_is_ratio)
        shapes = vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg
        phi_seq = policy.gamma_weights(policy.log_ratios(logps, old_logp, keep), a, ratio, *shapes)
    loss, kl, clipped = GrpoLossFunction.apply(
        logits,
        old_logp,
        ref_logp,
        completion_ids,
        advantages,
        completion_mask,
        temperature,
        beta,
        eps_low,
        eps_high,
        inplace,
        loss_type,
        max_completion_length,
        reduce,
        importance_sampling_level,
        sapo_temperature_pos,
        sapo_temperature_neg,
        vllm_is_ratio,
        delta,
        use_bias_correction_kl,
        num_items_in_batch,
        phi_seq,
    )
    if not reduce:
        return loss, kl, clipped
    return loss, [clipped] if kl is None else [kl, clipped]
