"""Bind the operators into a transformers model, and take them off again:  bind(model), unbind(model), verify(model, batch).

No model is known by name. Modules are found by what they compute (_find), and get a subclass of their own class (_swap); no
class, function or module of anybody's is changed, so that other models in the process are untouched.

In training the loss is computed without logits: lm_head answers with LazyLogits (_lazy), which transformers' own loss code
shifts and flattens, and whose cross_entropy is linear_cross_entropy. Whatever else is done with them makes real logits of them.
The output's `logits` is None then. Without labels, and in evaluation, logits are logits; forward(..., skip_logits=...) asks for
one or the other.
"""

import inspect

import torch
from torch import nn

from ..ops._check import FLOATS
from . import _find as find
from ._find import Found
from ._report import Counts
from ._report import Report
from ._report import Row
from ._swap import is_bound
from ._swap import released
from ._swap import rotation
from ._swap import subclass
from ._swap import swap
from ._verify import Verification
from ._verify import try_class
from ._verify import try_function
from ._verify import verify

__all__ = ["Report", "Row", "Verification", "bind", "unbind", "verify"]

# What a kind of module looks like, how its formula is found, the kind of class that is swapped in, and the operators in that.
KINDS = [
    (find.norm_like, find.find_norm, "norm", {"rms_norm", "layer_norm"}),
    (find.glu_like, find.find_glu, "glu", {"swiglu", "geglu"}),
    (find.experts_like, find.find_experts, "experts", {"swiglu", "geglu"}),
]


def bind(
    model: nn.Module,
    *,
    rms_norm: bool = True,
    layer_norm: bool = True,
    rope: bool = True,
    swiglu: bool = True,
    geglu: bool = True,
    linear_cross_entropy: bool = True,
    cross_entropy: bool = False,
    compile: str = "inductor",
    keep_logits: bool = False,
    strict: bool = False,
) -> Report:
    """Bind the operators into every module of model whose formula they compute. The report, printed, says what was bound.

    The flags are operators; swiglu and geglu are for MLPs and experts. cross_entropy, in the place of linear_cross_entropy,
    leaves the logits real. compile "inductor" leaves norms, gated units and rope to Inductor where torch.compile traces the
    model, "liger" keeps every operator in the graph; an export always does. keep_logits computes the output's logits beside
    the fused loss. Raises ValueError on what is no module or bound already, and RuntimeError where strict is set and a module
    that has one of the operators' forms was left alone; the model is then as it was.
    """
    check_module("bind", model)
    if compile not in ("inductor", "liger"):
        raise ValueError(f"bind: compile must be 'inductor' or 'liger', got {compile!r}")
    if linear_cross_entropy and cross_entropy:
        raise ValueError("bind: linear_cross_entropy and cross_entropy exclude each other, got both; set one to False")
    bound = sum(map(is_bound, model.modules()))
    if bound:
        raise ValueError(f"bind: model must not be bound yet, got one with {bound} bound modules; unbind(model) takes them off")
    flags = {"rms_norm": rms_norm, "layer_norm": layer_norm, "rope": rope, "swiglu": swiglu, "geglu": geglu}
    wanted = {name for name, flag in flags.items() if flag}
    counts = Counts()
    plan = []
    # Trials have gradients and dtypes of their own, wherever bind is called.
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        plan += layers(model, wanted, compile)
    if linear_cross_entropy or cross_entropy:
        plan += losses(model, keep_logits, "cross_entropy" if cross_entropy else "linear_cross_entropy", counts)
    report = Report([row for _, _, _, row in plan if row], base_path(model), compile, counts)
    if strict and report.left:
        raise RuntimeError(f"bind: strict, and these modules would be left alone:\n{Report(report.left, report.base, compile)}")
    done = []
    try:
        for module, cls, attributes, _ in plan:
            if cls is not None:
                done.append(module)
                swap(module, cls)
                vars(module).update(attributes)
    except BaseException:
        for module in done:
            release(module)
        raise
    return report


def unbind(model: nn.Module) -> None:
    """Give every bound module its own class back. Raises ValueError on what is no module."""
    check_module("unbind", model)
    for module in model.modules():
        release(module)


def check_module(function, model):
    if not isinstance(model, nn.Module):
        raise ValueError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def release(module):
    if is_bound(module):
        kind = type(module)._liger.kind
        swap(module, released(type(module)))
        if kind == "head":
            for name in HEAD:
                vars(module).pop(name, None)


HEAD = ("lazy", "real", "counts")  # what a bound head has more than its class has


def base_path(model):
    """Where the base model is; empty where base_model_prefix names nothing."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    return next((path for path, module in model.named_modules() if module is base), "")


def layers(model, wanted, compile):
    """(module, class to swap in or None, attributes, Row) of each norm, gated unit, experts and attention."""
    known = {}
    device = next((p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")), torch.device("cpu"))

    def once(key, look, *args):
        if key not in known:
            known[key] = look(*args)
        return known[key]

    def function_found(f):
        found = find.find_rope(f)
        why = found.operator and try_function(f, found.trial, rotation(f, "liger", *found.args), device)
        return Found(None, found.formula, why) if why else found

    for path, module in model.named_modules():
        kind = type(module)
        for like, search, built, operators in KINDS:
            if like(module):
                if not operators & wanted:
                    break
                key = find.identity(module)
                found = once(key, search, module)
                if found.operator and found.operator not in wanted:
                    break
                cls = found.operator and subclass(kind, built, (compile, *found.args))
                if why := cls and once((key, cls), try_class, module, found.trial, cls):
                    found = Found(None, found.formula, why)
                yield entry(path, module, found, cls)
                break
        else:
            functions = find.rope_functions(kind.forward) if "rope" in wanted else {}
            if functions:
                found = attention(kind, {name: once(f, function_found, f) for name, f in functions.items()})
                yield entry(path, module, found, found.operator and subclass(kind, "rope", (compile, *found.args)))


def attention(kind, functions):
    """What was found of the rotations of one class, taken together."""
    bound = {name: f for name, f in functions.items() if f.operator}
    formula = "; ".join(dict.fromkeys(f.formula for f in (bound or functions).values() if f.formula))
    why = "; ".join(f"{name}: {f.why}" for name, f in functions.items() if f.why)
    if kind.forward.__closure__:
        return Found(None, formula, "its forward is a closure")
    args = tuple((name, *f.args) for name, f in sorted(bound.items()))
    return Found("rope" if bound else None, formula, why, (args,))


def entry(path, module, found, cls):
    """The plan of one module: bound unless something of its own stands against it."""
    status, why = "bound", found.why
    if not found.operator:
        status = "left"
    elif shadowed(module):
        status, why = "shadowed", "this instance has a forward of its own"
    elif any(p.is_floating_point() and p.dtype not in FLOATS for p in module.parameters()):
        status, why = "left", "kernels take float32, float16 and bfloat16"
    bound = status == "bound"
    row = Row(path, type(module).__name__, found.operator if bound else None, status, found.formula, why)
    return module, cls if bound else None, {}, row


def shadowed(module):
    """Whether an instance's own forward, or that which accelerate's hook calls, is not its class's."""
    attributes = vars(module)
    method = attributes.get("_old_forward" if "_hf_hook" in attributes else "forward")
    return method is not None and getattr(method, "__func__", None) is not type(module).forward


def losses(model, keep_logits, operator, counts):
    """The heads, and the models that compute a loss from what those give."""
    heads, paths = {}, {module: path for path, module in model.named_modules()}
    for module in list(paths):
        kind = type(module)
        if not hasattr(kind, "get_output_embeddings") or "labels" not in inspect.signature(kind.forward).parameters:
            continue
        head = module.get_output_embeddings()
        if head is None:
            continue
        found = Found(operator, "lazy logits", unfit_head(model, head))
        if found.why:
            found = found._replace(operator=None)
        _, _, _, row = plan = entry(paths.get(head, ""), head, found, None)
        if row.status == "bound" and shadowed(module):
            plan = (
                *plan[:3],
                row._replace(status="shadowed", operator=None, why=f"the forward of this {kind.__name__} is its own"),
            )
        if head not in heads:
            heads[head] = plan
            yield plan
            if plan[3].status == "bound":
                attributes = {"lazy": set(), "real": operator == "cross_entropy", "counts": counts}
                for linear in linears_of(head):
                    yield linear, subclass(type(linear), "head", ()), attributes, None
        if heads[head][3].status == "bound":
            yield module, subclass(kind, "model", (keep_logits,)), {}, None


def linears_of(head):
    """A head, or the linear layers that PEFT keeps in its place where it trains a copy."""
    copies = getattr(head, "modules_to_save", None)
    return [head] if copies is None else [head.original_module, *copies.values()]


def unfit_head(model, head):
    """Why no operator can take the place of a head; empty where one can."""
    for linear in linears_of(head):
        if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
            return f"a {type(linear).__module__}.{type(linear).__qualname__} computes its output in its own way"
        if getattr(linear, "_is_hooked", False) or getattr(model, "_tp_size", None):
            return "it is under a tensor-parallel plan"
    return ""
