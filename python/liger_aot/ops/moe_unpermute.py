"""Results of experts, weighted and summed by token:  y[token] = Σ weight[token, place] · x[position[token, place]].

Gale et al., MegaBlocks, 2022 (arXiv 2211.15841), section 5.1, without padding. functional.moe_route makes order and position.
"""

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import cdiv
from .._runtime import kernels
from ._check import check_same
from ._check import looks_at
from ._check import rows_of
from ._check import wide
from ._moe import BLOCK
from ._moe import check_routing
from ._moe import check_slots
from ._moe import rows_at


def forward_reference(x, weight, order, position):
    check_slots("moe_unpermute", order, position)
    weight = torch.where(position >= 0, wide(weight), 0)
    return (weight[..., None] * wide(rows_at(x, position))).sum(1).to(x.dtype)


def backward_reference(dy, x, weight, order, position):
    there = position >= 0
    dys = torch.where(there[..., None], wide(dy)[:, None], 0)
    dweight = (dys * wide(rows_at(x, position))).sum(-1).to(weight.dtype)
    dx = (torch.where(there, wide(weight), 0)[..., None] * dys).to(x.dtype)
    return dx.flatten(0, 1)[order], dweight


@op(cpu=forward_reference)
def moe_unpermute_fwd(x: Tensor, weight: Tensor, order: Tensor, position: Tensor) -> Tensor:
    if looks_at(order):
        check_slots("moe_unpermute", order, position)
    x, stride, _, n = rows_of(x)
    tokens, k = position.shape
    y = x.new_empty((tokens, n))
    kernels.moe_unpermute_fwd[(tokens * cdiv(n, BLOCK),)](
        x, weight.contiguous(), position.contiguous(), y, tokens * n, stride, k, n, True, BLOCK=BLOCK
    )
    return y


@op(cpu=backward_reference)
def moe_unpermute_bwd(dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of weight, whose numbers are products of two rows: each row is read once for both."""
    dy, dy_stride, _, n = rows_of(dy)
    x, stride, rows, _ = rows_of(x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    kernels.moe_unpermute_bwd[(rows,)](
        dy, x, weight.contiguous(), order.contiguous(), position.contiguous(), dx, dweight,
        dy_stride, stride, position.shape[1], n, BLOCK=BLOCK,
    )  # fmt: skip
    return dx, dweight


class MoEUnpermuteFunction(Function):
    @staticmethod
    def forward(ctx, x, weight, order, position):
        ctx.save_for_backward(x, weight, order, position)
        return moe_unpermute_fwd(x, weight, order, position)

    @staticmethod
    def backward(ctx, dy):
        Function.once("moe_unpermute")
        dx, dweight = moe_unpermute_bwd(dy, *ctx.saved_tensors)
        return dx if ctx.needs_input_grad[0] else None, dweight if ctx.needs_input_grad[1] else None, None, None


@public
def moe_unpermute(x: Tensor, weight: Tensor, order: Tensor, position: Tensor) -> Tensor:
    """The sum of each token's rows of x (T · K, H), times its weights (T, K): (T, H), of x's dtype, fp32, fp16 or bf16.

    order (T · K,) is the slot of each row, token · K + place, and position (T, K) the row of each slot, both int64; a slot
    whose position is -1 adds nothing, whatever its weight, and gets no gradient. Summed in fp32 in the order of the slots,
    rounded once; weight may be fp32 or of x's dtype, and is read as fp32 otherwise. Raises ValueError on other dtypes, shapes
    or devices; and where order and position do not belong together, which on CUDA would read elsewhere and is looked at with
    LIGER_AOT_CHECK=1 alone.
    """
    check_routing("moe_unpermute", x, order, position, of_slots=True)
    check_same("moe_unpermute", "weight", weight, position.shape, x)
    if weight.dtype is not x.dtype:
        weight = weight.float()
    if needs_grad("moe_unpermute", x, weight):
        return MoEUnpermuteFunction.apply(x, weight, order, position)
    return moe_unpermute_fwd(x, weight, order, position)
