"""SwiGLU:  y = silu(gate · gate_multiplier) · up · down_multiplier,  silu(x) = x / (1 + exp(-x)).

Shazeer, GLU Variants Improve Transformer, 2020 (arXiv 2002.05202). Falcon-H1 has the two multipliers.
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


def forward_reference(gate, up, gate_multiplier, down_multiplier):
    g = wide(gate) * gate_multiplier
    return (g * g.sigmoid() * wide(up) * down_multiplier).to(gate.dtype)


def backward_reference(dy, gate, up, gate_multiplier, down_multiplier):
    dys, g = wide(dy) * down_multiplier, wide(gate) * gate_multiplier
    s = g.sigmoid()
    dgate = dys * wide(up) * (s + g * s * (1.0 - s)) * gate_multiplier
    return dgate.to(gate.dtype), (dys * g * s).to(up.dtype)


@op(cpu=forward_reference)
def swiglu_fwd(gate: Tensor, up: Tensor, gate_multiplier: float, down_multiplier: float) -> Tensor:
    count, (gate, up), size, strides, n = walk(gate, up)
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    kernels.swiglu_fwd[(count,)](gate, up, y, size, *strides, n, gate_multiplier, down_multiplier, BLOCK=BLOCK)
    return y


@op(cpu=backward_reference)
def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor, gate_multiplier: float, down_multiplier: float) -> tuple[Tensor, Tensor]:
    count, (dy, gate, up), size, strides, n = walk(dy, gate, up)
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dup = torch.empty_like(up, memory_format=torch.contiguous_format)
    kernels.swiglu_bwd[(count,)](dy, gate, up, dgate, dup, size, *strides, n, n, gate_multiplier, down_multiplier, BLOCK=BLOCK)
    return dgate, dup


class SwiGLUFunction(Function):
    @staticmethod
    def forward(ctx, gate, up, gate_multiplier, down_multiplier):
        ctx.save_for_backward(gate, up)
        ctx.multipliers = gate_multiplier, down_multiplier
        return swiglu_fwd(gate, up, gate_multiplier, down_multiplier)

    @staticmethod
    def backward(ctx, dy):
        Function.once("swiglu")
        gate, up = ctx.saved_tensors
        dgate, dup = swiglu_bwd(dy, gate, up, *ctx.multipliers)
        return dgate, dup, None, None


@public
def swiglu(gate: Tensor, up: Tensor, *, gate_multiplier: float = 1.0, down_multiplier: float = 1.0) -> Tensor:
    """silu(gate · gate_multiplier) · up · down_multiplier, elementwise, for two tensors of one shape, dtype and device.

    Arithmetic in fp32, rounded once. Chunks of one wider tensor are read where they lie; the result is contiguous. Raises
    ValueError where the two differ, and on dtypes other than fp32, fp16 and bf16.
    """
    check_pair("swiglu", gate, up)
    if needs_grad("swiglu", gate, up):
        return SwiGLUFunction.apply(gate, up, gate_multiplier, down_multiplier)
    return swiglu_fwd(gate, up, gate_multiplier, down_multiplier)
