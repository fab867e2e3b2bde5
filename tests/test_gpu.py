"""The program that measures on a GPU, as far as a CPU goes: a dry run of all of it, and the file it writes."""

import inspect
import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest

from liger_aot import _op
from liger_aot import _runtime

from calls import CALLS
from calls import few
from examples import EXAMPLES
from stub import copy_pack

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
import candidates

from gpu import behaviour
from gpu import cases
from gpu import numerics
from gpu import run
from gpu import table
from gpu import timing
from gpu import tune
from gpu.machine import Dry
from gpu.machine import Gpu
from gpu.record import Record

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
    left_out |= {"a dry run tries fewer of its kind", tune.NOT_COMPILED}
    assert {c["why"] for c in content["cut"]} == left_out | without_liger(content)


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
    tried = {f"{row['number']} of {row['operator']}" for row in content["tune"]}
    assert {job for job in tune.JOBS if not candidates.CHOICES[job.partition(" of ")[0]].kernels} == tried
    assert {job for job in tune.JOBS if job not in tried} <= {row["case"] for row in content["cut"]}
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
    text = (BENCHMARKS / "gpu/README.md").read_text()
    quick = re.search(r"make gpu GPU_SECONDS=\d+ MATCH='(.+)' GPU_OUT=out/tune.json", text)[1]
    found = run.asked(record, run.PARTS, re.compile(quick))
    few_rows = [["few", operator] for operator in numerics.HELD]
    checks = ["preload: all", "cuda_graph: rms_norm", "back_ends: rms_norm"]
    assert found == {"numerics": few_rows, "behaviour": checks, "speed": [[run.TUNE, job] for job in tune.JOBS]}


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
    deadline = time.monotonic() + 30
    while runs(began.read_text()):  # it is killed, and ends when the system comes to it
        assert time.monotonic() < deadline
        time.sleep(0.01)


def runs(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


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


def test_the_commit_of_a_tree_without_history(monkeypatch):
    import run as on_a_cpu

    monkeypatch.setattr(on_a_cpu.shutil, "which", lambda _: None)
    for carried, expected in (("0123", ("0123", False)), ("0123-dirty", ("0123", True)), ("", (None, None))):
        monkeypatch.setenv("LIGER_AOT_COMMIT", carried)
        found = run.environment()
        assert (found["commit"], found["changed since"]) == expected


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


def test_what_is_faster_than_what_is_shipped_is_said(record, capsys):
    """Where the times of the two do not overlap."""
    for number, best in (("rope", 7.0), ("softmax", 9.5)):
        for tried, shipped, us in (({"num_warps": 2}, True, 10.0), ({"num_warps": 4}, False, best)):
            row = {"operator": number, "sizes": {"tokens": 8}, "pass": "forward", "tried": tried, "shipped": shipped}
            record.add("tune", number=number, **row, us=us, low=us - 0.5, high=us + 0.5, peak_MiB=8.0 - shipped)
    assert run.summary(record) == 0
    said = capsys.readouterr().out
    line = "rope: rope forward, tokens 8: num_warps 4: 7.0 us, shipped 10.0 (30% less, 8 MiB for 7)"
    assert said.startswith(f"Faster than what is shipped:\n{line}\n0 more\n{record.path}")
    record.content["tune"] = record.content["tune"][2:]
    run.summary(record)
    assert capsys.readouterr().out.startswith("Faster than what is shipped:\nnothing\n")


def test_what_is_said_last_is_short_and_complete(record, capsys):
    """Where 12,000 characters of the output are kept they hold each operator that fails, however often, and the table."""
    plan = cases.plan()
    for operator, sizes in plan:
        for provider in (cases.OURS, *table.OTHERS):
            row = {"operator": operator, "sizes": sizes, "pass": "both", "fraction": 0.91, "bound": "bytes"}
            record.add("speed", **row, provider=provider, us=12345.0, peak_MiB=12345.0)
    for number, choice in candidates.CHOICES.items():
        for operator, which, own in itertools.product(choice.cases, choice.passes, (True, False)):
            us = 8000.0 if own else 9000.0
            row = {"operator": operator, "sizes": choice.cases[operator], "pass": which, "tried": choice.tried[own]}
            record.add("tune", number=number, **row, shipped=not own, us=us, low=us, high=us, peak_MiB=9.0)
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
