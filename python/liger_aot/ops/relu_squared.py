"""Squared ReLU:  y = max(x, 0)².

So et al., Primer: Searching for Efficient Transformers for Language Modeling, 2021 (arXiv 2109.08668).
"""

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import kernels
from ._check import FLOATS
from ._check import wide
from ._glu import BLOCK
from ._glu import walk


def forward_reference(x):
    return wide(x).relu().square().to(x.dtype)


def backward_reference(dy, x):
    return (2.0 * wide(x).relu() * wide(dy)).to(x.dtype)


@op(cpu=forward_reference)
def relu_squared_fwd(x: Tensor) -> Tensor:
    count, (x,), size, strides, n = walk(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels.relu_squared_fwd[(count,)](x, y, size, *strides, n, BLOCK=BLOCK)
    return y


@op(cpu=backward_reference)
def relu_squared_bwd(dy: Tensor, x: Tensor) -> Tensor:
    count, (dy, x), size, strides, n = walk(dy, x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels.relu_squared_bwd[(count,)](dy, x, dx, size, *strides, n, BLOCK=BLOCK)
    return dx


class ReLUSquaredFunction(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return relu_squared_fwd(x)

    @staticmethod
    def backward(ctx, dy):
        Function.once("relu_squared")
        return relu_squared_bwd(dy, *ctx.saved_tensors)


@public
def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)², elementwise, for x of any one shape and of fp32, fp16 or bf16, whose dtype the result has.

    Arithmetic in fp32, rounded once. A chunk of a wider tensor is read where it lies; the result is contiguous. NaN stays NaN.
    Raises ValueError on other dtypes.
    """
    if x.dtype not in FLOATS:
        raise ValueError(f"relu_squared: x must be float32, float16 or bfloat16, got {x.dtype}")
    if needs_grad("relu_squared", x):
        return ReLUSquaredFunction.apply(x)
    return relu_squared_fwd(x)
