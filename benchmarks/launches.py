"""What an operator launches for a shape, and the bytes that moves: the package's own code, run on tensors without memory."""

import contextlib
import dataclasses
import math

import torch
from operators import OPERATORS
from operators import shape
from torch.utils._python_dispatch import TorchDispatchMode
from traffic import KERNELS

from liger_aot import _runtime
from liger_aot.ops._check import FLOATS


@dataclasses.dataclass
class Launch:
    name: str  # of a kernel of ours, or ATen's operator
    read: int  # bytes, each tensor once
    written: int
    again: int = 0
    between: int = 0
    programs: int = 0  # 0: ATen's own
    key: tuple = ()  # of the variant
    trips: tuple = ()
    branches: int = 1
    ahead: int = 0
    matmul: tuple = ()  # (m, n, k, dtype)

    @property
    def flops(self):
        return 2 * math.prod(self.matmul[:3]) if self.matmul else 0


def size(tensor):
    return tensor.numel() * tensor.element_size()


def distinct(tensors):
    """Bytes of tensors, each once however often it is passed: what is absent is stood for by another."""
    return sum(size(t) for t in {id(t): t for t in tensors}.values())


def launch_of(kernel, grid, values, constants, parameters):
    """The record of a launch of one of our kernels."""
    if kernel not in KERNELS:
        raise NotImplementedError(f"{kernel}: unknown to the model; say in benchmarks/traffic.py what it writes")
    known, programs = KERNELS[kernel], math.prod(grid)
    named = dict(zip((name for name, _ in parameters), values, strict=True))
    tensors = {name: t for name, t in named.items() if isinstance(t, torch.Tensor)}
    written = [tensors[name] for name in known.writes]
    read = [t for t in tensors.values() if all(t is not w for w in written)]
    divisible = [n for n, (_, type_) in zip(values, parameters, strict=True) if type_.endswith(":16")]
    offsets = [t.storage_offset() * t.element_size() for t in tensors.values()]
    aligned = all(value % 16 == 0 for value in [*divisible, *offsets])
    v = named | constants | {"programs": programs, "aligned": aligned}
    again, between = known.again(v)
    return Launch(
        kernel,
        distinct(read),
        distinct(written),
        again,
        between,
        programs,
        (aligned, *(t.dtype for t in tensors.values()), *constants.values()),
        tuple(known.trips(v)),
        known.branches,
        known.ahead,
    )


class Launcher:
    """In the place of the package's own: writes down what is to be launched."""

    def __init__(self, pack, multiprocessors):
        self.pack, self.count, self.launches = pack, multiprocessors, []

    def multiprocessors(self, tensor):
        return self.count

    def launch(self, kernel, grid, *values, **constants):
        if 0 not in grid:
            self.launches.append(launch_of(kernel, grid, values, constants, self.pack.parameters(kernel)))


ALLOCATES = {"empty", "empty_like", "new_empty", "empty_strided"}
FILLS = {"zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "fill_", "zero_"}
ADDS = {"addmm", "addmm_"}
MATMULS = {"mm", *ADDS}


def tensors_in(values):
    return [v for v in values if isinstance(v, torch.Tensor)]


def read_by(name, args, kwargs):
    """The tensors that an operator of ATen reads; `out` is none of them."""
    if name in FILLS:
        return []
    unread = name == "copy_" or (name in ADDS and kwargs.get("beta", 1) == 0)
    return tensors_in(args)[unread:]


class Aten(TorchDispatchMode):
    """Writes down what ATen launches beside our kernels."""

    def __init__(self, launches):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.name().removeprefix("aten::").partition(".")[0]
        written = distinct(tensors_in(result if isinstance(result, tuple) else (result,)))
        if name in ALLOCATES or function.is_view or not written:
            return result
        matmul = ()
        if name in MATMULS:
            a, b = tensors_in(args)[-2:]
            matmul = a.shape[0], b.shape[1], a.shape[1], a.dtype
        self.launches.append(Launch(f"aten.{name}", distinct(read_by(name, args, kwargs)), written, matmul=matmul))
        return result


class Context:
    """What an autograd.Function's forward leaves for its backward, where every gradient is wanted."""

    def __init__(self, arguments):
        self.needs_input_grad = tuple(isinstance(a, torch.Tensor) and a.dtype in FLOATS for a in arguments)
        self.saved_tensors = ()

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass

    def set_materialize_grads(self, value):
        pass


@dataclasses.dataclass
class Pass:
    """A forward or a backward: its launches, and the least that it must move, each input read and each output written once."""

    launches: list
    least: int

    @property
    def moved(self):
        return sum(x.read + x.written + x.again for x in self.launches)

    @property
    def flops(self):
        return sum(x.flops for x in self.launches)


@contextlib.contextmanager
def recorded(pack, multiprocessors):
    launcher = Launcher(pack, multiprocessors)
    with torch.no_grad(), _runtime.kernels.launched_by(launcher), Aten(launcher.launches):
        yield launcher.launches


def trace(operator, sizes, dtype, pack, multiprocessors):
    """{"forward": Pass, "backward": Pass} of an operator where every gradient is wanted."""
    if operator not in OPERATORS:
        raise NotImplementedError(f"{operator}: unknown to the model; say in benchmarks/operators.py what it is called with")
    function, arguments = OPERATORS[operator](sizes, dtype)
    context = Context(arguments)
    with recorded(pack, multiprocessors) as launches:
        outputs = function.forward(context, *arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        forward = Pass(list(launches), distinct(tensors_in(arguments)) + distinct(outputs))
        launches.clear()
        upstream = [shape(*o.shape, dtype=o.dtype) for o in outputs if o.is_floating_point()]
        launches.clear()
        gradients = function.backward(context, *upstream)
        least = distinct(tensors_in([*upstream, *context.saved_tensors])) + distinct(tensors_in(gradients))
    return {"forward": forward, "backward": Pass(list(launches), least)}
