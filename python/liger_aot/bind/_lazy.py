"""Logits that nobody has looked at: what a bound lm_head answers while a loss is wanted."""

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)
from torch import Tensor

from ..functional import cross_entropy
from ..functional import linear_cross_entropy

WHOLE = slice(None)


class Form(NamedTuple):
    """dtype(softcap · tanh(scale · (hidden · weightᵀ + bias) / softcap)), of the first `classes` rows of weight and bias.

    softcap 0 means that the tanh was taken, and its factor has not been met yet.
    """

    hidden: Tensor
    classes: int
    dtype: torch.dtype
    scale: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None


class LazyLogits:
    """The output of a head, computed only if somebody looks. No tensor: wherever one is wanted it becomes one.

    What linear_cross_entropy can express is recorded. Anything else computes the logits, from then on the same tensor for
    everybody, so that what is done in place is seen wherever it would have been; it is counted under its name.
    """

    def __init__(self, head, form, parent=None, replay=None):
        self.head, self.form, self.parent, self.replay = head, form, parent, replay
        self.value, self.grad = None, torch.is_grad_enabled()

    @classmethod
    def of(cls, head, hidden):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        return cls(head, Form(hidden, head.out_features, dtype))

    dtype = property(lambda self: self.form.dtype)
    device = property(lambda self: self.form.hidden.device)
    is_cuda = property(lambda self: self.form.hidden.is_cuda)
    shape = property(lambda self: torch.Size((*self.form.hidden.shape[:-1], self.form.classes)))
    ndim = property(lambda self: self.form.hidden.ndim)
    requires_grad = property(lambda self: self.grad)

    def size(self, dim=None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self):
        return self.ndim

    def __len__(self):
        return self.shape[0]

    def __repr__(self):
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    def compute(self, why):
        """The logits as a tensor, because of `why`."""
        if self.value is None:
            with torch.set_grad_enabled(self.grad):
                if self.parent is None:
                    self.head.count(why if self.head.real else f"materialised: {why}")
                    self.value = self.head(self.form.hidden, use=type(self.head).logits)
                else:
                    self.value = self.replay(self.parent.compute(why))
        return self.value

    @property
    def computed(self):
        return self.value is not None or (self.parent is not None and self.parent.computed)

    def then(self, why, replay, **changes):
        """What replay makes of the logits: recorded as changes of the form, or computed where there are none."""
        if not changes or self.computed:
            return replay(self.compute(why))
        return LazyLogits(self.head, self.form._replace(**changes), self, replay)

    def to(self, *args, **kwargs):
        dtypes = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
        others = [a for a in (*args, *kwargs.values()) if not isinstance(a, torch.dtype) and a != self.device]
        changes = {} if others else {"dtype": dtypes[0] if dtypes else self.dtype}
        return self.then("to", lambda z: z.to(*args, **kwargs), **changes)

    def float(self):
        return self.to(torch.float32)

    def contiguous(self):
        return self.then("contiguous", lambda z: z.contiguous(), dtype=self.dtype)

    def view(self, *shape):
        return self.shaped("view", shape)

    def reshape(self, *shape):
        return self.shaped("reshape", shape)

    def shaped(self, why, shape):
        changes, sizes = {}, shape[0] if isinstance(shape[0], (tuple, list)) else shape
        if not isinstance(sizes[0], torch.dtype) and sizes[-1] == self.form.classes:
            changes = {"hidden": self.form.hidden.reshape(*sizes[:-1], self.form.hidden.shape[-1])}
        return self.then(why, lambda z: getattr(z, why)(*shape), **changes)

    def __getitem__(self, index):
        changes, items = {}, spelled(index, self.ndim)
        if items and items[-1] == WHOLE:
            changes = {"hidden": self.form.hidden[index]}
        elif items and all(i == WHOLE for i in items[:-1]) and isinstance(items[-1], slice):
            start, stop, step = items[-1].indices(self.form.classes)
            if start == 0 and step == 1 and stop > 0:
                changes = {"classes": stop}
        return self.then("__getitem__", lambda z: z[index], **changes)

    def __mul__(self, other):
        return self.then("__mul__", lambda z: z * other, **self.scaled(other, lambda scale: scale * other))

    __rmul__ = mul = __mul__

    def __truediv__(self, other):
        return self.then("__truediv__", lambda z: z / other, **self.scaled(other, lambda scale: scale / other))

    div = __truediv__

    def scaled(self, other, scale):
        if type(other) not in (int, float) or other <= 0 or self.form.softcap:
            return {}
        return {"scale": scale(self.form.scale)} if self.form.softcap is None else self.capped(scale(1.0))

    def capped(self, softcap):
        return {"softcap": softcap, "scale": self.form.scale * softcap}

    def tanh(self):
        return self.then("tanh", torch.tanh, **({"softcap": 0.0} if self.form.softcap is None else {}))

    def __add__(self, other):
        form, changes = self.form, {}
        first = form.bias is None and form.scale == 1.0 and form.softcap is None
        if first and isinstance(other, Tensor) and other.shape.numel() == other.shape[-1:].numel() == form.classes:
            changes = {"bias": other.flatten()}
        return self.then("__add__", lambda z: z + other, **changes)

    __radd__ = add = __add__

    def cross_entropy(
        self, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0
    ):
        options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        form, old = self.form, {"size_average": size_average, "reduce": reduce}
        if self.head.real:
            return cross_entropy(self.compute("cross_entropy"), target, **options, **old)
        if form.softcap == 0 or form.hidden.dim() != 2 or target.dim() != 1 or self.computed or set(old.values()) != {None}:
            return F.cross_entropy(self.compute("cross_entropy"), target, **options, **old)

        def loss(head, hidden):
            weight, bias = head.weight, head.bias
            if form.classes != head.out_features:
                weight, bias = weight[: form.classes], bias if bias is None else bias[: form.classes]
            if form.bias is not None:
                bias = form.bias[: form.classes] if bias is None else bias + form.bias[: form.classes]
            shape = {"softcap": form.softcap, "scale": form.scale, "loss_dtype": form.dtype}
            return linear_cross_entropy(hidden, weight, target, linear_bias=bias, **options, **shape)

        self.head.count("fused")
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            return self.head(form.hidden, use=loss)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.compute(name), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], cls) and function in RECORDED:
            return getattr(args[0], RECORDED[function])(*args[1:], **kwargs)
        why = getattr(function, "__name__", repr(function))
        return function(*tensors(args, why), **tensors(kwargs, why))


# What torch's functions call, where the method records.
RECORDED = {F.cross_entropy: "cross_entropy", torch.tanh: "tanh", torch.mul: "mul", torch.div: "div", torch.add: "add"}


def tensors(x, why):
    """x with tensors in the place of lazy logits."""
    if isinstance(x, LazyLogits):
        return x.compute(why)
    if isinstance(x, dict):
        return {key: tensors(value, why) for key, value in x.items()}
    return type(x)(tensors(value, why) for value in x) if type(x) in (tuple, list) else x


def spelled(index, dims):
    """An item for each dimension that `index` indexes, without an Ellipsis; None where it is more than slices and masks."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(i is None or isinstance(i, (list, bool)) for i in items):
        return None
    used = sum(i.dim() if isinstance(i, Tensor) and i.dtype is torch.bool else i is not Ellipsis for i in items)
    gap = [WHOLE] * (dims - used)
    at = next((n for n, i in enumerate(items) if i is Ellipsis), len(items))
    return [*items[:at], *gap, *items[at + 1 :]]


def passed_on(name, swapped):
    def method(self, *args):
        args = self.compute(name), *tensors(args, name)
        return getattr(operator, name)(*(args[::-1] if swapped else args))

    return method


for name in [
    "sub",
    "pow",
    "matmul",
    "floordiv",
    "mod",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "and_",
    "or_",
    "xor",
    "neg",
    "invert",
]:
    setattr(LazyLogits, f"__{name.strip('_')}__", passed_on(name, False))
for name in ["iadd", "isub", "imul", "itruediv", "setitem"]:
    setattr(LazyLogits, f"__{name}__", passed_on(name, False))
for name in ["sub", "truediv", "pow", "matmul"]:
    setattr(LazyLogits, f"__r{name}__", passed_on(name, True))
LazyLogits.__hash__ = object.__hash__
