"""Host cost of one call of each operator: this thread's CPU time, over a driver that does nothing."""

import gc
import pathlib
import sys
import time
from collections import Counter
from functools import partial

import torch
from torch.overrides import TorchFunctionMode

sys.path.append(str(pathlib.Path(__file__).parent.parent / "tests"))
import cases
import liger

from liger_aot._runtime import kernels

from stub import stubbed

FORWARD_ABOVE_ALLOCATIONS = 9.0  # us
FORWARD_OF_LIGER, BOTH_OF_LIGER, BOTH_OF_EMPTY = 0.5, 0.6, 1.3
CALLS = 100  # between two looks at the clock
ALLOCATORS = {torch.empty, torch.empty_like, torch.zeros_like, torch.Tensor.new_empty, torch.Tensor.new_zeros}


def measure(rounds, progress):
    """{operator: {what: us}}, and what was left out and why."""
    functional, version = liger.functions()
    results, notes = {}, {} if functional else {"liger": version}
    torch.set_num_threads(1)
    with stubbed(record=False):
        for name, build in cases.CASES.items():
            progress(f"host cost of {name}")
            try:
                case, (public, overload) = build(), cases.operator(name)
            except (ImportError, AttributeError) as error:
                notes[name] = f"not there: {error}"
                continue
            calls = ours(case, public, overload) | baselines(name, case) | launching(case, public)
            if case.forward and (wrong := difference(case, public)):
                notes[f"{name}: baseline"] = wrong
            if functional and case.liger:
                calls |= theirs(case, functional, name, notes)
            results[name] = interleave(calls, rounds)
    return results, notes


def both(call, inputs):
    """A forward and backward of call."""
    wanted = [i for i in inputs if i.requires_grad]
    outputs = call(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    upstream = [torch.randn(o.shape) for o in outputs]

    def one():
        return call(*inputs)

    def tuple_of():
        return list(call(*inputs))

    forward = one if len(outputs) == 1 else tuple_of
    return lambda: torch.autograd.grad(forward(), wanted, upstream)


def ours(case, public, overload):
    plain = [i.detach() for i in case.inputs]
    return {
        "forward": lambda: case.ours(overload, *plain),
        "both": both(partial(case.ours, public), case.inputs),
        "both, torch.ops": both(partial(case.ours, overload), case.inputs),
    }


def theirs(case, functional, name, notes):
    plain = [i.detach() for i in case.inputs]
    calls = {
        "forward, Liger": lambda: case.liger(functional, *plain),
        "both, Liger": both(partial(case.liger, functional), case.inputs),
    }
    try:
        for call in calls.values():
            call()
    except Exception as error:  # whatever another project raises without a GPU
        notes[f"{name}: Liger"] = f"does not run here: {type(error).__name__}: {error}"
        return {}
    return calls


def baselines(name, case):
    if case.forward is None:
        return {}
    plain = [i.detach() for i in case.inputs]
    return {
        "forward, allocations": lambda: case.forward(*plain),
        "both, empty": both(case.function(case.forward, case.backward), case.inputs),
        "both, empty operators": both(case.function(*map(registered(name), (case.forward, case.backward))), case.inputs),
    }


def launching(case, public):
    """The empty Function of baselines that launches the operator's kernels besides: what Python around them adds to."""
    if case.forward is None:
        return {}
    with kernels.launched_by(forward := Launches(kernels.launcher)):
        outputs = case.ours(public, *case.inputs)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
    with kernels.launched_by(backward := Launches(kernels.launcher)):
        torch.autograd.grad(outputs, [i for i in case.inputs if i.requires_grad], [torch.ones_like(o) for o in outputs])
    halves = forward.before(case.forward), backward.before(case.backward)
    return {"both, empty and launches": both(case.function(*halves), case.inputs)}


class Launches:
    """In a launcher's place: keeps what is launched, to do it again."""

    def __init__(self, launcher):
        self.made, self.multiprocessors = [], launcher.multiprocessors

    def launch(self, name, grid, *args, **constants):
        self.made.append((getattr(kernels, name), grid, args, constants))

    def before(self, function):
        def call(*args):
            for kernel, grid, given, constants in self.made:
                kernel[grid](*given, **constants)
            return function(*args)

        return call


LIBRARY = torch.library.Library("liger_bench", "DEF")


def registered(name):
    def register(function):
        whole = f"{name}_{function.__name__}_{len(REGISTERED)}"
        LIBRARY.define(whole + torch.library.infer_schema(function, mutates_args=()))
        LIBRARY.impl(whole, function, "CPU")
        REGISTERED.append(whole)
        return getattr(torch.ops.liger_bench, whole).default

    return register


REGISTERED = []


class Allocations(TorchFunctionMode):
    """Counts what is allocated; tensors without numbers, which stand for absent ones, are not."""

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in ALLOCATORS and result.numel():
            self.made[tuple(result.shape), result.dtype] += 1
        return result


def allocations(call, inputs):
    with Allocations() as mode:
        outputs = call(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.ones_like(o) for o in outputs]
    with mode:
        torch.autograd.backward(outputs, upstream)
    return mode.made


def difference(case, public):
    """How the allocations of the baseline differ from the operator's; None where they do not."""
    empty = allocations(case.function(case.forward, case.backward), case.inputs)
    real = allocations(partial(case.ours, public), case.inputs)
    if empty == real:
        return None
    return f"the operator allocates {dict(real - empty)} that the baseline does not, not {dict(empty - real)}"


def interleave(calls, rounds):
    """{name: us of a call, of all rounds the least, to which other work only adds}; the calls take turns."""
    times = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(CALLS):
            call()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.thread_time_ns()
                for _ in range(CALLS):
                    call()
                times[name].append((time.thread_time_ns() - start) / CALLS / 1000)
    finally:
        gc.enable()
    return {name: min(ts) for name, ts in times.items()}
