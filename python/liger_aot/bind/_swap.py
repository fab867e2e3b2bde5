"""The classes of bound modules: subclasses of their own classes, made when asked for.

A module keeps its identity, attributes, parameters and hooks; only its class changes. Nobody's class or module is touched.
"""

import functools
import inspect
import types
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import rope
from ..ops._check import FLOATS
from ..ops.geglu import geglu
from ..ops.layer_norm import layer_norm
from ..ops.rms_norm import rms_norm
from ..ops.swiglu import swiglu
from ._find import HALVES
from ._find import LAYOUTS
from ._find import parameters_of
from ._find import rope_functions
from ._lazy import LazyLogits
from ._lazy import lazy_logits


class Bound(NamedTuple):
    """What a bound class was made from."""

    original: type
    kind: str
    args: tuple


class Hidden:
    """An attribute that a class does not have, though its bases do."""

    def __get__(self, instance, owner=None):
        raise AttributeError("a bound module is no layer for the kernels library")


def for_inductor(compile):
    """Whether torch.compile is tracing a model whose pointwise operators are Inductor's; an export keeps ours."""
    return compile == "inductor" and torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def described(original, text):
    def extra_repr(self):
        return ", ".join(part for part in (original.extra_repr(self), text) if part)

    return extra_repr


def rms_norm_class(original, compile, place, one_dtype, formula, offset, casting):
    def compute(self, x):
        weight, eps = self._parameters.get("weight"), getattr(self, place) if isinstance(place, str) else place
        return rms_norm(x, weight if formula != "no weight" else None, eps, offset=offset, casting=casting)

    return norm_class("LigerRMSNorm", original, compile, place, one_dtype, compute, f", offset={offset}, casting={casting}")


def layer_norm_class(original, compile, place, one_dtype, formula):
    def compute(self, x):
        parameters = self._parameters
        eps = getattr(self, place) if isinstance(place, str) else place
        return layer_norm(x, parameters.get("weight"), parameters.get("bias"), eps)

    return norm_class("LigerLayerNorm", original, compile, place, one_dtype, compute, "")


def norm_class(name, original, compile, place, one_dtype, compute, options):
    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        (x,) = (*args, *kwargs.values())
        if for_inductor(compile) or (one_dtype and x.dtype is not self.weight.dtype):
            return original.forward(self, x)
        return compute(self, x)

    def extra_repr(self):
        weight = self._parameters.get("weight")
        eps = getattr(self, place) if isinstance(place, str) else place
        return f"{None if weight is None else tuple(weight.shape)}, eps={eps}{options}, was={original.__name__}"

    return name, {"forward": forward, "extra_repr": extra_repr}


GATED = {"silu": swiglu, "gelu_tanh": geglu, "gelu": functools.partial(geglu, approximate="none")}
NAMES = {"silu": "SwiGLU", "gelu_tanh": "GEGLU", "gelu": "GEGLU"}


def glu_class(original, compile, kind, act, names):
    *first, down = names

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        (x,) = (*args, *kwargs.values())
        if for_inductor(compile):
            return original.forward(self, x)
        outputs = [getattr(self, name)(x) for name in first]
        gate, up = outputs if len(outputs) == 2 else HALVES[kind](outputs[0])
        return getattr(self, down)(GATED[act](gate, up))

    return f"Liger{NAMES[act]}MLP", {
        "forward": forward,
        "extra_repr": described(original, f"{kind}, {act}, was={original.__name__}"),
    }


def experts_class(original, compile, kind, act):
    def _apply_gate(self, gate_up):
        if for_inductor(compile):
            return original._apply_gate(self, gate_up)
        return GATED[act](*HALVES[kind](gate_up))

    text = f"experts, {kind}, {act}, was={original.__name__}"
    return f"Liger{NAMES[act]}Experts", {"_apply_gate": _apply_gate, "extra_repr": described(original, text)}


def rope_class(original, compile, functions):
    """The module's own forward, in whose globals the functions' names mean ours.

    Without "__name__" in them torch.compile reads this dict and not the module of that name.
    """
    forward, known = original.forward, rope_functions(original.forward)
    scope = {**forward.__globals__, **{name: rotation(known[name], compile, *args) for name, *args in functions}}
    del scope["__name__"]
    clone = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    functools.update_wrapper(clone, forward)
    del clone.__wrapped__
    clone.__kwdefaults__ = forward.__kwdefaults__
    return original.__name__, {"forward": clone, "extra_repr": described(original, "rope=liger")}


def rotation(function, compile, layout, one_dtype, count):
    names, batched = parameters_of(function)[count + 2 :], layout == next(iter(LAYOUTS))
    default = inspect.signature(function).parameters.get("unsqueeze_dim")

    @functools.wraps(function)
    def rotate(*args, **kwargs):
        heads, (cos, sin), rest = args[:count], args[count : count + 2], args[count + 2 :]
        dim = {**dict(zip(names, rest)), **kwargs}.get("unsqueeze_dim", default and default.default)  # noqa: B905
        q, k = heads[0], heads[-1]
        ours = (
            q.dtype in FLOATS
            and q.dtype is k.dtype
            and (cos.dtype is q.dtype or (not one_dtype and cos.dtype is torch.float32))
        )
        ours = ours and q.dim() == (4 if batched else 3) and cos.dim() == q.dim() - 1 and not cos.requires_grad
        if not ours or (batched and dim not in (1, 2)) or for_inductor(compile):
            return function(*args, **kwargs)
        if not batched:
            q, k, dim = q[None], k[None], 2
        if count == 1:
            k = q.narrow(dim, 0, 0) if dim == 1 else q.narrow(2, 0, 0)
        results = rope(q, k, cos, sin, unsqueeze_dim=dim)
        results = results if batched else tuple(r[0] for r in results)
        return results if count == 2 else results[0]

    return rotate


def head_class(original, compile):
    def forward(self, input, use=None):
        """`use` is called with the weights at hand: whoever gathers them for a call of the module has done so."""
        if use is None and self.lazy:
            return lazy_logits(self, input)
        return (use or original.forward)(self, input)

    def count(self, what):
        if not torch.compiler.is_compiling():
            self.counts[what] += 1

    text = described(original, "loss=liger")
    return "LigerLMHead", {"forward": forward, "logits": original.forward, "count": count, "extra_repr": text}


def heads_of(model):
    """The bound heads of a model; more than one where adapters keep copies."""
    output = model.get_output_embeddings()
    return (
        [] if output is None else [m for m in output.modules() if isinstance(m, torch.nn.Linear) and hasattr(type(m), "logits")]
    )


def model_class(original, compile, keep_logits):
    place = [*inspect.signature(original.forward).parameters].index("labels") - 1
    own_loss = "CrossEntropyLoss" in inspect.unwrap(original.forward).__code__.co_names

    @functools.wraps(original.forward)
    def forward(self, *args, skip_logits=None, **kwargs):
        labels = args[place] if len(args) > place else kwargs.get("labels")
        wanted = labels is not None or kwargs.get("shift_labels") is not None
        # torch.compile cannot trace torch's module of that name with anything but a tensor.
        if not wanted or not (self.training or skip_logits) or (own_loss and torch.compiler.is_compiling()):
            return original.forward(self, *args, **kwargs)
        heads = heads_of(self)
        before = [head.lazy for head in heads]
        for head in heads:
            head.lazy = True
        try:
            out = original.forward(self, *args, **kwargs)
        finally:
            for head, lazy in zip(heads, before, strict=True):
                head.lazy = lazy
        drop = not (keep_logits or (heads and heads[0].real)) if skip_logits is None else skip_logits
        return without_lazy(out, drop)

    return original.__name__, {
        "forward": forward,
        "__qualname__": original.__qualname__,
        "extra_repr": described(original, "loss=liger"),
    }


def without_lazy(out, drop):
    """A model's output with None or the computed logits where it has lazy ones."""

    def plain(o):
        if type(o) is not LazyLogits:
            return o
        return None if drop else o.compute("keep_logits")

    if isinstance(out, tuple):
        return tuple(plain(o) for o in out)
    if isinstance(out, (LazyLogits, Tensor)):
        return plain(out)
    for key in list(out.keys()):
        if type(out[key]) is LazyLogits:
            out[key] = plain(out[key])
    return out


CLASSES = {
    "rms_norm": rms_norm_class,
    "layer_norm": layer_norm_class,
    "glu": glu_class,
    "experts": experts_class,
    "rope": rope_class,
    "head": head_class,
    "model": model_class,
}


@functools.cache
def subclass(original, kind, args):
    name, members = CLASSES[kind](original, *args)
    made_of = Bound(original, kind, args)

    def reduce(self, protocol):
        """Pickled and copied as a module of the original class, whose class is then swapped."""
        _, _, *state = original.__reduce_ex__(self, protocol)
        return rebuilt, made_of, *state

    common = {"__module__": original.__module__, "__reduce_ex__": reduce, "kernel_layer_name": Hidden(), "_liger": made_of}
    return type(original)(name, (original,), {**common, **members})


def rebuilt(original, kind, args):
    module = original.__new__(original)
    module.__class__ = subclass(original, kind, args)
    return module


def is_bound(module):
    return hasattr(type(module), "_liger")


def released(cls):
    """cls without our part, which may lie under others' subclasses, such as those of FSDP."""
    if "_liger" in vars(cls):
        return cls._liger.original
    if not hasattr(cls, "_liger"):
        return cls
    ours = next(c for c in cls.__mro__ if "_liger" in vars(c))
    members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    name = cls.__name__.replace(ours.__name__, ours._liger.original.__name__)
    return type(cls)(name, tuple(released(base) for base in cls.__bases__), members)


def swap(module, cls):
    """Give module another class, and the new forward to what keeps it as an attribute of the instance: accelerate's hooks."""
    before, module.__class__ = type(module), cls
    attributes = vars(module)
    for name in ("forward", "_old_forward"):
        method = attributes.get(name)
        if getattr(method, "__func__", None) is before.forward:
            attributes[name] = types.MethodType(cls.forward, module)
    if getattr(attributes.get("forward"), "__func__", None) is cls.forward:
        del attributes["forward"]
