"""Mixtures of experts: torch's grouped matrix product, and our operators before, between and after two of it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ._check import FLOATS
from ._linear import autocast
from .moe_permute import moe_permute
from .moe_unpermute import moe_unpermute
from .packed_glu import packed_glu_in_place

ROW = 16  # bytes that the rows of what torch's grouped product multiplies must be divisible by


def moe_route(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order, position, offsets) of the experts (T, K) of T tokens: how their rows go to the experts and back.

    order (T · K,) is the slot of each row, position (T, K) the row of each slot or -1, offsets (num_experts,) the end of each
    expert's rows, int32. Rows of one expert are in the order of their tokens. An index outside 0 ... num_experts - 1 is no
    expert; its row comes last. Nothing waits for the device.

    >>> liger_aot.functional.moe_route(torch.tensor([[1, 0], [1, 3]]), 3)
    (tensor([1, 0, 2, 3]), tensor([[ 1,  0],
            [ 2, -1]]), tensor([1, 3, 3], dtype=torch.int32))
    """
    index = top_k_index.reshape(-1).long()
    expert, order = index.masked_fill(index < 0, num_experts).sort(stable=True)
    ends = torch.arange(num_experts, dtype=expert.dtype, device=expert.device)
    offsets = torch.searchsorted(expert, ends, right=True, out_int32=True)
    rows = torch.arange(order.shape[0], device=order.device).masked_fill(expert >= num_experts, -1)
    return order, torch.empty_like(order).scatter_(0, order, rows).view(top_k_index.shape), offsets


def moe_experts(
    hidden: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str | Callable[[Tensor], Tensor] = "silu",
    transposed: bool = False,
) -> Tensor:
    """The weighted sum over each token's K experts of down_proj(f(gate) · up),  [gate, up] = gate_up_proj(hidden).

    hidden (..., H); gate_up_proj (E, 2 F, H) and down_proj (E, H, F), or (E, H, 2 F) and (E, F, H) with transposed; biases
    (E, 2 F) and (E, H); top_k_index and top_k_weights (..., K), an index outside 0 ... E - 1 being no expert. All of one dtype,
    fp32, fp16 or bf16, but the weights, which may be fp32. activation is packed_glu's, or a function of the rows [gate, up]
    which treats each alone. Under autocast the products are in its dtype. Without a token the projections get no gradient.

    The products are torch.nn.functional.grouped_mm: in bf16 on GPUs of compute capability 9.x and 10.x nothing waits for the
    device; for others torch itself reads the offsets on the host. Raises ValueError on what does not fit together, and on an H
    or F whose rows are no multiple of 16 bytes; NotImplementedError where another dtype than bf16 is compiled or exported.

    >>> up, down = torch.ones(2, 8, 4), torch.ones(2, 4, 4)
    >>> liger_aot.moe_experts(torch.ones(1, 4), up, down, torch.tensor([[1]]), torch.ones(1, 1))
    tensor([[62.8483, 62.8483, 62.8483, 62.8483]])
    """
    dtype, shape = hidden.dtype, hidden.shape
    hidden, gate_up_proj, down_proj, gate_up_bias, down_bias = autocast(
        hidden, gate_up_proj, down_proj, gate_up_bias, down_bias
    )
    if transposed:
        gate_up, down = gate_up_proj, down_proj
    else:
        gate_up, down = gate_up_proj.mT, down_proj.mT
    check(hidden, gate_up, down, top_k_index, top_k_weights, gate_up_bias, down_bias, callable(activation))
    hidden, index, weights = (t.flatten(0, -2) for t in (hidden, top_k_index, top_k_weights))
    order, position, offsets = moe_route(index, gate_up.shape[0])
    x = moe_permute(hidden, order, position)
    if x.shape[0]:  # torch documents no grouped product of no rows
        x = grouped_linear(x, gate_up, gate_up_bias, offsets)
        x = activated(x, activation, down.shape[1])
        x = grouped_linear(x, down, down_bias, offsets)
    return moe_unpermute(x, weights, order, position).view(shape).to(dtype)


def activated(x, activation, width):
    if not callable(activation):
        return packed_glu_in_place(x, activation)
    y = activation(x)
    if y.shape != (x.shape[0], width):
        raise ValueError(
            f"moe_experts: activation must give rows of down_proj's width, {(x.shape[0], width)}, got {tuple(y.shape)} of "
            f"{tuple(x.shape)}"
        )
    return y


def grouped_linear(x, weight, bias, offsets):
    """Each expert's rows of x (S, in), which end at offsets, times its weight (E, in, out), plus its bias (E, out)."""
    y = functional.grouped_mm(x, weight, offs=offsets)
    if bias is None:
        return y
    expert = torch.searchsorted(offsets, torch.arange(x.shape[0], dtype=offsets.dtype, device=x.device), right=True)
    # Rows of no expert have numbers and gradients that nobody wrote: their bias is one more, which is nobody's.
    return y + functional.pad(bias, (0, 0, 0, 1))[expert]


def check(hidden, gate_up, down, index, weights, gate_up_bias, down_bias, any_width):
    """Of projections (E, H, 2 F), or of any width, and (E, F, H)."""
    if hidden.dtype not in FLOATS:
        raise ValueError(f"moe_experts: hidden must be float32, float16 or bfloat16, got {hidden.dtype}")
    if torch.compiler.is_compiling() and hidden.dtype is not torch.bfloat16:
        raise NotImplementedError(
            f"moe_experts: torch traces its grouped product in torch.bfloat16 alone, got {hidden.dtype}; cast with .to(), use "
            "autocast, or leave the experts out of what is compiled or exported"
        )
    experts, n, inner = (gate_up.shape[0], *down.shape[:0:-1]) if gate_up.dim() == down.dim() == 3 else (0, 0, 0)
    agree = experts and down.shape[0] == experts and gate_up.shape[1] == n and (any_width or gate_up.shape[2] == 2 * inner)
    if not agree or hidden.dim() < 2 or hidden.shape[-1] != n:
        raise ValueError(
            "moe_experts: hidden (..., H) and the projections, by experts, rows and columns (E, H, 2 F) and (E, F, H), must "
            f"agree, got {tuple(hidden.shape)}, {tuple(gate_up.shape)} and {tuple(down.shape)}"
        )
    for name, t in (("top_k_index", index), ("top_k_weights", weights)):
        if t.dim() != hidden.dim() or t.shape[:-1] != hidden.shape[:-1] or t.shape != index.shape:
            raise ValueError(
                f"moe_experts: {name} must have shape {(*hidden.shape[:-1], 'K')}, got {tuple(t.shape)} of {tuple(index.shape)}"
            )
        if t.device != hidden.device:
            raise ValueError(f"moe_experts: {name} must be on {hidden.device} like hidden, got {t.device}; move it with .to()")
    if index.is_floating_point() or index.dtype is torch.bool:
        raise ValueError(f"moe_experts: top_k_index must be of integers, got {index.dtype}")
    biases = ("gate_up_bias", gate_up_bias, gate_up), ("down_bias", down_bias, down)
    for name, bias, projection in biases:
        if bias is not None and bias.shape != (experts, projection.shape[2]):
            raise ValueError(f"moe_experts: {name} must have shape {(experts, projection.shape[2])}, got {tuple(bias.shape)}")
    for name, t in (("gate_up_proj", gate_up), ("down_proj", down), *((name, bias) for name, bias, _ in biases)):
        if t is not None and (t.dtype is not hidden.dtype or t.device != hidden.device):
            raise ValueError(
                f"moe_experts: {name} must be {hidden.dtype} on {hidden.device} like hidden, got {t.dtype} on {t.device}; "
                "move or cast it with .to()"
            )
    for name, size in (("H", n), ("F", inner)):
        if size * hidden.dtype.itemsize % ROW:
            raise ValueError(
                f"moe_experts: {name} must be a multiple of {ROW // hidden.dtype.itemsize} in {hidden.dtype}, for torch's "
                f"grouped product, got {size}; pad the projections"
            )
