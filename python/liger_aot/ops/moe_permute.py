"""Rows of tokens in the order of their experts:  y[row] = x[order[row] / k],  k slots a token, one for each of its experts.

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
from ._check import looks_at
from ._check import rows_of
from ._check import wide
from ._moe import BLOCK
from ._moe import check_routing
from ._moe import check_slots
from ._moe import rows_at


def forward_reference(x, order, position):
    check_slots("moe_permute", order, position)
    return x[order // position.shape[1]]


def backward_reference(dy, position):
    return wide(rows_at(dy, position)).sum(1).to(dy.dtype)


@op(cpu=forward_reference)
def moe_permute_fwd(x: Tensor, order: Tensor, position: Tensor) -> Tensor:
    if looks_at(order):
        check_slots("moe_permute", order, position)
    x, stride, _, n = rows_of(x)
    rows = order.shape[0]
    y = x.new_empty((rows, n))
    kernels.moe_permute_fwd[(rows * cdiv(n, BLOCK),)](
        *map(bits, (x, order.contiguous(), y)), rows * n, stride, position.shape[1], n, BLOCK=BLOCK
    )
    return y


def bits(x):
    """The one dtype in which the kernel copies 16 bits."""
    return x.view(torch.float16) if x.dtype is torch.bfloat16 else x


@op(cpu=backward_reference)
def moe_permute_bwd(dy: Tensor, position: Tensor) -> Tensor:
    """The sum of each token's rows, without atomics."""
    dy, stride, _, n = rows_of(dy)
    tokens, k = position.shape
    dx = dy.new_empty((tokens, n))
    kernels.moe_unpermute_fwd[(tokens * cdiv(n, BLOCK),)](
        dy, dy, position.contiguous(), dx, tokens * n, stride, k, n, False, BLOCK=BLOCK
    )
    return dx


class MoEPermuteFunction(Function):
    @staticmethod
    def forward(ctx, x, order, position):
        ctx.save_for_backward(position)
        return moe_permute_fwd(x, order, position)

    @staticmethod
    def backward(ctx, dy):
        Function.once("moe_permute")
        return moe_permute_bwd(dy, *ctx.saved_tensors), None, None


@public
def moe_permute(x: Tensor, order: Tensor, position: Tensor) -> Tensor:
    """The row of x (T, H) of each slot, in the order of experts: (T · K, H), of x's dtype, fp32, fp16 or bf16.

    order (T · K,) is the slot of each row, token · K + place, and position (T, K) the row of each slot, both int64; a slot
    whose position is -1 has no expert, and its row no gradient. The gradient of a token is the sum of its rows' in the order of
    its slots, in fp32, rounded once. Raises ValueError on other dtypes, shapes or devices; and where order and position do not
    belong together, which on CUDA would read elsewhere and is looked at with LIGER_AOT_CHECK=1 alone.
    """
    check_routing("moe_permute", x, order, position, of_slots=False)
    if needs_grad("moe_permute", x):
        return MoEPermuteFunction.apply(x, order, position)
    return moe_permute_fwd(x, order, position)
