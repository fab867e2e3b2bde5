"""The losses as functions. All take input, weight and what it is compared with first, then biases, references and options;
all take keywords. Positions and defaults are those of Liger-Kernel's functions."""

from .cosine_similarity_loss import liger_fused_linear_cosine
from .cpo_loss import liger_fused_linear_cpo
from .dpo_loss import liger_fused_linear_dpo
from .grpo_loss import liger_fused_linear_grpo
from .jsd_loss import liger_fused_linear_jsd
from .kto_loss import liger_fused_linear_kto
from .orpo_loss import liger_fused_linear_orpo
from .simpo_loss import liger_fused_linear_simpo

__all__ = [
    "liger_fused_linear_cosine",
    "liger_fused_linear_cpo",
    "liger_fused_linear_dpo",
    "liger_fused_linear_grpo",
    "liger_fused_linear_jsd",
    "liger_fused_linear_kto",
    "liger_fused_linear_orpo",
    "liger_fused_linear_simpo",
]
