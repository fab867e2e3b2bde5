"""Liger-Kernel's names: with liger_kernel replaced by liger_aot in an import, code that calls these operators runs on ours."""

import importlib
import importlib.util

from . import monkey_patch
from .cross_entropy import LigerCrossEntropyLoss
from .dyt import LigerDyT
from .fused_add_rms_norm import LigerFusedAddRMSNorm
from .fused_ce_tvd import LigerFusedCETVDLoss
from .fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
from .fused_linear_jsd import LigerFusedLinearJSD
from .fused_linear_kl_div import LigerFusedLinearKLDivLoss
from .geglu import LigerGEGLUMLP
from .jsd import LigerJSD
from .kl_div import LigerKLDIVLoss
from .layer_norm import LigerLayerNorm
from .llama4_rope import liger_llama4_text_rotary_pos_emb
from .llama4_rope import liger_llama4_vision_rotary_pos_emb
from .mhc import LigerMHC
from .mlp import LigerFalconH1MLP
from .mlp import LigerMLP
from .modulated_rms_norm import LigerModulatedRMSNorm
from .multi_token_attention import LigerMultiTokenAttention
from .poly_norm import LigerPolyNorm
from .relu_squared import LigerReLUSquared
from .rms_norm import LigerRMSNorm
from .rms_norm import LigerRMSNormForMuseGlimmer
from .rms_norm import LigerRMSNormForMuseGlimmerTextCentered
from .rope import liger_rotary_pos_emb
from .softmax import LigerSoftmax
from .sparsemax import LigerSparsemax
from .swiglu import LigerBlockSparseTop2MLP
from .swiglu import LigerExperts
from .swiglu import LigerFalconH1SwiGLUMLP
from .swiglu import LigerPhi3SwiGLUMLP
from .swiglu import LigerQwen3MoeSwiGLUMLP
from .swiglu import LigerSwiGLUMLP
from .swiglu import LigerSwiGLUMLPForMuseGlimmer
from .tiled_mlp import LigerTiledGEGLUMLP
from .tiled_mlp import LigerTiledSwiGLUMLP
from .tvd import LigerTVDLoss
from .vocab_parallel_cross_entropy import LigerVocabParallelCrossEntropy

__all__ = [
    "LigerBlockSparseTop2MLP",
    "LigerCrossEntropyLoss",
    "LigerDyT",
    "LigerExperts",
    "LigerFalconH1MLP",
    "LigerFalconH1SwiGLUMLP",
    "LigerFusedAddRMSNorm",
    "LigerFusedCETVDLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearKLDivLoss",
    "LigerGEGLUMLP",
    "LigerJSD",
    "LigerKLDIVLoss",
    "LigerLayerNorm",
    "LigerMHC",
    "LigerMLP",
    "LigerModulatedRMSNorm",
    "LigerMultiTokenAttention",
    "LigerPhi3SwiGLUMLP",
    "LigerPolyNorm",
    "LigerQwen3MoeSwiGLUMLP",
    "LigerReLUSquared",
    "LigerRMSNorm",
    "LigerRMSNormForMuseGlimmer",
    "LigerRMSNormForMuseGlimmerTextCentered",
    "LigerSoftmax",
    "LigerSparsemax",
    "LigerSwiGLUMLP",
    "LigerSwiGLUMLPForMuseGlimmer",
    "LigerTVDLoss",
    "is_transformers_available",
    "liger_llama4_text_rotary_pos_emb",
    "liger_llama4_vision_rotary_pos_emb",
    "LigerTiledGEGLUMLP",
    "LigerTiledSwiGLUMLP",
    "LigerVocabParallelCrossEntropy",
    "liger_rotary_pos_emb",
    *(name for name in monkey_patch.__all__ if "apply_liger_kernel" in name),
]

# What imports transformers, which is optional.
LAZY = {"AutoLigerKernelForCausalLM": "auto_model", "LigerCallback": "callback", "register_experts_implementation": "experts"}


def is_transformers_available() -> bool:
    """Whether transformers is installed, by a look that does not import it."""
    return importlib.util.find_spec("transformers") is not None


def __getattr__(name):
    if name in LAZY:
        try:
            return getattr(importlib.import_module(f".{LAZY[name]}", __name__), name)
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            raise ImportError(
                f"{name} needs transformers, which is not installed: pip install 'liger-aot[transformers]'"
            ) from None
    if name in monkey_patch.__all__:
        return getattr(monkey_patch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
