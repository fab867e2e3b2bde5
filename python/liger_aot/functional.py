"""The operators as functions, with the arguments of torch.nn.functional where torch has the function.

torch's arguments come first, in torch's order; ours follow, keyword-only. What is computed, which dtypes and what is refused
stands where each operator is, in liger_aot.ops. Every function can be traced whole and exported.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import _reduction

from .ops import attn_res as _attn_res
from .ops import cross_entropy as _cross_entropy
from .ops import cross_entropy_tvd as _cross_entropy_tvd
from .ops import dyt as _dyt
from .ops import embedding as _embedding
from .ops import fused_add_rms_norm as _fused_add_rms_norm
from .ops import gated_rms_norm as _gated_rms_norm
from .ops import geglu as _geglu
from .ops import group_norm as _group_norm
from .ops import jsd as _jsd
from .ops import kl_div as _kl_div
from .ops import layer_norm as _layer_norm
from .ops import linear_cross_entropy as _linear_cross_entropy
from .ops import linear_distillation as _linear_distillation  # noqa: F401 (saved programs name its operator)
from .ops import linear_jsd as _linear_jsd
from .ops import linear_kl_div as _linear_kl_div
from .ops import linear_logprob as _linear_logprob
from .ops import mhc_coeffs as _mhc_coeffs
from .ops import mhc_post_res as _mhc_post_res
from .ops import mhc_pre as _mhc_pre
from .ops import modulated_rms_norm as _modulated_rms_norm
from .ops import moe_permute as _moe_permute
from .ops import moe_unpermute as _moe_unpermute
from .ops import multi_token_attention as _multi_token_attention
from .ops import neighborhood_attention as _neighborhood_attention
from .ops import packed_glu as _packed_glu
from .ops import poly_norm as _poly_norm
from .ops import relu_squared as _relu_squared
from .ops import rms_norm as _rms_norm
from .ops import rope as _rope
from .ops import softmax as _softmax
from .ops import sparsemax as _sparsemax
from .ops import swiglu as _swiglu
from .ops import tvd as _tvd
from .ops import vocab_parallel_cross_entropy as _vocab_parallel_cross_entropy
from .ops._experts import moe_experts as moe_experts
from .ops._experts import moe_route as moe_route

# What torch 2.13 added; before it, nothing is an instance.
OPTIONS = getattr(torch.nn, "LinearCrossEntropyOptions", ())


class CrossEntropyOutput(NamedTuple):
    """A loss, and what was asked for beside it; the rest is None."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def rms_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
    casting: str = "none",
) -> Tensor:
    """torch.nn.functional.rms_norm, times offset + weight; `casting` says where a 16-bit input is rounded (ops.rms_norm).

    >>> liger_aot.rms_norm(torch.tensor([[3.0, 4.0]]), (2,))
    tensor([[0.8485, 1.1314]])
    """
    x, weight = _rows("rms_norm", input, normalized_shape, weight=weight)
    return _rms_norm.rms_norm(x, weight, eps, offset=offset, casting=casting).view(input.shape)


def fused_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
    casting: str = "none",
) -> tuple[Tensor, Tensor]:
    """(the RMSNorm of the sum over its last dimension, the sum) of input + residual.

    >>> y, s = liger_aot.fused_add_rms_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]))
    >>> y, s
    (tensor([[0.8485, 1.1314]]), tensor([[3., 4.]]))
    """
    return _fused_add_rms_norm.fused_add_rms_norm(input, residual, weight, eps, offset=offset, casting=casting)


def gated_rms_norm(
    input: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float | None = None,
    *,
    groups: int = 1,
    gate_first: bool = False,
    activation: str = "silu",
    casting: str = "none",
) -> Tensor:
    """RMSNorm of groups of columns, times weight and silu(gate), as Qwen3-Next has it; with gate_first, as Mamba 2 has it, of
    input · silu(gate), times weight.

    >>> liger_aot.gated_rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]]), torch.ones(2))
    tensor([[0.0000, 0.8271]])
    """
    options = {"groups": groups, "gate_first": gate_first, "activation": activation, "casting": casting}
    return _gated_rms_norm.gated_rms_norm(input, gate, weight, eps, **options)


def attn_res(v: Tensor, query: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """A mixture of the rows v (depth, ..., n) over depth, by a softmax of query · rms_norm(v) · weight, as in Kimi's residuals.

    >>> liger_aot.attn_res(torch.tensor([[1.0, 3.0], [3.0, 3.0]]), torch.zeros(2), torch.ones(2))
    tensor([2., 3.])
    """
    return _attn_res.attn_res(v, query, weight, eps)


def mhc_coeffs(
    x: Tensor,
    phi: Tensor,
    b: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    *,
    tmax: int = 20,
    rms_eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 1e-6,
    post_mult: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What mixes the streams x (..., hc, n) of hyper-connections, for each token: (h_pre, h_post, h_res), fp32.

    >>> phi, b, one = torch.zeros(6, 8), torch.zeros(8), torch.ones(())
    >>> h_pre, h_post, h_res = liger_aot.mhc_coeffs(torch.ones(5, 2, 3), phi, b, one, one, one)
    >>> h_pre[0], h_post[0], h_res[0]
    (tensor([0.5000, 0.5000]), tensor([1., 1.]), tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]]))
    """
    options = {"tmax": tmax, "rms_eps": rms_eps, "pre_eps": pre_eps, "sinkhorn_eps": sinkhorn_eps, "post_mult": post_mult}
    return _mhc_coeffs.mhc_coeffs(x, phi, b, alpha_pre, alpha_post, alpha_res, **options)


def mhc_pre(x: Tensor, h_pre: Tensor) -> Tensor:
    """The layer's input (..., n): the sum of the streams x (..., hc, n), each times its number of h_pre (..., hc).

    >>> liger_aot.mhc_pre(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 10.0]))
    tensor([31., 42.])
    """
    return _mhc_pre.mhc_pre(x, h_pre)


def mhc_post_res(x: Tensor, f_out: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """The streams after a layer: h_res (..., hc, hc) times x (..., hc, n), h_post (..., hc) times its output f_out (..., n).

    >>> x, swap = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> liger_aot.mhc_post_res(x, torch.tensor([10.0, 20.0]), torch.tensor([1.0, 2.0]), swap)
    tensor([[13., 24.],
            [21., 42.]])
    """
    return _mhc_post_res.mhc_post_res(x, f_out, h_post, h_res)


def modulated_rms_norm(
    input: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
    casting: str = "none",
) -> Tensor:
    """(1 + scale) · rms_norm(input) + shift; scale and shift (b, n) are those of each batch of an input (b, t, n).

    >>> liger_aot.modulated_rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor([[1.6971, 2.1314]])
    """
    return _modulated_rms_norm.modulated_rms_norm(input, scale, shift, weight, eps, offset=offset, casting=casting)


def layer_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-05
) -> Tensor:
    """torch.nn.functional.layer_norm.

    >>> liger_aot.layer_norm(torch.tensor([[1.0, 3.0]]), (2,))
    tensor([[-1.0000,  1.0000]])
    """
    x, weight, bias = _rows("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    return _layer_norm.layer_norm(x, weight, bias, eps).view(input.shape)


def _rows(op, input, normalized_shape, **parameters):
    """input and the parameters with the dimensions of normalized_shape, which must be input's last ones, made one."""
    if isinstance(normalized_shape, int):
        raise ValueError(
            f"{op}: normalized_shape must be a tuple or a list of sizes, got {normalized_shape}; pass ({normalized_shape},)"
        )
    shape, count = tuple(normalized_shape), len(normalized_shape)
    if not count or input.shape[-count:] != shape:
        raise ValueError(f"{op}: normalized_shape must be the last dimensions of the input, {tuple(input.shape)}, got {shape}")
    if count == 1:
        return input, *parameters.values()
    for name, p in parameters.items():
        if p is not None and p.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(p.shape)}")
    return input.flatten(-count), *(None if p is None else p.flatten() for p in parameters.values())


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor | None = None,
    position_ids: Tensor | None = None,
    unsqueeze_dim: int = 1,
    *,
    rotary_dim: int | None = None,
    order: str = "half",
    sections: list[int] | None = None,
    parts: int = 1,
    last: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """transformers' apply_rotary_pos_emb: the first cos.shape[-1] numbers of each head of q and k, rotated by halves.

    q and k are (batch, heads, length, d), or (batch, length, heads, d) with unsqueeze_dim 2; cos and sin are
    (batch or 1, length, r) or (length, r). position_ids has no effect, as in transformers since 4.38: cos and sin belong to
    the positions already. k may be None, and is then in the result. The keywords are the forms that other models have:
    ops.rope says what each does.

    >>> q = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)
    >>> liger_aot.rope(q, q, torch.zeros(1, 2), torch.ones(1, 2))[0].flatten()
    tensor([-2.,  1.])
    >>> q = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    >>> liger_aot.rope(q, None, torch.tensor([[1j, 1.0]]), order="interleaved")[0].flatten()
    tensor([-2.,  1.,  3.,  4.])
    """
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"rope: unsqueeze_dim must be 1 or 2, got {unsqueeze_dim}")
    options = {
        "rotary_dim": rotary_dim,
        "order": order,
        "sections": sections,
        "parts": parts,
        "last": last,
        "reverse": reverse,
    }
    pair = q, q.narrow(unsqueeze_dim, 0, 0) if k is None else k  # of no k, no heads
    if unsqueeze_dim == 2:
        pair = [t.transpose(1, 2) for t in pair]
    q_out, k_out = _rope.rope(*pair, cos, sin, **options)
    if unsqueeze_dim == 2:
        q_out, k_out = q_out.transpose(1, 2), k_out.transpose(1, 2)
    return q_out, None if k is None else k_out


def swiglu(gate: Tensor, up: Tensor, *, gate_multiplier: float = 1.0, down_multiplier: float = 1.0) -> Tensor:
    """silu(gate · gate_multiplier) · up · down_multiplier.

    >>> liger_aot.swiglu(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0]))
    tensor([0.0000, 1.4621])
    """
    return _swiglu.swiglu(gate, up, gate_multiplier=gate_multiplier, down_multiplier=down_multiplier)


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """torch.nn.functional.gelu(gate, approximate=approximate) · up.

    >>> liger_aot.geglu(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0]))
    tensor([0.0000, 1.6824])
    """
    return _geglu.geglu(gate, up, approximate=approximate)


def packed_glu(input: Tensor, activation: str = "silu") -> Tensor:
    """f(gate) · up of one tensor that holds gate and up, in this order, in the halves of its last dimension; f is silu, gelu or
    gelu_tanh.

    >>> liger_aot.packed_glu(torch.tensor([0.0, 1.0, 2.0, 2.0]))
    tensor([0.0000, 1.4621])
    """
    return _packed_glu.packed_glu(input, activation)


def moe_permute(input: Tensor, order: Tensor, position: Tensor) -> Tensor:
    """The rows of tokens, one for each of their experts, in the order of the experts, as functional.moe_route says it.

    >>> order, position, offsets = liger_aot.functional.moe_route(torch.tensor([[1, 0], [1, 2]]), 3)
    >>> liger_aot.moe_permute(torch.tensor([[1.0], [2.0]]), order, position).flatten()
    tensor([1., 1., 2., 2.])
    """
    return _moe_permute.moe_permute(input, order, position)


def moe_unpermute(input: Tensor, weight: Tensor, order: Tensor, position: Tensor) -> Tensor:
    """The sums of the experts' rows by token, times weight, of rows in the order of functional.moe_route.

    >>> order, position, offsets = liger_aot.functional.moe_route(torch.tensor([[1, 0], [1, 2]]), 3)
    >>> rows = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    >>> liger_aot.moe_unpermute(rows, torch.tensor([[1.0, 10.0], [100.0, 0.0]]), order, position).flatten()
    tensor([ 12., 300.])
    """
    return _moe_unpermute.moe_unpermute(input, weight, order, position)


def relu_squared(input: Tensor) -> Tensor:
    """torch.nn.functional.relu(input)².

    >>> liger_aot.relu_squared(torch.tensor([-2.0, 3.0]))
    tensor([0., 9.])
    """
    return _relu_squared.relu_squared(input)


def dyt(input: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor | None = None) -> Tensor:
    """tanh(alpha · input) · gamma + beta, Dynamic Tanh: gamma and beta have the width of input's last dimension.

    >>> liger_aot.dyt(torch.tensor([0.0, 9.0]), torch.tensor([1.0]), torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0]))
    tensor([1., 3.])
    """
    return _dyt.dyt(input, alpha, gamma, beta)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-05
) -> Tensor:
    """torch.nn.functional.group_norm.

    >>> liger_aot.group_norm(torch.tensor([[1.0, 3.0, 5.0, 9.0]]), 2)
    tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
    """
    return _group_norm.group_norm(input, num_groups, weight, bias, eps)


def embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """torch.nn.functional.embedding, whose gradient is summed in fp32, in one order.

    >>> liger_aot.embedding(torch.tensor([1, 1]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[3., 4.],
            [3., 4.]])
    """
    return _embedding.embedding(weight, input, padding_idx)


def poly_norm(input: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """weight[0] · n(input³) + weight[1] · n(input²) + weight[2] · n(input) + bias; n divides by the root mean square of a row.

    >>> liger_aot.poly_norm(torch.tensor([[1.0, -1.0]]), torch.tensor([1.0, 1.0, 1.0]), torch.tensor(0.0))
    tensor([[ 3.0000, -1.0000]])
    """
    return _poly_norm.poly_norm(input, weight, bias, eps)


def softmax(input: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """torch.softmax: of input, cast to dtype first where one is given.

    >>> liger_aot.softmax(torch.tensor([0.0, 0.0]), 0)
    tensor([0.5000, 0.5000])
    """
    return _softmax.softmax(input if dtype is None else input.to(dtype), dim)


def sparsemax(input: Tensor, dim: int = -1) -> Tensor:
    """The point nearest to input among those of sum one and no number below zero: a softmax of which most is zero.

    >>> liger_aot.sparsemax(torch.tensor([2.0, 1.5, 0.0]))
    tensor([0.7500, 0.2500, 0.0000])
    """
    return _sparsemax.sparsemax(input, dim)


def multi_token_attention(
    scores: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    sparse: bool = False,
) -> Tensor:
    """The causal softmax, or sparsemax, of scores (batch, C, L, L), convolved as by conv2d, and masked causally.

    >>> liger_aot.multi_token_attention(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 1, 1))
    tensor([[[[1.0000, 0.0000],
              [0.5000, 0.5000]]]])
    """
    pairs = ([n, n] if isinstance(n, int) else list(n) for n in (stride, padding, dilation))
    return _multi_token_attention.multi_token_attention(scores, weight, bias, *pairs, groups, sparse)


def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int = 7, dilation: int = 1, scale: float | None = None
) -> Tensor:
    """scaled_dot_product_attention of each token to those at most kernel_size // 2 steps of dilation away.

    >>> x = torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 3, 1)
    >>> liger_aot.neighborhood_attention(torch.zeros_like(x), x, x, kernel_size=3).flatten()
    tensor([1.5000, 2.3333, 3.0000])
    """
    return _neighborhood_attention.neighborhood_attention(query, key, value, kernel_size, dilation, scale)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    loss_dtype: torch.dtype | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """torch.nn.functional.cross_entropy, of softcap · tanh(input / softcap), plus lse_square_scale · logsumexp².

    With a return_ flag the result is a CrossEntropyOutput. Its z_loss is the part of the loss that lse_square_scale adds,
    token_accuracy the share of targets that have the largest logit, predicted_tokens where that is; none has a gradient.

    >>> liger_aot.cross_entropy(torch.zeros(1, 4), torch.tensor([2]))
    tensor(1.3863)
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    options = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "softcap": softcap,
        "lse_square_scale": lse_square_scale,
        "loss_dtype": loss_dtype,
    }
    if return_z_loss or return_token_accuracy or return_predicted_tokens:
        out = _cross_entropy.cross_entropy_stats(input, target, weight, **options)
        return _asked(out, return_z_loss, return_token_accuracy, return_predicted_tokens)
    return _cross_entropy.cross_entropy(input, target, weight, **options)


def _asked(out, *flags):
    return CrossEntropyOutput(out[0], *(o if flag else None for o, flag in zip(out[1:], flags, strict=True)))


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object | None = None,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    scale: float = 1.0,
    loss_dtype: torch.dtype | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """torch.nn.functional.linear_cross_entropy, which torch has since 2.13: cross_entropy of scale · (input @ linear_weight.T
    + linear_bias), whose logits are in memory a chunk of rows at a time.

    Only targets that are probabilities, and a linear_weight of more than two dimensions, need all logits, as in torch.
    ignore_index None is -100. `options`, torch's LinearCrossEntropyOptions, has no effect: the operator always works in chunks
    of its own size, sums in fp32, and allows retain_graph. The return_ flags are those of cross_entropy.

    >>> liger_aot.linear_cross_entropy(torch.zeros(1, 8), torch.ones(4, 8), torch.tensor([2]))
    tensor(1.3863)
    """
    if options is not None and not isinstance(options, OPTIONS):
        raise ValueError(f"linear_cross_entropy: options must be a torch.nn.LinearCrossEntropyOptions or None, got {options!r}")
    if target.is_floating_point() and ignore_index is not None:
        raise ValueError(f"linear_cross_entropy: ignore_index must be None where targets are probabilities, got {ignore_index}")
    given = {
        "linear_bias": linear_bias,
        "weight": weight,
        "reduction": reduction,
        "ignore_index": -100 if ignore_index is None else ignore_index,
        "label_smoothing": label_smoothing,
        "softcap": softcap,
        "lse_square_scale": lse_square_scale,
        "scale": scale,
        "loss_dtype": loss_dtype,
    }
    if return_z_loss or return_token_accuracy or return_predicted_tokens:
        out = _linear_cross_entropy.linear_cross_entropy_stats(input, linear_weight, target, **given)
        return _asked(out, return_z_loss, return_token_accuracy, return_predicted_tokens)
    return _linear_cross_entropy.linear_cross_entropy(input, linear_weight, target, **given)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability of target, entropy, logsumexp) of each row of (hidden @ weight.T + bias) / temperature, in nats, all
    differentiable; the logits are in memory a chunk of rows at a time.

    >>> liger_aot.linear_logprob(torch.zeros(1, 8), torch.ones(4, 8), torch.tensor([2]))
    (tensor([-1.3863]), tensor([1.3863]), tensor([1.3863]))
    """
    return _linear_logprob.linear_logprob(hidden, weight, target, bias=bias, temperature=temperature, ignore_index=ignore_index)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
    *,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    eps: float = 0.0,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """torch.nn.functional.kl_div, in nats, of the rows whose shift_labels are not ignore_index; a target below eps has its log.

    >>> liger_aot.kl_div(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]), reduction="batchmean")
    tensor(0.6931)
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    options = {"ignore_index": ignore_index, "eps": eps, "loss_dtype": loss_dtype}
    return _kl_div.kl_div(input, target, shift_labels, reduction=reduction, log_target=log_target, **options)


def jsd(
    input: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    *,
    beta: float = 0.5,
    ignore_index: int = -100,
    reduction: str = "batchmean",
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """The generalised Jensen-Shannon divergence of log-probabilities, in nats, input the student's: KL(target || input) with
    beta 0, KL(input || target) with beta 1.

    >>> liger_aot.jsd(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log())
    tensor(0.2158)
    """
    options = {"beta": beta, "ignore_index": ignore_index, "reduction": reduction, "loss_dtype": loss_dtype}
    return _jsd.jsd(input, target, shift_labels, **options)


def tvd(
    input: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    *,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """The total variation distance of probabilities: half the sum of |input - target|, between 0 and 1 for each row.

    >>> liger_aot.tvd(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))
    tensor(0.5000)
    """
    options = {"ignore_index": ignore_index, "reduction": reduction, "loss_dtype": loss_dtype}
    return _tvd.tvd(input, target, shift_labels, **options)


def linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """jsd, in nats, of softmax((input @ weight.T + bias) / temperature), student and teacher; the logits are never all in
    memory.

    >>> student, teacher = torch.zeros(1, 4), torch.ones(1, 4)
    >>> weight = torch.tensor([[1.0] * 4, [0.0] * 4])
    >>> liger_aot.linear_jsd(student, weight, teacher, weight)
    tensor(0.1804)
    """
    return _linear_jsd.linear_jsd(
        student_input,
        student_weight,
        teacher_input,
        teacher_weight,
        shift_labels,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        beta=beta,
        ignore_index=ignore_index,
        temperature=temperature,
        reduction=reduction,
        loss_dtype=loss_dtype,
    )


def linear_kl_div(
    student_input: Tensor,
    student_weight: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    eps: float = 0.0,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """KL(target || softmax((input @ weight.T + bias) / temperature)), in nats, of probabilities that are given; the logits are
    never all in memory.

    >>> weight = torch.tensor([[1.0] * 4, [0.0] * 4])
    >>> liger_aot.linear_kl_div(torch.zeros(1, 4), weight, torch.tensor([[0.25, 0.75]]))
    tensor(0.1308)
    """
    return _linear_kl_div.linear_kl_div(
        student_input,
        student_weight,
        target,
        shift_labels,
        student_bias=student_bias,
        ignore_index=ignore_index,
        temperature=temperature,
        reduction=reduction,
        eps=eps,
        loss_dtype=loss_dtype,
    )


def cross_entropy_tvd(input: Tensor, teacher: Tensor, target: Tensor, *, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """(cross entropy of input, total variation distance of the softmaxes of input and teacher) of each row of logits, fp32.

    >>> liger_aot.cross_entropy_tvd(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
    (tensor([0.6931]), tensor([0.2311]))
    """
    return _cross_entropy_tvd.cross_entropy_tvd(input, teacher, target, ignore_index=ignore_index)


def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    group: torch.distributed.ProcessGroup | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """cross_entropy of logits of which every process of the group holds as many classes, as tensor parallelism leaves them.

    group None is torch.distributed's own, or this process alone where that is not set up.

    >>> liger_aot.vocab_parallel_cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor(1.3863)
    """
    name, rank, world = "", 0, 1
    if group is not None or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        group = torch.distributed.group.WORLD if group is None else group
        name, rank, world = group.group_name, group.rank(), group.size()
    return _vocab_parallel_cross_entropy.vocab_parallel_cross_entropy(
        input,
        target,
        name,
        rank,
        world,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=softcap,
        lse_square_scale=lse_square_scale,
        loss_dtype=loss_dtype,
    )
