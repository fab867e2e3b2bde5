"""Make Python functions PyTorch operators of the `liger` namespace."""

import contextlib
import functools
import warnings

import torch
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import maybe_current_level
from torch.library import infer_schema

try:
    LIBRARY = torch.library.Library("liger", "DEF")
except RuntimeError as error:
    raise ImportError(
        "liger_aot: another library in this process has registered the operator namespace `liger` already "
        f"(or liger_aot was imported twice from two places); use one of them. torch says: {error}"
    ) from error
TAGS = (torch.Tag.pt2_compliant_tag,)
PUBLIC = []  # the names of the differentiable operators
BODIES = {}  # name -> the function that launches the kernels, for whoever runs it on other than CUDA tensors


def _define(function):
    LIBRARY.define(function.__name__ + infer_schema(function, mutates_args=()), tags=TAGS)
    return getattr(torch.ops.liger, function.__name__).default


def quiet(function):
    """function with gradients and autocast off: ATen calls inside an operator must do just what they say."""

    @functools.wraps(function)
    def body(*args, **kwargs):
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return body


def contiguous(function):
    """function with results laid out as the kernels write them."""

    @functools.wraps(function)
    def body(*args, **kwargs):
        results = function(*args, **kwargs)
        return results.contiguous() if isinstance(results, torch.Tensor) else tuple(r.contiguous() for r in results)

    return body


def op(cpu, fake=None, strided=False):
    """Register a function that measures, allocates and launches as torch.ops.liger.<its name>.

    `cpu` computes the same in plain torch; its results are made contiguous unless the operator keeps strides. Without `fake` the function is its own fake: a launch on fake tensors does nothing.
    Library.define and impl cost a third of torch.library.custom_op per call. What is returned calls the body without the
    dispatcher where it would add nothing: plain CUDA tensors, and nobody who traces or transforms.
    """

    def register(function):
        name, body = function.__name__, quiet(function) if fake else function
        overload = _define(function)
        LIBRARY.impl(name, body, "CUDA")
        LIBRARY.impl(name, quiet(cpu if strided else contiguous(cpu)), "CPU")
        torch.library.register_fake(f"liger::{name}", fake or function, lib=LIBRARY)
        BODIES[name] = body

        @functools.wraps(function)
        def call(first, *others):
            if (first.is_cuda or DIRECT_ON_CPU) and not _len_torch_dispatch_stack() and maybe_current_level() is None:
                for a in (first, *others):
                    kind = type(a)
                    if kind is torch.Tensor or kind is torch.nn.Parameter:
                        if a.is_neg():
                            break
                    elif kind not in NUMBERS:
                        break
                else:
                    return body(first, *others)
            return overload(first, *others)

        return call

    return register


DIRECT_ON_CPU = []  # not empty while on_cpu() is entered
NUMBERS = frozenset({bool, int, float, type(None)})


def public(function):
    """Register the differentiable operator: export keeps it as one node, autograd and compile see through it."""
    overload = _define(function)
    LIBRARY.impl(function.__name__, function, "CompositeImplicitAutograd")
    PUBLIC.append(function.__name__)
    return overload


@contextlib.contextmanager
def on_cpu():
    """Inside the `with`, operators on CPU tensors run the bodies that are meant for CUDA: over an interpreter or a stub."""
    override = torch.library.Library("liger", "IMPL")
    DIRECT_ON_CPU.append(override)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name, body in BODIES.items():
                override.impl(name, body, "CPU", allow_override=True)
        yield
    finally:
        DIRECT_ON_CPU.remove(override)
        override._destroy()


class Function(torch.autograd.Function):
    """An autograd.Function whose gradient is computed by a kernel, once. `name` is the operator's."""

    @classmethod
    def apply(cls, *args):
        if maybe_current_level() is not None:
            raise RuntimeError(f"{cls.name}: torch.func transforms are not supported; use torch.autograd")
        # torch's own apply, without its Python preamble, which sees to transforms (2 us).
        return super(torch.autograd.Function, cls).apply(*args)

    @staticmethod
    def once(name):
        if torch.is_grad_enabled():
            raise RuntimeError(f"{name}: double backward is not supported; call backward without create_graph=True")


def needs_grad(*tensors):
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False
