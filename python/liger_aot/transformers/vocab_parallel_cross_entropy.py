"""Liger's cross entropy of logits whose classes are spread over the processes of a group, as a module."""

import torch

from ._functions import LigerVocabParallelCEFunction
from ._names import one_of


class LigerVocabParallelCrossEntropy(torch.nn.Module):
    def __init__(
        self,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "none",
        label_smoothing_formula: str = "pytorch",
        label_smoothing_mode: str = "global",
    ):
        super().__init__()
        name = "LigerVocabParallelCrossEntropy"
        one_of(name, "reduction", reduction, ("none",))
        one_of(name, "label_smoothing_formula", label_smoothing_formula, ("pytorch", "megatron"))
        one_of(name, "label_smoothing_mode", label_smoothing_mode, ("global", "partition"))
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"{name}: label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.label_smoothing_formula = label_smoothing_formula
        self.label_smoothing_mode = label_smoothing_mode

    def forward(self, vocab_parallel_logits: torch.Tensor, target: torch.Tensor, tp_group=None):
        options = self.ignore_index, self.label_smoothing, self.label_smoothing_formula, self.label_smoothing_mode
        return LigerVocabParallelCEFunction.apply(vocab_parallel_logits, target, tp_group, *options)
