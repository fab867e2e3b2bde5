"""Liger's cross entropy and total variation distance of each token, as a module."""

import torch

from ..functional import cross_entropy_tvd


class LigerFusedCETVDLoss(torch.nn.Module):
    """The teacher gets no gradient."""

    def __init__(self, ignore_index: int = -100):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, student_logits, teacher_logits, target):
        return cross_entropy_tvd(student_logits, teacher_logits.detach(), target, ignore_index=self.ignore_index)
