"""GeGLU:  y = gelu(gate) · up,  gelu(x) = x · Φ(x), Φ the normal distribution or its approximation by tanh.

Shazeer, GLU Variants Improve Transformer, 2020 (arXiv 2002.05202); Hendrycks and Gimpel, Gaussian Error Linear Units, 2016
(arXiv 1606.08415).
"""

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import kernels
from ._check import wide
from ._glu import BLOCK
from ._glu import check_pair
from ._glu import walk

APPROXIMATE = {"tanh": True, "none": False}
SLOPE = 1.5957691216057308  # 2 sqrt(2 / pi)


def gelu(x, tanh):
    """(p, q) such that gelu(x) = x · p, whose derivative is p + x · q."""
    if tanh:  # (1 + tanh(z)) / 2 = sigmoid(2 z); the bound, far out, keeps 0 · infinity from the derivative
        square = x.square().clamp(max=1e4)
        p = (SLOPE * x * (1.0 + 0.044715 * square)).sigmoid()
        return p, p * (1.0 - p) * SLOPE * (1.0 + 0.134145 * square)
    return 0.5 * (1.0 + torch.erf(x * 0.5**0.5)), (2 * torch.pi) ** -0.5 * torch.exp(-0.5 * x * x)


def forward_reference(gate, up, tanh):
    g = wide(gate)
    return (g * gelu(g, tanh)[0] * wide(up)).to(gate.dtype)


def backward_reference(dy, gate, up, tanh):
    dys, g = wide(dy), wide(gate)
    p, q = gelu(g, tanh)
    return (dys * wide(up) * (p + g * q)).to(gate.dtype), (dys * g * p).to(up.dtype)


@op(cpu=forward_reference)
def geglu_fwd(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    count, (gate, up), size, strides, n = walk(gate, up)
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    kernels.geglu_fwd[(count,)](gate, up, y, size, *strides, n, BLOCK=BLOCK, TANH=tanh)
    return y


@op(cpu=backward_reference)
def geglu_bwd(dy: Tensor, gate: Tensor, up: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    count, (dy, gate, up), size, strides, n = walk(dy, gate, up)
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dup = torch.empty_like(up, memory_format=torch.contiguous_format)
    kernels.geglu_bwd[(count,)](dy, gate, up, dgate, dup, size, *strides, n, n, BLOCK=BLOCK, TANH=tanh)
    return dgate, dup


class GeGLUFunction(Function):
    @staticmethod
    def forward(ctx, gate, up, tanh):
        ctx.save_for_backward(gate, up)
        ctx.tanh = tanh
        return geglu_fwd(gate, up, tanh)

    @staticmethod
    def backward(ctx, dy):
        Function.once("geglu")
        gate, up = ctx.saved_tensors
        dgate, dup = geglu_bwd(dy, gate, up, ctx.tanh)
        return dgate, dup, None


@public
def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """gelu(gate) · up, elementwise, for two tensors of one shape, dtype and device; approximate as in torch's gelu.

    Arithmetic in fp32, rounded once. Chunks of one wider tensor are read where they lie; the result is contiguous. Raises
    ValueError where the two differ, on dtypes other than fp32, fp16 and bf16, and on an approximate not "tanh" or "none".
    """
    tanh = APPROXIMATE.get(approximate)
    if tanh is None:
        raise ValueError(f"geglu: approximate must be one of {', '.join(APPROXIMATE)}, got {approximate!r}")
    check_pair("geglu", gate, up)
    if needs_grad("geglu", gate, up):
        return GeGLUFunction.apply(gate, up, tanh)
    return geglu_fwd(gate, up, tanh)
