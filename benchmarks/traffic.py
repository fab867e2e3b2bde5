"""What each kernel writes, how often its loops run and what it moves once more: what no argument of a launch says."""

import dataclasses
from collections.abc import Callable

from liger_aot._runtime import cdiv
from liger_aot.ops import mhc_coeffs


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
