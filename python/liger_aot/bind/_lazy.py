"""Logits that nobody has looked at: what a bound lm_head answers while a loss is wanted."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn import Linear
from torch.utils._pytree import tree_map_only

from ..functional import linear_cross_entropy


class LazyLogits:
    """head(hidden) as dtype, computed only if somebody looks. No tensor: wherever one is wanted it becomes one."""

    def __init__(self, hidden, head, dtype):
        self.hidden, self.head, self.dtype = hidden, head, dtype
        self.shape, self.device = torch.Size((*hidden.shape[:-1], head.out_features)), hidden.device

    def float(self):
        return LazyLogits(self.hidden, self.head, torch.float32)

    def view(self, *shape):
        if shape[-1] != self.head.out_features:
            return self.compute().view(*shape)
        return LazyLogits(self.hidden.reshape(*shape[:-1], self.head.in_features), self.head, self.dtype)

    def cross_entropy(
        self, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0
    ):
        if self.hidden.dim() != 2 or size_average is not None or reduce is not None:
            old = {"size_average": size_average, "reduce": reduce, "reduction": reduction}
            return F.cross_entropy(
                self.compute(), target, weight, ignore_index=ignore_index, label_smoothing=label_smoothing, **old
            )

        def loss(head, hidden):
            return linear_cross_entropy(
                hidden,
                head.weight,
                target,
                linear_bias=head.bias,
                weight=weight,
                reduction=reduction,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                loss_dtype=self.dtype,
            )

        return self.head(self.hidden, use=loss)

    def compute(self):
        return self.head(self.hidden, use=Linear.forward).to(self.dtype)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.compute(), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.cross_entropy and args and type(args[0]) is cls:
            return args[0].cross_entropy(*args[1:], **kwargs)
        args, kwargs = tree_map_only(cls, cls.compute, (args, kwargs))
        return function(*args, **kwargs)


for operator in ["getitem", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "pow"]:
    name = f"__{operator}__"
    setattr(LazyLogits, name, lambda self, *args, name=name: getattr(self.compute(), name)(*args))
