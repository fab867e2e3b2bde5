"""Liger's Dynamic Tanh module."""

from ..nn import DyT


class LigerDyT(DyT):
    def __init__(self, hidden_size, beta=True, init_alpha=0.5):
        super().__init__(hidden_size, beta, init_alpha)

    def forward(self, x):
        return super().forward(x)
