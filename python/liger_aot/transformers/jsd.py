"""Liger's Jensen-Shannon divergence, as a module."""

import torch

from .functional import liger_jsd


class LigerJSD(torch.nn.Module):
    def __init__(self, beta: float = 0.5, ignore_index: int = -100):
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: torch.Tensor, log_p: torch.Tensor, shift_labels: torch.LongTensor | None = None):
        return liger_jsd(log_q, log_p, shift_labels, self.beta, self.ignore_index)
