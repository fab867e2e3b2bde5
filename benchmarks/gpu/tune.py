"""Numbers in kernels and operators, and what else could stand there: timed in turns, for a choice."""

import contextlib
import time

import candidates

from liger_aot._runtime import kernels

from . import cases
from . import timing

ALIKE = 2**-7  # of results that differ in the order of sums alone: both are rounded to bfloat16
NOT_COMPILED = "no kernels were compiled for it; make carry does"
JOBS = [f"{name} of {operator}" for name, choice in candidates.CHOICES.items() for operator in choice.cases]


def tune(machine, record, job, folder):
    """Time the numbers of a choice; `folder` has the kernels that were compiled for it."""
    name, operator = job.split(" of ")
    choice, sizes = candidates.CHOICES[name], candidates.CHOICES[name].cases[operator]
    launcher = machine.launcher()
    device = launcher.at(0)
    compiled = folder and candidates.opened(folder, device.pack.arch)
    found = candidates.compiled_trials(compiled, name)
    if not found:
        record.cut(job, NOT_COMPILED)
        return
    for trial in choice.tried:
        if trial not in found:
            record.cut(f"{job}: {candidates.text(trial)}", "it is not among the compiled kernels: it spills")
    shipped = {
        which: [t for t in found if candidates.is_shipped(name, t, operator, which, device.pack, device.multiprocessors)]
        for which in choice.passes
    }
    with machine.serving(), put_back():
        for row in rows(machine, record, job, {candidates.text(t): (t, launching(machine, compiled, name, t)) for t in found}):
            own = row["tried"] in shipped[row["pass"]]
            record.add(
                "tune", operator=operator, number=name, shipped=own, **row, **({"stands_for": sizes} if machine.dry else {})
            )
    record.write()


def launching(machine, compiled, name, trial):
    """What launches the kernels of a trial; None, where they are the shipped ones."""
    if not candidates.CHOICES[name].kernels:
        return None
    launcher = machine.launcher()
    device = launcher.at(0)
    device.pack = candidates.Tried(device.pack, compiled, name, trial)
    return launcher


@contextlib.contextmanager
def put_back():
    with candidates.put_back(), kernels.launched_by(kernels.launcher):
        yield


def rows(machine, record, job, trials):
    name, operator = job.split(" of ")
    choice, sizes = candidates.CHOICES[name], candidates.CHOICES[name].cases[operator]
    if machine.dry:  # of kernels, which a width chooses, few rows
        sizes = sizes | {"tokens": cases.TINY["tokens"]} if choice.kernels else cases.tiny(sizes)
    bench = timing.Bench(machine, operator, sizes, None, False)
    ours, shipped = bench.contenders[cases.OURS].call, kernels.launcher

    def using(trial, launcher):
        def call(*inputs):
            candidates.put(choice, trial)  # which stays for the backward, as does the launcher
            kernels.launcher = launcher or shipped
            return ours(*inputs)

        return timing.Contender(call, backward=True, spoils=False)

    names = {f"{cases.OURS}, {text}": trial for text, (trial, _) in trials.items()}
    # In the place of torch eager, what all others are compared with, the numbers that are shipped.
    bench.contenders = {cases.EAGER: timing.Contender(ours, backward=True, spoils=False)}
    bench.contenders |= {f"{cases.OURS}, {text}": using(*pair) for text, pair in trials.items()}
    bench.warm_up(record, job)
    bench.contenders.pop(cases.EAGER, None)
    for text, contender in list(bench.contenders.items()):
        if machine.computes and not contender.difference <= ALIKE:
            record.fail(
                f"{job}: {text}", f"a result or a gradient is {contender.difference:.3g} off that of the shipped numbers"
            )
            del bench.contenders[text]
    bench.rounds(timing.SWEEP, time.monotonic() + max(record.left(), 0))
    for text, which, row in bench.measured():
        if which in choice.passes:
            yield {"sizes": bench.sizes, "tried": names[text], **row}
