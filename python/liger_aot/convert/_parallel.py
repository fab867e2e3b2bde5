"""How SAT's model parallelism splits a tensor: a column's first dimension, each summand by itself; a row's second."""

from dataclasses import dataclass

import torch

from ._rules import summands

WHOLE_VOCABULARY = 1000  # below this SAT's embedding is a plain one, held by every rank


@dataclass(frozen=True)
class Layout:
    kind: str  # column, row, or "" for a tensor that every rank holds
    parts: tuple


def layout(item, index):
    kind = item.rule.mp
    if kind == "vocab":
        kind = "column" if item.sat_shapes[index][0] >= WHOLE_VOCABULARY else ""
    dims = item.rule.sat_dims[index].split()
    return Layout(kind, tuple(summands(dims[0], item.sizes)) if dims else ())


def uneven(shape, layout, ranks):
    """The sizes that cannot be split."""
    parts = {"column": layout.parts, "row": shape[1:2]}.get(layout.kind, ())
    return [part for part in parts if part % ranks]


def local_shape(shape, layout, ranks):
    if layout.kind == "row":
        return (shape[0], shape[1] // ranks, *shape[2:])
    return (shape[0] // ranks, *shape[1:]) if layout.kind == "column" else shape


def whole_shape(shape, layout, ranks):
    if layout.kind == "row" and len(shape) > 1:
        return (shape[0], shape[1] * ranks, *shape[2:])
    return (shape[0] * ranks, *shape[1:]) if layout.kind == "column" and shape else shape


def split(tensor, layout, ranks):
    """Of each rank, the pieces of its tensor."""
    if layout.kind == "row":
        return [[piece] for piece in tensor.chunk(ranks, 1)]
    if layout.kind == "column":
        parts = [part.chunk(ranks) for part in tensor.split(layout.parts)]
        return [[part[rank] for part in parts] for rank in range(ranks)]
    return [[tensor]] * ranks


def merge(tensors, layout):
    if layout.kind == "row":
        return torch.cat(tensors, 1)
    if layout.kind == "column":
        own = [part // len(tensors) for part in layout.parts]
        pieces = [tensor.split(own) for tensor in tensors]
        return torch.cat([piece[part] for part in range(len(own)) for piece in pieces])
    return tensors[0]
