"""Bound against unbound: a probe of each kind of module before it is bound, and a whole model on a batch of the user's."""

import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)

from ..functional import cross_entropy
from ..functional import linear_cross_entropy
from ..ops._check import FLOATS
from ._find import close
from ._find import normal
from ._swap import is_bound
from ._swap import linears_of
from ._swap import model_class
from ._swap import released
from ._swap import swap


def outcome(function, inputs, parameters=()):
    """What function makes of inputs, and the gradients of those and of parameters; or what it raises, which may be anything."""
    leaves = [x.detach().clone().requires_grad_(needed) for x, needed in inputs]
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            out = function(*leaves)
            outs = list(out) if isinstance(out, (tuple, list)) else [out]
            upstream = [torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).to(o.dtype) for o in outs]
            return [*outs, *torch.autograd.grad(outs, [x for x in (*leaves, *parameters) if x.requires_grad], upstream)]
    except Exception as error:
        return error


def difference(own, ours, exact):
    """Why ours may not take the place of a module's own; empty where it may. exact is the module's own in fp32."""
    for results, whose in ((own, ""), (exact, ""), (ours, "the operator ")):
        if isinstance(results, Exception):
            return f"{whose}raises {type(results).__name__}: {results}"
    return "" if all(map(close, ours, own, exact)) else "the operator computes other numbers on this device"


def try_module(module, trial, cls, device):
    """difference of module's class and cls, on that device and in module's dtypes, with the weights of a probe."""
    (copy, method, x), weights = trial, dict(module.named_parameters())
    # Quantised weights are integers, and the linear layers' own business.
    known = {name: p.dtype for name, p in weights.items() if p.dtype in FLOATS}
    x_dtype = next(iter(known.values()), x.dtype)
    dtypes = {name: known.get(name, x_dtype) for name, _ in copy.named_parameters()}

    def run(dtype=None):
        for name, p in copy.named_parameters():
            p.data = p.data.to(device, dtypes[name]).to(dtype or dtypes[name])
        inputs = x.to(device, x_dtype).to(dtype or x_dtype)
        return outcome(lambda x: getattr(copy, method)(x), [(inputs, True)], [*copy.parameters()])

    own, exact, copy.__class__ = run(), run(torch.float32), cls
    return difference(own, run(), exact)


def try_rope(module, trial, cls, device):
    """difference of the rotations that module's class and cls call."""
    for name, tensors in trial:
        inputs = [(x.to(device), n < len(tensors) - 2) for n, x in enumerate(tensors)]
        own, ours = (outcome(c.forward.__globals__[name], inputs) for c in (type(module), cls))
        if why := difference(own, ours, own):
            return f"{name}: {why}"
    return ""


def try_loss(operator, head, device):
    """difference of the loss of logits and what takes its place, for a small head of the same dtype."""
    generator, dtype = torch.Generator().manual_seed(0), linears_of(head)[0].weight.dtype
    target = torch.tensor([-100, 5, 0, 31, 95, 40, 7], device=device)
    tensors = [normal(generator, *shape, scale=0.3).to(device) for shape in ((7, 64), (96, 64))]

    def own(x, weight):
        return F.cross_entropy(F.linear(x, weight), target)

    def ours(x, weight):
        logits = operator == "cross_entropy"
        return cross_entropy(F.linear(x, weight), target) if logits else linear_cross_entropy(x, weight, target)

    inputs = [(x.to(dtype if dtype in FLOATS else x.dtype), True) for x in tensors]
    exact = outcome(own, [(x.float(), True) for x, _ in inputs])
    return difference(outcome(own, inputs), outcome(ours, inputs), exact)


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
