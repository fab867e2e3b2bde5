"""Neighborhood attention:  y_i = Σ p_ij · v_j,  p_ij = softmax over j of scale · q_i · k_j,  of the tokens j in i's window.

Hassani et al., Neighborhood Attention Transformer, 2022 (arXiv 2204.07143), in one dimension. The window is Liger-Kernel's: the
tokens up to kernel_size // 2 steps of `dilation` away, fewer at both ends of the sequence, where the paper moves it inwards.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import cdiv
from .._runtime import kernels
from ._check import FLOATS
from ._check import wide

NAME = "neighborhood_attention"
WIDTHS, NUMBERS = (32, 64, 128), 2048  # of a head; how many numbers a program holds of each tensor


def steps(tokens, kernel_size, dilation):
    """How far away the tokens of a window are; none further than the sequence is long."""
    reach = min(kernel_size // 2, max(tokens - 1, 0) // dilation)
    return [step * dilation for step in range(-reach, reach + 1)]


def moved(x, step):
    """The tokens that are `step` further on, zeros where there are none."""
    return pad(x, (0, 0, -step, step))


def scores(q, k, away, scale):
    """(…, tokens, window), -inf where a window has no token."""
    exist = torch.stack([moved(torch.ones_like(q[..., :1]), step).squeeze(-1) for step in away], -1) > 0
    products = torch.stack([(q * moved(k, step)).sum(-1) for step in away], -1)
    return (products * scale).masked_fill(~exist, -torch.inf)


def forward_reference(query, key, value, kernel_size, dilation, scale):
    q, k, v = wide(query), wide(key), wide(value)
    away = steps(q.shape[2], kernel_size, dilation)
    s = scores(q, k, away, scale)
    lse = s.logsumexp(-1)
    p = (s - lse[..., None]).exp()
    y = sum(p[..., n, None] * moved(v, step) for n, step in enumerate(away))
    return y.to(query.dtype), lse


def backward_reference(dy, query, key, value, lse, kernel_size, dilation, scale):
    dys, q, k, v = wide(dy), wide(query), wide(key), wide(value)
    away = steps(q.shape[2], kernel_size, dilation)
    p = (scores(q, k, away, scale) - lse[..., None]).exp()
    dp = torch.stack([(dys * moved(v, step)).sum(-1) for step in away], -1)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dq = sum(ds[..., n, None] * moved(k, step) for n, step in enumerate(away))
    dk = sum(moved(ds[..., n, None] * q, -step) for n, step in enumerate(away))
    dv = sum(moved(p[..., n, None] * dys, -step) for n, step in enumerate(away))
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


def laid_out(*tensors):
    """The tensors, each copied only where neighbouring columns are not neighbours in memory, and all their other strides."""
    tensors = [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
    return tensors, [stride for t in tensors for stride in t.stride()[:3]]


def tile(n):
    """ROWS and D of the kernels for heads of width n; under tracing any will do."""
    D = next((d for d in WIDTHS if type(n) is int and n <= d), WIDTHS[-1])
    return {"ROWS": NUMBERS // D, "D": D}


@op(cpu=forward_reference)
def neighborhood_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int, dilation: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(y, the logsumexp of each token's scores)."""
    (batch, heads, tokens, n), (tensors, strides) = query.shape, laid_out(query, key, value)
    y = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    sizes = tile(n)
    kernels.neighborhood_attention_fwd[(batch * heads * cdiv(tokens, sizes["ROWS"]),)](
        *tensors, y, lse, *strides, heads, tokens, n, kernel_size // 2, dilation, scale, **sizes
    )
    return y, lse


@op(cpu=backward_reference)
def neighborhood_attention_bwd(
    dy: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, kernel_size: int, dilation: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, heads, tokens, n), (tensors, strides) = query.shape, laid_out(dy, query, key, value)
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    lse, mean = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    sizes = tile(n)
    grid, numbers = (batch * heads * cdiv(tokens, sizes["ROWS"]),), (heads, tokens, n, kernel_size // 2, dilation, scale)
    kernels.neighborhood_attention_bwd_q[grid](*tensors, lse, dq, mean, *strides, *numbers, **sizes)
    kernels.neighborhood_attention_bwd_kv[grid](*tensors, lse, mean, dk, dv, *strides, *numbers, **sizes)
    return dq, dk, dv


class NeighborhoodAttentionFunction(Function):
    @staticmethod
    def forward(ctx, query, key, value, *options):
        y, lse = neighborhood_attention_fwd(query, key, value, *options)
        ctx.save_for_backward(query, key, value, lse)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, dy):
        Function.once(NAME)
        return *neighborhood_attention_bwd(dy, *ctx.saved_tensors, *ctx.options), None, None, None


@public
def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int = 7, dilation: int = 1, scale: float | None = None
) -> Tensor:
    """Attention of each of the tokens of query (batch, heads, tokens, d) to those of its window alone, kernel_size at most.

    A window is the tokens at most kernel_size // 2 away, or as many steps of `dilation`; at the ends of the sequence it is
    cut off, not moved. kernel_size is odd, d at most 128, scale 1 / sqrt(d) where it is None. query, key and value have one
    shape and dtype, fp32, fp16 or bf16, and any strides of batch, heads and tokens; arithmetic is in fp32, rounded once.
    On CUDA neither scores nor probabilities are ever stored. Raises ValueError where any of that is not so.
    """
    check(query, key, value, kernel_size, dilation)
    options = kernel_size, dilation, query.shape[-1] ** -0.5 if scale is None else scale
    if needs_grad(NAME, query, key, value):
        return NeighborhoodAttentionFunction.apply(query, key, value, *options)
    return neighborhood_attention_fwd(query, key, value, *options)[0]


def check(query, key, value, kernel_size, dilation):
    name = NAME
    if query.dim() != 4 or not 0 < query.shape[-1] <= WIDTHS[-1]:
        raise ValueError(
            f"{name}: query must have shape (batch, heads, tokens, d) with d from 1 to {WIDTHS[-1]}, got {tuple(query.shape)}"
        )
    if query.dtype not in FLOATS:
        raise ValueError(f"{name}: query must be float32, float16 or bfloat16, got {query.dtype}")
    for which, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise ValueError(f"{name}: {which} must have shape {tuple(query.shape)} like query, got {tuple(tensor.shape)}")
        if tensor.dtype is not query.dtype:
            raise ValueError(f"{name}: {which} must be {query.dtype} like query, got {tensor.dtype}; cast it with .to()")
        if tensor.device != query.device:
            raise ValueError(f"{name}: {which} must be on {query.device} like query, got {tensor.device}; move it with .to()")
    if kernel_size < 1 or not kernel_size % 2:
        raise ValueError(f"{name}: kernel_size must be odd and at least 1, got {kernel_size}")
    if dilation < 1:
        raise ValueError(f"{name}: dilation must be at least 1, got {dilation}")
