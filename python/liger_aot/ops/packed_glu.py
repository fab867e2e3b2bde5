"""GLU of one tensor that holds gate and up:  y = f(gate) · up,  x = [gate, up],  f silu, gelu or gelu's approximation by tanh.

Shazeer, GLU Variants Improve Transformer, 2020 (arXiv 2002.05202), of one projection for both, as fused MLPs and experts have
it. The kernels are those of swiglu and geglu, which read and write the two halves where they lie.
"""

import torch
from torch import Tensor
from torch._C import _get_tracing_state
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import plain
from .._op import public
from .._runtime import cdiv
from .._runtime import kernels
from . import geglu
from . import swiglu
from ._check import FLOATS
from ._check import rows_of
from ._glu import BLOCK

TANH = {"gelu": False, "gelu_tanh": True}
ACTIVATIONS = "silu", *TANH


def forward_reference(x, activation):
    if activation == "silu":
        return swiglu.forward_reference(*halves(x), 1.0, 1.0)
    return geglu.forward_reference(*halves(x), TANH[activation])


def backward_reference(dy, x, activation):
    if activation == "silu":
        return torch.cat(swiglu.backward_reference(dy, *halves(x), 1.0, 1.0), -1)
    return torch.cat(geglu.backward_reference(dy, *halves(x), TANH[activation]), -1)


def halves(x):
    n = x.shape[-1] // 2
    return x.narrow(-1, 0, n), x.narrow(-1, n, n)


@op(cpu=forward_reference)
def packed_glu_fwd(x: Tensor, activation: str) -> Tensor:
    x, stride, rows, width = rows_of(x)
    n = width // 2
    y = x.new_empty((*x.shape[:-1], n))
    grid, given = (rows * cdiv(n, BLOCK),), (*halves(x), y, rows * n, stride, stride, n)
    if activation == "silu":
        kernels.swiglu_fwd[grid](*given, 1.0, 1.0, BLOCK=BLOCK)
    else:
        kernels.geglu_fwd[grid](*given, BLOCK=BLOCK, TANH=TANH[activation])
    return y


@op(cpu=backward_reference)
def packed_glu_bwd(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    return backward_into(None, dy, x, activation)


def backward_into(dx, dy, x, activation):
    """The gradient of x, written to dx, contiguous, which may be x itself: each number is read before it is written."""
    dy, dy_stride, rows, n = rows_of(dy)
    x, stride, _, _ = rows_of(x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if dx is None else dx
    grid, given = (rows * cdiv(n, BLOCK),), (dy, *halves(x), *halves(dx), rows * n, dy_stride, stride, stride, 2 * n, n)
    if activation == "silu":
        kernels.swiglu_bwd[grid](*given, 1.0, 1.0, BLOCK=BLOCK)
    else:
        kernels.geglu_bwd[grid](*given, BLOCK=BLOCK, TANH=TANH[activation])
    return dx


class PackedGLUFunction(Function):
    @staticmethod
    def forward(ctx, x, activation):
        ctx.save_for_backward(x)
        ctx.activation = activation
        return packed_glu_fwd(x, activation)

    @staticmethod
    def backward(ctx, dy):
        Function.once("packed_glu")
        return packed_glu_bwd(dy, *ctx.saved_tensors, ctx.activation), None


class InPlaceFunction(PackedGLUFunction):
    @staticmethod
    def backward(ctx, dy):
        Function.once("packed_glu")
        (x,) = ctx.saved_tensors
        # A graph that is kept will want x again, and one that is traced is not this one.
        if is_dynamo_compiling() or not plain(dy, x) or torch._C._autograd._get_current_graph_task_keep_graph():
            return packed_glu_bwd(dy, x, ctx.activation), None
        increment_version(x)  # so that torch names whoever else had saved it
        x = x.detach()
        return backward_into(x, dy, x, ctx.activation), None


def packed_glu_in_place(x, activation="silu"):
    """packed_glu for an x that nobody reads afterwards: on a GPU its gradient is written in its place.

    Not in a graph that is kept, compiled, traced or exported, nor where somebody's hooks save tensors, as checkpoints do, nor
    for a leaf, its views, or an x that is not contiguous: there nothing differs.
    """
    check(x, activation)
    if is_dynamo_compiling():
        return packed_glu(x, activation)
    watched = _get_tracing_state() or _top_saved_tensors_default_hooks(True) or not plain(x)
    leaf = x.is_leaf or (x._is_view() and x._base.is_leaf)
    if watched or leaf or not x.is_contiguous() or not needs_grad("packed_glu", x):
        return packed_glu(x, activation)
    return InPlaceFunction.apply(x, activation)


def check(x, activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"packed_glu: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if x.dtype not in FLOATS:
        raise ValueError(f"packed_glu: x must be float32, float16 or bfloat16, got {x.dtype}")
    if not x.dim() or x.shape[-1] % 2:
        raise ValueError(f"packed_glu: the last dimension of x must be even, gate and up, got shape {tuple(x.shape)}")


@public
def packed_glu(x: Tensor, activation: str = "silu") -> Tensor:
    """f(x[..., :n]) · x[..., n:] of x (..., 2 n) in fp32, fp16 or bf16, the dtype of the result.

    activation is "silu", "gelu" or "gelu_tanh". Arithmetic in fp32, rounded once. Rows are read where they lie. Raises
    ValueError on other dtypes and activations, and on an odd last dimension.
    """
    check(x, activation)
    return PackedGLUFunction.apply(x, activation) if needs_grad("packed_glu", x) else packed_glu_fwd(x, activation)
