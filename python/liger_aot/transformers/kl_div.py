"""Liger's Kullback-Leibler divergence, as a module."""

import torch

from .functional import liger_kl_div


class LigerKLDIVLoss(torch.nn.KLDivLoss):
    """eps comes first, then torch's arguments."""

    def __init__(self, eps: float = 1e-10, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred, y_true):
        return liger_kl_div(y_pred, y_true, reduction=self.reduction, log_target=self.log_target, eps=self.eps)
