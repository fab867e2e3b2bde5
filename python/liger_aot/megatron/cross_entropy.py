"""Megatron's cross entropy of logits whose classes are spread over processes, as a module."""

from ..transformers.vocab_parallel_cross_entropy import LigerVocabParallelCrossEntropy


class LigerMegatronCrossEntropy(LigerVocabParallelCrossEntropy):
    """LigerVocabParallelCrossEntropy, smoothing labels as Megatron does: over the classes of each process."""

    def __init__(
        self,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "none",
        label_smoothing_formula: str = "megatron",
        label_smoothing_mode: str = "partition",
    ):
        super().__init__(ignore_index, label_smoothing, reduction, label_smoothing_formula, label_smoothing_mode)
