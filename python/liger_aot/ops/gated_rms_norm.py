"""Gated RMSNorm:  y = norm(x) · weight · f(gate),  or  norm(x · f(gate)) · weight,  norm(x) = x / sqrt(mean(x²) + eps).

f is silu or sigmoid. Dao and Gu, Transformers are SSMs, 2024 (arXiv 2405.21060), gate first and normalise groups of columns;
Yang, Kautz and Hatamizadeh, Gated Delta Networks, 2024 (arXiv 2412.06464), gate last.
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
from ._norm import unusable
from .rms_norm import CASTING
from .rms_norm import DEFAULT_EPS

BLOCKS = 128, 1024, 4096
ROWS = {128: 8, 1024: 1, 4096: 1}
RESIDENT = {128: 4, 1024: 4, 4096: 1}  # a backward's programs on one multiprocessor: 16 warps together
ACTIVATIONS = {"silu": True, "sigmoid": False}


def tile(n):
    """ROWS, BLOCK and LOOP for groups of n columns; under tracing any will do."""
    block = fit(n, BLOCKS)
    return {"ROWS": ROWS[block], "BLOCK": block, "LOOP": type(n) is int and n > BLOCKS[-1]}


def by_groups(x, groups):
    return x.unflatten(-1, (groups, x.shape[-1] // groups))


def activation(gate, silu):
    """f(gate) and its derivative."""
    g = wide(gate)
    s = torch.sigmoid(g)
    return (g * s, s + g * s * (1 - s)) if silu else (s, s * (1 - s))


def product(u, rstd, weight, groups, cast, last, dtype):
    """u · rstd by groups, the same as the weight meets it, and its product with the weight as a last gate meets it."""
    uhat = (by_groups(u, groups) * rstd[..., None]).flatten(-2)
    xhat = wide(uhat.to(dtype)) if cast else uhat
    z = xhat * wide(weight)
    return uhat, xhat, wide(z.to(torch.promote_types(dtype, weight.dtype))) if cast and last else z


def forward_reference(x, gate, weight, groups, eps, cast, last, silu):
    a, _ = activation(gate, silu)
    u = wide(x) if last else wide(x) * a
    rstd = torch.rsqrt(by_groups(u, groups).square().mean(-1) + eps)
    _, _, z = product(u, rstd, weight, groups, cast, last, x.dtype)
    return (z * a if last else z).to(x.dtype), rstd


def backward_reference(dy, x, gate, weight, rstd, groups, cast, last, silu):
    (a, slope), xs, dys = activation(gate, silu), wide(x), wide(dy)
    uhat, xhat, z = product(xs if last else xs * a, rstd, weight, groups, cast, last, x.dtype)
    dz = dys * a if last else dys
    wdz = dz * wide(weight)
    mean = by_groups(wdz * uhat, groups).mean(-1, keepdim=True)
    du = by_groups(wdz, groups) - by_groups(uhat, groups) * mean
    du = (du * rstd[..., None]).flatten(-2)
    dx, dgate = (du, dys * z) if last else (du * a, du * xs)
    return dx.to(x.dtype), (dgate * slope).to(gate.dtype), (dz * xhat).sum_to_size(weight.shape).to(weight.dtype)


@op(cpu=forward_reference)
def gated_rms_norm_fwd(
    x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float, cast: bool, last: bool, silu: bool
) -> tuple[Tensor, Tensor]:
    x, stride, rows, width = rows_of(x)
    gate, gate_stride, _, _ = rows_of(gate)
    y, n = torch.empty_like(x, memory_format=torch.contiguous_format), width // groups
    rstd, how = x.new_empty(*x.shape[:-1], groups, dtype=torch.float32), tile(n)
    kernels.gated_rms_norm_fwd[(-(-rows // how["ROWS"]), groups)](
        x, gate, weight.contiguous(), y, rstd, stride, gate_stride, rows, n, eps, cast, last, silu, **how
    )
    return y, rstd


@op(cpu=backward_reference)
def gated_rms_norm_bwd(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor, groups: int, cast: bool, last: bool, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, stride, rows, width = rows_of(x)
    gate, gate_stride, _, _ = rows_of(gate)
    dx, dgate = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    n = width // groups
    how = tile(n)
    count = programs(x, -(-rows // how["ROWS"]), RESIDENT[how["BLOCK"]])
    partial = x.new_empty(count * width, dtype=torch.float32)
    kernels.gated_rms_norm_bwd[(count, groups)](
        dy.contiguous(), x, gate, weight.contiguous(), rstd, dx, dgate, partial,
        stride, gate_stride, rows, n, cast, last, silu, **how,
    )  # fmt: skip
    return dx, dgate, column_sum(partial, count, torch.empty_like(weight, memory_format=torch.contiguous_format))


class GatedRMSNormFunction(Function):
    @staticmethod
    def forward(ctx, x, gate, weight, groups, eps, cast, last, silu):
        y, rstd = gated_rms_norm_fwd(x, gate, weight, groups, eps, cast, last, silu)
        ctx.save_for_backward(x, gate, weight, rstd)
        ctx.options = groups, cast, last, silu
        return y

    @staticmethod
    def backward(ctx, dy):
        Function.once("gated_rms_norm")
        gradients = gated_rms_norm_bwd(dy, *ctx.saved_tensors, *ctx.options)
        wanted = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False))
        return *wanted, None, None, None, None, None


@public
def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float | None = None,
    *,
    groups: int = 1,
    gate_first: bool = False,
    activation: str = "silu",
    casting: str = "none",
) -> Tensor:
    """x (..., n) over the root mean square of each of its groups of columns, times weight (n,) and f(gate), gate (..., n).

    With gate_first, x meets the gate before it is normalised. Arithmetic in fp32, rounded once, to x's dtype; casting "llama"
    rounds the normalised x to it before the product, and the product before a gate that comes last, to the wider dtype of x
    and weight. Rows of x and gate are read where they lie. eps None is that of fp32, as in torch. Raises ValueError on dtypes
    other than fp32, fp16 and bf16, on shapes or devices that do not fit together, and on an unknown activation or casting.
    """
    if x.dtype not in FLOATS or not x.dim():
        raise unusable("gated_rms_norm", x)
    check_same("gated_rms_norm", "gate", gate, x.shape, x)
    if gate.dtype is not x.dtype:
        raise ValueError(f"gated_rms_norm: gate must be {x.dtype} like x, got {gate.dtype}; cast with .to()")
    n = x.shape[-1]
    check_same("gated_rms_norm", "weight", weight, (n,), x)
    if groups < 1 or n % groups:
        raise ValueError(f"gated_rms_norm: groups must divide the last dimension of x, {n}, got {groups}")
    for name, value, known in (("activation", activation, ACTIVATIONS), ("casting", casting, CASTING)):
        if value not in known:
            raise ValueError(f"gated_rms_norm: {name} must be one of {', '.join(known)}, got {value!r}")
    if weight.dtype is not x.dtype:
        weight = weight.float()
    eps = DEFAULT_EPS if eps is None else eps
    given = x, gate, weight, groups, eps, CASTING[casting], not gate_first, ACTIVATIONS[activation]
    return (
        GatedRMSNormFunction.apply(*given) if needs_grad("gated_rms_norm", x, gate, weight) else gated_rms_norm_fwd(*given)[0]
    )
