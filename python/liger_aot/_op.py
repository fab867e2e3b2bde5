"""Make Python functions PyTorch operators of the `liger` namespace."""

import builtins
import contextlib
import functools
import inspect
import types
import warnings

import torch
from torch import Tensor
from torch import is_autocast_enabled
from torch import is_grad_enabled
from torch._C import _get_tracing_state
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import _sharding

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


TYPES = {  # as schemas call them
    Tensor: "Tensor",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
    list[int]: "SymInt[]",
}
TYPES |= {type_ | None: f"{word}?" for type_, word in TYPES.items()}


def schema(function):
    """What torch.library.infer_schema says of an operator's function; to ask that takes 6 ms longer for all of them.

    It knows what functions here have: types for all arguments and the result, which are TYPES or tuples of them.
    """
    *parameters, (_, result) = function.__annotations__.items()
    names, words = list(function.__annotations__), []
    positional = function.__code__.co_argcount
    defaults = function.__defaults__ or ()
    defaults = dict(zip(names[positional - len(defaults) :], defaults, strict=False)) | (function.__kwdefaults__ or {})
    for n, (name, type_) in enumerate(parameters):
        if type_ not in TYPES:
            raise TypeError(f"{function.__name__}: {name} must be annotated as {', '.join(TYPES.values())}, got {type_}")
        default = defaults.get(name, Tensor)
        shown = "" if default is Tensor else f'="{default}"' if isinstance(default, str) else f"={default}"
        words.append(f"{'*, ' if n == positional else ''}{TYPES[type_]} {name}{shown}")
    results = TYPES[result] if result in TYPES else f"({', '.join(TYPES[r] for r in result.__args__)})"
    return f"{function.__name__}({', '.join(words)}) -> {results}"


def _define(function):
    LIBRARY.define(schema(function), tags=TAGS)


def quiet(function):
    """function with gradients and autocast off: ATen calls inside an operator must do just what they say."""

    @functools.wraps(function)
    def body(*args, **kwargs):
        if not (is_grad_enabled() or is_autocast_enabled("cpu") or is_autocast_enabled("cuda")):
            return function(*args, **kwargs)  # 10 us sooner
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


def on_one_device(name, body):
    """What the dispatcher calls: public functions, which call the body itself, have looked at the devices of their tensors."""

    @functools.wraps(body)
    def together(first, *others):
        for other in others:
            if isinstance(other, torch.Tensor) and other.device != first.device:
                raise ValueError(
                    f"{name}: tensors must be on one device, got one on {first.device} and one on {other.device}; "
                    "move it with .to()"
                )
        return body(first, *others)

    return together


def op(cpu, fake=None, strided=False):
    """Register a function that measures, allocates and launches as torch.ops.liger.<its name>.

    `cpu` computes the same in plain torch; its results are made contiguous unless the operator keeps strides; None where the
    function itself serves the CPU, because it calls other operators. Without `fake` the function is its own fake: a launch on
    fake tensors does nothing. Library.define and impl cost a third of torch.library.custom_op per call. What is returned calls
    the body without the dispatcher where it would add nothing: plain CUDA tensors, and nobody who traces or transforms. Devices
    apart, an operator's arguments are not checked: the public operator, which makes them, has seen to them.
    """

    def register(function):
        name, body = function.__name__, quiet(function) if fake else function
        _define(function)
        LIBRARY.impl(name, on_one_device(name, body), "CUDA")
        LIBRARY.impl(name, body if cpu is None else quiet(cpu if strided else contiguous(cpu)), "CPU")
        LIBRARY.impl(name, fake or function, "Meta")  # register_fake looks up who calls it, which takes ten times as long
        BODIES[name] = body

        return direct(function, body)

    return register


DIRECT_ON_CPU = []  # not empty while on_cpu() is entered
TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
# In so many words, because a loop over the arguments takes 1 us longer.
CALL = """\
def {name}({parameters}):
    if (DIRECT_ON_CPU_ or {first}.is_cuda) and not modes_() and level_() is None and {plain}:
        return body_({passed})
    return overload_({passed})
"""


def plain(*tensors):
    """Whether a body may be called on these without the dispatcher, which is what the calls that direct() makes ask."""
    alone = (DIRECT_ON_CPU or tensors[0].is_cuda) and not _len_torch_dispatch_stack() and maybe_current_level() is None
    return alone and all(type(t) in TENSORS and not t.is_neg() for t in tensors)


# Dynamo does not trace exec.
FIRST_CALL = (lambda *args, **kwargs: (overload_ if tracing_() else compiled_())(*args, **kwargs)).__code__  # noqa: F821
# What it traces where it inlines the call: of a function whose code has changed it would take the parameters it has seen.
TRACED = (lambda *args, **kwargs: overload_(*args, **kwargs)).__code__  # noqa: F821


def spelled(function):
    """CALL for a function of tensors, optional or not, and numbers."""
    parameters, plain = inspect.signature(function).parameters, []
    for name, parameter in parameters.items():
        if parameter.annotation is Tensor:
            plain.append(f"type({name}) in TENSORS_ and not {name}.is_neg()")
        elif parameter.annotation == Tensor | None:
            plain.append(f"({name} is None or type({name}) in TENSORS_ and not {name}.is_neg())")
    return CALL.format(
        name=function.__name__,
        parameters=", ".join(n if p.default is p.empty else f"{n}={p.default!r}" for n, p in parameters.items()),
        passed=", ".join(parameters),
        first=next(iter(parameters)),
        plain=" and ".join(plain),
    )


def direct(function, body):
    """A call of body where all tensors are plain and nobody traces or transforms, else of the operator."""
    scope = {
        "DIRECT_ON_CPU_": DIRECT_ON_CPU,
        "TENSORS_": TENSORS,
        "modes_": _len_torch_dispatch_stack,
        "level_": maybe_current_level,
        "body_": body,
        "overload_": _sharding.aware(function.__name__),
        "tracing_": is_dynamo_compiling,
        "__builtins__": builtins,  # which Dynamo looks for; exec would put it there
    }
    call = types.FunctionType(FIRST_CALL, scope)
    call._torchdynamo_inline = types.FunctionType(TRACED, scope)

    def compiled():  # not before the first call: all of them would take 5 ms of the import
        exec(spelled(function), scope)
        made = scope[function.__name__]
        call.__defaults__ = made.__defaults__  # which another thread's call with the new code needs
        call.__code__ = made.__code__
        return call

    scope["compiled_"] = compiled
    return functools.update_wrapper(call, function)


def public(function):
    """Register the differentiable operator: export keeps it as one node, autograd and compile see through it.

    What is returned calls the function without the dispatcher (4 us with gradients) where nobody traces or transforms.
    """
    name = function.__name__
    _define(function)
    LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    PUBLIC.append(name)

    @functools.wraps(function)
    def call(*args, **kwargs):
        # is_dynamo_compiling comes first: Dynamo takes it for true, and looks no further.
        if is_dynamo_compiling() or _get_tracing_state() or _len_torch_dispatch_stack() or maybe_current_level() is not None:
            return getattr(torch.ops.liger, name).default(*args, **kwargs)
        return function(*args, **kwargs)

    return call


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
    """An autograd.Function whose gradient is computed by a kernel, once."""

    def __init_subclass__(cls):
        # torch's own apply, without its Python preamble (2 us), which sees to transforms: needs_grad does.
        cls.apply = super(torch.autograd.Function, cls).apply

    @staticmethod
    def once(name):
        if is_grad_enabled():
            raise RuntimeError(f"{name}: double backward is not supported; call backward without create_graph=True")


def needs_grad(name, *tensors):
    """Whether an operator must record its gradient, which it cannot in forward mode or under a transform of torch.func."""
    if forward_ad._current_level >= 0:
        refuse_tangents(name, tensors)
    if is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                if maybe_current_level() is not None:
                    raise RuntimeError(f"{name}: torch.func transforms are not supported; use torch.autograd")
                return True
    return False


def refuse_tangents(name, tensors):
    for t in tensors:
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:
            raise RuntimeError(f"{name}: forward-mode differentiation is not supported; use torch.autograd.grad")
