"""Liger's modules of neighborhood attention, and what they are built from."""

import torch
from torch.nn import Linear

from .functional import liger_fused_neighborhood_attention


class LigerFusedNeighborhoodAttention(torch.nn.Module):
    """out_proj of the attention of each token of (batch, tokens, hidden_size) to its window, with dropout before it."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        scale: float | None = None,
    ):
        super().__init__()
        name = "LigerFusedNeighborhoodAttention"
        if hidden_size % num_heads:
            raise ValueError(f"{name}: hidden_size must be divisible by num_heads {num_heads}, got {hidden_size}")
        if kernel_size < 1 or not kernel_size % 2:
            raise ValueError(f"{name}: kernel_size must be odd and at least 1, got {kernel_size}")
        if dilation < 1:
            raise ValueError(f"{name}: dilation must be at least 1, got {dilation}")
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, hidden_size // num_heads
        self.kernel_size, self.dilation, self.dropout_p = kernel_size, dilation, dropout
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(hidden_size, hidden_size, bias=bias) for _ in range(4))
        self.dropout = torch.nn.Dropout(dropout) if dropout > 0 else None

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        if attention_mask is not None:
            raise NotImplementedError("LigerFusedNeighborhoodAttention: attention_mask must be None: the window is the mask")
        projections = self.q_proj, self.k_proj, self.v_proj
        heads = (p(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for p in projections)
        y = liger_fused_neighborhood_attention(*heads, self.kernel_size, self.dilation, self.scale).transpose(1, 2).flatten(2)
        return self.out_proj(y if self.dropout is None else self.dropout(y))

    def extra_repr(self):
        sizes = f"{self.hidden_size}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"
        return f"{sizes}, scale={self.scale}, dropout={self.dropout_p}"


class LigerFusedNeighborhoodAttentionLayer(torch.nn.Module):
    """hidden_states + attention(layer_norm(hidden_states)), with dropout before the sum."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        scale: float | None = None,
    ):
        super().__init__()
        self.attention = LigerFusedNeighborhoodAttention(hidden_size, num_heads, kernel_size, dilation, bias, dropout, scale)
        self.layer_norm = torch.nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dropout = torch.nn.Dropout(dropout) if dropout > 0 else None

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.attention(self.layer_norm(hidden_states), attention_mask)
        return hidden_states + (y if self.dropout is None else self.dropout(y))


class LigerFusedNeighborhoodAttentionConfig:
    """The arguments of the layer."""

    def __init__(
        self,
        hidden_size: int = 768,
        num_heads: int = 12,
        kernel_size: int = 7,
        dilation: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        scale: float | None = None,
    ):
        self.hidden_size, self.num_heads, self.kernel_size, self.dilation = hidden_size, num_heads, kernel_size, dilation
        self.bias, self.dropout, self.layer_norm_eps, self.scale = bias, dropout, layer_norm_eps, scale

    def to_dict(self):
        return dict(vars(self))
