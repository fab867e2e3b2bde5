"""Liger's multi-token attention module."""

import math

import torch
from torch.nn.modules.utils import _pair

from .functional import liger_multi_token_attention


class LigerMultiTokenAttention(torch.nn.Module):
    """A convolution over the probabilities of neighbouring queries, keys and heads; its bias starts as zero."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        sparse: bool = False,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, _pair(kernel_size)
        self.stride, self.padding, self.dilation = _pair(stride), _pair(padding), _pair(dilation)
        self.groups, self.sparse = groups, sparse
        self.weight = torch.nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.register_parameter("bias", torch.nn.Parameter(torch.empty(out_channels)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self):
        torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        options = self.stride, self.padding, self.dilation, self.groups, self.sparse
        return liger_multi_token_attention(scores, self.weight, self.bias, *options)

    def extra_repr(self):
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{sizes}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}, sparse={self.sparse}"
