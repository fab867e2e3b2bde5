"""Bound against unbound: a probe of each kind of module before it is bound, and a whole model on a batch of the user's."""

import contextlib
import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)
from torch.func import functional_call

from ..functional import cross_entropy
from ..functional import linear_cross_entropy
from ..ops._check import FLOATS
from ._find import close
from ._find import normal
from ._swap import is_bound
from ._swap import model_class
from ._swap import released
from ._swap import swap


def outcome(function, tensors, fixed):
    """What function makes of tensors, and the gradients of all but the last `fixed`; or what it raises, anything."""
    leaves = [x.detach().clone().requires_grad_(n < len(tensors) - fixed) for n, x in enumerate(tensors)]
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            out = function(*leaves)
            outs = list(out) if isinstance(out, (tuple, list)) else [out]
            upstream = [torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).to(o.dtype) for o in outs]
            return [*outs, *torch.autograd.grad(outs, leaves[: len(leaves) - fixed], upstream)]
    except Exception as error:
        return error


def refusal(own, ours, tensors, fixed=0):
    """Why ours may not take own's place, with gradients, held to what own gives in fp32; empty where it may."""
    plain, bound = outcome(own, tensors, fixed), outcome(ours, tensors, fixed)
    exact = outcome(own, [x.float() if x.dtype in FLOATS else x for x in tensors], fixed)
    for results, whose in ((plain, ""), (exact, ""), (bound, "the operator ")):
        if isinstance(results, Exception):
            return f"{whose}raises {type(results).__name__}: {results}"
    return "" if all(map(close, bound, plain, exact)) else "the operator computes other numbers on this device"


def try_module(module, trial, cls, device):
    """refusal of cls in the place of module's class, on that device and in module's dtypes, with the weights of a probe."""
    probe, method, x = trial
    # Quantised weights are integers, and the linear layers' own business.
    known = {name: p.dtype for name, p in module.named_parameters() if p.dtype in FLOATS}
    dtype, weights = next(iter(known.values()), x.dtype), dict(probe.named_parameters())

    def of(kind):
        twin = copy.copy(probe)
        twin.__class__ = kind
        return lambda x, *given: (
            functional_call(twin, dict(zip(weights, given, strict=True)), x) if given else getattr(twin, method)(x)
        )

    tensors = [x.to(device, dtype), *(p.to(device, known.get(name, dtype)) for name, p in weights.items())]
    return refusal(of(type(module)), of(cls), tensors)


def try_rope(module, trial, cls, device):
    """refusal of the rotations that cls calls in the place of those that module's class does; angles have no gradient."""
    for name, count, tensors in trial:
        own, ours = (c.forward.__globals__[name] for c in (type(module), cls))
        if why := refusal(own, ours, [x.to(device) for x in tensors], fixed=len(tensors) - count):
            return f"{name}: {why}"
    return ""


def try_loss(operator, head, device):
    """refusal of what takes the place of the loss of logits, with a small head of the same dtype."""
    dtype, generator = head.weight.dtype if head.weight.dtype in FLOATS else torch.float32, torch.Generator().manual_seed(0)
    tensors = [normal(generator, *shape, dtype=dtype, scale=0.3).to(device) for shape in ((7, 64), (96, 64))]
    target = torch.tensor([-100, 5, 0, 31, 95, 40, 7], device=device)

    ours = {
        "linear_cross_entropy": lambda x, weight: linear_cross_entropy(x, weight, target),
        "cross_entropy": lambda x, weight: cross_entropy(F.linear(x, weight), target),
    }
    return refusal(lambda x, weight: F.cross_entropy(F.linear(x, weight), target), ours[operator], tensors)


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

    Gradients, buffers and the random state are left as they were. Raises ValueError where model is not bound, or gives no loss.
    """
    bound = [(m, type(m)) for m in model.modules() if is_bound(m)] if isinstance(model, torch.nn.Module) else []
    if not bound:
        raise ValueError(f"verify: model must be bound, got a {type(model).__name__} that is not; bind(model) first")
    fused = any(cls._liger.make is model_class for _, cls in bound)
    ours = step(model, batch, **({"skip_logits": False} if fused else {}))
    with unbound(bound):
        own = step(model, batch)
    # A gradient that is zero but for rounding, such as that of attention's bias of k, is held to the largest one.
    names, gradients = {**own, **ours}, [x.norm().item() for name, x in own.items() if name not in ("loss", "logits")]
    least = max(gradients, default=0.0) * 2.0**-20
    return Verification(Difference(name, relative(ours.get(name), own.get(name), least)) for name in names)


@contextlib.contextmanager
def unbound(bound):
    try:
        for module, cls in bound:
            swap(module, released(cls))
        yield
    finally:
        for module, cls in bound:
            if type(module) is not cls:
                swap(module, cls)


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
            out.loss.backward()
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        return {"loss": out.loss, "logits": out.get("logits"), **gradients}
    finally:
        for name, p in parameters.items():
            p.grad = before[name]
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
