"""What moving rows of tokens to their experts and back requires, and how it is done in plain torch."""

import torch

from ._check import FLOATS
from ._check import check_indices

BLOCK = 1024


def check_routing(op, x, order, position, of_slots):
    """order (T · K,) and position (T, K) are int64 and on x's device; x has a row for each token, or for each slot."""
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: x must be float32, float16 or bfloat16, got {x.dtype}")
    for name, tensor, dims in (("order", order, 1), ("position", position, 2)):
        if tensor.dim() != dims or tensor.dtype is not torch.int64:
            raise ValueError(f"{op}: {name} must have {dims} dimensions and be int64, got {tensor.dim()} and {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like x, got {tensor.device}; move it with .to()")
    slots = position.shape[0] * position.shape[1]
    # Known sizes alone: torch 2.13 cannot decompose a program from a file in which one input's size is a multiple of another's.
    if type(slots) is int and order.shape[0] != slots:
        raise ValueError(
            f"{op}: order must have one number for each of position's, {tuple(position.shape)}, got {tuple(order.shape)}"
        )
    rows = (order if of_slots else position).shape[0]
    if x.dim() != 2 or x.shape[0] != rows:
        raise ValueError(f"{op}: x must have shape ({rows}, H), got {tuple(x.shape)}")


def check_slots(op, order, position):
    """order has every slot once, and position each slot's row in it, or none: else kernels would read and write elsewhere."""
    check_indices(op, "order", order, position.numel(), ", the slots of position")
    row = order.new_full((position.numel(),), -1).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    position = position.reshape(-1)
    wrong = ((row < 0) | ((position >= 0) & (position != row))).nonzero()
    if wrong.numel():
        slot = wrong[0].item()
        raise ValueError(
            f"{op}: order must have every slot once, in the row that position says, as functional.moe_route makes them, got "
            f"slot {slot} in row {row[slot].item()} and position {position[slot].item()}"
        )


def rows_at(x, position):
    """x's rows at position (T, K), zeros where that is negative: (T, K, H)."""
    return torch.where((position >= 0)[..., None], x[position.clamp(min=0)], 0)
