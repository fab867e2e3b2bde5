"""Liger-Kernel's functions by their names and positional arguments: liger_kernel.transformers.functional.

Nothing here is computed in place: in_place is accepted, and has no effect. Results have the dtypes that Liger's have: X's, but
fp32 for the losses of linear heads, liger_kl_div and liger_tvd. Targets and teachers get no gradient, as in Liger.
"""

import torch

from .. import functional as F  # noqa: N812 (as torch names it)
from ..functional import CrossEntropyOutput
from ._names import one_of
from ._names import positive
from .fused_linear_scaled_cross_entropy import scaled_cross_entropy_tp

__all__ = [
    "CrossEntropyOutput",
    "liger_attn_res",
    "liger_cross_entropy",
    "liger_dyt",
    "liger_fused_add_rms_norm",
    "liger_fused_linear_cross_entropy",
    "liger_fused_linear_jsd",
    "liger_fused_linear_kl_div",
    "liger_fused_linear_scaled_cross_entropy_tp",
    "liger_fused_neighborhood_attention",
    "liger_geglu",
    "liger_group_norm",
    "liger_jsd",
    "liger_kl_div",
    "liger_layer_norm",
    "liger_mhc_apply",
    "liger_mhc_coeffs",
    "liger_mhc_forward",
    "liger_mhc_post_res",
    "liger_mhc_pre",
    "liger_modulated_rms_norm",
    "liger_multi_token_attention",
    "liger_poly_norm",
    "liger_qwen2vl_mrope",
    "liger_relu_squared",
    "liger_rms_norm",
    "liger_rope",
    "liger_softmax",
    "liger_sparsemax",
    "liger_swiglu",
    "liger_tvd",
]
# Sums are accumulated in fp32, whichever of these is asked for.
ACCUMULATE = None, torch.float32, torch.bfloat16, torch.float16


def liger_rms_norm(X, W, eps, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True):
    one_of("liger_rms_norm", "in_place", in_place, (True, False))
    return F.rms_norm(X, X.shape[-1:], W, eps, offset=offset, casting=casting_mode).to(X.dtype)


def liger_fused_add_rms_norm(X, R, W, eps, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True):
    """(y, s): the RMSNorm of s = X + R, and s."""
    one_of("liger_fused_add_rms_norm", "in_place", in_place, (True, False))
    y, s = F.fused_add_rms_norm(X, R, W, eps, offset=offset, casting=casting_mode)
    return y.to(X.dtype), s


def liger_modulated_rms_norm(
    X,
    W,
    scale,
    shift=None,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
):
    """scale and shift have X's shape, or the first dimensions of it and its last, or, as in Liger, all its rows as one."""
    one_of("liger_modulated_rms_norm", "in_place", in_place, (True, False))
    x = X.flatten(0, -2) if scale.dim() == 2 and X.dim() > 2 and scale.shape[0] == X.shape[:-1].numel() else X
    return F.modulated_rms_norm(x, scale, shift, W, eps, offset=offset, casting=casting_mode).view(X.shape)


def liger_layer_norm(X, W, B, eps):
    return F.layer_norm(X, X.shape[-1:], W, B, eps)


def liger_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    """rope; with rotary_dim twice the width of cos and sin, these stand for both halves, as in GPT-OSS."""
    return F.rope(q, k, cos, sin, position_ids, unsqueeze_dim, rotary_dim=rotary_dim)


def liger_qwen2vl_mrope(q, k, cos, sin, mrope_section, unsqueeze_dim=1):
    """rope of positions in time, height and width: cos and sin (3, batch, length, d)."""
    return F.rope(q, k, cos, sin, None, unsqueeze_dim, sections=list(mrope_section))


def liger_swiglu(a, b):
    return F.swiglu(a, b)


def liger_geglu(a, b):
    return F.geglu(a, b)


def liger_relu_squared(x):
    return F.relu_squared(x)


def liger_dyt(x, alpha, gamma, beta):
    return F.dyt(x, alpha, gamma, beta)


def liger_attn_res(V, w_query, w_norm, eps: float = 1e-6):
    """V is (depth, ..., hidden), or a list of depth tensors, which are stacked."""
    return F.attn_res(torch.stack(V) if isinstance(V, (list, tuple)) else V, w_query, w_norm, eps)


def liger_mhc_coeffs(
    x,
    phi,
    b,
    alpha_pre,
    alpha_post,
    alpha_res,
    *,
    allow_fp32: bool = False,
    tmax: int = 20,
    rms_eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 1e-6,
    post_mult: float = 2.0,
):
    """(h_pre, h_post, h_res) of the streams x (..., hc, n); of fp32 with allow_fp32 alone, as in Liger."""
    if x.dtype is torch.float32 and not allow_fp32:
        raise ValueError("liger_mhc_coeffs: x must be float16 or bfloat16, got torch.float32; pass allow_fp32=True")
    options = {"tmax": tmax, "rms_eps": rms_eps, "pre_eps": pre_eps, "sinkhorn_eps": sinkhorn_eps, "post_mult": post_mult}
    return F.mhc_coeffs(x, phi, b, alpha_pre, alpha_post, alpha_res, **options)


def liger_mhc_pre(x, h_pre):
    return F.mhc_pre(x, h_pre)


def liger_mhc_post_res(x, f_out, h_post, h_res):
    return F.mhc_post_res(x, f_out, h_post, h_res)


def liger_mhc_apply(x, f_out, h_pre, h_post, h_res, *, return_x_in: bool = False):
    """The streams after a layer whose output is f_out; with return_x_in (they, the layer's input)."""
    x_out = liger_mhc_post_res(x, f_out, h_post, h_res)
    return (x_out, liger_mhc_pre(x, h_pre)) if return_x_in else x_out


def liger_mhc_forward(
    x,
    layer,
    phi,
    b,
    alpha_pre,
    alpha_post,
    alpha_res,
    *,
    allow_fp32=False,
    tmax=20,
    rms_eps=1e-6,
    pre_eps=0.0,
    sinkhorn_eps=1e-6,
    post_mult=2.0,
    return_coeffs=False,
):
    """The streams x (..., hc, n) after the layer, whose input has its first parameter's dtype, if it has any."""
    options = {"tmax": tmax, "rms_eps": rms_eps, "pre_eps": pre_eps, "sinkhorn_eps": sinkhorn_eps, "post_mult": post_mult}
    coefficients = liger_mhc_coeffs(x, phi, b, alpha_pre, alpha_post, alpha_res, allow_fp32=allow_fp32, **options)
    h_pre, h_post, h_res = coefficients
    x_in = liger_mhc_pre(x, h_pre)
    parameters = layer.parameters() if isinstance(layer, torch.nn.Module) else ()
    f_out = layer(x_in.to(next((p.dtype for p in parameters), x_in.dtype)))
    x_out = liger_mhc_post_res(x, f_out, h_post, h_res)
    return (x_out, coefficients) if return_coeffs else x_out


def liger_poly_norm(X, W, B, eps=1e-6, in_place=True):
    one_of("liger_poly_norm", "in_place", in_place, (True, False))
    return F.poly_norm(X, W, B, eps)


def liger_softmax(x):
    return F.softmax(x, -1)


def liger_sparsemax(input, dim: int = -1):
    return F.sparsemax(input, dim)


def liger_multi_token_attention(
    scores,
    weight,
    bias=None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    sparse: bool = False,
):
    return F.multi_token_attention(scores, weight, bias, stride, padding, dilation, groups, sparse=sparse)


def liger_fused_neighborhood_attention(
    query,
    key,
    value,
    kernel_size: int = 7,
    dilation: int = 1,
    scale: float | None = None,
):
    return F.neighborhood_attention(query, key, value, kernel_size, dilation, scale)


def liger_group_norm(X, affine_scaling_weight, affine_shifting_bias, num_channels, num_groups, eps):
    if X.dim() < 2 or X.shape[1] != num_channels:
        raise ValueError(f"liger_group_norm: X must have shape (N, {num_channels}, ...), got {tuple(X.shape)}")
    return F.group_norm(X, num_groups, affine_scaling_weight, affine_shifting_bias, eps)


def liger_cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index: int = -100,
    reduce=None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
):
    return F.cross_entropy(
        input,
        target,
        weight,
        size_average,
        ignore_index,
        reduce,
        reduction,
        label_smoothing,
        softcap=softcap,
        lse_square_scale=lse_square_scale,
        return_z_loss=return_z_loss,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
    )


def liger_fused_linear_cross_entropy(
    input,
    weight,
    target,
    bias=None,
    ce_weight=None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype=None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
):
    """The chunks have the operator's own size, sums and the loss are fp32: chunk_mem_const and accum_dtype have no effect.

    use_token_scaling multiplies each token's loss by the probability of its target, a constant, at the price of a second pass.
    """
    name = "liger_fused_linear_cross_entropy"
    one_of(name, "accum_dtype", accum_dtype, ACCUMULATE)
    positive(name, "chunk_mem_const", chunk_mem_const)
    logits = {"linear_bias": bias, "ignore_index": ignore_index, "softcap": softcap, "loss_dtype": torch.float32}
    options = {
        "weight": ce_weight,
        "lse_square_scale": lse_square_scale,
        "label_smoothing": label_smoothing,
        "return_z_loss": return_z_loss,
        "return_token_accuracy": return_token_accuracy,
        "return_predicted_tokens": return_predicted_tokens,
    }
    if not use_token_scaling:
        return F.linear_cross_entropy(input, weight, target, reduction=reduction, **logits, **options)

    one_of(name, "reduction", reduction, ("none", "mean", "sum"))
    if ce_weight is not None and lse_square_scale and reduction == "mean":
        raise NotImplementedError(
            f"{name}: use_token_scaling must have reduction sum or none with both ce_weight and lse_square_scale, got mean"
        )
    with torch.no_grad():
        probability = torch.exp(-F.linear_cross_entropy(input, weight, target, reduction="none", **logits))
    out = F.linear_cross_entropy(input, weight, target, reduction="none", **logits, **options)
    keep = target != ignore_index
    count = keep.sum()

    def reduce(x, divisor):
        x = x * probability
        return x if reduction == "none" else x.sum() if reduction == "sum" else x.sum() / divisor

    total = count if ce_weight is None else ce_weight[target.where(keep, 0)].where(keep, 0).sum()
    if not isinstance(out, CrossEntropyOutput):
        return reduce(out, total)
    accuracy = out.token_accuracy
    return CrossEntropyOutput(
        reduce(out.loss, total),
        None if out.z_loss is None else reduce(out.z_loss, count),
        accuracy if accuracy is None or reduction == "none" else accuracy.sum() / count,
        out.predicted_tokens,
    )


def liger_kl_div(
    input,
    target,
    size_average: bool = True,
    reduce: bool = True,
    reduction: str = "mean",
    log_target: bool = False,
    eps: float = 1e-10,
):
    """size_average and reduce, which torch has given up, have no effect, as in Liger. The loss is fp32."""
    one_of("liger_kl_div", "size_average", size_average, (True, False, None))
    one_of("liger_kl_div", "reduce", reduce, (True, False, None))
    return F.kl_div(input, target.detach(), reduction=reduction, log_target=log_target, eps=eps, loss_dtype=torch.float32)


def liger_jsd(
    input,
    target,
    shift_labels=None,
    beta: float = 0.5,
    ignore_index: int = -100,
):
    return F.jsd(input, target.detach(), shift_labels, beta=beta, ignore_index=ignore_index)


def liger_tvd(
    input,
    target,
    shift_labels=None,
    reduction: str = "mean",
    ignore_index: int = -100,
):
    """The loss is fp32."""
    return F.tvd(input, target.detach(), shift_labels, reduction=reduction, ignore_index=ignore_index, loss_dtype=torch.float32)


def liger_fused_linear_jsd(
    student_input,
    student_weight,
    teacher_input,
    teacher_weight,
    shift_labels=None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype=None,
):
    """Sums are fp32: accum_dtype has no effect. So is the loss."""
    one_of("liger_fused_linear_jsd", "accum_dtype", accum_dtype, ACCUMULATE)
    heads = student_input, student_weight, teacher_input.detach(), teacher_weight.detach()
    options = {"beta": jsd_beta, "ignore_index": ignore_index, "temperature": temperature, "loss_dtype": torch.float32}
    return F.linear_jsd(*heads, shift_labels, **options)


def liger_fused_linear_kl_div(
    student_input,
    student_weight,
    target,
    shift_labels=None,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    temperature: float = 1.0,
    eps: float = 1e-10,
    accum_dtype: torch.dtype | None = None,
):
    """Sums are fp32: accum_dtype has no effect. So is the loss."""
    one_of("liger_fused_linear_kl_div", "accum_dtype", accum_dtype, ACCUMULATE)
    one_of("liger_fused_linear_kl_div", "reduction", reduction, ("batchmean", "mean", "sum"))
    options = {"reduction": reduction, "ignore_index": ignore_index, "temperature": temperature, "eps": eps}
    return F.linear_kl_div(student_input, student_weight, target.detach(), shift_labels, loss_dtype=torch.float32, **options)


def liger_fused_linear_scaled_cross_entropy_tp(
    input,
    weight,
    target,
    tp_group,
    temperature: float = 1.0,
    ignore_index: int = -100,
    tiles_per_reduce: int = 1,
    return_entropy: bool = False,
):
    """The loss of each token, or (loss, entropy), fp32; weight is this process' shard of the classes."""
    options = temperature, ignore_index, tiles_per_reduce, return_entropy
    return scaled_cross_entropy_tp(input, weight, target, tp_group, *options)
