"""How DTensors go through the operators that work row by row: each process computes its rows.

Of rows nothing is gathered but the losses of cross_entropy, a few numbers for each, of which every process takes the mean.

torch.distributed.tensor asks each operator which placements of its arguments give which of its results. What is not in RULES,
the linear losses and group_norm among it, is refused by torch, which names the operator.
"""

import functools
import sys

import torch
from torch.compiler import is_dynamo_compiling

# operator -> (its results, its arguments, which dimensions may be sharded: "rows", all but the last, "all", "tokens", all but
# the last two, or, of v, the first and the last, or "none"). Of the letters, x is sharded as the first x, so is v, which has a
# dimension more in front, a, rope's angles, goes with it, so does g, what groups of rows have, as far as it has their
# dimensions, w is whole, s is a sum of which each process has a part; a dot is no tensor.
RULES = {
    "rms_norm_fwd": ("xx", "xw", "rows"),
    "rms_norm_bwd": ("xs", "xxwx..x", "rows"),
    "fused_add_rms_norm_fwd": ("xxx", "xxw", "rows"),
    "gated_rms_norm_fwd": ("xx", "xxw", "rows"),
    "gated_rms_norm_bwd": ("xxs", "xxxwx", "rows"),
    "modulated_rms_norm_fwd": ("xx", "xggw", "rows"),
    "modulated_rms_norm_bwd": ("xsgg", "xxgwx", "rows"),
    "layer_norm_fwd": ("xxx", "xww", "rows"),
    "layer_norm_bwd": ("xs", "xxwwxx", "rows"),
    "attn_res_fwd": ("xvvx", "vw", "tokens"),
    "attn_res_bwd": ("vs", "xvwvvx", "tokens"),
    "mhc_coeffs_fwd": ("xxxxx", "xwwwww", "tokens"),
    "mhc_coeffs_bwd": ("xss", "xxxxwwwwwxx", "tokens"),
    "mhc_pre_fwd": ("x", "xx", "tokens"),
    "mhc_pre_bwd": ("xx", "xxx", "tokens"),
    "mhc_post_res_fwd": ("x", "xxxx", "tokens"),
    "mhc_post_res_bwd": ("xxxx", "xxxxx", "tokens"),
    "dyt_fwd": ("x", "xwww", "rows"),
    "dyt_bwd": ("xs", "xxww", "rows"),
    "poly_norm_fwd": ("xx", "xww", "rows"),
    "poly_norm_bwd": ("xs", "xxwx", "rows"),
    "embedding_fwd": ("x", "wx", "rows"),
    "embedding_bwd": ("s", "xx", "rows"),
    "softmax_fwd": ("x", "x", "rows"),
    "softmax_bwd": ("x", "xx", "rows"),
    "sparsemax_fwd": ("x", "x", "rows"),
    "sparsemax_bwd": ("x", "xx", "rows"),
    "swiglu_fwd": ("x", "xx", "all"),
    "swiglu_bwd": ("xx", "xxx", "all"),
    "geglu_fwd": ("x", "xx", "all"),
    "geglu_bwd": ("xx", "xxx", "all"),
    "packed_glu_fwd": ("x", "x", "rows"),
    "packed_glu_bwd": ("x", "xx", "rows"),
    "relu_squared_fwd": ("x", "x", "all"),
    "relu_squared_bwd": ("x", "xx", "all"),
    "rope_fwd": ("xx", "xxaa", "rows"),
    "rope_bwd": ("xx", "xxaa", "rows"),
    "cross_entropy_fwd": ("xxx", "xxw", "rows"),
    "cross_entropy_reduce": ("ww", "wwwww", "none"),
    "cross_entropy_bwd": ("x", "xxxwxw", "rows"),
    "cross_entropy_tvd_fwd": ("xxxxx", "xxx", "rows"),
    "cross_entropy_tvd_bwd": ("x", "xxxxxxxx", "rows"),
}


def aware(name):
    """The operator of that name; where torch.distributed.tensor was imported, it has the rules by then."""

    def call(*args, **kwargs):
        if not is_dynamo_compiling() and "torch.distributed.tensor" in sys.modules:
            register()
        return getattr(torch.ops.liger, name).default(*args, **kwargs)

    return call


@functools.cache
def register():
    from torch.distributed.tensor.experimental import register_sharding

    for name, rule in RULES.items():
        register_sharding(getattr(torch.ops.liger, name).default)(functools.partial(shardings, *rule))


def shardings(results, arguments, dimensions, *args):
    """[(placements of the results, of the arguments)] that are right on one dimension of a mesh; args describe the tensors."""
    from torch.distributed.tensor import Partial
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard

    roles = arguments.ljust(len(args), ".")[: len(args)]  # the dispatcher leaves out arguments that are as by default
    tensors = [(role, arg) if hasattr(arg, "ndim") else None for role, arg in zip(roles, args, strict=True)]
    most = max(t.ndim for role, t in filter(None, tensors))
    of_groups = next((t for role, t in filter(None, tensors) if role == "g"), None)
    count = {"rows": most - 1, "all": most, "tokens": most - 2, "none": 0}[dimensions]

    def place(role, tensor, dim):
        if role == "x" and (tensor is None or dim < tensor.ndim):  # a scalar upstream is everybody's
            return Shard(dim)
        if role == "v":
            return Shard(dim + 1)
        if role == "a" and dim != 1:  # of angles (b, s, r), (1, s, r) or (s, r), with axes in front, which are every head's
            if dim == 0:
                return Replicate() if tensor.ndim == 2 or tensor.shape[-3] == 1 else Shard(tensor.ndim - 3)
            return Shard(tensor.ndim - 2)
        if role == "g" and dim < of_groups.ndim - 1:
            return Shard(dim)
        return Partial() if role == "s" or (role == "g" and tensor is None) else Replicate()

    found = [([Replicate() for _ in results], [None if t is None else Replicate() for t in tensors])]
    for dim in range(count):
        found.append(([place(role, None, dim) for role in results], [None if t is None else place(*t, dim) for t in tensors]))
    return found
