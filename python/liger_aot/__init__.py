"""Fused training kernels for PyTorch, compiled ahead of time: torch.ops.liger.*"""

from ._build import VERSION as __version__
from ._explain import explain
from ._explain import preload
from .ops.rms_norm import rms_norm
