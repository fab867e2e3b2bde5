"""The classes of bound modules: subclasses of their own classes, made when asked for.

A module keeps its identity, attributes, parameters and hooks; only its class changes. Nobody's class or module is touched.
"""

import functools
import inspect
import threading
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..ops._check import FLOATS
from ..ops._check import under_autocast
from ..ops.layer_norm import layer_norm
from ..ops.packed_glu import packed_glu
from ..ops.rms_norm import rms_norm
from ._find import HALVES
from ._find import called
from ._find import parameters_of
from ._find import unit_of
from ._lazy import LazyLogits
from ._lazy import lazy_logits
from ._rope import rope_functions
from ._rope import rotation


class Bound(NamedTuple):
    """What a bound class was made from."""

    original: type
    make: Callable
    args: tuple


def left(compile, x):
    """Whether a module's own code runs: in float64, and where torch.compile traces what is Inductor's; an export keeps ours."""
    inductor = compile == "inductor" and torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return inductor or x.dtype not in FLOATS


def computing(original, compile, compute, method="forward"):
    """A method that computes from its one argument; called otherwise it does what the original does, which may be to raise."""
    own = getattr(original, method)
    name = next(iter(parameters_of(own)[1:]), None)

    @functools.wraps(own)
    def computed(self, *args, **kwargs):
        x = args[0] if args else kwargs.get(name)
        if x is None or len(args) + len(kwargs) != 1 or left(compile, x):
            return own(self, *args, **kwargs)
        return compute(self, x)

    return {method: computed}


def described(original, text):
    def extra_repr(self):
        return ", ".join(part for part in (original.extra_repr(self), text) if part)

    return extra_repr


def norm_class(original, compile, operator, place, one_dtype, dims, weights, offset=0.0, casting=""):
    torchs = issubclass(original, (nn.LayerNorm, nn.RMSNorm)) or bool({"layer_norm", "rms_norm"} & {*called(original.forward)})

    def eps_of(self):
        return getattr(self, place) if isinstance(place, str) else place

    def compute(self, x):
        weight, bias = (getattr(self, name) if name in weights else None for name in ("weight", "bias"))
        # Which CUDA's autocast widens to float32, and what a module spells out itself it does not.
        widened = torchs and x.is_cuda and x.dtype is not torch.float32 and under_autocast(x)
        if widened or x.dim() not in dims or (one_dtype and x.dtype is not weight.dtype):
            return original.forward(self, x)
        if operator == "layer_norm":
            return layer_norm(x, weight, bias, eps_of(self))
        return rms_norm(x, weight, eps_of(self), offset=offset, casting=casting)

    def extra_repr(self):
        shape = tuple(self.weight.shape) if "weight" in weights else None
        options = f", offset={offset}, casting={casting}" if casting else ""
        return f"{shape}, eps={eps_of(self)}{options}, was={original.__name__}"

    name = "LigerLayerNorm" if operator == "layer_norm" else "LigerRMSNorm"
    return name, {"extra_repr": extra_repr, **computing(original, compile, compute)}


def untouched(module, others):
    """Whether the children that are no linear layers are what they were when module was bound, and nobody watches them."""
    children = module._modules
    if any(type(children.get(n)) is not t or "forward" in children[n].__dict__ for n, t in others):
        return False
    return all(not hooked(children[n]) and not getattr(children[n], "p", 0) for n, t in others)


def unit(kind, act):
    """The operator, of what the first layers give."""
    if kind == "gate_up":
        return lambda h: packed_glu(h, act)
    operator, split = unit_of(kind, act)[2], HALVES.get(kind, lambda *outputs: outputs)
    return lambda *outputs: operator(*split(*outputs))


def glu_class(original, compile, kind, act, names, others):
    *first, down = names
    name, activate = unit_of(kind, act)[1], unit(kind, act)

    def compute(self, x):
        if not untouched(self, others):
            return original.forward(self, x)
        return getattr(self, down)(activate(*(getattr(self, layer)(x) for layer in first)))

    text = described(original, f"{kind}, {act}, was={original.__name__}")
    return f"{name}MLP", {"extra_repr": text, **computing(original, compile, compute)}


def experts_class(original, compile, kind, act, others):
    from ..transformers.experts import experts_forward  # here, because it imports transformers
    from ..transformers.experts import in_the_place_of

    name, activate = unit_of(kind, act)[1], unit(kind, act)

    def compute(self, x):
        if not untouched(self, others):
            return original._apply_gate(self, x)
        return activate(x)

    @functools.wraps(original.forward)
    def forward(self, hidden_states, *args, **kwargs):
        ours = in_the_place_of("grouped_mm", self) and not left(compile, hidden_states)
        return (experts_forward if ours else original.forward)(self, hidden_states, *args, **kwargs)

    text = described(original, f"experts, {kind}, {act}, was={original.__name__}")
    computed = computing(original, compile, compute, "_apply_gate")
    return f"{name}Experts", {"extra_repr": text, "forward": forward, **computed}


def rope_class(original, compile, functions):
    """The module's own forward, in whose globals the functions' names mean ours.

    Without "__name__" in them torch.compile reads this dict and not the module of that name.
    """
    forward, known, own = original.forward, rope_functions(original.forward), functools.partial(left, compile)
    scope = {**forward.__globals__, **{name: rotation(known[name], own, *args) for name, *args in functions}}
    del scope["__name__"]
    clone = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    functools.update_wrapper(clone, forward)
    del clone.__wrapped__
    clone.__kwdefaults__ = forward.__kwdefaults__
    return original.__name__, {"forward": clone, "extra_repr": described(original, "rope=liger")}


def hooked(module):
    """Whether anybody's hooks see a call of module, but for those that only gather its weights."""
    own = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    everybodys = torch.nn.modules.module._global_forward_pre_hooks, torch.nn.modules.module._global_forward_hooks
    hooks = [hook for hooks in (*own, *everybodys) for hook in hooks.values()]
    return any(not getattr(hook, "__module__", "").startswith(("torch.distributed.", "deepspeed.")) for hook in hooks)


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
            self.count(f"materialised: the head's weight is a {type(self.weight).__name__}", torch.compiler.is_compiling())
            return original.forward(self, input)
        if hooked(self):  # which would see two calls, neither of which gives logits
            self.count("materialised: a hook on the head", torch.compiler.is_compiling())
            return original.forward(self, input)
        return lazy_logits(self, input)

    text = described(original, "loss=liger")
    return "LigerLMHead", {"forward": forward, "logits": original.forward, "count": count, "extra_repr": text}


def linears_of(head):
    """A head, or the linear layers that PEFT keeps in its place where it trains a copy."""
    copies = getattr(head, "modules_to_save", None)
    return [head] if copies is None else [head.original_module, *copies.values()]


def heads_of(model, own_loss):
    """The bound heads of a model, and why those are to give it logits all the same; empty where they need not."""
    output, why = model.get_output_embeddings(), ""
    heads = [] if output is None else [m for m in output.modules() if isinstance(m, nn.Linear) and hasattr(type(m), "logits")]
    if own_loss and torch.compiler.is_compiling():  # which cannot trace that module with anything but a tensor
        why = "CrossEntropyLoss"
    elif any(all(head is not m for m in linears_of(output)) for head in heads):  # which may give it weights for its calls
        why = "a wrapper around the head"
    elif heads and own_logits(model):
        why = "a loss_function that is not transformers'"
    return heads, why


def own_logits(model):
    """Whether model's loss_function, assigned, registered or of its class, is not of transformers.

    Such a one may hand logits to what takes nothing but tensors and does not say so: an autograd.Function has no gradient then.
    """
    function = getattr(model, "loss_function", None)
    return function is not None and not getattr(function, "__globals__", {}).get("__name__", "").startswith("transformers.")


# What is assigned later is another function, for which the model is traced anew.
own_logits._dynamo_marked_constant = True


def model_class(original, keep_logits, fused):
    place = [*inspect.signature(original.forward).parameters].index("labels") - 1
    own_loss = "CrossEntropyLoss" in called(original.forward)

    @functools.wraps(original.forward)
    def forward(self, *args, skip_logits=None, **kwargs):
        labels = args[place] if len(args) > place else kwargs.get("labels")
        wanted = fused and is_bound(self) and labels is not None and (self.training or skip_logits is not None)
        heads, why = heads_of(self, own_loss) if wanted else ([], "")
        if wanted and (why or not heads):
            what = f"materialised: {why}" if heads else "unbound: another head than the one that was bound"
            count(self, what, torch.compiler.is_compiling())
            heads = []
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
            swap(head, type(old))
            vars(head).update({name: vars(old)[name] for name in HEAD})

    text = described(original, "loss=liger" if fused else "")
    members = {"forward": forward, "set_output_embeddings": set_output_embeddings, "extra_repr": text}
    return original.__name__, {"__qualname__": original.__qualname__, **members}


def without_lazy(out, drop):
    """A model's output with None, or the computed logits, where it has lazy ones."""
    if type(out) is LazyLogits:
        return None if drop else out.compute("keep_logits")
    if isinstance(out, (tuple, list)):
        plain = [without_lazy(o, drop) for o in out]
        return type(out)(*plain) if hasattr(out, "_fields") else type(out)(plain)
    if isinstance(out, dict):  # as transformers' outputs are
        for key in [key for key, o in out.items() if type(o) is LazyLogits]:
            out[key] = without_lazy(out[key], drop)
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
    name, members = make(original, *args)
    made_of = Bound(original, make, args)

    def reduce(self, protocol):
        """Pickled and copied as a module of the original class, whose class is then swapped."""
        _, _, *state = original.__reduce_ex__(self, protocol)
        return rebuilt, made_of, *state

    # A bound module is no layer for the kernels library: the attribute of its class is hidden.
    hidden = {"kernel_layer_name": types.DynamicClassAttribute()}
    common = {"__module__": original.__module__, "__reduce_ex__": reduce, "_liger": made_of, **hidden}
    return type(original)(name, (original,), {**common, **members})


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


def swap(module, cls):
    """Give module another class, and the new forward to what keeps it as an attribute of the instance: accelerate's hooks."""
    before, module.__class__ = type(module), cls
    attributes = vars(module)
    for name in ("forward", "_old_forward"):
        if getattr(attributes.get(name), "__func__", None) is before.forward:
            attributes[name] = types.MethodType(cls.forward, module)
    if getattr(attributes.get("forward"), "__func__", None) is cls.forward:
        del attributes["forward"]
