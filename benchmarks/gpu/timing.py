"""Device time, memory and host time of calls that take turns; and what the device reaches at most, measured beside them."""

import dataclasses
import gc
import statistics
import time

import cases as small
import host
import liger
import torch

from . import cases
from .cases import COMPILED
from .cases import EAGER
from .cases import LIGER
from .cases import OURS
from .machine import MiB

ROUNDS = range(5, 41)  # the fewest and the most
SECONDS, SWEEP = 0.5, 0.25  # for the rounds of one of the first cases, and of one in a sweep
PASSES = "forward", "backward", "both"
CALLS = 40  # of host time between two looks at the clock: fewer launches than the driver queues
HOST_ROUNDS = 11


def spread(samples):
    """The median, and the 20th and 80th percentile; none of a dry run's."""
    if not samples or None in samples:
        return {"median": None, "low": None, "high": None, "samples": 0}
    ordered = sorted(samples)
    at = [ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8)]
    return {"median": statistics.median(ordered), "low": at[0], "high": at[1], "samples": len(ordered)}


def ceilings(machine, record):
    """The bandwidth of a large copy, bytes read and written, and the rate of a large product of random numbers."""
    numbers, n = (2**12, 64) if machine.dry else (2**31, 8192)
    copy = copying(machine, numbers)
    record.add("ceilings", what="copy", unit="GB/s", dtype="bfloat16", sizes={"numbers": numbers}, **copy)
    matmul = multiplying(machine, n)
    record.add("ceilings", what="matmul", unit="TFLOP/s", dtype="bfloat16", sizes={"n": n}, **matmul)
    machine.free()
    return {"copy": copy["value"], "matmul": matmul["value"]}


def copying(machine, numbers):
    source = torch.empty(numbers, dtype=torch.bfloat16, device=machine.device).normal_()
    target = torch.empty_like(source)
    return rate(machine, lambda: target.copy_(source), 2 * source.nbytes, 1e9)


def multiplying(machine, n):
    a, b = (torch.empty(n, n, dtype=torch.bfloat16, device=machine.device).normal_() for _ in range(2))
    return rate(machine, lambda: a @ b, 2 * n**3, 1e12)


def rate(machine, call, amount, unit):
    for _ in range(3):
        call()
    marks = []
    for _ in range(20):
        start = machine.mark()
        call()
        marks.append((start, machine.mark()))
    machine.synchronize()
    times = [machine.between(*pair) for pair in marks]
    found = spread([None if t is None else amount / (t * 1e-6) / unit for t in times])
    return {"value": found.pop("median")} | found


def available(machine):
    """Liger's functions, or None; in a dry run over a Triton driver that launches nothing."""
    if machine.dry:
        return liger.functions(compiled=False)[0]
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        return None
    return functional


def left_out(functional):
    """(what, why) of each provider that no case has, or not all."""
    ends = " and ".join(cases.AT_ENDS)
    yield f"{COMPILED} in sweeps, but at the ends of those of {ends}", "to compile takes longer than all else of a case"
    if functional is None:
        yield f"{LIGER} in all cases", "it is not installed"
    if not cases.quack_is_there():
        yield f"{cases.QUACK} in all cases", "it is not installed"
    if not cases.fused_of_torch():
        yield f"{cases.FUSED} in all cases", f"torch {torch.__version__} has none"


@dataclasses.dataclass
class Contender:
    """One provider of a case."""

    call: object
    backward: bool
    spoils: bool  # Liger computes in place of inputs and upstream gradients
    times: list = dataclasses.field(default_factory=list)
    peak: int | None = None
    difference: float | None = None


class Bench:
    """A case: its inputs, and the providers that run it."""

    def __init__(self, machine, operator, sizes, functional, compile):
        self.machine, self.operator, self.sizes = machine, operator, sizes
        with torch.device(machine.device):
            self.timed = cases.BUILD[operator](**sizes, liger=functional)
        self.inputs = self.timed.inputs
        self.leaves = [i for i in self.inputs if i.requires_grad]
        calls = dict(self.timed.calls)
        if compile:
            torch._dynamo.reset()
            own = self.timed.calls.get(cases.HF, self.timed.calls[EAGER])
            calls[COMPILED] = torch.compile(own, fullgraph=True, dynamic=False, backend=machine.backend)
        self.contenders = {
            name: Contender(call, name not in self.timed.forward_only, name.startswith(LIGER)) for name, call in calls.items()
        }
        self.upstream = None
        self.originals = [i.detach().clone() for i in self.inputs]

    def restore(self):
        for tensor, original in zip([*self.inputs, *(self.upstream or [])], self.originals, strict=True):
            tensor.detach().copy_(original)

    def forward(self, contender):
        outputs = contender.call(*self.inputs)
        return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]

    def backward(self, outputs):
        return torch.autograd.grad(outputs, self.leaves, self.upstream, allow_unused=True)

    def gradients(self, outputs):
        """Those that there are."""
        return [gradient for gradient in self.backward(outputs) if gradient is not None]

    def warm_up(self, record, case):
        """Compile, and note differences and memory; a provider that cannot run is left out of the rounds."""
        outputs = self.forward(self.contenders[EAGER])
        self.upstream = [torch.ones_like(o) if not o.dim() else torch.randn_like(o) for o in outputs]
        self.originals += [u.clone() for u in self.upstream]
        reference = [o.detach() for o in outputs] + self.gradients(outputs)
        del outputs
        for name, contender in list(self.contenders.items()):
            try:
                for _ in range(2):
                    self.try_out(contender, reference)
            except Exception as error:  # whatever other people's code raises; of ours it is a failure
                del self.contenders[name]
                self.machine.free()
                if name.startswith(OURS) or not self.machine.alive():
                    record.fail(f"{case}: {name}", error)
                else:
                    why = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"
                    record.cut(f"{case}: {name}", why[:500])

    def try_out(self, contender, reference):
        machine = self.machine
        machine.free()
        machine.forget_peak()
        before = machine.allocated()
        outputs = self.forward(contender)
        if contender.backward:
            gradients = self.gradients(outputs)
            machine.synchronize()
            contender.peak = None if before is None else (machine.peak() - before) / MiB
            if machine.computes:
                contender.difference = relative([*outputs, *gradients], reference)
        if contender.spoils:
            self.restore()

    def sample(self, contender):
        """Three marks: before the forward, between, after the backward."""
        self.machine.flush()
        marks = [self.machine.mark()]
        outputs = self.forward(contender)
        marks.append(self.machine.mark())
        if contender.backward:
            self.backward(outputs)
            marks.append(self.machine.mark())
        del outputs
        if contender.spoils:
            self.restore()
        return marks

    def rounds(self, seconds, deadline):
        """Every provider once a round, until the time of the case is over."""
        if not self.machine.dry:  # the first round pays for memory that those after it find in the allocator
            for contender in self.contenders.values():
                self.sample(contender)
            self.machine.synchronize()
        ends = min(time.monotonic() + seconds, deadline)
        for n in range(1 if self.machine.dry else ROUNDS.stop - 1):
            if n >= ROUNDS.start and time.monotonic() > ends:
                break
            for contender in self.contenders.values():
                contender.times.append(self.sample(contender))
            self.machine.synchronize()

    def measured(self):
        """(provider, pass, what was measured of it)."""
        for name, contender in self.contenders.items():
            for place, which in enumerate(PASSES):
                if contender.backward:
                    pair = ((0, 1), (1, 2), (0, 2))[place]
                elif which == "both":
                    pair = 0, 1
                else:
                    continue
                times = spread([self.machine.between(marks[pair[0]], marks[pair[1]]) for marks in contender.times])
                us = times.pop("median")
                more = {"peak_MiB": contender.peak, "difference": contender.difference}
                yield name, which, {"pass": which, "us": us, **times, **more}

    def rows(self, reached):
        """What goes into the file, a row for each provider and pass."""
        bytes_, flops = (dict(zip(PASSES, (*two, sum(two)), strict=True)) for two in (self.timed.bytes, self.timed.flops))
        head = {"operator": self.operator, "dtype": "bfloat16", "sizes": self.sizes}
        for name, which, row in self.measured():
            yield {**head, "provider": name, **row, **fractions(row["us"], bytes_[which], flops[which], reached)}


def fractions(us, bytes_, flops, reached):
    """How much of what the device reaches, of that of the two which takes longer."""
    row = {"bytes": bytes_, "flops": flops, "GBps": None, "TFLOPs": None, "fraction": None, "bound": None}
    if us is None:
        return row
    row |= {"GBps": bytes_ / us / 1e3, "TFLOPs": flops / us / 1e6}
    shares = {"bytes": row["GBps"] / reached["copy"], "flops": row["TFLOPs"] / reached["matmul"]}
    row["bound"] = max(shares, key=shares.get)
    row["fraction"] = shares[row["bound"]]
    return row


def relative(results, reference):
    """‖a - b‖ / ‖b‖, the largest of all results and gradients; NaN if one holds a NaN."""
    pairs = [(a.detach().float(), b.float()) for a, b in zip(results, reference, strict=True)]
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()


def speed(machine, record, operator, sizes, functional, reached):
    """Time one operator at one size with all its providers."""
    first = (operator, sizes) in cases.FIRST
    compile = first if machine.dry else (operator, sizes) in cases.WITH_COMPILE
    with machine.serving():
        bench = Bench(machine, operator, cases.tiny(sizes) if machine.dry else sizes, functional, compile)
        bench.warm_up(record, cases.text(operator, sizes))
        bench.rounds(SECONDS if first else SWEEP, time.monotonic() + max(record.left(), 0))
        for row in bench.rows(reached):
            record.add("speed", **row, **({"stands_for": sizes} if machine.dry else {}))


def host_time(machine, record, name, functional):
    """The host's time for a call of small tensors, which the device does not delay: the wall clock of many calls in a row."""
    with machine.serving():
        for row in host_rows(machine, record, name, functional):
            record.add("host", **row)


def host_rows(machine, record, name, functional):
    with torch.device(machine.device):
        case, (public, overload) = small.CASES[name](), small.operator(name)
        plain = [i.detach() for i in case.inputs]
        own = host.ours(case, public, overload)
        calls = {(OURS, "forward"): own["forward"], (OURS, "both"): own["both"]}
        calls[EAGER, "forward"] = lambda: cases.IN_TORCH[name](*plain)
        calls[EAGER, "both"] = host.both(cases.IN_TORCH[name], case.inputs)
        if functional and case.liger:
            notes = {}
            try:
                theirs = host.theirs(case, functional, name, notes)
                calls |= {(LIGER, which): theirs[f"{which}, Liger"] for which in ("forward", "both") if theirs}
            except Exception as error:  # whatever other people's code raises
                notes["raised"] = f"{type(error).__name__}: {error}"
            for note in notes.values():
                record.cut(f"host time of {name}: {LIGER}", note[:500])
    times = {key: [] for key in calls}
    for call in calls.values():
        for _ in range(1 if machine.dry else CALLS):
            call()
    gc.collect()
    gc.disable()
    try:
        for _ in range(1 if machine.dry else HOST_ROUNDS):
            for key, call in calls.items():
                times[key].append(host_sample(machine, call))
    finally:
        gc.enable()
    for (provider, which), samples in times.items():
        found = spread(samples)
        yield {"operator": name, "provider": provider, "pass": which, "host_us": found.pop("median"), **found}


def host_sample(machine, call):
    machine.synchronize()
    start = machine.clock()
    for _ in range(1 if machine.dry else CALLS):
        call()
    seconds = machine.since(start)
    machine.synchronize()
    return None if seconds is None else seconds / CALLS * 1e6
