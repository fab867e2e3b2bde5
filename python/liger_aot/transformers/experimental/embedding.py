"""Liger's embedding module."""

import torch

from ...functional import embedding


class LigerEmbedding(torch.nn.Module):
    """Rows of a table; row padding_idx is zero, whatever weight holds there, and gets no gradient."""

    def __init__(self, num_embeddings, embedding_dim, padding_idx: int | None = None):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.weight = torch.nn.Parameter(torch.randn(num_embeddings, embedding_dim))
        if padding_idx is not None:
            with torch.no_grad():
                self.weight[padding_idx] = 0

    def forward(self, indices):
        embedded = embedding(indices, self.weight, self.padding_idx)
        if self.padding_idx is None:
            return embedded
        return embedded.masked_fill((indices == self.padding_idx % self.num_embeddings)[..., None], 0)

    def extra_repr(self):
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"
