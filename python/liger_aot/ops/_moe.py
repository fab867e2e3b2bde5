"""What moving rows of tokens to their experts and back requires, and how it is done in plain torch."""

import torch

from ._check import FLOATS

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


def rows_at(x, position):
    """x's rows at position (T, K), zeros where that is negative: (T, K, H)."""
    return torch.where((position >= 0)[..., None], x[position.clamp(min=0)], 0)
