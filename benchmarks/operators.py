"""What each operator is called with for a shape: tensors without memory, on which it runs the body that is meant for CUDA."""

import math

import torch

from liger_aot import _op
from liger_aot.ops import attn_res
from liger_aot.ops import cross_entropy
from liger_aot.ops import cross_entropy_tvd
from liger_aot.ops import dyt
from liger_aot.ops import embedding
from liger_aot.ops import fused_add_rms_norm
from liger_aot.ops import gated_rms_norm
from liger_aot.ops import geglu
from liger_aot.ops import group_norm
from liger_aot.ops import jsd
from liger_aot.ops import kl_div
from liger_aot.ops import layer_norm
from liger_aot.ops import linear_cross_entropy
from liger_aot.ops import linear_jsd
from liger_aot.ops import linear_kl_div
from liger_aot.ops import linear_logprob
from liger_aot.ops import mhc_coeffs
from liger_aot.ops import mhc_post_res
from liger_aot.ops import mhc_pre
from liger_aot.ops import modulated_rms_norm
from liger_aot.ops import moe_permute
from liger_aot.ops import moe_unpermute
from liger_aot.ops import multi_token_attention
from liger_aot.ops import neighborhood_attention
from liger_aot.ops import packed_glu
from liger_aot.ops import poly_norm
from liger_aot.ops import relu_squared
from liger_aot.ops import rms_norm
from liger_aot.ops import rope
from liger_aot.ops import softmax
from liger_aot.ops import sparsemax
from liger_aot.ops import swiglu
from liger_aot.ops import tvd
from liger_aot.ops import vocab_parallel_cross_entropy

HEAD = 128  # columns
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Shape(torch.Tensor):
    """A tensor that says that it is on a GPU and holds nothing; operators on it run the bodies that are meant for CUDA."""

    is_cuda = True

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if isinstance(function, torch._ops.OpOverload) and function.namespace == "liger":
            return _op.BODIES[function.name().removeprefix("liger::").partition(".")[0]](*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


def shape(*sizes, dtype="bfloat16"):
    return torch.empty(sizes, dtype=DTYPES.get(dtype, dtype), device="meta").as_subclass(Shape)


def norm_sizes(s):
    return s["tokens"], s["hidden"]


def of_rms_norm(s, dtype):
    return rms_norm.RMSNormFunction, (shape(*norm_sizes(s), dtype=dtype), shape(s["hidden"], dtype=dtype), 1e-6, 0.0, False)


def of_fused_add_rms_norm(s, dtype):
    x, residual = (shape(*norm_sizes(s), dtype=dtype) for _ in range(2))
    return fused_add_rms_norm.FusedAddRMSNormFunction, (x, residual, shape(s["hidden"], dtype=dtype), 1e-6, 0.0, False)


def of_gated_rms_norm(s, dtype):
    x, gate = (shape(*norm_sizes(s), dtype=dtype) for _ in range(2))
    options = 1, 1e-6, False, True, True
    return gated_rms_norm.GatedRMSNormFunction, (x, gate, shape(s["hidden"], dtype=dtype), *options)


def of_layer_norm(s, dtype):
    weight, bias = (shape(s["hidden"], dtype=dtype) for _ in range(2))
    return layer_norm.LayerNormFunction, (shape(*norm_sizes(s), dtype=dtype), weight, bias, 1e-5)


def of_rope(s, dtype):
    """As models have q and k: heads transposed behind the tokens, a fourth of them for k."""
    n = s.get("head", HEAD)
    heads = max(1, s["hidden"] // n)
    q, k = (shape(1, s["tokens"], h, n, dtype=dtype).transpose(1, 2) for h in (heads, max(1, heads // 4)))
    return rope.RopeFunction, (q, k, *(shape(1, s["tokens"], n, dtype=dtype) for _ in range(2)))


def of_swiglu(s, dtype):
    return swiglu.SwiGLUFunction, (*(shape(*norm_sizes(s), dtype=dtype) for _ in range(2)), 1.0, 1.0)


def of_geglu(s, dtype):
    return geglu.GeGLUFunction, (*(shape(*norm_sizes(s), dtype=dtype) for _ in range(2)), True)


def of_packed_glu(s, dtype):
    return packed_glu.PackedGLUFunction, (shape(s["tokens"], 2 * s["hidden"], dtype=dtype), "silu")


def slots(s):
    """Where the rows of a model with 8 experts a token go."""
    return shape(8 * s["tokens"], dtype=torch.int64), shape(s["tokens"], 8, dtype=torch.int64)


def of_moe_permute(s, dtype):
    return moe_permute.MoEPermuteFunction, (shape(*norm_sizes(s), dtype=dtype), *slots(s))


def of_moe_unpermute(s, dtype):
    x, weight = shape(8 * s["tokens"], s["hidden"], dtype=dtype), shape(s["tokens"], 8, dtype=dtype)
    return moe_unpermute.MoEUnpermuteFunction, (x, weight, *slots(s))


def of_relu_squared(s, dtype):
    return relu_squared.ReLUSquaredFunction, (shape(*norm_sizes(s), dtype=dtype),)


def of_dyt(s, dtype):
    width = s["hidden"]
    return dyt.DyTFunction, (*(shape(*n, dtype=dtype) for n in (norm_sizes(s), (1,), (width,), (width,))),)


def of_modulated_rms_norm(s, dtype):
    """Images of 1024 tokens, each with a scale and a shift."""
    images = max(1, s["tokens"] // 1024)
    x = shape(images, s["tokens"] // images, s["hidden"], dtype=dtype)
    both = (shape(images, s["hidden"], dtype=dtype) for _ in range(2))
    return modulated_rms_norm.ModulatedRMSNormFunction, (x, *both, shape(s["hidden"], dtype=dtype), 1e-6, 0.0, False)


def of_attn_res(s, dtype):
    """Of eight blocks of layers."""
    v, query = shape(8, *norm_sizes(s), dtype=dtype), shape(s["hidden"], dtype="float32")
    return attn_res.AttnResFunction, (v, query, 1e-6)


STREAMS = 4


def streams(s, dtype, *last):
    """What tokens of one batch have, each of this shape."""
    return shape(1, s["tokens"], *last, dtype=dtype)


def of_mhc_coeffs(s, dtype):
    heads = STREAMS * (STREAMS + 2)
    x, phi = streams(s, dtype, STREAMS, s["hidden"]), shape(STREAMS * s["hidden"], heads, dtype=dtype)
    parameters = [shape(*sizes, dtype="float32") for sizes in ((heads,), (), (), ())]
    return mhc_coeffs.MHCCoeffsFunction, (x, phi, *parameters, 20, 1e-6, 0.0, 1e-6, 2.0)


def of_mhc_pre(s, dtype):
    return mhc_pre.MHCPreFunction, (streams(s, dtype, STREAMS, s["hidden"]), streams(s, "float32", STREAMS))


def of_mhc_post_res(s, dtype):
    x, f_out = streams(s, dtype, STREAMS, s["hidden"]), streams(s, dtype, s["hidden"])
    coefficients = (streams(s, "float32", *last) for last in ((STREAMS,), (STREAMS, STREAMS)))
    return mhc_post_res.MHCPostResFunction, (x, f_out, *coefficients)


def of_embedding(s, dtype):
    """Which rows, no shape says: each at most once, as far as bytes go."""
    weight, indices = shape(s["vocabulary"], s["hidden"], dtype=dtype), shape(s["tokens"], dtype=torch.int64)
    return embedding.EmbeddingFunction, (weight, indices, -1)


def of_poly_norm(s, dtype):
    return poly_norm.PolyNormFunction, (shape(*norm_sizes(s), dtype=dtype), shape(3, dtype=dtype), shape(1, dtype=dtype), 1e-6)


def of_softmax(s, dtype):
    return softmax.SoftmaxFunction, (shape(*norm_sizes(s), dtype=dtype),)


def of_sparsemax(s, dtype):
    return sparsemax.SparsemaxFunction, (shape(*norm_sizes(s), dtype=dtype),)


def of_multi_token_attention(s, dtype):
    """Heads of 128 columns in the width, of which each has a convolution of its own, 3 x 3."""
    heads, tokens = max(1, s["hidden"] // HEAD), s["tokens"]
    scores, weight = shape(1, heads, tokens, tokens, dtype=dtype), shape(heads, 1, 3, 3, dtype=dtype)
    return multi_token_attention.MultiTokenAttentionFunction, (scores, weight, None, [1, 1], [1, 1], [1, 1], heads, False)


def of_neighborhood_attention(s, dtype):
    """As models have q, k and v: heads transposed behind the tokens; Liger's window of 7."""
    n = s.get("head", HEAD)
    q, k, v = (shape(1, s["tokens"], max(1, s["hidden"] // n), n, dtype=dtype).transpose(1, 2) for _ in range(3))
    return neighborhood_attention.NeighborhoodAttentionFunction, (q, k, v, 7, 1, n**-0.5)


def of_group_norm(s, dtype):
    """As image models have it: 512 channels in 32 groups, for as many numbers as tokens times hidden."""
    weight, bias = (shape(512, dtype=dtype) for _ in range(2))
    return group_norm.GroupNormFunction, (shape(8, 512, math.prod(norm_sizes(s)) // 4096, dtype=dtype), 32, weight, bias, 1e-5)


def of_cross_entropy(s, dtype, stats=False):
    logits, target = shape(s["tokens"], s["vocabulary"], dtype=dtype), shape(s["tokens"], dtype=torch.int64)
    options = -100, 0.0, None, 0.0
    return cross_entropy.CrossEntropyFunction, (logits, target, None, options, True, DTYPES[dtype], stats)


def of_cross_entropy_stats(s, dtype):
    return of_cross_entropy(s, dtype, True)


def of_vocab_parallel_cross_entropy(s, dtype):
    """One of several processes' part, without what they tell each other."""
    logits, target = shape(s["tokens"], s["vocabulary"], dtype=dtype), shape(s["tokens"], dtype=torch.int64)
    options = -100, 0.0, None, 0.0, True
    return vocab_parallel_cross_entropy.VocabParallelCrossEntropyFunction, (logits, target, "", 0, 1, options)


def pair(s, dtype):
    """Two distributions, and no labels."""
    return *(shape(s["tokens"], s["vocabulary"], dtype=dtype) for _ in range(2)), None, -100


def of_kl_div(s, dtype):
    return kl_div.KLDivFunction, (*pair(s, dtype), True, 0.0, (s["tokens"], 1), DTYPES[dtype])


def of_jsd(s, dtype):
    return jsd.JSDFunction, (*pair(s, dtype), 0.5, (0, 1), DTYPES[dtype])


def of_tvd(s, dtype):
    return tvd.TVDFunction, (*pair(s, dtype), (0, 1), DTYPES[dtype])


def linear(s, dtype):
    hidden, weight = shape(*norm_sizes(s), dtype=dtype), shape(s["vocabulary"], s["hidden"], dtype=dtype)
    return hidden, weight, shape(s["tokens"], dtype=torch.int64), None


def of_linear_cross_entropy(s, dtype, stats=False):
    arguments = *linear(s, dtype), None, (-100, 0.0, None, 0.0, 1.0), True, DTYPES[dtype], stats
    return linear_cross_entropy.LinearCrossEntropyFunction, arguments


def of_linear_cross_entropy_stats(s, dtype):
    return of_linear_cross_entropy(s, dtype, True)


def of_linear_logprob(s, dtype):
    return linear_logprob.LinearLogprobFunction, (*linear(s, dtype), 1.0, -100)


def of_linear_jsd(s, dtype):
    """Teacher and student of one size."""
    hidden, weight, _, bias = linear(s, dtype)
    teacher = (shape(*t.shape, dtype=dtype) for t in (hidden, weight))
    arguments = hidden, weight, bias, *teacher, bias, None, (-100, 0.5, 1.0), (0, 1), DTYPES[dtype]
    return linear_jsd.LinearJSDFunction, arguments


def of_linear_kl_div(s, dtype):
    hidden, weight, _, bias = linear(s, dtype)
    target = shape(s["tokens"], s["vocabulary"], dtype=dtype)
    return linear_kl_div.LinearKLDivFunction, (hidden, weight, bias, target, None, (-100, 0.0, 1.0), (0, 1), DTYPES[dtype])


def of_cross_entropy_tvd(s, dtype):
    logits, teacher, _, index = pair(s, dtype)
    return cross_entropy_tvd.CrossEntropyTVDFunction, (logits, teacher, shape(s["tokens"], dtype=torch.int64), index)


# {name: (sizes, dtype) -> (the autograd.Function behind it, its arguments)}
OPERATORS = {name.removeprefix("of_"): function for name, function in list(globals().items()) if name.startswith("of_")}
