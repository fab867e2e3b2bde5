"""What a case is, and what the cases are made of."""

import dataclasses
from collections.abc import Callable

import torch

FP32 = torch.float32
ROWS, N = 32, 64
CONTIGUOUS = torch.contiguous_format


@dataclasses.dataclass
class Case:
    inputs: list  # tensors; those that require a gradient get one
    ours: Callable  # (operator, *inputs)
    liger: Callable | None  # (liger_kernel.transformers.functional, *inputs)
    forward: Callable | None = None  # the allocations of a forward and of a backward
    backward: Callable | None = None
    function: Callable | None = None  # (forward, backward) -> a call(*inputs) with an autograd.Function that does only that


class Cases(dict):
    """{name: what builds the case}."""

    def add(self, build):
        self[build.__name__] = build
        return build


def leaf(*shape):
    return torch.randn(shape).requires_grad_()
