"""Liger's experimental modules."""

from .embedding import LigerEmbedding

__all__ = ["LigerEmbedding"]
