"""Language models and their heads: where labels are given, whose loss is computed, and which heads and weights kernels read."""

import inspect
import sys

from torch import nn

from ._probe import untold
from ._probe import weights_of

PLAIN, DTENSOR = ("torch.nn.parameter.Parameter", "torch.Tensor"), "torch.distributed.tensor.DTensor"
BY_NAME = sys.maxsize  # a place that no argument has


def labels_place(kind):
    """Which positional argument of a model's class labels are, BY_NAME if none, None where it has none.

    A forward that takes any keywords hands them on to that of a base.
    """
    all_handed_on = True
    for forward in (cls.forward for cls in kind.__mro__ if "forward" in vars(cls)):
        parameters = inspect.signature(forward).parameters
        if "labels" in parameters:
            return [*parameters].index("labels") - 1 if all_handed_on else BY_NAME
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            return None
        all_handed_on = all_handed_on and untold(forward)
    return None


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
        if why := unfit_weights(model, linear):
            return why
    return ""


def unfit_weights(model, module, *taken):
    """Why the weights of a module are none that kernels could read; empty where they are plain ones, or FSDP2 makes them so."""
    kinds = {f"{cls.__module__}.{cls.__qualname__}" for cls in map(type, weights_of(module).values())} - {*PLAIN, *taken}
    if not kinds or any(c.__module__.startswith("torch.distributed.fsdp") for m in model.modules() for c in type(m).__mro__):
        return ""
    return f"its weights are {', '.join(sorted(kinds))}"


def own_logits(model):
    """Whether model's loss_function, assigned, registered or of its class, is not of transformers.

    Such a one may hand logits to what takes nothing but tensors and does not say so: an autograd.Function has no gradient then.
    """
    function = getattr(model, "loss_function", None)
    return function is not None and not getattr(function, "__globals__", {}).get("__name__", "").startswith("transformers.")


# What is assigned later is another function, for which the model is traced anew.
own_logits._dynamo_marked_constant = True
