"""The classes of bound modules: subclasses of their own classes, made when asked for.

A module keeps its identity, attributes, parameters and hooks; only its class changes. Nobody's class or module is touched.
"""

import functools
import threading
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .._hooks import altered
from .._hooks import hooked
from ..ops._check import FLOATS
from ..ops._check import under_autocast
from ..ops.gated_rms_norm import gated_rms_norm
from ..ops.group_norm import group_norm
from ..ops.layer_norm import layer_norm
from ..ops.rms_norm import rms_norm
from ..ops.rope import rope
from ..recognise import _model as models
from ..recognise._glu import operator_of
from ..recognise._probe import called
from ..recognise._probe import parameters_of
from ..recognise._rope import parts_of
from ..recognise._rope import rotated
from ._lazy import LazyLogits
from ._lazy import lazy_logits


class Bound(NamedTuple):
    """What a bound class was made from."""

    original: type
    make: Callable
    args: tuple


def left(compile, x):
    """Whether a module's own code runs: in float64, and where torch.compile traces what is Inductor's; an export keeps ours."""
    inductor = compile == "inductor" and torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return inductor or x.dtype not in FLOATS


def untouched(module, parts):
    """Whether the children that an operator replaces are what they were when module was bound, and nobody watches them."""
    children = module._modules
    return all(
        type(children.get(n)) is kind and not altered(children[n]) and not getattr(children[n], "p", 0) for n, kind in parts
    )


def computing(original, compile, compute, parts=(), method="forward", count=1):
    """A method that computes from so many arguments; called otherwise it does what the original does, which may be to raise."""
    own = getattr(original, method)
    names = parameters_of(own)[1:]

    @functools.wraps(own)
    def computed(self, *args, **kwargs):
        xs = [*args, *(kwargs[name] for name in names[len(args) : count] if name in kwargs)]
        complete = len(xs) == len(args) + len(kwargs) == count and all(x is not None for x in xs)
        if not complete or left(compile, xs[0]) or not untouched(self, parts):
            return own(self, *args, **kwargs)
        return compute(self, *xs)

    return {method: computed}


# What bound classes are called, by their operator.
NAMES = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm", "group_norm": "GroupNorm", "gated_rms_norm": "GatedRMSNorm"}
NAMES |= {"swiglu": "SwiGLU", "geglu": "GEGLU", "relu_squared": "ReLUSquared"}
NORMS = {"rms_norm": rms_norm, "layer_norm": layer_norm, "group_norm": group_norm, "gated_rms_norm": gated_rms_norm}

# What follows gives the name of a bound class, what its extra_repr adds, and its other members.


def norm_class(original, compile, operator, place, one_dtype, dims, width, weights, options):
    norm = functools.partial(NORMS[operator], **dict(options))
    of_torch = issubclass(original, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm))
    torchs = of_torch or bool({"layer_norm", "rms_norm", "group_norm"} & {*called(original.forward)})

    def eps_of(self):
        return getattr(self, place) if isinstance(place, str) else place

    def compute(self, x, *gate):
        weight, bias = (getattr(self, name) if name in weights else None for name in ("weight", "bias"))
        # Which CUDA's autocast widens to float32, and what a module spells out itself it does not.
        widened = torchs and x.is_cuda and x.dtype is not torch.float32 and under_autocast(x)
        ordered = operator == "group_norm" and not x.is_contiguous()  # channels last, which torch's own keeps so
        unlike = any((g.shape, g.dtype) != (x.shape, x.dtype) for g in gate)
        sized = x.dim() in dims and width in (None, x.shape[-1])
        if widened or not sized or ordered or unlike or (one_dtype and x.dtype is not weight.dtype):
            return original.forward(self, x, *gate)
        return norm(x, *gate, weight=weight, eps=eps_of(self), **({} if bias is None else {"bias": bias}))

    def extra_repr(self):
        shape = tuple(self.weight.shape) if "weight" in weights else None
        given = {"eps": eps_of(self), **dict(options), "was": original.__name__}
        return ", ".join([str(shape), *(f"{key}={value}" for key, value in given.items())])

    members = computing(original, compile, compute, count=2 if operator == "gated_rms_norm" else 1)
    return f"Liger{NAMES[operator]}", "", {"extra_repr": extra_repr, **members}


def glu_class(original, compile, kind, act, names, parts):
    *first, down = names
    name, activate = operator_of(kind, act)

    def compute(self, x):
        return getattr(self, down)(activate(*(getattr(self, layer)(x) for layer in first)))

    return f"Liger{NAMES[name]}MLP", f"{kind}, {act}, was={original.__name__}", computing(original, compile, compute, parts)


def experts_class(original, compile, kind, act, parts):
    from ..transformers import experts  # here, because it imports transformers

    name, activate = operator_of(kind, act)

    @functools.wraps(original.forward)
    def forward(self, hidden_states, *args, **kwargs):
        ours = experts.in_the_place_of("grouped_mm", self) and not left(compile, hidden_states)
        return (experts.experts_forward if ours else original.forward)(self, hidden_states, *args, **kwargs)

    members = {"forward": forward, **computing(original, compile, lambda self, x: activate(x), parts, "_apply_gate")}
    return f"Liger{NAMES[name]}Experts", f"experts, {kind}, {act}, was={original.__name__}", members


def rotation(function, compile, form, places, mixed):
    """A function like an attention's own, which is called where the operator does not take the tensors."""
    names = parameters_of(function)
    heads, turns = parts_of(names)

    @functools.wraps(function)
    def rotate(*args, **kwargs):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        xs, angles = [given.get(name) for name in heads], [given.get(name) for name in turns]
        results = None
        if all(isinstance(x, torch.Tensor) for x in xs + angles) and not left(compile, xs[0]):
            positions, dim = given.get("position_ids"), given.get("unsqueeze_dim")
            results = rotated(rope, form, places, xs, angles, positions, dim, mixed)
        return function(*args, **kwargs) if results is None else results

    return rotate


def rope_class(original, compile, functions):
    """The module's own forward, in whose globals the functions' names mean ours.

    Without "__name__" in them torch.compile reads this dict and not the module of that name.
    """
    forward = original.forward
    scope = {**forward.__globals__}
    for name, form, places, mixed in functions:
        scope[name] = rotation(scope[name], compile, form, dict(places), mixed)
    del scope["__name__"]
    clone = types.FunctionType(forward.__code__, scope, None, forward.__defaults__, forward.__closure__)
    functools.update_wrapper(clone, forward)
    del clone.__wrapped__
    clone.__kwdefaults__ = forward.__kwdefaults__
    return original.__name__, "rope=liger", {"forward": clone}


def thread():
    """Whose logits are lazy: a model may train in one thread and answer in another. What is compiled is one thread's."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


HEAD = ("liger_lazy", "liger_real", "liger_counts")  # what a bound head has more than its class has; its model has the last


def count(self, what, traced):
    self.liger_counts[f"{what}, traced" if traced else what] += 1


# torch.compile runs it as it traces. This is torch.compiler.assume_constant_result, which would import all of Dynamo, and make
# its cache's folder, with this package.
count._dynamo_marked_constant = True


def head_class(original):
    def forward(self, input, *, use=None):
        """`use` is called with the weights at hand: whoever gathers them for a call of the module has done so."""
        if use is not None or thread() not in self.liger_lazy:
            return (use or original.forward)(self, input)
        if hasattr(self.weight, "__tensor_flatten__"):  # a tensor around others, as quantised or distributed ones are
            why = f"the head's weight is a {type(self.weight).__name__}"
        elif hooked(self):  # which would see two calls, neither of which gives logits
            why = "a hook on the head"
        else:
            return lazy_logits(self, input)
        self.count(f"materialised: {why}", torch.compiler.is_compiling())
        return original.forward(self, input)

    return "LigerLMHead", "loss=liger", {"forward": forward, "logits": original.forward, "count": count}


def heads_of(model, own_loss):
    """The bound heads of a model; none, and counted why, where there are none or they are to give it logits all the same."""
    output = model.get_output_embeddings()
    heads = [] if output is None else [m for m in output.modules() if isinstance(m, nn.Linear) and hasattr(type(m), "logits")]
    if not heads:
        why = "unbound: another head than the one that was bound"
    elif own_loss and torch.compiler.is_compiling():  # which cannot trace that module with anything but a tensor
        why = "materialised: CrossEntropyLoss"
    elif any(all(head is not m for m in models.linears_of(output)) for head in heads):  # which may change its weights
        why = "materialised: a wrapper around the head"
    elif models.own_logits(model):
        why = "materialised: a loss_function that is not transformers'"
    else:
        return heads
    count(model, why, torch.compiler.is_compiling())
    return []


def model_class(original, keep_logits, fused):
    place = models.labels_place(original)
    own_loss = "CrossEntropyLoss" in called(original.forward)

    @functools.wraps(original.forward)
    def forward(self, *args, skip_logits=None, **kwargs):
        labels = args[place] if len(args) > place else kwargs.get("labels")
        wanted = fused and is_bound(self) and labels is not None and (self.training or skip_logits is not None)
        heads = heads_of(self, own_loss) if wanted else []
        if not heads:
            return original.forward(self, *args, **kwargs)
        who = thread()
        eager = [head for head in heads if who not in head.liger_lazy]
        for head in eager:
            head.liger_lazy.add(who)
        try:
            out = original.forward(self, *args, **kwargs)
        finally:
            for head in eager:
                head.liger_lazy.discard(who)
        drop = skip_logits if skip_logits is not None else not (keep_logits or any(head.liger_real for head in heads))
        return without_lazy(out, drop)

    def set_output_embeddings(self, head):
        """A layer in the place of a bound head, as for a vocabulary of another size, is bound as that was."""
        old = self.get_output_embeddings()
        original.set_output_embeddings(self, head)
        if isinstance(head, nn.Linear) and type(old) is subclass(type(head), head_class, ()):
            swap(head, type(old), loss_of(old))

    members = {"__qualname__": original.__qualname__, "set_output_embeddings": set_output_embeddings}
    return original.__name__, "loss=liger" if fused else "", {"forward": forward, **members}


def without_lazy(out, drop):
    """A model's output with None, or the computed logits, where it has lazy ones."""

    def plain(lazy):
        return None if drop else lazy.compute("keep_logits")

    if isinstance(out, (tuple, list, dict)):
        # Caches, which torch may take apart and make anew, are left alone.
        return tree_map_only(LazyLogits, plain, out, is_leaf=lambda x: not isinstance(x, (tuple, list, dict)))
    attributes = getattr(out, "__dict__", {})  # of a dataclass, or a namespace
    attributes.update({name: plain(value) for name, value in attributes.items() if isinstance(value, LazyLogits)})
    return out


MADE = {}


def subclass(original, make, args):
    """What make, one of the functions above, gives for original: one class, unless its forward's globals have changed since."""
    scope = original.forward.__globals__ if make is rope_class else {}
    key = original, make, args, *(id(scope.get(name)) for name in called(original.forward))
    if key not in MADE:
        MADE[key] = make_subclass(original, make, args)
    return MADE[key]


def make_subclass(original, make, args):
    name, text, members = make(original, *args)
    made_of = Bound(original, make, args)

    def extra_repr(self):
        return ", ".join(part for part in (original.extra_repr(self), text) if part)

    def reduce(self, protocol):
        """Pickled and copied as a module of the original class, whose class is then swapped."""
        _, _, *state = original.__reduce_ex__(self, protocol)
        return rebuilt, made_of, *state

    # A bound module is no layer for the kernels library: the attribute of its class is hidden.
    hidden = {"kernel_layer_name": types.DynamicClassAttribute()}
    common = {"__module__": original.__module__, "__reduce_ex__": reduce, "_liger": made_of, "extra_repr": extra_repr}
    return type(original)(name, (original,), {**common, **hidden, **members})


def rebuilt(original, make, args):
    return original.__new__(subclass(original, make, args))


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


def loss_of(module):
    """What a bound head has more than its class has."""
    return {name: vars(module)[name] for name in HEAD if name in vars(module)}


def swap_all(model, plan):
    """swap for each of plan. What other modules of model keep of one's forward, as adapters do of their base, follows it."""
    methods = [(m, vars(m).get("forward")) for m in model.modules()]
    methods = [(m, f, f.__self__) for m, f in methods if isinstance(f, types.MethodType) and f.__self__ is not m]
    kept = [(m, other) for m, f, other in methods if f.__func__ is getattr(type(other), "forward", None)]
    for each in plan:
        swap(*each)
    for module, other in kept:
        module.forward = types.MethodType(type(other).forward, other)


def swap(module, cls, loss=None):
    """Give module another class, and the new forward to what keeps it as an attribute of the instance: accelerate's hooks."""
    before, module.__class__ = type(module), cls
    attributes = vars(module)
    for name in HEAD:
        attributes.pop(name, None)
    attributes.update(loss or {})
    for name in ("forward", "_old_forward"):
        if getattr(attributes.get(name), "__func__", None) is before.forward:
            attributes[name] = types.MethodType(cls.forward, module)
    if getattr(attributes.get("forward"), "__func__", None) is cls.forward:
        del attributes["forward"]
