"""Bound against unbound: a whole model, on a batch of the user's."""

import contextlib
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from .bind._swap import is_bound
from .bind._swap import loss_of
from .bind._swap import model_class
from .bind._swap import released
from .bind._swap import swap_all


class Difference(NamedTuple):
    """How far bound is from unbound: |bound - unbound| / |unbound|, in the 2-norm, of the loss, the logits or a gradient.

    |unbound| is taken no smaller than 2^-20 of the largest gradient's."""

    what: str
    relative: float


class Verification(list):
    """A Difference each for the loss, the logits, and the gradient of every parameter that has one."""

    @property
    def worst(self):
        return max(self, key=lambda row: row.relative)

    def __str__(self):
        loss, logits, *gradients = self
        worst = max(gradients, key=lambda row: row.relative, default=Difference("there are none", 0.0))
        return "\n".join(
            [
                "bound against unbound, |difference| / |unbound|",
                f"loss       {loss.relative:.1e}",
                f"logits     {logits.relative:.1e}",
                f"gradients  {worst.relative:.1e} at most, of {len(gradients)}: {worst.what}",
            ]
        )


def verify(model: torch.nn.Module, batch: dict) -> Verification:
    """The differences between the bound model and itself unbound, for a batch with labels, with the same random numbers.

    Gradients, buffers and the random state are left as they were. Where no parameter requires one, there are no gradients.
    Raises ValueError where model is not bound or gives no loss, and where batch is no mapping or has skip_logits.
    """
    bound = [(m, type(m), loss_of(m)) for m in model.modules() if is_bound(m)] if isinstance(model, torch.nn.Module) else []
    if not bound:
        raise ValueError(f"verify: model must be bound, got a {type(model).__name__} that is not; bind(model) first")
    if not isinstance(batch, Mapping) or "skip_logits" in batch:
        got = f"{type(batch).__name__} of {', '.join(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"verify: batch must be a mapping of the model's own inputs, without skip_logits, got {got}")
    fused = any(cls._liger.make is model_class for _, cls, _ in bound)
    ours = step(model, batch, **({"skip_logits": False} if fused else {}))
    with unbound(model, bound):
        own = step(model, batch)
    # A gradient that is zero but for rounding, such as that of attention's bias of k, is held to the largest one.
    names, gradients = {**own, **ours}, [x.norm().item() for name, x in own.items() if name not in ("loss", "logits")]
    least = max(gradients, default=0.0) * 2.0**-20
    return Verification(Difference(name, relative(ours.get(name), own.get(name), least)) for name in names)


@contextlib.contextmanager
def unbound(model, bound):
    try:
        swap_all(model, [(module, released(cls), {}) for module, cls, _ in bound])
        yield
    finally:
        swap_all(model, [each for each in bound if type(each[0]) is not each[1]])


def relative(a, b, least):
    """|a - b| / |b|, where |b| is no less than `least`; infinite where one is missing or no number."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    a, b = (x.detach().double() for x in (a, b))
    size = (a - b).norm().item()
    if math.isnan(size):
        return math.inf
    return size / max(b.norm().item(), least) if size else 0.0


def step(model, batch, **options):
    """The loss, the logits, and every gradient of one step."""
    parameters = dict(model.named_parameters())
    before = {name: p.grad for name, p in parameters.items()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    devices = {p.device for p in parameters.values() if p.is_cuda}
    try:
        for p in parameters.values():
            p.grad = None
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            out = model(**batch, **options)
            if getattr(out, "loss", None) is None:
                raise ValueError(f"verify: model and batch must give a loss, as from labels, got {', '.join(batch)}")
            if out.loss.requires_grad:
                out.loss.backward()
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        return {"loss": out.loss, "logits": out.get("logits"), **gradients}
    finally:
        for name, p in parameters.items():
            p.grad = before[name]
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
