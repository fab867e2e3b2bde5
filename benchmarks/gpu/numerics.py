"""Every built variant against float64: the calls that reach all of them, with few rows and with many, outputs poisoned.

The allowances are derived, by tests/harness.py, from the loss of the same formula in float32, whose instructions err as those
of a GPU may: instructions.py. What else a kernel rounds, its function below says. On a GPU the launches that count are those
whose numbers are held; in a dry run the CPU kernels' numbers are held, and the launches go to the stub.
"""

import contextlib
import functools
import math
import sys
import warnings

import torch

from liger_aot import _runtime
from liger_aot.ops import attn_res as attention
from liger_aot.ops import dyt as dyt_
from liger_aot.ops import embedding as embedding_
from liger_aot.ops import fused_add_rms_norm as fused
from liger_aot.ops import gated_rms_norm as gated_rms
from liger_aot.ops import geglu as geglu_
from liger_aot.ops import group_norm as group
from liger_aot.ops import layer_norm as layer
from liger_aot.ops import modulated_rms_norm as modulated
from liger_aot.ops import moe_permute as permute
from liger_aot.ops import moe_unpermute as unpermute
from liger_aot.ops import packed_glu as packed
from liger_aot.ops import poly_norm as poly
from liger_aot.ops import relu_squared as relu
from liger_aot.ops import rms_norm as rms
from liger_aot.ops import rope as rope_
from liger_aot.ops import softmax as softmax_
from liger_aot.ops import sparsemax as sparsemax_
from liger_aot.ops import swiglu as swiglu_

import formulas
import harness
from calls import CALLS
from calls import few
from gpu.instructions import Instructions
from harness import fixed

check = functools.partial(harness.check, arithmetic=Instructions)
HELD_IN_A_DRY_RUN = 5  # one call in so many; the others are only launched
# Programs of the norms' backward walk over several groups of rows each, and a column_sum over several blocks of them.
PROGRAMS = 148 * 4  # of a B200, where there are the most
ROWS_OF_A_PROGRAM = {128: 32, 2048: 4, 8192: 1, math.inf: 2}  # of wider rows there are fewer programs


def many(n):
    """Two groups of rows and more for each program of a norm's backward, the last of them ragged."""
    return next(PROGRAMS * rows + 1 for width, rows in ROWS_OF_A_PROGRAM.items() if n <= width)


@contextlib.contextmanager
def poisoned():
    """Uninitialised memory is NaN: an output that is not written shows."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def rms_norm(x, weight, eps=rms.DEFAULT_EPS, casting="none"):
    cast = casting == "llama" and x.dtype != torch.float32
    how = {"slack": 4.0, "through": x.dtype} if cast else {}  # rounds twice, as its models do
    return lambda x, w: rms.rms_norm(x, w, eps, casting=casting), norm_formula(eps), [x, weight], how


def norm_formula(eps):
    return lambda x, w: rms.forward_reference(x, w, eps, 0.0, False)[0]


def fused_add_rms_norm(x, residual, weight, eps=rms.DEFAULT_EPS, casting="none"):
    _, _, _, how = rms_norm(x, weight, eps, casting)

    def formula(x, r, w):
        return fused.forward_reference(x, r, w, eps, 0.0, False)[:2]

    return lambda x, r, w: fused.fused_add_rms_norm(x, r, w, eps, casting=casting), formula, [x, residual, weight], how


def gated_rms_norm(x, gate, weight, eps, casting="none", **options):
    how = {"slack": 6.0, "through": x.dtype} if casting == "llama" and x.dtype != torch.float32 else {}  # rounds three times

    def function(x, gate, weight):
        return gated_rms.gated_rms_norm(x, gate, weight, eps, casting=casting, **options)

    return function, formulas.gated_rms_norm(eps=eps, **options), [x, gate, weight], how


def modulated_rms_norm(x, scale, *rest):
    return modulated.modulated_rms_norm, formulas.modulated_rms_norm(), [x, scale, *rest], {}


def layer_norm(x, weight, bias):
    return layer.layer_norm, lambda x, w, b: layer.forward_reference(x, w, b, 1e-5)[0], [x, weight, bias], {}


def rope(q, k, cos, sin=None, **options):
    def formula(q, k, cos, sin):
        return rope_.forward_reference(q, k, cos, sin, **options)

    angles = fixed(cos), None if sin is None else fixed(sin)
    return functools.partial(rope_.rope, **options), formula, [q, k, *angles], {}


def swiglu(gate, up, gate_multiplier):
    def function(gate, up):
        return swiglu_.swiglu(gate, up, gate_multiplier=gate_multiplier)

    return function, lambda gate, up: swiglu_.forward_reference(gate, up, gate_multiplier, 1.0), [gate, up], {}


def geglu(gate, up, approximate):
    def function(gate, up):
        return geglu_.geglu(gate, up, approximate=approximate)

    return function, lambda gate, up: geglu_.forward_reference(gate, up, approximate == "tanh"), [gate, up], {}


def packed_glu(x, activation="silu"):
    return lambda x: packed.packed_glu(x, activation), formulas.packed_glu(activation), [x], {}


def moe_permute(x, order, position):
    """What the row of no expert has is no result."""
    there = (position >= 0).sum()

    def function(x, order, position):
        return permute.moe_permute(x, order, position)[:there]

    def formula(x, order, position):
        return formulas.moe_permute(x, order, position)[:there]

    return function, formula, [x, fixed(order), fixed(position)], {}


def moe_unpermute(x, weight, order, position):
    return unpermute.moe_unpermute, formulas.moe_unpermute, [x, weight, fixed(order), fixed(position)], {}


def relu_squared(x):
    return relu.relu_squared, relu.forward_reference, [x], {}


def dyt(x, alpha, gamma, beta):
    return dyt_.dyt, dyt_.forward_reference, [x, alpha, gamma, beta], {}


def poly_norm(x, weight, bias):
    return poly.poly_norm, formulas.poly_norm(), [x, weight, bias], {}


def attn_res(v, query, weight):
    return attention.attn_res, formulas.attn_res(), [v, query, weight], {}


def mhc_coeffs(x, *rest, **options):
    def function(*tensors):
        return public("mhc_coeffs")(*tensors, **options)

    # The gradient of phi is a matmul of gradients rounded to 16 bits; in fp32, products come before the norm, not after it.
    how = {"slack": 3.0 if x.dtype == torch.float32 else 6.0}
    return function, formulas.mhc_coeffs(**options), [x, *rest], how


def mhc_pre(*tensors):
    return public("mhc_pre"), formulas.mhc_pre, list(tensors), {}


def mhc_post_res(*tensors):
    return public("mhc_post_res"), formulas.mhc_post_res, list(tensors), {}


def embedding(weight, indices, padding_idx=None):
    def formula(weight, indices):
        return torch.nn.functional.embedding(indices, weight, padding_idx)

    return functools.partial(embedding_.embedding, padding_idx=padding_idx), formula, [weight, fixed(indices)], {}


def softmax(x):
    return softmax_.softmax, formulas.softmax(x.dtype), [x], {}


def sparsemax(x):
    return sparsemax_.sparsemax, formulas.sparsemax, [x], {}


def multi_token_attention(scores, weight, bias=None, **options):
    def function(x, w, b=None):
        return public("multi_token_attention")(x, w, b, **options)

    sparse, convolution = options.get("sparse", False), {k: v for k, v in options.items() if k != "sparse"}
    formula = formulas.multi_token_attention(scores.dtype, sparse, **convolution)
    # torch's convolutions sum in an order of their own, and at TF32 where a program allows it.
    return function, formula, [scores, weight, *([] if bias is None else [bias])], {"slack": 4.0}


def neighborhood_attention(q, k, v, *window):
    def function(q, k, v):
        return public("neighborhood_attention")(q, k, v, *window)

    return function, formulas.neighborhood_attention(*window), [q, k, v], {}


def group_norm(x, num_groups, weight, bias):
    def formula(x, w, b):
        return group.forward_reference(x, num_groups, w, b, 1e-5)[0]

    return lambda x, w, b: group.group_norm(x, num_groups, w, b), formula, [x, weight, bias], {}


def public(name):
    return getattr(torch.ops.liger, name).default


def cross_entropy(logits, target, weight, **options):
    def function(x, t, *weight):
        return public("cross_entropy")(x, t, *weight, **options)

    weights = [] if weight is None else [fixed(weight)]
    return function, formulas.cross_entropy(**options), [logits, fixed(target), *weights], {}


def cross_entropy_stats(logits, target, weight, **options):
    def function(x, t, *weight):
        loss, _, _, predicted = public("cross_entropy_stats")(x, t, *weight, **options)
        expect_largest(x.detach(), predicted, slack=0.0)
        return loss

    return function, *cross_entropy(logits, target, weight, **options)[1:]


def linear(hidden, weight):
    return torch.nn.functional.linear(hidden.detach().float(), weight.detach().float())


def linear_cross_entropy(hidden, head, target, weight, **options):
    def function(h, w, t, _, *weight):
        return public("linear_cross_entropy")(
            h, w, t, weight=weight[0] if weight else None, loss_dtype=torch.float32, **options
        )

    # dlogits are rounded to 16 bits before the matmuls, the gradients after them and once more by backward.
    weights = [] if weight is None else [fixed(weight)]
    return function, formulas.linear_cross_entropy(**options), [hidden, head, fixed(target), None, *weights], {"slack": 4.0}


def linear_cross_entropy_stats(hidden, head, target, weight, **options):
    def function(h, w, t, _, *weight):
        loss, _, _, predicted = public("linear_cross_entropy_stats")(
            h, w, t, weight=weight[0] if weight else None, loss_dtype=torch.float32, **options
        )
        # The matmul sums in another order here, at about 1e-6 of the logits' size.
        expect_largest(linear(h, w), predicted, slack=1e-5)
        return loss

    return function, *linear_cross_entropy(hidden, head, target, weight, **options)[1:]


def expect_largest(logits, predicted, slack):
    got = logits.gather(-1, predicted[:, None])[:, 0].float()
    want = logits.amax(-1).float()
    if not (got >= want - slack * want.abs() - slack).all():
        raise AssertionError(f"predicted: not where the largest logit is, in rows {(got < want).nonzero()[:8, 0].tolist()}")


def linear_logprob(hidden, head, target, temperature):
    def function(h, w, t):
        return public("linear_logprob")(h, w, t, temperature=temperature)

    # dlogits are rounded to 16 bits before the matmuls that make the gradients.
    how = {"slack": 2.0 if hidden.dtype == torch.float32 else 6.0}
    return function, formulas.linear_logprob(temperature), [hidden, head, fixed(target)], how


def vocab_parallel_cross_entropy(logits, target, **options):
    def function(x, t):
        return public("vocab_parallel_cross_entropy")(x, t, **options)

    return function, *cross_entropy(logits, target, None, **options)[1:]


def divergence(name):
    def held(x, y, labels, reduction, **options):
        def function(x, y, labels):
            loss_dtype = None if reduction == "none" else torch.float32  # so that what is measured is not the rounding of it
            return public(name)(x, y, labels, reduction=reduction, loss_dtype=loss_dtype, **options)

        given = None if labels is None else fixed(labels)
        return function, getattr(formulas, name)(reduction=reduction, **options), [x, y, given], {}

    return held


def linear_jsd(x, w, y, v, labels, temperature, reduction):
    def function(x, w, y, v, _, __, labels):
        options = {"temperature": temperature, "reduction": reduction, "loss_dtype": torch.float32}
        return public("linear_jsd")(x, w, y, v, labels, **options)

    # dlogits are rounded to 16 bits before the matmuls, the gradients after them and once more by backward.
    how = {"slack": 2.0 if x.dtype == torch.float32 else 6.0}
    inputs = [x, w, y, v, None, None, None if labels is None else fixed(labels)]
    return function, formulas.linear_jsd(temperature=temperature, reduction=reduction), inputs, how


def linear_kl_div(x, w, target, labels, temperature, reduction):
    def function(x, w, target, _, labels):
        options = {"temperature": temperature, "reduction": reduction, "loss_dtype": torch.float32}
        return public("linear_kl_div")(x, w, target, labels, **options)

    # dlogits are rounded to 16 bits before the matmuls, the gradients after them and once more by backward.
    how = {"slack": 2.0 if x.dtype == torch.float32 else 6.0}
    inputs = [x, w, fixed(target), None, None if labels is None else fixed(labels)]
    return function, formulas.linear_kl_div(temperature=temperature, reduction=reduction), inputs, how


def cross_entropy_tvd(logits, teacher, target):
    return public("cross_entropy_tvd"), formulas.cross_entropy_tvd(), [logits, fixed(teacher), fixed(target)], {}


# operator -> its arguments and options -> (function, formula, inputs, what harness.check is told)
HELD = {f.__name__: f for f in (rms_norm, fused_add_rms_norm, layer_norm, rope, swiglu, geglu, cross_entropy)}
HELD |= {f.__name__: f for f in (packed_glu, moe_permute, moe_unpermute)}
HELD |= {f.__name__: f for f in (relu_squared, dyt, softmax, sparsemax, group_norm, gated_rms_norm, poly_norm)}
HELD |= {f.__name__: f for f in (modulated_rms_norm, attn_res, mhc_coeffs, mhc_pre, mhc_post_res, embedding)}
HELD |= {f.__name__: f for f in (cross_entropy_stats, linear_cross_entropy, linear_cross_entropy_stats, linear_logprob)}
HELD |= {f.__name__: f for f in (multi_token_attention, neighborhood_attention)}
HELD |= {name: divergence(name) for name in ("kl_div", "jsd", "tvd")} | {"linear_jsd": linear_jsd}
HELD |= {f.__name__: f for f in (linear_kl_div, cross_entropy_tvd, vocab_parallel_cross_entropy)}


ROWS = {"few": few, "many": many}
# In the order of their importance: few rows reach every variant that is built.
JOBS = [(rows, operator) for rows in ROWS for operator in HELD]


def calls(machine, operator, rows):
    """The operator's calls, with tensors on the machine's device."""
    made = CALLS[operator](rows)
    while True:
        with torch.device(machine.device):
            call = next(made, None)
        if call is None:
            return
        yield call


def words(arguments, options):
    """A call in words."""
    tensors = [
        f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}" + ("" if a.is_contiguous() else " view")
        for a in arguments
        if isinstance(a, torch.Tensor)
    ]
    given = [f"{k}={'given' if isinstance(v, torch.Tensor) else v}" for k, v in options.items()]
    return ", ".join([*tensors, *given])


def numerics(machine, rows, operator, record, launcher, stuck=None):
    """Hold every call of one operator, for as long as there is time; one that takes `stuck` seconds ends the process."""
    row = {"operator": operator, "rows": rows, "calls": 0, "failed": 0, "worst": 0.0, "of": None}
    record.content["correctness"]["numerics"].append(row)
    function = HELD[operator]
    for arguments, options in calls(machine, operator, ROWS[rows]):
        if record.left() <= 0:
            record.cut(f"{rows} {operator}: its calls after {row['calls']}")
            return
        row["calls"] += 1
        text, seen = words(arguments, options), []
        print(f"{operator}: {text}", file=sys.stderr, flush=True)  # the last one that is said is the one that did not end
        record.watch(stuck)
        with record.trying(f"{operator}: {text}") as outcome:
            call, formula, inputs, how = function(*arguments, **options)
            inputs = [i.detach() if isinstance(i, torch.Tensor) else i for i in inputs]
            with poisoned():
                if machine.computes:
                    with machine.launching(launcher):
                        check(call, formula, *inputs, seen=seen, **how)
                else:
                    if (row["calls"] - 1) % HELD_IN_A_DRY_RUN == 0:
                        check(call, formula, *inputs, seen=seen, **how)
                    launch(machine, launcher, operator, arguments, options)
        row["failed"] += not outcome["ok"]
        worst = max(seen, default=0.0)
        if worst > row["worst"]:
            row |= {"worst": worst, "of": text}
        if not machine.alive():
            return


def launch(machine, launcher, operator, arguments, options):
    """The same call and its backward once more, over the stub, whose results are nothing."""
    with machine.launching(launcher):
        results = public(operator)(*arguments, **options)
        outputs = [o for o in (results if isinstance(results, tuple) else [results]) if o.requires_grad]
        torch.autograd.backward([o.sum() for o in outputs])


def built(machine):
    """Every variant of the pack that serves the machine; launches are to be counted in it."""
    pack = pack_of(machine)
    names = [v.cubin for kernel in pack.manifest["kernels"] for v in pack.table(kernel).values()]
    return {"arch": pack.arch, "built": len(names), "names": names, "launches": {}}


def pack_of(machine):
    if machine.dry:
        return _runtime.open_pack(_runtime.pack_paths()["90"])
    return _runtime.kernels.launcher.at(0).pack
