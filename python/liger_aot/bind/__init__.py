"""Bind the operators into a transformers model, and take them off again:  bind(model), unbind(model).

No model is known by name. Modules are found by what they compute, and get a subclass of their own class (_swap), if that
computes the same here (recognise). No class, function or module of anybody is changed: other models in the process are
untouched.

In training the loss is computed without logits: lm_head answers with LazyLogits (_lazy), which transformers' own loss code
shifts and flattens, and whose cross_entropy is linear_cross_entropy. Whatever else is done with them makes real logits of them.
The output's `logits` is None then. Without labels, and in evaluation, logits are logits; forward(..., skip_logits=...) asks for
one or the other.
"""

import torch
from torch import nn

from .._hooks import shadowed
from ..ops._check import FLOATS
from ..recognise import Found
from ..recognise import _model as models
from ..recognise import _trial as trials
from ..recognise import recognise
from . import _swap as swaps
from ._report import Counts
from ._report import Report
from ._report import Row

__all__ = ["Report", "Row", "bind", "unbind"]

# The class to swap in for a kind of module, and how that is tried.
CLASSES = {
    "norm": (swaps.norm_class, trials.try_module),
    "glu": (swaps.glu_class, trials.try_module),
    "experts": (swaps.experts_class, trials.try_module),
    "rope": (swaps.rope_class, trials.try_rope),
}
LAYERS = ("rms_norm", "layer_norm", "group_norm", "gated_rms_norm", "rope", "swiglu", "geglu", "relu_squared")
SWITCHES = (*LAYERS, "linear_cross_entropy", "cross_entropy", "keep_logits", "strict")


def bind(
    model: nn.Module,
    *,
    rms_norm: bool = True,
    layer_norm: bool = True,
    group_norm: bool = True,
    gated_rms_norm: bool = True,
    rope: bool = True,
    swiglu: bool = True,
    geglu: bool = True,
    relu_squared: bool = True,
    linear_cross_entropy: bool = True,
    cross_entropy: bool = False,
    compile: str = "inductor",
    keep_logits: bool = False,
    strict: bool = False,
) -> Report:
    """Bind the operators into every module of model whose formula they compute. The report, printed, says what was bound.

    The flags are operators; swiglu, geglu and relu_squared are for MLPs, the first two for experts as well. cross_entropy, in
    the place of linear_cross_entropy, leaves the logits real. compile "inductor" leaves norms, gated units and rope to Inductor
    where torch.compile traces the model, "liger" keeps every operator in the graph; an export always does. keep_logits computes
    the output's logits beside the fused loss. Raises ValueError on what is no module or bound already, and RuntimeError where
    strict is set and a module whose formula an operator computes, or a head, was left alone; the model is then as it was.
    """
    check_module("bind", model)
    layer_flags = rms_norm, layer_norm, group_norm, gated_rms_norm, rope, swiglu, geglu, relu_squared
    flags = dict(zip(SWITCHES, (*layer_flags, linear_cross_entropy, cross_entropy, keep_logits, strict), strict=True))
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"bind: {name} must be True or False, got {flag!r}")
    if compile not in ("inductor", "liger"):
        raise ValueError(f"bind: compile must be 'inductor' or 'liger', got {compile!r}")
    if linear_cross_entropy and cross_entropy:
        raise ValueError("bind: linear_cross_entropy and cross_entropy exclude each other, got both; set one to False")
    bound = sum(map(swaps.is_bound, model.modules()))
    if bound:
        raise ValueError(f"bind: model must not be bound yet, got one with {bound} bound modules; unbind(model) takes them off")
    wanted = {name for name in LAYERS if flags[name]}
    operator = "cross_entropy" if cross_entropy else "linear_cross_entropy" if linear_cross_entropy else None
    device = next((p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")), torch.device("cpu"))
    # Trials have gradients and dtypes of their own, wherever bind is called.
    counts = Counts()
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        plan = [*layers(model, wanted, compile, device), *losses(model, keep_logits, operator, counts, device)]
    report = Report([row for _, _, _, row in plan if row], base_path(model), compile, counts)
    missed = [row for row in report.left if row.operator]
    if strict and missed:
        raise RuntimeError(f"bind: strict, and these modules would be left alone:\n{Report(missed, report.base, compile)}")
    try:
        swaps.swap_all(model, [(module, cls, loss) for module, cls, loss, _ in plan if cls is not None])
    except BaseException:
        unbind(model)
        raise
    return report


def unbind(model: nn.Module) -> None:
    """Give every bound module its own class back. Raises ValueError on what is no module."""
    check_module("unbind", model)
    swaps.swap_all(model, [(m, swaps.released(type(m)), {}) for m in model.modules() if swaps.is_bound(m)])


def check_module(function, model):
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ValueError(f"{function}: model must be a torch.nn.Module, got {got}; build the model first, and give that")


def base_path(model):
    """Where the base model is, also inside of a wrapper; empty where base_model_prefix names nothing."""
    whole = next((m for m in model.modules() if hasattr(type(m), "base_model_prefix")), model)
    base = getattr(whole, getattr(whole, "base_model_prefix", "") or "", None)
    return next((path for path, module in model.named_modules() if module is base), "")


def layers(model, wanted, compile, device):
    """(module, class to swap in or None, what more it gets, Row) of each norm, gated unit, experts and attention."""
    known = {}
    for path, module in model.named_modules():
        looks = recognise(module)
        if looks is None:
            continue
        if looks not in known:
            known[looks] = tried(module, looks, wanted, compile, device)
        found, cls = known[looks]
        if found.operator and found.operator not in wanted:
            continue
        taken = () if found.operator == "group_norm" else (models.DTENSOR,)  # which row by row operators take
        if cls and (why := models.unfit_weights(model, module, *taken)):
            found = found._replace(args=None, why=why)
        row = row_of(path, module, found)
        yield module, cls if row.status == "bound" else None, {}, row


def tried(module, looks, wanted, compile, device):
    """What a module computes, and the class to swap in, where that is wanted and computes the same here."""
    kind, _, find = looks
    found = find(module)
    if found.args is None or found.operator not in wanted:
        return found, None
    make, trial = CLASSES[kind]
    cls = swaps.subclass(type(module), make, (compile, *found.args))
    why = trial(module, cls, found.trial, device)
    return (found._replace(args=None, why=why), None) if why else (found, cls)


def row_of(path, module, found, of=None):
    """The row of one module, a part of another: bound unless something of their own stands against it."""
    status, why = "bound", found.why
    parts = (module.get_submodule(name) for name, _ in found.parts)  # in whose place the operator computes
    if found.args is None:
        status = "left"
    elif own := [m for m in (module, of, *parts) if m is not None and shadowed(m)]:
        status, why = "shadowed", f"this {type(own[0]).__name__} has a forward of its own"
    elif any(p.is_floating_point() and p.dtype not in FLOATS for p in module.parameters()):
        status, why = "left", "kernels take float32, float16 and bfloat16"
    return Row(path, type(module).__name__, found.operator, status, found.formula, why)


def losses(model, keep_logits, operator, counts, device):
    """The heads, and the models that compute a loss from what those give."""
    heads, paths = {}, {module: path for path, module in model.named_modules()}
    for module in list(paths):
        kind = type(module)
        if not hasattr(kind, "get_output_embeddings") or models.labels_place(kind) is None:
            continue
        head = module.get_output_embeddings()
        if head is None:
            continue
        if operator and head not in heads:
            why = models.unfit_head(model, head) or trials.try_loss(operator, models.linears_of(head)[0], device)
            row = row_of(paths.get(head, ""), head, Found(operator, "lazy logits", why, None if why else ()), module)
            heads[head] = row.status == "bound"
            yield head, None, {}, row
            for linear in models.linears_of(head) if heads[head] else ():
                loss = {"liger_lazy": set(), "liger_real": operator == "cross_entropy", "liger_counts": counts}
                yield linear, swaps.subclass(type(linear), swaps.head_class, ()), loss, None
        if not shadowed(module):  # for its skip_logits, if for nothing else
            fused = heads.get(head, False)
            loss = {"liger_counts": counts} if fused else {}
            yield module, swaps.subclass(kind, swaps.model_class, (keep_logits, fused)), loss, None
