"""Liger's softmax module, over the last dimension."""

import torch

from .functional import liger_softmax


class LigerSoftmax(torch.nn.Module):
    def __init__(self):
        super().__init__()

    def forward(self, x: torch.Tensor):
        return liger_softmax(x)
