"""The arithmetic of the program that measures on a GPU: times, bytes, fractions and choices, on made-up clocks."""

import contextlib
import importlib
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from liger_aot import _jit
from liger_aot import _runtime
from liger_aot.ops import _linear
from liger_aot.ops import _norm

from calls import CALLS
from calls import few

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
import candidates

from gpu import cases
from gpu import fresh
from gpu import machine
from gpu import numerics
from gpu import run
from gpu import stack
from gpu import timing
from gpu import tune
from gpu.machine import Dry
from gpu.machine import Gpu

BENCHMARKS = pathlib.Path(run.__file__).parent.parent
COMPILED = "column_sum", "norm's backward in a loop"


class Clocked(Dry):
    """Ends of forwards and of backwards are 10 and 30 us apart; a call takes 1 MiB."""

    dry, computes = False, True

    def __init__(self):
        super().__init__()
        self.now, self.steps = 0, itertools.cycle([5, 10, 30])

    def serving(self):
        return contextlib.nullcontext()

    def mark(self):
        self.now += next(self.steps)
        return self.now

    def between(self, start, end):
        return end - start

    def allocated(self):
        return 0

    def peak(self):
        return 2**20

    def clock(self):
        return 0.0

    def since(self, start):
        return timing.CALLS * 7e-6


class Operations(TorchDispatchMode, list):
    """(operator, its first argument) of each call."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.append((function, arguments[0]))
        return function(*arguments, **(options or {}))


class InPlace(Clocked):
    """Where the GPU is asked for: its numbers are the CPU kernels', its times made up."""

    def launching(self, launcher):
        return contextlib.nullcontext()

    def found(self):
        return {"name": "none"}


def test_a_child_that_is_no_dry_run(tmp_path, monkeypatch):
    """From task to file, as for a GPU: times, counts, differences are there, and Liger, which needs one, is cut."""
    monkeypatch.setattr(machine, "Gpu", InPlace)
    monkeypatch.setitem(numerics.ROWS, "many", few)
    monkeypatch.setattr(numerics, "pack_of", lambda _: _runtime.open_pack(_runtime.pack_paths()["90"]))
    monkeypatch.setattr(timing, "copying", lambda *_: {"value": 100.0})
    monkeypatch.setattr(timing, "multiplying", lambda *_: {"value": 1.0})
    monkeypatch.setattr(cases, "WITH_COMPILE", [("swiglu", {"tokens": 8, "hidden": 64})])
    jobs = {
        "numerics": [["few", "swiglu"], ["many", "swiglu"]],
        "behaviour": ["autocast: linear_logprob"],
        "speed": [["swiglu", {"tokens": 8, "hidden": 64}], [run.HOST, "swiglu"]],
    }
    for part, some in jobs.items():
        task = {"part": part, "jobs": some, "dry": False, "seconds": 100.0, "started": 0.0}
        out = tmp_path / f"{part}.json"
        assert run.child(task, out) == 0
        content = json.loads(out.read_text())
        assert content["finished"] == some
        assert content["failures"] == []
        assert content["gpu"] == {"name": "none"}
        if part == "numerics":
            count = len(list(CALLS["swiglu"](few)))
            assert [(r["rows"], r["calls"]) for r in content["correctness"]["numerics"]] == [("few", count), ("many", count)]
        elif part == "behaviour":
            assert content["correctness"]["checks"][0]["ok"] is True
        else:
            assert all(row["us"] and row["fraction"] is not None for row in content["speed"])
            assert {row["provider"] for row in content["speed"]} == {cases.OURS, cases.EAGER, cases.COMPILED}
            assert all(row["host_us"] for row in content["host"])
            assert [row["value"] for row in content["ceilings"]] == [100.0, 1.0]
            left_out = {what for what, _ in timing.left_out(functional=True)}
            assert {c["case"] for c in content["cut"] if cases.LIGER not in c["case"]} == left_out


def test_times_bytes_and_fractions(record):
    reached = {"copy": 100.0, "matmul": 1.0}
    with record.part("speed", 0.5):
        timing.speed(Clocked(), record, "rms_norm", {"tokens": 1000, "hidden": 64}, None, reached)
    assert record.content["failures"] == []
    rows = {(r["provider"], r["pass"]): r for r in record.content["speed"]}
    ours = {which: rows[cases.OURS, which] for which in timing.PASSES}
    assert [ours[which]["us"] for which in timing.PASSES] == [10, 30, 40]
    assert [ours[which]["bytes"] for which in timing.PASSES] == [2 * 128000, 3 * 128000, 5 * 128000]
    assert ours["forward"]["GBps"] == 25.6
    assert (ours["forward"]["fraction"], ours["forward"]["bound"]) == (0.256, "bytes")
    assert ours["both"]["peak_MiB"] == 1
    assert ours["both"]["samples"] in timing.ROUNDS
    assert {provider for provider, _ in rows} == {cases.OURS, cases.EAGER, cases.HF}
    assert rows[cases.EAGER, "both"]["difference"] == 0
    assert 0 < ours["both"]["difference"] < 0.01


def test_few_sizes_are_compiled():
    """Of the sweeps the ends alone, which come before the middle."""
    ends = cases.WITH_COMPILE[len(cases.FIRST) :]
    assert [(operator, *sizes.values()) for operator, sizes in ends if operator == "rms_norm"] == [
        ("rms_norm", 2048, 1024), ("rms_norm", 1024, 4096), ("rms_norm", 2048, 32768), ("rms_norm", 32768, 4096)
    ]  # fmt: skip
    assert [sizes["vocabulary"] for operator, sizes in ends if sizes["tokens"] == 4096] == [32768, 262144]
    assert len(ends) == 8
    plan = cases.plan()
    assert plan[: len(cases.FIRST)] == cases.FIRST
    assert max(map(plan.index, ends)) < plan.index(("rms_norm", {"tokens": 2048, "hidden": 4096}))


def test_providers_that_are_not_there_are_named(monkeypatch):
    def left_out(functional):
        return {what.split(" in ")[0] for what, _ in timing.left_out(functional)} - {cases.COMPILED}

    optional = {cases.LIGER, cases.QUACK, cases.FUSED}
    monkeypatch.setattr(cases.importlib.util, "find_spec", lambda name: name == "quack")
    monkeypatch.setattr(cases.functional, "linear_cross_entropy", print, raising=False)
    assert left_out(functional=True) == set()
    assert {*cases.linear_cross_entropy(2, 4, 8, None).calls} >= optional - {cases.LIGER}
    monkeypatch.setattr(cases.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delattr(cases.functional, "linear_cross_entropy")
    assert left_out(functional=None) == optional
    assert not optional & cases.linear_cross_entropy(2, 4, 8, None).calls.keys()


def test_what_all_processes_say_is_said_once(record):
    for case in "aba":
        run.merge(record, {"cut": [{"part": "speed", "case": case, "why": "so"}]})
    assert [c["case"] for c in record.content["cut"]] == ["a", "b"]


def test_matmuls_are_one_call(record, monkeypatch):
    monkeypatch.setattr(Clocked, "between", lambda *_: 4.0)
    with record.part("speed", 0.5):
        sizes = {"tokens": 10, "hidden": 20, "vocabulary": 30}
        timing.speed(Clocked(), record, "linear_cross_entropy", sizes, None, {"copy": 100.0, "matmul": 1.0})
    rows = {(r["provider"], r["pass"]): r for r in record.content["speed"]}
    assert [which for provider, which in rows if provider == cases.MATMULS] == ["both"]
    assert rows[cases.MATMULS, "both"]["flops"] == 6 * 10 * 20 * 30
    assert rows[cases.OURS, "both"]["bound"] == "bytes"


def test_a_provider_that_fails_is_left_out_and_ours_is_a_failure(record, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("so")

    monkeypatch.setattr(cases, "ours", lambda name, **_: broken)
    with record.part("speed", 0.5):
        liger = type("Liger", (), {"liger_swiglu": staticmethod(broken)})
        timing.speed(Clocked(), record, "swiglu", {"tokens": 4, "hidden": 64}, liger, {"copy": 1.0, "matmul": 1.0})
    assert {r["provider"] for r in record.content["speed"]} == {cases.EAGER}
    assert [c["case"] for c in record.content["cut"]] == ["swiglu tokens 4, hidden 64: liger-kernel"]
    assert [f["case"] for f in record.content["failures"]] == ["swiglu tokens 4, hidden 64: liger-aot"]


def test_what_is_spoilt_is_restored(record):
    """Liger computes in place of its inputs and of the upstream gradient: the next sample has them as they were."""

    def spoil(gate, up):
        gate.detach().zero_()
        return gate * up

    liger = type("Liger", (), {"liger_swiglu": staticmethod(spoil)})
    bench = timing.Bench(Clocked(), "swiglu", {"tokens": 4, "hidden": 64}, liger, False)
    before = [i.detach().clone() for i in bench.inputs]
    bench.warm_up(record, "swiglu")
    bench.rounds(timing.SWEEP, 0.0)
    assert all(torch.equal(i, b) for i, b in zip(bench.inputs, before, strict=True))


class Served(Clocked):
    """Operators run their bodies, over the stub, which computes nothing."""

    computes = False

    serving = Dry.serving


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder with what was compiled for two choices."""
    folder = tmp_path_factory.mktemp("candidates")
    names = [word for name in COMPILED for word in ("--choice", name)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, BENCHMARKS / "candidates.py", "90", folder, *names], env=environment, check=True)
    return folder


@pytest.mark.parametrize("job", [job for job in tune.JOBS if job.partition(" of ")[0] in COMPILED])
def test_kernels_are_tried_and_put_back(job, record, compiled, monkeypatch):
    """Each trial launches what was compiled for it, in the place of what is shipped, which launches again afterwards."""
    name, operator = job.split(" of ")
    choice, gpu, launchers = candidates.CHOICES[name], Served(), []
    monkeypatch.setitem(choice.cases, operator, choice.cases[operator] | {"tokens": 6})
    monkeypatch.setattr(gpu, "launcher", lambda make=gpu.launcher: launchers.append(make()) or launchers[-1])
    monkeypatch.setattr(record, "left", lambda: 1.0)
    before, numbers = _runtime.kernels.launcher, [dict(found) for found in candidates.HERE.values()]
    tune.tune(gpu, record, job, compiled)
    assert record.content["failures"] == record.content["cut"] == []
    assert _runtime.kernels.launcher is before
    assert [dict(found) for found in candidates.HERE.values()] == numbers
    launched = [{launch.image for launch in made.stub.launches if launch.kernel in choice.kernels} for made in launchers]
    shipped, pack = _runtime.open_pack(_runtime.pack_paths()["90"]), candidates.opened(compiled, "90")
    for trial in choice.tried:
        tried = candidates.Tried(shipped, pack, name, trial)
        assert any(images and images <= {tried.read(cubin) for cubin in tried.own} for images in launched)
    rows = record.content["tune"]
    assert [row["tried"] for row in rows] == [trial for trial in choice.tried for _ in choice.passes]
    assert {row["pass"] for row in rows} == set(choice.passes)
    assert all(row["us"] for row in rows)
    assert sum(row["shipped"] for row in rows) == len(choice.passes)


@pytest.mark.parametrize("job", [job for job in tune.JOBS if not candidates.CHOICES[job.partition(" of ")[0]].kernels])
def test_numbers_are_tried_and_put_back(job, record, monkeypatch):
    """Each value is where the operator looks for it, and what it had is there again."""
    name, operator = job.split(" of ")
    module, choice, used = importlib.import_module(f"liger_aot.ops.{operator}"), candidates.CHOICES[name], []

    def chunks(hidden, original=_linear.chunks):
        if _linear.CHUNK == _linear.LEAST:  # which the shipped are not
            used.append({"CHUNK": _linear.CHUNK})
        return original(hidden)

    def programs(x, rows, each):
        used.append({"RESIDENT": each})
        return 1

    monkeypatch.setattr(module, *(("chunks", chunks) if name == "CHUNK" else ("programs", programs)))
    small = {axis: cases.TINY[axis] for axis in choice.cases[operator] if name == "CHUNK" or axis == "tokens"}
    monkeypatch.setitem(choice.cases, operator, choice.cases[operator] | small)
    before = _linear.CHUNK, _linear.LEAST, dict(_norm.RESIDENT)
    with record.part("speed", 0.5):
        tune.tune(Served(), record, job, None)
    assert before == (_linear.CHUNK, _linear.LEAST, _norm.RESIDENT)
    assert record.content["failures"] == record.content["cut"] == []
    rows = record.content["tune"]
    assert all(trial in used for trial in choice.tried)
    assert all(row["tried"] in choice.tried for row in rows)
    assert {(row["pass"], row["us"]) for row in rows} == {
        p for p in (("forward", 10), ("backward", 30), ("both", 40)) if p[0] in choice.passes
    }


def test_a_trial_whose_gradients_are_wrong_is_a_failure(record, monkeypatch):
    """And none to choose."""
    choice = candidates.CHOICES["RESIDENT at 1024"]
    monkeypatch.setitem(choice.cases, "rms_norm", {"tokens": 6, "hidden": 1024})

    def wrong(call):
        def called(x, weight):
            factor = float("nan") if _norm.RESIDENT[1024] == 8 else 1.02 if _norm.RESIDENT[1024] == 2 else 1.0
            return call(x * 1, Scaled.apply(weight, factor))

        return called

    own = cases.ours
    monkeypatch.setattr(cases, "ours", lambda name, **options: wrong(own(name, **options)))
    with record.part("speed", 0.5):
        tune.tune(Clocked(), record, "RESIDENT at 1024 of rms_norm", None)
    assert [row["tried"]["RESIDENT"] for row in record.content["tune"]] == [1, 4, 16]
    said = [(failure["case"].rpartition(" ")[2], failure["message"]) for failure in record.content["failures"]]
    assert [case for case, _ in said] == ["2", "8"]
    assert re.fullmatch(r"a result or a gradient is 0\.0(2|19|20)\d* off that of the shipped numbers", said[0][1])
    assert said[1][1] == "a result or a gradient is nan off that of the shipped numbers"


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def test_kernels_that_nobody_compiled_are_listed(record, tmp_path):
    tune.tune(Served(), record, "rope of rope", tmp_path)
    assert record.content["cut"] == [
        {"part": None, "case": "rope of rope", "why": "no kernels were compiled for it; make carry does"}
    ]
    assert record.content["tune"] == []


@pytest.mark.parametrize("job", tune.JOBS)
def test_what_is_shipped_is_among_what_is_tried(job):
    """Once for each pass, of all that the choice has a part in: what was measured says whether to keep it."""
    name, operator = job.split(" of ")
    choice, pack = candidates.CHOICES[name], _runtime.open_pack(_runtime.pack_paths()["90"])
    for which in choice.passes:
        shipped = [t for t in choice.tried if candidates.is_shipped(name, t, operator, which, pack, 132)]
        assert len(shipped) == 1, which


@pytest.mark.parametrize("name", [name for name, choice in candidates.CHOICES.items() if choice.kernels])
def test_trials_are_forms_of_the_kernels(name):
    """That the kernels are declared to have, but for the numbers; one of them, to the last."""
    choice, kernels = candidates.CHOICES[name], _jit.load()
    for kernel in choice.kernels:
        declared = kernels[kernel].variants
        found = [candidates.forms(kernels[kernel], choice, trial) for trial in choice.tried]
        assert all(found)
        assert any(all(form in declared for form in forms) for forms in found)
        assert all(types in [t for t, *_ in declared] for forms in found for types, *_ in forms)


def test_host_time(record):
    with record.part("host", 0.5):
        timing.host_time(Clocked(), record, "rms_norm", None)
    rows = record.content["host"]
    assert {(r["provider"], r["pass"]) for r in rows} == set(itertools.product([cases.OURS, cases.EAGER], ["forward", "both"]))
    assert all(r["host_us"] == pytest.approx(7.0) and r["samples"] == timing.HOST_ROUNDS for r in rows)


def test_a_sample_pays_for_no_write_before_it(monkeypatch):
    """Before one, more than an L2 is read that nothing wrote since the first time."""
    monkeypatch.setattr(machine, "LEAD", 64)
    gpu = object.__new__(Gpu)
    gpu.device = torch.device("meta")
    gpu.flush()
    with Operations() as seen:
        gpu.flush()
    (*_, (last, read)) = seen
    assert last is torch.ops.aten.sum.default
    assert read.nbytes >= 4 * 60 * machine.MiB
    assert [name for name, tensor in seen[:-1] if tensor is read] == []
    assert {name for name, _ in seen[:-1]} == {torch.ops.aten.zero_.default}


def test_ceilings(record, monkeypatch):
    monkeypatch.setattr(Clocked, "between", lambda *_: 2.0)
    monkeypatch.setattr(timing, "copying", lambda machine, numbers: timing.rate(machine, lambda: None, 8000, 1e9))
    monkeypatch.setattr(timing, "multiplying", lambda machine, n: timing.rate(machine, lambda: None, 6e6, 1e12))
    assert timing.ceilings(Clocked(), record) == {"copy": pytest.approx(4.0), "matmul": pytest.approx(3.0)}
    assert [row["samples"] for row in record.content["ceilings"]] == [20, 20]


def test_spread():
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0, 100.0]) == {"median": 3.5, "low": 2.0, "high": 5.0, "samples": 6}
    assert timing.spread([None]) == {"median": None, "low": None, "high": None, "samples": 0}


@pytest.mark.parametrize("limit", [0, 1024, 8192, 12000, 100000, 2**30])
def test_the_longest_sequence(limit):
    class Training:
        def __init__(self):
            self.tried = []

        def fits(self, tokens):
            self.tried.append(tokens)
            return tokens <= limit

    training, notes = Training(), []
    stack.longest(training, float("inf"), lambda *found: notes.append(found))
    fits, fails = notes[-1]
    if limit < 1024:
        assert (fits, fails) == (None, 1024)
    elif limit < stack.LONGEST:
        assert fits <= limit < fails <= fits * 5 / 4
    else:
        assert (fits, fails) == (stack.LONGEST, None)
    assert len(training.tried) == len(set(training.tried)) == len(notes) < 14
    stack.longest(training, 0.0, lambda *found: pytest.fail("there was no time"))


@pytest.fixture
def no_cuda(monkeypatch):
    """What the parts with processes of their own ask of torch.cuda, on a CPU."""
    for module in stack, fresh:
        monkeypatch.setitem(module.DEVICE, False, "cpu")
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)


def test_training_measured(no_cuda, monkeypatch):
    monkeypatch.setattr(stack, "SHAPE", stack.SHAPE | stack.TINY)
    monkeypatch.setattr(stack, "TOKENS", 64)
    rows, now = [], time.time()
    stack.train(stack.OURS, False, now - 5, timing.spread, lambda row: rows.append(dict(row)))
    first, steps = rows
    assert 5 < first["import_seconds"] < first["seconds_to_first_step"] < 5 + time.time() - now
    assert first["loss"] == pytest.approx(math.log(128), rel=0.1)
    assert steps["samples"] == stack.STEPS
    assert steps["tokens_per_s"] == pytest.approx(64e3 / steps["step_ms"])
    assert (steps["peak_MiB"], steps["layers"], steps["tokens"]) == (3, stack.LAYERS, 64)


def test_the_longest_sequence_measured(no_cuda, monkeypatch):
    limits = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 4 * stack.MEMORY))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    monkeypatch.setattr(stack, "SHAPE", stack.SHAPE | stack.TINY)
    monkeypatch.setattr(stack, "SHORTEST", 16)
    monkeypatch.setattr(
        stack.Training, "fits", lambda self, tokens, fits=stack.Training.fits: tokens < 100 and fits(self, tokens)
    )
    rows = []
    stack.search(stack.OURS, False, float("inf"), rows.append)
    assert limits == [0.25]
    assert rows[-1] == {"provider": "liger-aot", "layers": 4, "memory_MiB": 40960, "longest": 96, "too_long": 112}
    assert all(re.search(rf"\b{field}\b", (BENCHMARKS / "gpu/README.md").read_text()) for field in rows[-1])


def test_compiled_steps_come_before_searches():
    whats = [(compiled, what) for _, compiled, what in stack.JOBS]
    assert whats == [(False, "cold")] * 3 + [(True, "cold")] * 3 + [(False, "warm")] + [(False, "longest")] * 3


def test_memory_that_does_not_suffice(no_cuda):
    class Model(torch.nn.Linear):
        config = type("Config", (), {"vocab_size": 7})

        def forward(self, input_ids, labels):
            if input_ids.shape[1] > 9:
                raise torch.OutOfMemoryError
            return type("Output", (), {"loss": super().forward(torch.ones(1)).sum()})

    training = stack.Training(Model(1, 1), dry=False)
    assert [training.fits(tokens) for tokens in (9, 10, 9)] == [True, False, True]
    assert training.model.weight.grad is None


def test_first_calls_are_few_and_both_libraries_have_them():
    jobs = run.listed("first call")
    assert len(jobs) == 8
    assert all(fresh.small.CASES[operator]().liger for _, operator in jobs)
    assert {provider for provider, _ in jobs} == {cases.OURS, cases.LIGER}


def test_a_first_call_measured(no_cuda):
    found = fresh.measure(cases.OURS, "rms_norm", dry=False)
    assert 0 < found["ms"] < 60000
    assert found["import_ms"] > 0


def test_first_calls_of_one_operator_are_one_row():
    rows = [{"operator": "a", "provider": "p", "ms": ms, "import_ms": 5.0} for ms in (3.0, 1.0)]
    assert run.together(rows) == [
        {"operator": "a", "provider": "p", "ms": 2.0, "low": 1.0, "high": 3.0, "samples": 2, "import_ms": 5.0}
    ]
    assert fresh.measure(cases.OURS, "rms_norm", dry=True) == {"import_ms": None, "ms": None}


def test_caches_are_empty_unless_they_are_wanted(tmp_path):
    def folder(part, job):
        found = run.child_environment(part, [job], tmp_path)["TRITON_CACHE_DIR"]
        pathlib.Path(found).mkdir(parents=True)
        return found

    cold = [folder("stack", [provider, False, "cold"]) for provider in ("liger-kernel", "liger-aot", "liger-kernel")]
    assert len(set(cold)) == 3
    for what in (stack.WARM, stack.SEARCH):
        found = run.child_environment("stack", [["liger-kernel", False, what]], tmp_path)
        assert found["TRITON_CACHE_DIR"] == cold[0]
    assert folder("first call", ["liger-kernel", "rope"]) != folder("first call", ["liger-kernel", "rms_norm"])
