"""Tiled MLPs: a sequence goes through the MLP in parts, whose activations the backward computes again.

After TiledMLP of DeepSpeed's Ulysses (arXiv:2506.13996): what an MLP keeps for its backward is its input alone, and what it
holds at once is that of one part. Each part is one activation checkpoint of torch, so that autograd.grad, hooks, wrappers
and torch.compile see every parameter's gradient as usual; Liger's calls autograd within its backward.
"""

from torch import cat
from torch.utils.checkpoint import checkpoint

from .geglu import LigerGEGLUMLP
from .swiglu import LigerSwiGLUMLP


def apply_tiled_mlp(fn, mlp_module, x, num_shards=None, compute_params=None):
    """fn(mlp_module, x) of x (..., tokens, H) by num_shards parts of the tokens; None takes tokens / H, rounded up.

    fn must treat every token alike. As torch.chunk, which divides, makes fewer parts where they would be empty. compute_params,
    Liger's, is not used. Raises ValueError on an x of one dimension and on a number of shards below 1.
    """
    if x.dim() < 2:
        raise ValueError(f"apply_tiled_mlp: x must have shape (..., tokens, hidden size), got {tuple(x.shape)}")
    if num_shards is None:
        num_shards = max(1, -(-x.shape[-2] // x.shape[-1]))
    if num_shards < 1:
        raise ValueError(f"apply_tiled_mlp: num_shards must be at least 1, got {num_shards}")
    return cat([checkpoint(fn, mlp_module, part, use_reentrant=False) for part in x.chunk(num_shards, -2)], -2)


class LigerTiledMLPFunction:
    @staticmethod
    def apply(fn, mlp_module, x, shards, compute_params=None):
        return apply_tiled_mlp(fn, mlp_module, x, shards, compute_params)


class LigerTiledSwiGLUMLP(LigerSwiGLUMLP):
    """LigerSwiGLUMLP by parts."""

    def __init__(self, config, num_shards=None):
        super().__init__(config)
        self.num_shards = num_shards

    def forward(self, x):
        return apply_tiled_mlp(LigerSwiGLUMLP.forward, self, x, self.num_shards)


class LigerTiledGEGLUMLP(LigerGEGLUMLP):
    """LigerGEGLUMLP by parts, for the config's activations that are a gelu."""

    def __init__(self, config, num_shards=None):
        super().__init__(config)
        activation = getattr(config, "hidden_act", "gelu")
        if activation not in ("gelu", "gelu_new", "gelu_pytorch_tanh"):
            raise ValueError(f"GEGLU: the config's activation must be gelu, gelu_new or gelu_pytorch_tanh, got {activation!r}")
        self.num_shards = num_shards

    def forward(self, x):
        return apply_tiled_mlp(LigerGEGLUMLP.forward, self, x, self.num_shards)
