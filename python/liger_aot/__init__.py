"""Fused training kernels for PyTorch, compiled ahead of time: torch.ops.liger.*"""

from . import functional
from . import nn
from ._build import VERSION as __version__  # noqa: N811
from ._explain import explain
from ._explain import preload
from .bind import bind
from .bind import unbind
from .functional import cross_entropy
from .functional import fused_add_rms_norm
from .functional import geglu
from .functional import layer_norm
from .functional import linear_cross_entropy
from .functional import linear_logprob
from .functional import rms_norm
from .functional import rope
from .functional import swiglu

__all__ = [
    "__version__",
    "bind",
    "cross_entropy",
    "explain",
    "functional",
    "fused_add_rms_norm",
    "geglu",
    "layer_norm",
    "linear_cross_entropy",
    "linear_logprob",
    "nn",
    "preload",
    "rms_norm",
    "rope",
    "swiglu",
    "unbind",
]
