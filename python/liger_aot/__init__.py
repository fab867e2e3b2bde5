"""Fused training kernels for PyTorch, compiled ahead of time: torch.ops.liger.*"""

from . import functional
from . import nn
from ._as_liger import as_liger
from ._build import VERSION as __version__  # noqa: N811
from ._explain import explain
from ._explain import preload
from ._verify_model import verify
from .bind import bind
from .bind import unbind
from .functional import attn_res
from .functional import cross_entropy
from .functional import cross_entropy_tvd
from .functional import dyt
from .functional import embedding
from .functional import fused_add_rms_norm
from .functional import gated_rms_norm
from .functional import geglu
from .functional import group_norm
from .functional import jsd
from .functional import kl_div
from .functional import layer_norm
from .functional import linear_cross_entropy
from .functional import linear_jsd
from .functional import linear_kl_div
from .functional import linear_logprob
from .functional import mhc_coeffs
from .functional import mhc_post_res
from .functional import mhc_pre
from .functional import modulated_rms_norm
from .functional import moe_experts
from .functional import moe_permute
from .functional import moe_unpermute
from .functional import multi_token_attention
from .functional import neighborhood_attention
from .functional import packed_glu
from .functional import poly_norm
from .functional import relu_squared
from .functional import rms_norm
from .functional import rope
from .functional import softmax
from .functional import sparsemax
from .functional import swiglu
from .functional import tvd
from .functional import vocab_parallel_cross_entropy

__all__ = [
    "__version__",
    "as_liger",
    "attn_res",
    "bind",
    "cross_entropy",
    "cross_entropy_tvd",
    "dyt",
    "embedding",
    "explain",
    "functional",
    "fused_add_rms_norm",
    "gated_rms_norm",
    "geglu",
    "group_norm",
    "jsd",
    "kl_div",
    "layer_norm",
    "linear_cross_entropy",
    "linear_jsd",
    "linear_kl_div",
    "linear_logprob",
    "mhc_coeffs",
    "mhc_post_res",
    "mhc_pre",
    "modulated_rms_norm",
    "moe_experts",
    "moe_permute",
    "moe_unpermute",
    "multi_token_attention",
    "neighborhood_attention",
    "nn",
    "packed_glu",
    "poly_norm",
    "preload",
    "relu_squared",
    "rms_norm",
    "rope",
    "softmax",
    "sparsemax",
    "swiglu",
    "tvd",
    "unbind",
    "verify",
    "vocab_parallel_cross_entropy",
]


def __getattr__(name):
    # Not imported with the package: it needs transformers, which is optional and takes seconds to import.
    if name == "LigerCallback":
        from .transformers import LigerCallback

        return LigerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
