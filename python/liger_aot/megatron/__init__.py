"""Megatron-Core on these operators, by Liger-Kernel's names: modules for its specs, and what puts them in Megatron's places."""

from .cross_entropy import LigerMegatronCrossEntropy
from .monkey_patch import apply_liger_kernel_to_megatron
from .rms_norm import LigerMegatronRMSNorm
from .swiglu import LigerMegatronSwiGLU

__all__ = ["LigerMegatronCrossEntropy", "LigerMegatronRMSNorm", "LigerMegatronSwiGLU", "apply_liger_kernel_to_megatron"]
