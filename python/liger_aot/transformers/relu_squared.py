"""Liger's squared ReLU module."""

import torch

from .functional import liger_relu_squared


class LigerReLUSquared(torch.nn.Module):
    def __init__(self):
        super().__init__()

    def forward(self, x):
        return liger_relu_squared(x)
