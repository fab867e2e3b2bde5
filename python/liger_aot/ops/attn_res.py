"""Attention residuals:  y = Σᵢ softmaxᵢ(query · n(vᵢ) · weight) · vᵢ,  n(u) = u / sqrt(mean(u²) + eps), over the depth.

Instead of their sum, a layer's input is a mixture of what the layers before it gave, for each token its own. Kimi Team,
Attention Residuals, 2026 (arXiv 2603.15031).
"""

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import fit
from .._runtime import kernels
from .._runtime import programs
from ._check import FLOATS
from ._check import check_same
from ._check import rows_of
from ._check import wide
from ._norm import column_sum

BLOCKS = 2048, 8192
RESIDENT = {2048: 4, 8192: 1}  # a backward's programs on one multiprocessor: 16 warps together


def tile(n):
    """BLOCK and LOOP for rows of n numbers; under tracing any will do."""
    return {"BLOCK": fit(n, BLOCKS), "LOOP": type(n) is int and n > BLOCKS[-1]}


def forward_reference(v, query, eps):
    vs = wide(v)
    rstd = torch.rsqrt(vs.square().mean(-1) + eps)
    score = (vs * query).sum(-1) * rstd
    lse = score.logsumexp(0)
    return ((score - lse).exp()[..., None] * vs).sum(0).to(v.dtype), score, rstd, lse


def backward_reference(dy, v, query, score, rstd, lse):
    dys, vs, part = wide(dy), wide(v), (score - lse).exp()
    along = (dys * vs).sum(-1)
    slope = (part * (along - (part * along).sum(0)) * rstd)[..., None]
    dv = part[..., None] * dys + slope * (query - vs * (score * rstd / v.shape[-1])[..., None])
    return dv.to(v.dtype), (slope * vs).sum_to_size(query.shape)


@op(cpu=forward_reference)
def attn_res_fwd(v: Tensor, query: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(the result; of each row its score and 1 / its root mean square; of each token the logsumexp of its scores)."""
    v, stride, rows, n = rows_of(v)
    depth, *rest = v.shape
    tokens = rows // depth
    y = v.new_empty(rest)
    score, rstd = (v.new_empty(tuple(v.shape[:-1]), dtype=torch.float32) for _ in range(2))
    lse = v.new_empty(rest[:-1], dtype=torch.float32)
    kernels.attn_res_fwd[(tokens,)](v, query.contiguous(), y, score, rstd, lse, stride, depth, tokens, n, eps, **tile(n))
    return y, score, rstd, lse


@op(cpu=backward_reference)
def attn_res_bwd(dy: Tensor, v: Tensor, query: Tensor, score: Tensor, rstd: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    v, stride, rows, n = rows_of(v)
    depth, how = v.shape[0], tile(n)
    tokens = rows // depth
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    count = programs(v, tokens, RESIDENT[how["BLOCK"]])
    partial, along = v.new_empty(count * n, dtype=torch.float32), torch.empty_like(score) if how["LOOP"] else score
    kernels.attn_res_bwd[(count,)](
        dy.contiguous(), v, query.contiguous(), score, rstd, lse, dv, along, partial, stride, depth, tokens, n, **how
    )
    return dv, column_sum(partial, count, torch.empty_like(query))


class AttnResFunction(Function):
    @staticmethod
    def forward(ctx, v, query, eps):
        y, *rest = attn_res_fwd(v, query, eps)
        ctx.save_for_backward(v, query, *rest)
        return y

    @staticmethod
    def backward(ctx, dy):
        Function.once("attn_res")
        return *attn_res_bwd(dy, *ctx.saved_tensors), None


@public
def attn_res(v: Tensor, query: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The mixture (..., n) of the rows v (depth, ..., n): Σ softmax(query · rms_norm(v) · weight) · v, the softmax over depth.

    query and weight (n,) are taken in fp32 whatever their dtypes. Arithmetic in fp32, rounded once to v's dtype; each gradient
    has the dtype of its tensor, sums in one order. Rows are read where they lie. Raises ValueError on dtypes other than fp32,
    fp16 and bf16, on fewer than two dimensions or a depth of 0, and where query or weight has another shape or device.
    """
    if v.dtype not in FLOATS:
        raise ValueError(f"attn_res: v must be float32, float16 or bfloat16, got {v.dtype}")
    if v.dim() < 2 or not v.shape[0]:
        raise ValueError(f"attn_res: v must have shape (depth, ..., n), depth 1 or more, got {tuple(v.shape)}")
    for name, parameter in (("query", query), ("weight", weight)):
        check_same("attn_res", name, parameter, v.shape[-1:], v)
    # Only their product meets the rows: autograd divides its gradient between the two.
    query = query.float() * weight.float()
    if needs_grad("attn_res", v, query):
        return AttnResFunction.apply(v, query, eps)
    return attn_res_fwd(v, query, eps)[0]
