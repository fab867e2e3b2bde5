"""What an operator launches for a shape, and the bytes that moves: the package's own code, run on tensors without memory."""

import contextlib
import dataclasses
import math
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from liger_aot import _op
from liger_aot import _runtime
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
from liger_aot.ops._check import FLOATS

cdiv = _runtime.cdiv
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


def size(tensor):
    return tensor.numel() * tensor.element_size()


# --- the operators: (sizes, dtype) -> (the autograd.Function behind it, its arguments)


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


OPERATORS = {name.removeprefix("of_"): function for name, function in list(globals().items()) if name.startswith("of_")}


# --- the kernels: what cannot be read off the arguments of a launch


def never(v):
    return 0, 0


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Of `v`, a launch's arguments, constants, number of programs, and whether its variant is the aligned one."""

    writes: tuple  # the parameters it writes; it reads the others
    trips: Callable = lambda v: []  # how often each loop of the machine code runs, in the order of their ends
    # (bytes moved once more, from the L2 as far as it holds them; of what a program touches in between)
    again: Callable = never
    branches: int = 1  # of which a program takes one
    ahead: int = 0  # loads that must be back before the others start


def blocks(v):
    return cdiv(v["n"], v["BLOCK"])


def groups(v):
    return cdiv(v["rows"], v["ROWS"])


def twice(v):
    return [blocks(v)] * 2 if v["LOOP"] else []


def row(v, *names):
    """Bytes of one row of these tensors."""
    return v["n"] * sum(v[name].element_size() for name in names)


def again_forward(name):
    return lambda v: (v["rows"] * row(v, name), v["ROWS"] * row(v, name)) if v["LOOP"] else (0, 0)


def again_backward(v):
    """The rows once more, and the program's share of the weights' gradients, read and written for each of its turns but one."""
    if not v["LOOP"]:
        return 0, 0
    share = 4 * v["n"] * (v["need_dw"] + v.get("need_db", 0))
    rows = row(v, "x", "dy")
    return v["rows"] * rows + 2 * share * (groups(v) - v["programs"]), v["ROWS"] * rows + share


def again_gated_backward(v):
    """As again_backward, of one group of columns."""
    rows, share = row(v, "x", "gate", "dy"), 4 * v["n"]
    return (v["rows"] * rows + 2 * share * (groups(v) - v["programs"]), v["ROWS"] * rows + share) if v["LOOP"] else (0, 0)


def turns(v):
    return groups(v) / v["programs"]


def trips_backward(v):
    return [*twice(v), turns(v)]


def trips_rope(v):
    left = cdiv(v["n"] - 2 * v["half"] * v["parts"], 2 * v["HALF"])  # of the programs of the first part
    return ([cdiv(v["half"], v["HALF"]), left] if v["LOOP"] else [left]) * 2


def walked(*names):
    """The row of these tensors once more."""

    def again(v):
        row = v["n"] * sum(v[name].element_size() for name in names)
        return (v["programs"] * row, row) if v.get("LOOP", True) else (0, 0)

    return again


def gathered(v):
    """A token's row for each of its experts but one."""
    row = v["n"] * v["x"].element_size()
    return (v["k"] - 1) * v["size"] // v["k"] * v["x"].element_size(), row


def fours(v):
    """ptxas unrolls the loop of the aligned variants."""
    return [v["k"] // 4, v["k"] % 4] if v["aligned"] else [v["k"]]


def gathered_back(v):
    row = v["n"] * v["dy"].element_size()
    return (v["programs"] - v["programs"] // v["k"]) * row, row


STEPS = 4  # assumed, of the search for a row's threshold, which depends on the numbers


def trips_sparsemax(v):
    return [blocks(v), STEPS * blocks(v), STEPS, blocks(v)] if v["LOOP"] else [STEPS]


def again_sparsemax(v):
    row = v["n"] * v["x"].element_size()
    return ((STEPS + 1) * v["programs"] * row, row) if v["LOOP"] else (0, 0)


def reach(v):
    return min(v["half"], (v["tokens"] - 1) // v["dilation"])


def window(loops):
    return lambda v: [2 * reach(v) + 1] * loops


def neighbours(*names):
    """The rows that the window of a program's tokens has besides: a step of the window reads the first level cache."""

    def again(v):
        more = min(2 * reach(v) * v["ROWS"], 2 * reach(v) * v["dilation"])
        return v["programs"] * more * row(v, *names), (more + v["ROWS"]) * row(v, *names)

    return again


def trips_attn_res(v):
    """The softmax's loop over rows, and where a row is wider than a block, a second one for each block of columns."""
    return [blocks(v), v["depth"], v["depth"], blocks(v)] if v["LOOP"] else [v["depth"]]


def trips_attn_res_backward(v):
    turns = v["tokens"] / v["programs"]
    return [*trips_attn_res(v), turns] if v["LOOP"] else [v["depth"], v["depth"], turns]


def again_depth(v):
    """All rows of v once more."""
    own = v["depth"] * row(v, "v")
    return v["tokens"] * own, own


def again_phi(v):
    """What the streams are multiplied with, for each group of tokens but one."""
    own = 4 * v["n"] * v["heads"]
    return (cdiv(v["rows"], v["TOKENS"]) - 1) * own, own


def again_dy(v):
    """The layer's gradient for each stream but one."""
    return (v["programs"] - v["programs"] // v["hc"]) * row(v, "dy"), row(v, "dy")


def each_four(v):
    """ptxas unrolls the loop of the aligned variants."""
    return [v["hc"] // 4, v["hc"] % 4] if v["aligned"] else [v["hc"]]


def trips_heads_backward(v):
    tokens = mhc_coeffs.TILE // v["HC"] ** 2
    return [v["tmax"] - 1, v["tmax"] - 1, cdiv(v["rows"], tokens) / v["programs"]]


def trips_modulated(v):
    share = v["groups"] / v["programs"]  # of a program: several groups, or part of the rows of one
    return [*twice(v), v["each"] * min(1, share), max(1, share)]


def again_modulated(v):
    """As again_backward, with the shares of three gradients."""
    rows, share = row(v, "x", "dy"), 4 * v["n"] * (v["need_dw"] + v["need_dscale"] + v["need_dshift"])
    count = v["groups"] * v["each"]
    return (count * rows + 2 * share * (count - v["programs"]), rows + share) if v["LOOP"] else (0, 0)


def again_rows(*names):
    """Every row of these tensors once more, whatever the number of programs."""
    return lambda v: (v["rows"] * row(v, *names), row(v, *names))


def smoothed(v):
    row = v["n"] * v["logits"].element_size()
    return (v["programs"] * row, row) if v["smoothing"] else (0, 0)


def rows_again(v):
    rows = v["n"] * (v["student"].element_size() + v["teacher"].element_size())
    return v["programs"] * rows, rows


KERNELS = {
    "rms_norm_fwd": Kernel(("y", "rstd"), twice, again_forward("x")),
    "rms_norm_bwd": Kernel(("dx", "dw"), trips_backward, again_backward),
    "fused_add_rms_norm_fwd": Kernel(("s", "y", "rstd"), twice, again_forward("s")),
    "gated_rms_norm_fwd": Kernel(("y", "rstd"), twice, again_forward("x")),
    "gated_rms_norm_bwd": Kernel(("dx", "dgate", "dw"), trips_backward, again_gated_backward),
    "layer_norm_fwd": Kernel(("y", "mean", "rstd"), twice, again_forward("x")),
    "layer_norm_bwd": Kernel(("dx", "partial"), trips_backward, again_backward),
    "column_sum": Kernel(("out",), lambda v: [cdiv(v["rows"], v["ROWS"])]),
    "rope": Kernel(("q_out", "k_out"), trips_rope, branches=2),
    "swiglu_fwd": Kernel(("y",)),
    "swiglu_bwd": Kernel(("dgate", "dup")),
    "geglu_fwd": Kernel(("y",)),
    "geglu_bwd": Kernel(("dgate", "dup")),
    "moe_permute_fwd": Kernel(("y",), again=gathered, ahead=1),
    "moe_unpermute_fwd": Kernel(("y",), fours, ahead=1),
    "moe_unpermute_bwd": Kernel(("dx", "dweight"), lambda v: [blocks(v)], gathered_back, ahead=1),
    "relu_squared_fwd": Kernel(("y",)),
    "relu_squared_bwd": Kernel(("dx",)),
    "dyt_fwd": Kernel(("y",)),
    "dyt_bwd": Kernel(("dx", "partial"), lambda v: [v["rows"] * blocks(v) / v["programs"]]),
    "modulated_rms_norm_fwd": Kernel(("y", "rstd"), lambda v: [blocks(v)] * 2, walked("x")),
    "modulated_rms_norm_bwd": Kernel(
        ("dx", "dscale", "dshift", "dscale_parts", "dshift_parts", "dw"), trips_modulated, again_modulated
    ),
    "attn_res_fwd": Kernel(("y", "score", "rstd", "lse"), trips_attn_res, lambda v: again_depth(v) if v["LOOP"] else (0, 0)),
    "attn_res_bwd": Kernel(("dv", "partial"), trips_attn_res_backward, again_depth),
    "mhc_heads_fwd": Kernel(("pre", "post", "res"), lambda v: [v["tmax"] - 1]),
    "mhc_heads_bwd": Kernel(("ddots", "dscale", "history", "partial"), trips_heads_backward),
    "mhc_coeffs_dx": Kernel(("dx",), lambda v: [v["heads"]], again_phi),
    "mhc_pre_fwd": Kernel(("y",), each_four),
    "mhc_pre_bwd": Kernel(("dx", "dh"), lambda v: [blocks(v)], again_dy),
    "mhc_post_res_fwd": Kernel(("y",), lambda v: [v["hc"]]),
    "mhc_post_res_bwd": Kernel(
        ("dx", "df", "dpost", "dres"),
        lambda v: [v["hc"], v["hc"], blocks(v)],
        lambda v: (v["programs"] * v["hc"] * row(v, "dy"), v["hc"] * v["BLOCK"] * v["dy"].element_size()),
    ),
    "embedding_fwd": Kernel(("y",), ahead=1),
    "embedding_shares": Kernel(("share",), ahead=2),
    "embedding_bwd": Kernel(("dweight",), lambda v: [v["CHUNK"], 0], ahead=2),
    "poly_norm_fwd": Kernel(("y", "rstd"), lambda v: [blocks(v)] * 2, walked("x")),
    "poly_norm_bwd": Kernel(
        ("dx", "partial"), lambda v: [blocks(v), blocks(v), v["rows"] / v["programs"]], again_rows("x", "dy")
    ),
    "softmax_fwd": Kernel(("y",), twice, walked("x")),
    "softmax_bwd": Kernel(("dx",), twice, walked("dy", "y")),
    "causal_softmax_fwd": Kernel(("y",), twice, walked("x")),
    "neighborhood_attention_fwd": Kernel(("y", "lse"), window(1), neighbours("k", "v")),
    "neighborhood_attention_bwd_q": Kernel(("dq", "mean"), window(2), neighbours("k", "v")),
    "neighborhood_attention_bwd_kv": Kernel(("dk", "dv"), window(1), neighbours("q", "dy")),
    "sparsemax_fwd": Kernel(("y",), trips_sparsemax, again_sparsemax),
    "sparsemax_bwd": Kernel(("dx",), twice, walked("dy", "y")),
    "group_norm_fwd": Kernel(("y", "mean", "rstd"), lambda v: [blocks(v)] * 2, walked("x")),
    "group_norm_sums": Kernel(("partial",), lambda v: [cdiv(v["size"], v["BLOCK"])]),
    "group_norm_bwd": Kernel(("dx",), lambda v: [cdiv(v["n"] // v["size"], v["BLOCK"]), blocks(v)]),
    "cross_entropy_fwd": Kernel(
        ("loss", "lse", "predicted"), lambda v: [blocks(v), blocks(v) if v["smoothing"] else 0], smoothed, ahead=1
    ),
    "cross_entropy_reduce": Kernel(("result", "totals"), lambda v: [cdiv(v["rows"], v["BLOCK"])]),
    "cross_entropy_bwd": Kernel(("dlogits",), ahead=1),
    "vocab_parallel_cross_entropy_bwd": Kernel(("dlogits",), ahead=1),
    "divergence_fwd": Kernel(("loss",), lambda v: [blocks(v)], ahead=1),
    "divergence_each": Kernel(("loss",), ahead=1),
    "divergence_reduce": Kernel(("result", "factor"), lambda v: [cdiv(v["rows"], v["BLOCK"])]),
    "divergence_bwd": Kernel(("dx",), ahead=1),
    "softmax_jsd_fwd": Kernel(
        ("loss", "student_lse", "teacher_lse", "student_share", "teacher_share"), lambda v: [blocks(v)] * 2, rows_again, ahead=1
    ),
    "softmax_jsd_bwd": Kernel(("dlogits",), ahead=1),
    "softmax_kl_div_fwd": Kernel(("loss", "lse", "mass"), lambda v: [blocks(v)], ahead=1),
    "softmax_kl_div_bwd": Kernel(("dlogits",), ahead=1),
    "cross_entropy_tvd_fwd": Kernel(
        ("loss", "distance", "student_lse", "teacher_lse", "share"), lambda v: [blocks(v)] * 2, rows_again, ahead=1
    ),
    "cross_entropy_tvd_bwd": Kernel(("dstudent",), ahead=1),
    "logprob_fwd": Kernel(("logp", "entropy", "lse"), lambda v: [blocks(v)], ahead=1),
    "logprob_bwd": Kernel(("dlogits",), ahead=1),
}


# --- the record of a run


@dataclasses.dataclass
class Launch:
    name: str  # of a kernel of ours, or ATen's operator
    read: int  # bytes, each tensor once
    written: int
    again: int = 0
    between: int = 0
    programs: int = 0  # 0: ATen's own
    key: tuple = ()  # of the variant
    trips: tuple = ()
    branches: int = 1
    ahead: int = 0
    matmul: tuple = ()  # (m, n, k, dtype)

    @property
    def flops(self):
        return 2 * math.prod(self.matmul[:3]) if self.matmul else 0


def distinct(tensors):
    """Bytes of tensors, each once however often it is passed: what is absent is stood for by another."""
    return sum(size(t) for t in {id(t): t for t in tensors}.values())


def launch_of(kernel, grid, values, constants, parameters):
    """The record of a launch of one of our kernels."""
    if kernel not in KERNELS:
        raise NotImplementedError(f"{kernel}: unknown to the model; say in KERNELS of benchmarks/launches.py what it writes")
    known, programs = KERNELS[kernel], math.prod(grid)
    named = dict(zip((name for name, _ in parameters), values, strict=True))
    tensors = {name: t for name, t in named.items() if isinstance(t, torch.Tensor)}
    written = [tensors[name] for name in known.writes]
    read = [t for t in tensors.values() if all(t is not w for w in written)]
    divisible = [n for n, (_, type_) in zip(values, parameters, strict=True) if type_.endswith(":16")]
    offsets = [t.storage_offset() * t.element_size() for t in tensors.values()]
    aligned = all(value % 16 == 0 for value in [*divisible, *offsets])
    v = named | constants | {"programs": programs, "aligned": aligned}
    again, between = known.again(v)
    return Launch(
        kernel,
        distinct(read),
        distinct(written),
        again,
        between,
        programs,
        (aligned, *(t.dtype for t in tensors.values()), *constants.values()),
        tuple(known.trips(v)),
        known.branches,
        known.ahead,
    )


class Launcher:
    """In the place of the package's own: writes down what is to be launched."""

    def __init__(self, pack, multiprocessors):
        self.pack, self.count, self.launches = pack, multiprocessors, []

    def multiprocessors(self, tensor):
        return self.count

    def launch(self, kernel, grid, *values, **constants):
        if 0 not in grid:
            self.launches.append(launch_of(kernel, grid, values, constants, self.pack.parameters(kernel)))


ALLOCATES = {"empty", "empty_like", "new_empty", "empty_strided"}
FILLS = {"zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "fill_", "zero_"}
ADDS = {"addmm", "addmm_"}
MATMULS = {"mm", *ADDS}


def tensors_in(values):
    return [v for v in values if isinstance(v, torch.Tensor)]


def read_by(name, args, kwargs):
    """The tensors that an operator of ATen reads; `out` is none of them."""
    if name in FILLS:
        return []
    unread = name == "copy_" or (name in ADDS and kwargs.get("beta", 1) == 0)
    return tensors_in(args)[unread:]


class Aten(TorchDispatchMode):
    """Writes down what ATen launches beside our kernels."""

    def __init__(self, launches):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.name().removeprefix("aten::").partition(".")[0]
        written = distinct(tensors_in(result if isinstance(result, tuple) else (result,)))
        if name in ALLOCATES or function.is_view or not written:
            return result
        matmul = ()
        if name in MATMULS:
            a, b = tensors_in(args)[-2:]
            matmul = a.shape[0], b.shape[1], a.shape[1], a.dtype
        self.launches.append(Launch(f"aten.{name}", distinct(read_by(name, args, kwargs)), written, matmul=matmul))
        return result


class Context:
    """What an autograd.Function's forward leaves for its backward, where every gradient is wanted."""

    def __init__(self, arguments):
        self.needs_input_grad = tuple(isinstance(a, torch.Tensor) and a.dtype in FLOATS for a in arguments)
        self.saved_tensors = ()

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass

    def set_materialize_grads(self, value):
        pass


@dataclasses.dataclass
class Pass:
    """A forward or a backward: its launches, and the least that it must move, each input read and each output written once."""

    launches: list
    least: int

    @property
    def moved(self):
        return sum(x.read + x.written + x.again for x in self.launches)

    @property
    def flops(self):
        return sum(x.flops for x in self.launches)


@contextlib.contextmanager
def recorded(pack, multiprocessors):
    launcher = Launcher(pack, multiprocessors)
    with torch.no_grad(), _runtime.kernels.launched_by(launcher), Aten(launcher.launches):
        yield launcher.launches


def trace(operator, sizes, dtype, pack, multiprocessors):
    """{"forward": Pass, "backward": Pass} of an operator where every gradient is wanted."""
    if operator not in OPERATORS:
        raise NotImplementedError(f"{operator}: unknown to the model; say in benchmarks/launches.py what it is called with")
    function, arguments = OPERATORS[operator](sizes, dtype)
    context = Context(arguments)
    with recorded(pack, multiprocessors) as launches:
        outputs = function.forward(context, *arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        forward = Pass(list(launches), distinct(tensors_in(arguments)) + distinct(outputs))
        launches.clear()
        upstream = [shape(*o.shape, dtype=o.dtype) for o in outputs if o.is_floating_point()]
        launches.clear()
        gradients = function.backward(context, *upstream)
        least = distinct(tensors_in([*upstream, *context.saved_tensors])) + distinct(tensors_in(gradients))
    return {"forward": forward, "backward": Pass(list(launches), least)}
