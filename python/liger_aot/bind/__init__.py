"""Bind the operators into a transformers model, and take them off again:  bind(model), unbind(model).

This first form knows the modules of Llama alone, by their exact classes. A bound module gets a subclass of its own class; no
class, function or module of anybody's is changed, so that other models in the process are untouched. Bound modules cannot be
pickled whole; their state dicts can.

In training the loss is computed without logits: lm_head answers with LazyLogits, which transformers' own loss code shifts and
flattens, and whose cross_entropy is linear_cross_entropy. Whatever else is done with them makes real logits of them. The
output's `logits` is None then. Without labels, and in evaluation, logits are logits.
"""

import functools
import inspect
import types
from typing import NamedTuple

import torch
from torch.nn import Linear

from ..functional import rms_norm
from ..functional import rope
from ..functional import swiglu
from ._lazy import LazyLogits


def bound_norm(original):
    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon, casting="llama")

    return "LigerRMSNorm", forward


def bound_mlp(original):
    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    return "LigerSwiGLUMLP", forward


def bound_attention(original):
    """The model's own forward, in whose globals one name means something else.

    Without "__name__" in them torch.compile reads this dict and not the module of that name.
    """
    forward = original.forward
    scope = {**forward.__globals__, "apply_rotary_pos_emb": rope}
    del scope["__name__"]
    clone = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    clone.__kwdefaults__ = forward.__kwdefaults__
    return original.__name__, clone


def bound_head(original):
    def forward(self, input, use=None):
        """`use` is called with the weights at hand: whoever gathers them for a module's call has done so."""
        if use is None and self.lazy:
            return LazyLogits(input, self, input.dtype)
        return (use or original.forward)(self, input)

    return "LigerLMHead", forward


def bound_model(original):
    place = [*inspect.signature(original.forward).parameters].index("labels") - 1

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        labels = args[place] if len(args) > place else kwargs.get("labels")
        if labels is None or not self.training:
            return original.forward(self, *args, **kwargs)
        self.lm_head.lazy = True
        try:
            out = original.forward(self, *args, **kwargs)
        finally:
            self.lm_head.lazy = False
        if isinstance(out, tuple):
            return tuple(None if type(o) is LazyLogits else o for o in out)
        out["logits"] = None
        return out

    return original.__name__, forward


@functools.cache
def subclass(original, build):
    name, forward = build(original)
    return type(name, (original,), {"forward": forward, "__module__": original.__module__, "_liger_bound": True})


class Row(NamedTuple):
    path: str
    kind: str
    operator: str | None
    why: str = ""


class Report(list):
    """A Row for each module that was bound, or that was left for a reason."""

    def __str__(self):
        groups = {}
        for row in self:
            groups.setdefault((row.operator or "left alone", row.kind, row.why), []).append(row.path)
        lines = [(f"{what:20} {len(paths):3} x {kind}", why) for (what, kind, why), paths in groups.items()]
        return "\n".join(f"{line}: {why}" if why else line for line, why in lines)


def plan(model):
    """(module, how to bind it, Row) of every module that could be bound; how is None where it is left alone."""
    from transformers.models.llama import modeling_llama as llama

    known = {
        llama.LlamaRMSNorm: ("rms_norm", bound_norm),
        llama.LlamaMLP: ("swiglu", bound_mlp),
        llama.LlamaAttention: ("rope", bound_attention),
        llama.LlamaForCausalLM: ("linear_cross_entropy", bound_model),
    }
    for path, module in model.named_modules():
        kind = type(module)
        if kind not in known:
            continue
        operator, build = known[kind]
        if why := obstacle(module, build):
            yield module, None, Row(path, kind.__name__, None, why)
            continue
        if build is bound_model:
            yield module.lm_head, bound_head, Row(f"{path}.lm_head".lstrip("."), "Linear", operator, "lm_head")
        yield module, build, Row(path, kind.__name__, operator, "with labels, in training" if build is bound_model else "")


def obstacle(module, build):
    """Why a module is left alone; None if it is not."""
    if "forward" in vars(module):
        return "this instance has a forward of its own"
    if build is bound_mlp and module.config.hidden_act not in ("silu", "swish"):
        return f"activation {module.config.hidden_act}"
    if build is bound_model and type(module.lm_head) is not Linear:
        return f"lm_head is no torch.nn.Linear but {type(module.lm_head).__name__}"
    return None


def bind(model: torch.nn.Module) -> Report:
    """Bind rms_norm, swiglu, rope and linear_cross_entropy into a Llama model. The report, printed, says what was bound."""
    found = list(plan(model))
    if not any(build for _, build, _ in found):
        raise ValueError(f"bind: model must hold modules of transformers' Llama, not bound yet, got {type(model).__name__}")
    for module, build, _ in found:
        if build is not None:
            module.__class__ = subclass(type(module), build)
            if build is bound_head:
                module.lazy = False
    return Report(row for _, _, row in found)


def unbind(model: torch.nn.Module) -> None:
    """Give every bound module its own class back."""
    for module in model.modules():
        if getattr(type(module), "_liger_bound", False):
            module.__class__ = type(module).__base__
            vars(module).pop("lazy", None)
