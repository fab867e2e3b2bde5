"""The program that measures on a GPU, as far as a CPU goes: a dry run of all of it, and its arithmetic on made-up clocks."""

import contextlib
import importlib
import inspect
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder
from triton.runtime.interpreter import TensorHandle

import liger_aot
from liger_aot import _jit
from liger_aot import _op
from liger_aot import _runtime
from liger_aot.ops import _linear
from liger_aot.ops import _norm

import examples
import harness
from calls import CALLS
from calls import few
from examples import EXAMPLES
from stub import copy_pack

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
from gpu import behaviour
from gpu import cases
from gpu import fresh
from gpu import instructions
from gpu import machine
from gpu import numerics
from gpu import run
from gpu import stack
from gpu import table
from gpu import timing
from gpu import tune
from gpu.machine import Dry
from gpu.machine import Gpu
from gpu.record import Record

compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor wants a C++ compiler, and there is no g++")
BENCHMARKS = pathlib.Path(run.__file__).parent.parent
README = BENCHMARKS.parent / "README.md"
# Every figure that is measured, which no dry run may have.
FIGURES = {
    "us", "low", "high", "GBps", "TFLOPs", "fraction", "bound", "peak_MiB", "difference", "value", "host_us", "ms", "import_ms",
    "step_ms", "tokens_per_s", "longest", "too_long", "seconds_to_first_step", "import_seconds", "loss",
}  # fmt: skip


def program(out, *arguments, **environment):
    return subprocess.run(
        [sys.executable, BENCHMARKS / "gpu/run.py", "--dry-run", "--out", out, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "dry.json"
    done = program(out)
    assert out.exists(), done.stderr
    return done, json.loads(out.read_text())


def test_a_dry_run_ends_well(dry):
    done, content = dry
    assert content["failures"] == []
    assert done.returncode == 0
    assert "a dry run: no figure is from a GPU; 0 failures" in done.stdout
    left_out = {why for _, why in timing.left_out(functional=True)}
    assert {c["why"] for c in content["cut"]} == {"a dry run tries fewer of its kind"} | left_out | without_liger(content)


def without_liger(content):
    return {c["why"] for c in content["cut"] if "liger-kernel" in c["case"]}


def test_a_dry_run_has_no_figure(dry):
    _, content = dry
    assert content["dry"] is True
    assert content["environment"].get("gpu") is None
    lists = ["ceilings", "speed", "tune", "host", "first_call", "stack"]
    for row in itertools.chain.from_iterable(content[name] for name in lists):
        assert {k: v for k, v in row.items() if k in FIGURES and v is not None} == {}
        assert row.get("samples", 0) == 0
    assert all(check["seconds"] is None for check in content["correctness"]["checks"])
    assert table.render(pathlib.Path(dry[0].args[4]).parent) == table.NONE


def test_every_shipped_variant_is_reached(dry):
    variants = dry[1]["correctness"]["variants"]
    pack = _runtime.open_pack(_runtime.pack_paths()["90"])
    built = {v.cubin for kernel in pack.manifest["kernels"] for v in pack.table(kernel).values()}
    assert variants["launches"].keys() == built
    assert min(variants["launches"].values()) > 0
    assert (variants["arch"], variants["built"], variants["reached"], variants["not_reached"]) == (
        "90",
        len(built),
        len(built),
        [],
    )


def test_everything_planned_was_done(dry):
    _, content = dry
    assert numerics.HELD.keys() == CALLS.keys() == set(_op.PUBLIC)
    assert {(row["rows"], row["operator"]) for row in content["correctness"]["numerics"]} == {("few", o) for o in numerics.HELD}
    assert all(row["calls"] > 20 and not row["failed"] and 0 < row["worst"] <= 1 for row in content["correctness"]["numerics"])
    planned = behaviour.CHECKS + behaviour.PROGRAMS
    checks = {f"{c['check']}: {c['subject']}" for c in content["correctness"]["checks"]}
    assert checks | {c["case"] for c in content["cut"]} >= {behaviour.named(*c) for c in planned}
    assert {c for c, _ in planned} == {getattr(behaviour, c["check"]) for c in content["correctness"]["checks"]}
    timed = {(row["operator"], json.dumps(row["stands_for"])) for row in content["speed"]}
    assert timed == {(operator, json.dumps(sizes)) for operator, sizes in cases.plan()}
    for operator in cases.BUILD:
        rows = {(row["provider"], row["pass"]) for row in content["speed"] if row["operator"] == operator}
        assert rows >= set(itertools.product([cases.OURS, cases.EAGER, cases.COMPILED], timing.PASSES)), operator
    assert {f"{row['number'].partition('[')[0]} of {row['operator']}" for row in content["tune"]} == set(tune.JOBS)
    assert {row["operator"] for row in content["host"]} == EXAMPLES.keys() - {"linear_logprob"}
    assert {row["what"] for row in content["ceilings"]} == {"copy", "matmul"}
    assert content["first_call"]
    assert [row["provider"] for row in content["stack"]] == [cases.LIGER]  # ours: test_training_measured


def test_every_field_is_documented(dry):
    """README's list of the file's fields is that of the file."""
    text = (BENCHMARKS / "gpu/README.md").read_text()
    _, content = dry
    lists = ("ceilings", "speed", "tune", "host", "first_call", "stack")
    fields = {*content, *itertools.chain.from_iterable(row for name in lists for row in content[name])}
    fields |= {*content["correctness"], *content["correctness"]["variants"], *content["budget"]}
    fields |= {*content["correctness"]["numerics"][0], *content["correctness"]["checks"][0]}
    assert {f for f in fields if not re.search(rf"\b{f}\b", text)} == set()


def test_a_failure_is_reported_and_does_not_stop_the_rest(tmp_path):
    copy_pack(tmp_path)  # of one kernel alone, in place of all
    out = tmp_path / "out.json"
    done = program(out, "--only", "correctness", "--match", "swiglu", LIGER_AOT_PACKS=str(tmp_path))
    content = json.loads(out.read_text())
    assert done.returncode == 1
    assert "FAILED numerics: swiglu: float32[5, 64]" in done.stdout
    assert all("swiglu_fwd: not in sm_90.zip" in f["message"] for f in content["failures"])
    assert {f["part"] for f in content["failures"]} == {"numerics", "behaviour"}
    (row,) = content["correctness"]["numerics"]
    assert row["failed"] == row["calls"] == len(list(CALLS["swiglu"](few)))
    outcomes = {c["check"]: c["ok"] for c in content["correctness"]["checks"]}
    assert outcomes["cuda_graph"] is False
    assert outcomes["opcheck"] is True


def test_what_no_time_was_left_for_is_listed(tmp_path):
    done = program(out := tmp_path / "out.json", "--seconds", "0")
    content = json.loads(out.read_text())
    assert done.returncode == 0
    assert not content["speed"]
    assert {c["case"] for c in content["cut"] if c["why"] == "no time was left"} >= {"few rms_norm", "cuda_graph: rope"}
    assert len(content["cut"]) == sum(len(run.listed(part)) for part in run.PARTS)
    assert content["budget"]["seconds"] == 0


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "record.json", dry=False, arguments=[], environment={}, seconds=1000.0)


def test_the_file_holds_what_is_no_number(record):
    record.add("speed", difference=float("inf"), low=[float("nan")], us=1.5)
    record.write()
    assert json.loads(record.path.read_text())["speed"] == [{"difference": "inf", "low": ["nan"], "us": 1.5}]


def test_what_a_part_leaves_the_others_have(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    record = Record(tmp_path / "r.json", dry=False, arguments=[], environment={}, seconds=100.0)
    with record.part("a", 0.5):
        assert record.left() == 50
        now[0] = 10.0
    with record.part("b", 1.0):
        assert record.left() == 90
        now[0] = 120.0
        assert record.left() < 0
    assert [(p["share"], p["taken"]) for p in record.budget["parts"]] == [(50, 10), (90, 110)]


def test_a_process_that_dies_takes_one_job_with_it(record, monkeypatch):
    children = iter(
        [
            ({"finished": ["a"], "failures": []}, -11, "Segmentation fault"),
            ({"finished": ["c"], "failures": [{"case": "c"}]}, run.LOST, ""),
            ({"finished": ["d", "e"]}, 0, ""),
        ]
    )
    asked = []
    monkeypatch.setattr(run, "run_child", lambda record, part, jobs, *_: asked.append(jobs) or next(children))
    with record.part("numerics", 0.5):
        run.run_part(record, "numerics", list("abcde"), False, None)
    assert asked == [list("abcde"), list("cde"), list("de")]
    assert [f["case"] for f in record.content["failures"]] == ["b", "c"]
    assert "status -11: Segmentation fault" in record.content["failures"][0]["message"]


def test_what_is_found_is_written_as_it_is_found(record, monkeypatch):
    """What a run that is killed leaves: the whole after the last process, and beside it what the present one found."""
    command = subprocess.Popen

    def start(command_line, **options):
        out = pathlib.Path(command_line[-1])
        assert [row["us"] for row in written()["speed"]] == list(range(len(starts)))
        starts.append(out.name)
        out.write_text(json.dumps({"finished": [f"{len(starts)}"], "speed": [{"us": len(starts) - 1}]}))
        return command([sys.executable, "-c", ""], **options)

    starts, written = [], lambda: json.loads(record.path.read_text())
    monkeypatch.setattr(run.subprocess, "Popen", start)
    monkeypatch.setitem(run.FRESH, "speed", slice(1))
    record.write()
    with record.part("speed", 0.5):
        run.run_part(record, "speed", ["1", "2", "3"], False, record.path.parent)
        assert len(written()["speed"]) == 3
    assert starts == ["record-speed-0.json"] * 3
    assert [path.name for path in record.path.parent.glob("*.json")] == ["record.json"]


def test_make_gpu_takes_another_file_and_another_time():
    """And ends before ten minutes do."""

    def command(**variables):
        given = [f"{name}={value}" for name, value in variables.items()]
        done = subprocess.run(
            ["make", "--no-print-directory", "-n", "gpu", *given], cwd=BENCHMARKS.parent, capture_output=True, text=True
        )
        return shlex.split(done.stdout.split("benchmarks/gpu/run.py")[-1].replace("\\\n", ""))

    assert command() == ["--out", "out/gpu.json"]
    given = command(GPU_OUT="/there/gpu.json", GPU_SECONDS=90, ONLY="speed", MATCH="few|a: b")
    assert given == ["--out", "/there/gpu.json", "--seconds", "90", "--only", "speed", "--match", "few|a: b"]
    assert run.SECONDS + run.GRACE <= 540


def test_the_quick_first_command_asks_for_what_its_readers_want(record):
    """And the parts it asks nothing of leave it their time."""
    quick = re.search(r"make gpu GPU_SECONDS=\d+ MATCH='(.+)'", (BENCHMARKS / "gpu/README.md").read_text())[1]
    found = run.asked(record, run.PARTS, re.compile(quick))
    few_rows = [["few", operator] for operator in numerics.HELD]
    assert found == {"numerics": few_rows, "behaviour": ["preload: all", "cuda_graph: rms_norm", "back_ends: rms_norm"]}


def test_a_match_of_nothing_is_an_error(record):
    with pytest.raises(SystemExit, match="--match 'rmsnorm' matches no job's name; they are such as 'few rms_norm'"):
        run.asked(record, run.PARTS, re.compile("rmsnorm"))


def test_a_part_that_cannot_be_listed_is_a_failure_of_its_own(record, monkeypatch):
    monkeypatch.setattr(run, "listed", lambda part: ["a"] if part == "stack" else cases.NONE)
    assert run.asked(record, ["speed", "stack"], re.compile("")) == {"stack": ["a"]}
    assert [(f["part"], f["case"]) for f in record.content["failures"]] == [("speed", "its jobs")]


def test_processes_side_by_side_do_every_job_once(record, monkeypatch):
    """And their counts of launches are added up."""
    monkeypatch.setattr(run.os, "cpu_count", lambda: 16)
    together, done = threading.Barrier(run.LANES["numerics"], timeout=60), []

    def child(record, part, jobs, *_):
        together.wait()  # ends only if all lanes are here at once
        done.extend(jobs)
        return {"finished": jobs, "variants": {"launches": dict.fromkeys(jobs, 1) | {"shared": 1}}}, 0, ""

    monkeypatch.setattr(run, "run_child", child)
    jobs = [str(n) for n in range(20)]
    with record.part("numerics", 0.5):
        run.run_part(record, "numerics", jobs, False, None)
    assert sorted(done) == sorted(jobs)
    assert record.content["correctness"]["variants"]["launches"] == dict.fromkeys(jobs, 1) | {"shared": run.LANES["numerics"]}


def test_what_compiles_keeps_nothing_else_waiting():
    """The checks of large tensors, of autocast and of models are of another part; packages are the last."""
    alone, beside = ([name.partition(":")[0] for name in run.listed(part)] for part in ("behaviour", "programs"))
    assert set(alone) >= {"beyond_31_bits", "autocast", "bound_model"}
    assert not set(alone) & set(beside)
    assert list(dict.fromkeys(beside)) == ["from_a_cpu", "opcheck", "compiled", "lowered", "package"]
    assert {"programs", "numerics"} == run.LANES.keys()


def test_few_rows_of_all_come_before_many_of_any():
    jobs = run.listed("numerics")
    assert [rows for rows, _ in jobs] == ["few"] * len(numerics.HELD) + ["many"] * len(numerics.HELD)


def test_calls_that_time_does_not_suffice_for_are_listed(record, monkeypatch):
    """What came before them counts."""
    monkeypatch.setattr(record, "left", itertools.chain([1.0, 1.0], itertools.repeat(0.0)).__next__)
    numerics.numerics(Interpreted(), "few", "swiglu", record, None)
    (row,) = record.content["correctness"]["numerics"]
    assert (row["rows"], row["calls"], row["failed"]) == ("few", 2, 0)
    assert [c["case"] for c in record.content["cut"]] == ["few swiglu: its calls after 2"]


def test_a_process_that_is_late_is_cut(record, monkeypatch):
    children = iter([({"finished": ["a"]}, None, ""), ({"finished": ["c"]}, 0, "")])
    monkeypatch.setattr(run, "run_child", lambda *_: next(children))
    with record.part("behaviour", 0.5):
        run.run_part(record, "behaviour", list("abc"), False, None)
    assert record.content["failures"] == []
    assert record.content["cut"] == [{"part": "behaviour", "case": "b", "why": "its time was over"}]


def test_what_a_late_process_began_ends_with_it(record, monkeypatch, tmp_path):
    """It would run beside what is measured next."""
    began = tmp_path / "began"
    program = tmp_path / "program.py"
    program.write_text(
        "import pathlib, subprocess, sys, time\n"
        f"pathlib.Path({str(began)!r}).write_text(str(subprocess.Popen(['sleep', '600']).pid))\n"
        "print('[  0 s] begun', file=sys.stderr, flush=True)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(run, "__file__", str(program))
    monkeypatch.setattr(run, "GRACE", 2)
    record.ends = time.monotonic()
    content, status, errors = run.run_child(record, "behaviour", ["a"], False, tmp_path, 0)
    assert (content, status) == ({"finished": []}, None)
    assert "begun" in errors
    pid = int(began.read_text())
    stat = pathlib.Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


ENDLESS_CALL = """
import sys, time
sys.path[:0] = {folders!r}
import pathlib
from gpu.record import Record
record = Record(pathlib.Path({out!r}), dry=True, arguments=[], environment=None, seconds=60)
record.add("tune", tried=1)
time.sleep(1.1)
record.watch(1)
time.sleep(60)
"""


def test_a_call_that_does_not_end_ends_its_process_and_loses_nothing(record, monkeypatch, tmp_path):
    out = tmp_path / "found.json"
    text = ENDLESS_CALL.format(folders=[str(pathlib.Path(run.__file__).parent.parent)], out=str(out))
    done = subprocess.run([sys.executable, "-c", text])
    assert done.returncode == -signal.SIGALRM
    assert json.loads(out.read_text())["tune"] == [{"tried": 1}]
    children = iter([({"finished": []}, done.returncode, "few rms_norm: a call"), ({"finished": ["b"]}, 0, "")])
    monkeypatch.setattr(run, "run_child", lambda *_: next(children))
    with record.part("behaviour", 0.5):
        run.run_part(record, "behaviour", list("ab"), False, None)
    (failure,) = record.content["failures"]
    assert failure["case"] == "a"
    assert "(a call did not end): few rms_norm: a call" in failure["message"]


def test_the_gpu_and_what_stands_for_it_are_used_alike():
    """No check can call what one of them lacks; what a dry run does not reach is what the GPU has for its own use."""

    def methods(cls):
        return {n: inspect.signature(f) for n, f in inspect.getmembers(cls, inspect.isfunction) if not n.startswith("_")}

    gpu, stand_in = methods(Gpu), methods(Dry)
    assert stand_in.items() <= gpu.items()
    assert gpu.keys() - stand_in.keys() == {"over"}


def test_a_variant_that_is_not_reached_is_a_failure(record):
    record.content["correctness"]["variants"] = {"arch": "90", "built": 2, "names": ["a", "b"], "launches": {"b": 3}}
    run.count_variants(record, complete=True)
    assert record.content["correctness"]["variants"]["not_reached"] == ["a"]
    assert "1 of 2 built variants were not reached" in record.content["failures"][0]["message"]
    assert run.summary(record) == 1


def test_a_variant_that_no_time_was_left_for_is_no_failure(record):
    record.content["correctness"]["variants"] = {"arch": "90", "built": 2, "names": ["a", "b"], "launches": {"b": 3}}
    record.cut("few rms_norm: its calls after 2")
    run.count_variants(record, complete=True)
    assert record.content["correctness"]["variants"]["not_reached"] == ["a"]
    assert record.content["failures"] == []


@pytest.fixture
def erring(interpreted, monkeypatch):
    """Interpreted kernels, whose instructions err by the whole of their bounds, up or down as the digits of a result have it;
    but for 2^0, of which PTX says that it is 1."""

    def err(function, bound):
        def instruction(self, *operands):
            result = function(self, *operands)
            digits = np.ascontiguousarray(result.data).view(np.uint32)
            down = digits * np.uint32(0x9E3779B1) >> np.uint32(31)
            erring = np.where(result.data == 1, 1, result.data * (1 + bound * (1.0 - 2.0 * down)))
            return TensorHandle(erring.astype(np.float32), result.dtype)

        return instruction

    bounds = {"exp2": instructions.EX2_APPROX, "log": instructions.LOGF, "fdiv": instructions.DIV_FULL}
    for name, bound in (bounds | {"rsqrt": instructions.RSQRT_APPROX}).items():
        monkeypatch.setattr(InterpreterBuilder, f"create_{name}", err(getattr(InterpreterBuilder, f"create_{name}"), bound))

    def exp(self, x):
        return self.create_exp2(TensorHandle(x.data * np.float32(instructions.LOG2E), x.dtype))

    monkeypatch.setattr(InterpreterBuilder, "create_exp", exp)


def narrow_calls(operator):
    """What numerics holds of the operator, of narrow rows and in float32."""
    for arguments, options in numerics.calls(Interpreted(), operator, few):
        if arguments[0].dtype == torch.float32 and arguments[0].shape[-1] < 100:
            function, formula, inputs, how = numerics.HELD[operator](*arguments, **options)
            yield function, formula, [i.detach() if isinstance(i, torch.Tensor) else i for i in inputs], how


AMPLIFIED = "dyt", "softmax", "attn_res", "neighborhood_attention"


@pytest.mark.parametrize("operator", AMPLIFIED)
def test_allowances_hold_for_a_gpus_instructions(erring, operator):
    """As those of exact instructions would not."""
    exact = []
    for function, formula, inputs, how in itertools.islice(narrow_calls(operator), 2):
        numerics.check(function, formula, *inputs, **how)
        with contextlib.suppress(AssertionError):
            harness.check(function, formula, *inputs, seen=exact, **how)
    assert max(exact) > 1


@pytest.mark.parametrize("operator", AMPLIFIED)
def test_allowances_notice_more_than_instructions(operator):
    """And say by how much it is more."""
    for function, formula, inputs, how in itertools.islice(narrow_calls(operator), 2):
        seen = []
        with pytest.raises(AssertionError, match=r"error .*, allowed .*: \S+ times it"):
            numerics.check(lambda *a, f=function: scaled(f(*a), 1 + 2**-15), formula, *inputs, seen=seen, **how)
        assert 4 < seen[-1] < 400


def scaled(results, factor):
    return tuple(r * factor for r in (results if isinstance(results, tuple) else (results,)))


class Interpreted(Dry):
    """Launches give numbers: the kernels are interpreted."""

    computes = True

    @contextlib.contextmanager
    def launching(self, launcher):
        with _jit.interpreted():
            yield


class Exact(Interpreted):
    """Bits are compared, as on a GPU; a captured graph writes its results anew where they were."""

    same = Gpu.same

    def on(self, stream):
        return contextlib.nullcontext()

    def launched_on(self, launcher, streams):
        pass

    def capture(self, function):
        results = function()
        return lambda: [old.copy_(new) for old, new in zip(results, function(), strict=True)], results

    def loads(self, launcher):
        return 1

    def context(self):
        return 0

    def leave_context(self):
        pass


HELD_BY_BITS = [
    *((check, "rms_norm") for check in (behaviour.first_call_in_a_graph, behaviour.thread_without_a_context)),
    *((behaviour.cuda_graph, name) for name in ("fused_add_rms_norm", "swiglu", "linear_logprob")),
    *((behaviour.two_streams, name) for name in ("rms_norm", "geglu", "linear_cross_entropy")),
    *((behaviour.same_bits, name) for name in ("rms_norm", "swiglu", "mhc_pre", "mhc_post_res")),
    *((behaviour.in_place, activation) for activation in ("silu", "gelu")),
    *((behaviour.beyond_31_bits, name) for name in behaviour.ROW_WISE),
    *((behaviour.autocast, name) for name in behaviour.LINEAR),
    *((behaviour.not_finite, name) for name in behaviour.NOT_FINITE),
    *((behaviour.from_a_cpu, name) for name in (behaviour.ONE, behaviour.ALL)),
]


@pytest.mark.parametrize(("check", "subject"), HELD_BY_BITS, ids=lambda c: getattr(c, "__name__", c))
def test_what_checks_demand_is_what_kernels_do(check, subject):
    """Each comparison of bits holds for the kernels themselves, interpreted."""
    check(Exact(), subject)


@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
def test_a_launch_that_misses_its_graph_or_stream_is_seen(name, monkeypatch):
    monkeypatch.setattr(Exact, "capture", lambda self, function: (lambda: None, function()))
    with pytest.raises(AssertionError):
        behaviour.cuda_graph(Exact(), name)
    monkeypatch.setattr(behaviour, "refill", lambda *_: None)  # what a launch before the copy would see
    with pytest.raises(AssertionError):
        behaviour.two_streams(Exact(), name)


def test_a_row_that_should_be_nan_is_seen(monkeypatch):
    call = behaviour.call
    monkeypatch.setattr(behaviour, "call", lambda *a: [r.nan_to_num(0.0) for r in call(*a)])
    for name in behaviour.NOT_FINITE:
        with pytest.raises(AssertionError, match=r"result of 96 columns: rows .* must be NaN"):
            behaviour.not_finite(Dry(), name)


@pytest.fixture
def on_this_device(monkeypatch):
    """Packages are programs, which load here, and lowering leaves them as they are."""
    monkeypatch.setattr(Exact, "dry", False)
    monkeypatch.setattr(behaviour.export, "lower", lambda program, multiprocessors: program)

    def compile_into(folder, program):
        torch.export.save(program, path := f"{folder}/package.pt2")
        return path

    monkeypatch.setattr(behaviour, "compile_into", compile_into)
    for name in ("beside_library", "without_library"):
        monkeypatch.setattr(behaviour, name, lambda path, inputs: torch.export.load(path).module()(*inputs))


@pytest.mark.parametrize("subject", [behaviour.ONE, behaviour.ALL])
@pytest.mark.parametrize("check", [behaviour.package, behaviour.lowered])
def test_what_packages_give_is_what_eager_execution_gives(on_this_device, monkeypatch, check, subject):
    assert check(Exact(), subject).endswith(" MB")
    eager = examples.Call.forward
    monkeypatch.setattr(examples.Call, "forward", lambda self, *tensors: [1.1 * t for t in eager(self, *tensors)])
    with pytest.raises(AssertionError, match="are not close"):
        check(Exact(), subject)


@pytest.mark.slow
@compiles
def test_a_package_runs_where_the_library_is_not(tmp_path):
    """And one that calls its operators does not."""
    inputs = (torch.randn(2, 8),)
    own, ours = torch.nn.RMSNorm(8), liger_aot.nn.RMSNorm(8)
    path = behaviour.compile_into(tmp_path, torch.export.export(own, inputs))
    torch.testing.assert_close(behaviour.without_library(path, inputs), own(*inputs))
    path = behaviour.compile_into(tmp_path, torch.export.export(ours, inputs))
    with pytest.raises(AssertionError, match="Could not find schema for liger::rms_norm_fwd"):
        behaviour.without_library(path, inputs)


def test_a_bound_model_as_on_a_gpu(monkeypatch):
    """In both dtypes and against float64, over the CPU kernels, which are quicker than interpreted ones."""
    monkeypatch.setattr(Exact, "dry", False)
    monkeypatch.setattr(Exact, "launching", lambda *_: contextlib.nullcontext())
    assert behaviour.bound_model(Exact(), "llama") == "0 launches"


def test_wrong_numbers_are_failures(record, monkeypatch):
    numerics.numerics(Interpreted(), "few", "swiglu", record, None)
    held = numerics.HELD["swiglu"]

    def wrong(*arguments, **options):
        function, formula, inputs, how = held(*arguments, **options)
        return lambda *a: 1.02 * function(*a), formula, inputs, how

    monkeypatch.setitem(numerics.HELD, "swiglu", wrong)
    numerics.numerics(Interpreted(), "few", "swiglu", record, None)
    right, bad = record.content["correctness"]["numerics"]
    count = len(list(CALLS["swiglu"](few)))
    assert (right["calls"], right["failed"], bad["failed"]) == (count, 0, count)
    assert right["worst"] < 1 < bad["worst"]
    assert len(record.content["failures"]) == count
    assert "error" in record.content["failures"][0]["message"]


def test_the_upstream_gradient_is_drawn_once_for_all_that_is_compared(monkeypatch):
    """Of results as large as a GPU's, drawing it anew for each dtype takes longer than all that is computed."""
    x, draw, drawn = torch.randn(5, 64).bfloat16(), torch.randn, []
    monkeypatch.setattr(torch, "randn", lambda *shape, **where: drawn.append(where["device"]) or draw(*shape, **where))
    harness.check(lambda x: x.float().exp().to(x.dtype), torch.exp, x)
    assert drawn == [x.device]


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
    """Operators run their bodies, over the stub."""

    serving = Dry.serving


@pytest.mark.parametrize("job", tune.JOBS)
def test_numbers_are_tried_and_put_back(job, record, monkeypatch):
    """Each value is where the operator looks for it, one of them is what it had, and that is there again."""
    name, operator = job.split(" of ")
    module, number, used = importlib.import_module(f"liger_aot.ops.{operator}"), tune.NUMBERS[name], set()

    def chunks(hidden, original=_linear.chunks):
        used.add((_linear.CHUNK, _linear.LEAST))
        return original(hidden)

    def programs(x, rows, each):
        used.add((each, each))
        return 1

    monkeypatch.setattr(module, *(("chunks", chunks) if name == "CHUNK" else ("programs", programs)))
    monkeypatch.setattr(number, "sizes", [cases.tiny(number.sizes[0])])
    before = _linear.CHUNK, _linear.LEAST, dict(_norm.RESIDENT)
    with record.part("speed", 0.5):
        tune.tune(Served(), record, job)
    assert before == (_linear.CHUNK, _linear.LEAST, _norm.RESIDENT)
    assert record.content["failures"] == record.content["cut"] == []
    rows = record.content["tune"]
    assert used == {(row["tried"], row["tried"]) for row in rows}
    assert {row["tried"] for row in rows} >= {*number.values}
    assert {row["tried"] for row in rows if row["shipped"]} == {number.shipped(operator, number.sizes[0])}
    assert {(row["pass"], row["us"]) for row in rows} == {
        p for p in (("forward", 10), ("backward", 30), ("both", 40)) if p[0] in number.passes
    }


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


def test_the_commit_of_a_tree_without_history(monkeypatch):
    import run as on_a_cpu

    monkeypatch.setattr(on_a_cpu.shutil, "which", lambda _: None)
    for carried, expected in (("0123", ("0123", False)), ("0123-dirty", ("0123", True)), ("", (None, None))):
        monkeypatch.setenv("LIGER_AOT_COMMIT", carried)
        found = run.environment()
        assert (found["commit"], found["changed since"]) == expected


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


def test_the_table(tmp_path, record, capsys):
    row = {"operator": "rms_norm", "sizes": {"tokens": 8, "hidden": 64}, "pass": "both", "fraction": 0.91, "bound": "bytes"}
    gpu = {"name": "NVIDIA H200", "driver": "CUDA 13.0"}
    content = {
        "dry": False,
        "environment": {"when": "2026-12-01T10:00:00+00:00", "commit": "0123456789abcdef", "torch": "2.11.0", "gpu": gpu},
        "ceilings": [{"what": "copy", "value": 4300.0, "unit": "GB/s"}],
        "speed": [
            row | {"provider": "liger-aot", "us": 100.0, "peak_MiB": 32.0},
            row | {"provider": "liger-kernel", "us": 150.0, "peak_MiB": 32.0},
        ],
        "failures": [],
    }
    (tmp_path / "h200.json").write_text(json.dumps(content))
    (tmp_path / "dry.json").write_text(json.dumps(content | {"dry": True}))
    text = table.render(tmp_path)
    assert text.startswith("NVIDIA H200, 2026-12-01, commit 0123456789ab, driver CUDA 13.0, torch 2.11.0.")
    assert "copy 4300 GB/s. No failures." in text
    assert text.endswith("| `rms_norm` | tokens 8, hidden 64 | 100 | 91 % of bytes | 32 | 1.50 x | | |")
    assert table.render(tmp_path / "none") == table.NONE
    record.content |= content
    assert run.summary(record) == 0
    assert "| `rms_norm` | tokens 8, hidden 64 | 100 |" in capsys.readouterr().out


def test_what_is_said_last_is_short_and_complete(record, capsys):
    """Where 12,000 characters of the output are kept they hold each operator that fails, however often, and the table."""
    plan = cases.plan()
    for operator, sizes in plan:
        for provider in (cases.OURS, *table.OTHERS):
            row = {"operator": operator, "sizes": sizes, "pass": "both", "fraction": 0.91, "bound": "bytes"}
            record.add("speed", **row, provider=provider, us=12345.0, peak_MiB=12345.0)
    gpu = {"name": "NVIDIA H200", "driver": "CUDA 13.0"}
    record.content["environment"] = {"when": "2026-12-01T10:00:00+00:00", "commit": "0", "torch": "2.11.0", "gpu": gpu}
    record.place = "numerics"
    for operator in numerics.HELD:
        for n in range(50):
            record.fail(f"{operator}: float32[{n}, 64]", "not close\n" + 100 * "so ")
    record.cut("many swiglu")
    capsys.readouterr()
    assert run.summary(record) == 1
    said = capsys.readouterr().out
    assert len(said) < 12000
    for operator in numerics.HELD:
        assert f"FAILED numerics: {operator}: 48 more" in said or f"numerics: {operator} (50)" in said
        assert re.search(rf"^\| `{operator}` \|", said, re.M) or operator not in dict(plan)
    assert "FAILED numerics: rms_norm: float32[0, 64]: not close so so" in said
    assert "cut of numerics: 1\n" in said
    assert said.index("FAILED") < said.index("| `rms_norm` |")


def test_readme_shows_no_other_figure():
    """Its table is what the committed files give; with none it says that no figure exists."""
    text, found = README.read_text(), table.render()
    if found == table.NONE:
        assert re.search(r"no\s+(> )?GPU figure exists", text)
        assert not re.search(r"\bH[12]00\b[^.]*\d (µs|us|GB/s|TFLOP/s)\b", text)
    else:
        assert found in text
