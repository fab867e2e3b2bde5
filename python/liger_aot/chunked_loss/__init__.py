"""Losses of post-training, by Liger-Kernel's names: preference, policy and distillation losses of a head whose logits never
exist whole. Each is a function with keywords in functional, an autograd-like Function.apply and a module."""

from .cosine_similarity_loss import LigerFusedLinearCosineSimilarityLoss
from .cpo_loss import LigerFusedLinearCPOLoss
from .dpo_loss import LigerFusedLinearDPOLoss
from .grpo_loss import LigerFusedLinearGRPOLoss
from .jsd_loss import LigerFusedLinearJSDLoss
from .kto_loss import LigerFusedLinearKTOLoss
from .orpo_loss import LigerFusedLinearORPOLoss
from .simpo_loss import LigerFusedLinearSimPOLoss

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCosineSimilarityLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]
