"""What is timed of each operator: a call of ours, the same call of Liger's, and the same allocations with nothing else.

Tensors are small and in fp32, for which Liger casts least, so that what ATen computes on the CPU takes next to no time.
"""

import importlib

import torch

from . import layers
from . import losses
from . import norms
from ._case import Case
from .losses import liger_vocab_parallel_cross_entropy

__all__ = ["CASES", "Case", "liger_vocab_parallel_cross_entropy", "operator"]

CASES = norms.CASES | layers.CASES | losses.CASES


def operator(name):
    """(what liger_aot exports, torch.ops.liger's)."""
    module = importlib.import_module(f"liger_aot.ops.{name}")
    return getattr(module, name), getattr(torch.ops.liger, name).default
