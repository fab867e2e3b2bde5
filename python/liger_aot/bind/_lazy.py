"""Logits that nobody has looked at: what a bound lm_head answers while a loss is wanted."""

import functools
import math
import operator
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..functional import cross_entropy
from ..functional import linear_cross_entropy
from ..ops._check import FLOATS
from ..ops._check import under_autocast

WHOLE = slice(None)


class Form(NamedTuple):
    """dtype(softcap · tanh(scale · (hidden · weightᵀ + bias) / softcap)), of the first `classes` rows of weight and bias.

    softcap 0 means that the tanh was taken, and its factor has not been met yet; part, that these may be strided.
    """

    hidden: Tensor
    classes: int
    dtype: torch.dtype
    scale: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None
    part: bool = False


# What a method makes of a form: another form, or None where that cannot say it.


def cast(form, *args, **kwargs):
    given = [*args, *kwargs.values()]
    if any(not isinstance(a, torch.dtype) and a != form.hidden.device for a in given):
        return None
    dtype = next((a for a in given if isinstance(a, torch.dtype)), form.dtype)
    # Rounding on the way down would have to be repeated.
    return form._replace(dtype=dtype) if torch.promote_types(dtype, form.dtype) is dtype else None


def shaped(form, *shape):
    *sizes, last = shape[0] if isinstance(shape[0], (tuple, list)) else shape
    return form._replace(hidden=form.hidden.reshape(*sizes, form.hidden.shape[-1])) if last == form.classes else None


def indexed(form, index):
    """Of the positions anything; of the classes all, or the first ones of every position."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(i is None or isinstance(i, (list, bool)) for i in items):
        return None
    used = sum(i.dim() if isinstance(i, Tensor) and i.dtype is torch.bool else i is not Ellipsis for i in items)
    at = next((n for n, i in enumerate(items) if i is Ellipsis), len(items))
    items[at : at + 1] = [WHOLE] * (form.hidden.dim() - used)
    last = items[-1]
    if isinstance(last, slice) and last == WHOLE:
        return form._replace(hidden=form.hidden[index], part=True)
    if not isinstance(last, slice) or any(not isinstance(i, slice) or i != WHOLE for i in items[:-1]):
        return None
    start, stop, step = last.indices(form.classes)
    return form._replace(classes=stop, part=True) if (start, step) == (0, 1) and stop else None


def scaled(form, factor, inverse=False):
    if type(factor) not in (int, float) or not 0 < factor < math.inf or form.softcap:
        return None
    factor = 1 / factor if inverse else factor
    return form._replace(scale=form.scale * factor, **({} if form.softcap is None else {"softcap": factor}))


def added(form, bias):
    first = form.bias is None and form.scale == 1.0 and form.softcap is None
    fits = isinstance(bias, Tensor) and bias.shape.numel() == bias.shape[-1:].numel() == form.classes
    return form._replace(bias=bias.flatten(), dtype=torch.promote_types(form.dtype, bias.dtype)) if first and fits else None


divided = functools.partial(scaled, inverse=True)
RECORDED = {
    "to": cast,
    "float": lambda form: cast(form, torch.float32),
    "contiguous": lambda form: form._replace(part=False),
    "view": shaped,
    "reshape": shaped,
    "__getitem__": indexed,
    "tanh": lambda form: form._replace(softcap=0.0) if form.softcap is None else None,
    **dict.fromkeys(("__mul__", "__rmul__", "mul"), scaled),
    **dict.fromkeys(("__truediv__", "div"), divided),
    **dict.fromkeys(("__add__", "__radd__", "add"), added),
}


class LazyLogits:
    """The output of a head, computed only if somebody looks. No tensor: wherever one is wanted it becomes one.

    What linear_cross_entropy can say is recorded. Anything else computes the logits, from then on the same tensor for
    everybody, so that what is done in place is seen wherever it would have been; and it is counted under its name.
    """

    def __init__(self, head, form, parent=None, call=None):
        self.head, self.form, self.parent, self.call = head, form, parent, call
        self.value, self.children, self.grad = None, [], torch.is_grad_enabled()
        self.autocast = autocast_of(form.hidden) if parent is None else parent.autocast
        self.made = (form.hidden, versions(head, form.hidden)) if parent is None else parent.made
        self.tracked = self.grad if parent is None else parent.tracked
        if parent is not None and not torch.compiler.is_compiling():
            parent.children.append(weakref.ref(self))

    __array_priority__ = torch.Tensor.__array_priority__  # so that NumPy's numbers leave operators to these methods

    dtype = property(lambda self: self.form.dtype)
    device = property(lambda self: self.form.hidden.device)
    ndim = property(lambda self: self.form.hidden.ndim)
    shape = property(lambda self: torch.Size((*self.form.hidden.shape[:-1], self.form.classes)))

    def size(self, dim=None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self):
        return self.ndim

    def is_contiguous(self, **options):
        return self.compute("is_contiguous").is_contiguous(**options) if self.form.part or options else True

    def __len__(self):
        return self.shape[0]

    @property
    def requires_grad(self):
        return self.grad and any(x.requires_grad for x in (self.form.hidden, *self.head.parameters()))

    def compute(self, why):
        """The logits as a tensor, because of `why`; as they would have been when they were made."""
        if self.value is None and self.parent is not None:
            self.parent.compute(why)
        if self.value is None:
            with torch.set_grad_enabled(self.grad):
                self.value = self.replay(why)
            # What was made of it, before anybody changes it in place.
            for child in [child() for child in self.children]:
                if child is not None:
                    child.compute(why)
        return self.value

    def replay(self, why):
        if self.parent is not None:
            name, args, kwargs = self.call
            return getattr(self.parent.value, name)(*args, **kwargs)
        self.head.count(why if self.head.liger_real else f"materialised: {why}", torch.compiler.is_compiling())
        return self.at_head(type(self.head).logits)

    def at_head(self, use):
        """use(head, hidden) with the head's weights at hand, if they are those of the forward that made these logits."""
        if self.tracked and within_function():  # where what is made of them has no grad of its own
            raise RuntimeError(
                "bind: an autograd.Function must be given tensors, the only things it has gradients for, got a bound head's "
                "logits; give it logits + 0, or bind(model, linear_cross_entropy=False)"
            )
        hidden, before = self.made

        def checked(head, x):
            now = versions(head, hidden)
            if before and now and now != before:
                raise RuntimeError(
                    "bind: logits that were not computed must be asked for before the weights change, got a bound head whose "
                    "weights, or input, are others by now; bind(model, keep_logits=True) computes logits at once"
                )
            return use(head, x)

        with torch.autocast(*self.autocast):
            return self.head(self.form.hidden, use=checked)

    @property
    def computed(self):
        return self.value is not None or (self.parent is not None and self.parent.computed)

    def method(self, name, *args, **kwargs):
        known = name in RECORDED and not (kwargs and name != "to") and not self.computed
        form = RECORDED[name](self.form, *args, **kwargs) if known else None
        if form is None:
            return getattr(self.compute(name), name)(*tensors(args, name), **tensors(kwargs, name))
        return LazyLogits(self.head, form, self, (name, args, kwargs))

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return functools.partial(self.method, name) if name in RECORDED else getattr(self.compute(name), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if isinstance(args[0] if args else None, cls):
            if function is F.cross_entropy:
                return args[0].cross_entropy(*args[1:], **(kwargs or {}))
            if name in RECORDED:
                return args[0].method(name, *args[1:], **(kwargs or {}))
        return function(*tensors(args, name), **tensors(kwargs or {}, name))

    def cross_entropy(
        self, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0
    ):
        options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        form, classes = self.form, not target.is_floating_point()  # probabilities are torch's
        rows = self.ndim == 2 and target.dim() == 1 and classes and form.hidden.dtype in FLOATS
        real, old = self.head.liger_real, size_average is not None or reduce is not None
        if real or old or not rows or form.softcap == 0 or self.computed:
            loss = cross_entropy if real and classes else F.cross_entropy
            return loss(self.compute("cross_entropy"), target, size_average=size_average, reduce=reduce, **options)

        # There torch computes this loss in no less, whatever the logits are.
        dtype = torch.promote_types(form.dtype, torch.float32) if under_autocast(form.hidden) else form.dtype

        def loss(head, hidden):
            weight, bias, more = (first(form.classes, p) for p in (head.weight, head.bias, form.bias))
            bias = more if bias is None else bias if more is None else bias + more
            shape = {"softcap": form.softcap, "scale": form.scale, "loss_dtype": dtype}
            return linear_cross_entropy(hidden, weight, target, linear_bias=bias, **options, **shape)

        self.head.count("fused", torch.compiler.is_compiling())
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            return self.at_head(loss)


def within_function():
    """Whether this runs in an autograd.Function's forward, where forward-mode differentiation is off as nowhere else."""
    off = not torch.compiler.is_compiling() and not torch._C._is_fwd_grad_enabled()
    return off and not torch.is_inference_mode_enabled()


def versions(head, hidden):
    """How often a head's parameters and its input were changed in place; those that torch counts."""
    tensors = () if torch.compiler.is_compiling() else (hidden, *head.parameters())
    return [0 if t.is_inference() else t._version for t in tensors]


def first(count, parameter):
    return parameter if parameter is None or parameter.shape[0] == count else parameter[:count]


def tensors(x, why):
    """x with tensors in the place of lazy logits."""
    return tree_map_only(LazyLogits, lambda lazy: lazy.compute(why), x)


def operation(name):
    def call(self, *args):
        return self.method(name, *args)

    return call


# Python looks operators up in the class.
OPERATORS = {f"__{prefix}{name.strip('_')}__" for name in operator.__all__ for prefix in ("", "r")} & {*dir(Tensor)}
for name in OPERATORS:
    setattr(LazyLogits, name, operation(name))
LazyLogits.__hash__ = object.__hash__


def autocast_of(x):
    """The arguments of torch.autocast as it is for x now; there is none for meta tensors."""
    kind = "cpu" if x.is_meta else x.device.type
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)


def lazy_logits(head, hidden):
    _, dtype, enabled = autocast_of(hidden)
    return LazyLogits(head, Form(hidden, head.out_features, dtype if enabled else hidden.dtype))
