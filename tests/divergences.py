"""Random distributions, and labels, for the tests of divergences."""

import torch

from harness import fixed

REDUCTIONS = ["none", "mean", "sum", "batchmean"]
# One row, a ragged tail, several turns of the loop, a width that fills its blocks.
SHAPES = [(1, 3), (3, 100), (4, 2049), (2, 6001), (3, 2048)]


def logs(*shape, dtype=torch.float32):
    """Log-probabilities."""
    return torch.randn(shape).log_softmax(-1).to(dtype)


def labels(*shape, ignored=1, ignore_index=-100):
    """Some classes; as many of the first rows as asked for are ignored."""
    found = torch.randint(1, 9, shape)
    found.view(-1)[:ignored] = ignore_index
    return fixed(found)
