"""The static report and the model that predicts: what they count is what the package launches and what the cubins hold."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from liger_aot import _op
from liger_aot import _runtime

from repository import ROOT
from stub import Launcher
from stub import Stub

sys.path.append(str(ROOT / "benchmarks"))
import candidates
import devices
import launches
import operators
import pictures
import proposals
import roofline
import sass
import show
import static
import traffic

ARCH = "90"
SIZES = {"tokens": 4096, "hidden": 4096, "vocabulary": 128256}
PREDICTIONS = ROOT / "benchmarks/predictions"


@pytest.fixture(autouse=True)
def no_filling(reproducible):
    """Uninitialised memory is not filled: that would be launches."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def pack():
    return _runtime.open_pack(_runtime.pack_paths()[ARCH])


@pytest.fixture(scope="module")
def model():
    return roofline.Model("H200")


def variant(pack, kernel, *key):
    return kernel, pack.table(kernel)[key]


# --- occupancy, by hand from the limits of the CUDA C++ Programming Guide


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "programs", "limit"),
    [
        ("90", 256, 32, 0, 8, "warps"),  # 64 warps of 8
        ("90", 32, 32, 0, 32, "blocks"),
        # 122 registers take 16 units of 256 a warp, 4096: four warps in each quarter's 16384, so 16 warps of 4
        ("90", 128, 122, 64, 4, "registers"),
        ("90", 512, 129, 0, 0, "registers"),  # 17 units: three warps a quarter, 12 of the 16 that are needed
        ("80", 128, 40, 48 * 1024, 3, "shared memory"),  # 164 KB in blocks of 48 + 1
        ("90", 128, 40, 48 * 1024, 4, "shared memory"),  # 228 KB
        ("120f", 256, 32, 0, 6, "warps"),  # 48 warps of 8
        ("75", 128, 64, 0, 8, "warps"),  # 32 warps of 4
    ],
)
def test_occupancy(arch, threads, registers, shared, programs, limit):
    assert devices.occupancy(arch, threads, registers, shared) == (programs, limit)


def test_occupancy_names_an_unknown_architecture():
    with pytest.raises(ValueError, match="sm_66 is none of 75, 80"):
        devices.occupancy("66", 128, 32, 0)


@pytest.mark.parametrize("arch", _runtime.pack_paths())
def test_every_pack_has_its_limits(arch):
    pack = _runtime.open_pack(_runtime.pack_paths()[arch])
    for kernel in pack.manifest["kernels"]:
        for v in pack.table(kernel).values():
            assert devices.occupancy(arch, v.threads, v.registers, v.shared)[0] >= 1


# --- machine code


def test_classes_of_a_cubin(pack):
    bf16 = torch.bfloat16
    of = variant(pack, "swiglu_fwd", True, bf16, bf16, bf16, 1024)
    code = sass.disassemble(pack, [of])[of[1].cubin]
    # 1024 numbers in 128 threads: 8 numbers, 16 bytes, of each tensor a thread. A sigmoid takes one exp2 and one reciprocal;
    # one more reciprocal divides the program's number into row and block.
    assert code.widths("LDG") == {128: 2}
    assert code.widths("STG") == {128: 1}
    assert code.classes["MUFU"] == 8 + 8 + 1
    assert code.classes["global memory"] == 3
    assert not {"MMA", "local memory", "barrier"} & set(code.classes)
    assert code.loops == []


def test_loops_of_a_cubin(pack):
    of = variant(pack, "column_sum", True, torch.float32, torch.bfloat16, 128, 32)
    code = sass.disassemble(pack, [of])[of[1].cubin]
    ((start, end),) = code.loops
    assert sum(i.opcode == "LDG" for i in code.instructions[start : end + 1]) == sum(code.widths("LDG").values())
    # 128 rows of 32 columns by 128 threads: 32 numbers a turn, 8 loads; after 5 turns the rest once more.
    work = roofline.work(code, (5,))
    body = sum(i.opcode != "NOP" for i in code.instructions[start : end + 1])
    assert work.issued == sum(code.classes.values()) + 4 * body
    assert work.rounds == 5
    assert code.classes["barrier"] >= 1  # the sum over rows is one between warps
    with pytest.raises(ValueError, match="1 loops, got trips of 2"):
        code.executed((1, 1))


def test_machine_code_reads_as_the_gate_reads_it(pack):
    of = [next(variants(pack, kernel)) for kernel in ("rope", "rms_norm_bwd", "cross_entropy_fwd")]
    codes = sass.disassemble(pack, of)
    for kernel, v in of:
        (lines,) = sass.gate.listings([(kernel, pack.read(v.cubin))], pack.arch)
        assert (codes[v.cubin].widths("LDG"), codes[v.cubin].widths("STG")) == sass.gate.global_widths(lines)
        assert len(codes[v.cubin].instructions) == len(lines)


def variants(pack, kernel):
    return ((kernel, v) for v in pack.table(kernel).values())


def test_an_unknown_instruction_is_named():
    with pytest.raises(ValueError, match="FROB is in no class"):
        sass.count([sass.Instruction(0, "FROB", "", "")])


@pytest.mark.parametrize("arch", _runtime.pack_paths())
def test_the_model_knows_the_loops_of_every_kernel(arch):
    """Of each kernel the first and last variant, which differ in LOOP and alignment."""
    pack = _runtime.open_pack(_runtime.pack_paths()[arch])
    every = [of for kernel in traffic.KERNELS for of in list(variants(pack, kernel))[:: len(pack.table(kernel)) - 1]]
    codes = sass.disassemble(pack, every)
    for kernel, v in every:
        sizes = {
            "n": 5,
            "rows": 5,
            "half": 2,
            "smoothing": 0.0,
            "programs": 1,
            "size": 5,
            "parts": 1,
            "groups": 5,
            "each": 5,
            "depth": 5,
            "hc": 3,
            "heads": 15,
            "tmax": 5,
            "tokens": 5,
            "k": 5,
            "dilation": 1,
        }
        trips = traffic.KERNELS[kernel].trips(sizes | v.constants | {"aligned": v.aligned})
        assert len(codes[v.cubin].loops) == len(trips), v.cubin
        assert codes[v.cubin].classes


# --- the static report


def test_the_report_knows_what_every_variant_moves(pack):
    moved = static.ratios(pack)
    assert all(static.ratio(moved, kernel, v) >= 1 for kernel in traffic.KERNELS for v in pack.table(kernel).values())


def test_report_puts_the_suspicious_first(capsys):
    rows = static.report([ARCH], ["rms_norm_bwd", "swiglu_fwd"])
    assert len(rows) == 84 + 6
    assert [r["weight"] for r in rows] == sorted((r["weight"] for r in rows), reverse=True)
    assert not any(r["findings"] for r in rows if r["kernel"] == "swiglu_fwd" and r["aligned"])
    looped = [r for r in rows if "LOOPTrue" in r["variant"]]
    assert looped
    for r in looped:
        assert "moves over 1.2 times the least bytes" in r["findings"]
    static.show_rows(rows[:3])
    static.show_findings(rows)
    assert rows[0]["kernel"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"spills": 3}, "spills"),
        ({"occupancy": 0.125, "limited_by": "registers"}, "few warps.*registers"),
        ({"loads": {64: 8, 128: 1}}, "narrow loads"),
        ({"loads": {64: 8}}, "no 128-bit loads"),
        ({"stores": {16: 8, 128: 0.5}}, "narrow stores"),
        ({"moved_to_least": 1.5}, "moves over"),
        ({"calls": 1}, "calls a function"),
    ],
)
def test_findings(change, finding):
    fine = {"spills": 0, "occupancy": 0.5, "limited_by": "warps", "aligned": True, "moved_to_least": 1.0, "calls": 0}
    fine |= {"loads": {128: 4}, "stores": {128: 2, 32: 1}}
    assert list(static.findings(fine)) == []
    ((weight, text),) = static.findings(fine | change)
    assert weight > 0
    assert re.match(finding, text)


# --- launches and their bytes


def test_every_operator_and_kernel_is_known(pack):
    """A new one needs an entry in benchmarks/operators.py or benchmarks/traffic.py."""
    assert sorted(operators.OPERATORS) == sorted(_op.PUBLIC)
    assert sorted(traffic.KERNELS) == sorted(pack.manifest["kernels"])
    for kernel, known in traffic.KERNELS.items():
        assert set(known.writes) <= {name for name, type_ in pack.parameters(kernel) if type_.startswith("*")}


def test_the_unknown_is_named(pack):
    with pytest.raises(NotImplementedError, match="frobnicate: unknown to the model"):
        launches.trace("frobnicate", SIZES, "bfloat16", pack, 132)
    with pytest.raises(NotImplementedError, match="frob_fwd: unknown to the model"):
        launches.launch_of("frob_fwd", (1,), (), {}, [])


def on_cpu(operator, sizes, dtype):
    """What a stub in the place of the driver sees of the same calls: [(kernel, programs, cubin)], forward and backward."""
    function, shapes = operators.OPERATORS[operator](sizes, dtype)
    inputs = [real(s) if isinstance(s, torch.Tensor) else s for s in shapes]
    stub = Stub()
    with _runtime.kernels.launched_by(Launcher(stub)), _op.on_cpu():
        outputs = function.apply(*inputs)
        outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
        forward = len(stub.launches)
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    seen = [(x.kernel, math.prod(x.grid), x.cubin) for x in stub.launches]
    return {"forward": seen[:forward], "backward": seen[forward:]}


def real(s):
    made = torch.zeros(s.shape, dtype=s.dtype).as_strided(s.shape, s.stride())
    return made.requires_grad_() if made.is_floating_point() and made.dim() != 3 else made  # rope's angles get no gradient


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("hidden", [96, 1024, 4096, 8208])
@pytest.mark.parametrize("operator", sorted(_op.PUBLIC))
def test_launches_are_those_of_the_operator(pack, operator, hidden, dtype):
    sizes = {"tokens": 300 if "linear" not in operator else 60, "hidden": hidden, "vocabulary": 1000, "head": 96}
    traced = launches.trace(operator, sizes, dtype, pack, 132)
    made = {
        name: [(x.name, x.programs, pack.table(x.name)[x.key].cubin) for x in p.launches if x.programs]
        for name, p in traced.items()
    }
    assert made == on_cpu(operator, sizes, dtype)
    assert made["forward"]


def test_bytes_of_rms_norm(pack):
    passes = launches.trace("rms_norm", SIZES, "bfloat16", pack, 132)
    x, weight, rstd, n = 4096 * 4096 * 2, 4096 * 2, 4096 * 4, 4096
    (fwd,) = passes["forward"].launches
    assert (fwd.read, fwd.written, fwd.again) == (x + weight, x + rstd, 0)
    bwd, total = passes["backward"].launches
    partial = 2 * 132 * n * 4  # two programs a multiprocessor, a row of fp32 each
    assert (bwd.read, bwd.written, bwd.again) == (2 * x + weight + rstd, x + partial, 0)
    assert (total.read, total.written) == (partial, weight)
    assert passes["backward"].least == 3 * x + 2 * weight + rstd  # dy, x, dx; weight, dw; rstd


def test_bytes_of_a_row_that_is_walked_twice(pack):
    n, rows, programs = 16384, 4096, 264
    passes = launches.trace("rms_norm", SIZES | {"hidden": n}, "bfloat16", pack, 132)
    x = rows * n * 2
    assert passes["forward"].launches[0].again == x
    # x and dy once more, and the program's fp32 share of dw read and written for every two rows but its first
    assert passes["backward"].launches[0].again == 2 * x + 2 * 4 * n * (rows // 2 - programs)
    assert passes["forward"].moved == 3 * x + n * 2 + rows * 4


def test_bytes_of_swiglu_and_rope(pack):
    moved = {name: p.moved for name, p in launches.trace("swiglu", SIZES, "bfloat16", pack, 132).items()}
    assert moved == {"forward": 3 * 4096 * 4096 * 2, "backward": 5 * 4096 * 4096 * 2}
    q, k, angles = 4096 * 4096 * 2, 4096 * 1024 * 2, 4096 * 128 * 2
    for p in launches.trace("rope", SIZES, "bfloat16", pack, 132).values():
        assert p.moved == p.least == 2 * (q + k + angles)


def test_bytes_and_flops_of_linear_cross_entropy(pack):
    sizes = SIZES | {"tokens": 2048}
    passes = launches.trace("linear_cross_entropy", sizes, "bfloat16", pack, 132)
    rows, width, classes = 1024, 4096, 128256  # a chunk
    made = [x for x in passes["forward"].launches if x.matmul]
    assert passes["forward"].flops == 6 * 2048 * width * classes
    logits, dhidden, dweight = made[:3]
    assert (logits.read, logits.written) == (2 * (rows * width + classes * width), 4 * rows * classes)
    assert (dhidden.read, dhidden.written) == (2 * (rows * classes + classes * width), 2 * rows * width)
    inputs, sums = 2 * (rows * classes + rows * width), 4 * classes * width
    assert (dweight.read, dweight.written) == (inputs, sums)  # the first chunk finds the sums empty
    assert (made[5].read, made[5].written) == (inputs + sums, sums)
    scale = passes["backward"].launches[-1]
    assert (scale.read, scale.written) == (sums + 4, sums // 2)


# --- the model's arithmetic


def test_time_of_what_moves_bytes(model):
    moved = 3 * 32768 * 14336 * 2
    predicted = model.predict("swiglu", {"tokens": 32768, "hidden": 14336}, "bfloat16")["forward"]
    seconds = 5e-6 + moved / (0.9 * 4.8e12) + 478.8 / 1.98e9
    assert predicted["us"] == pytest.approx(1e6 * seconds, rel=1e-3)
    assert (predicted["bound"], predicted["launches"], predicted["bytes"]) == ("bytes", 1, moved)


def test_time_of_a_matmul(model):
    n = 8192
    of = launches.Launch("mm", 4 * n * n, 2 * n * n, matmul=(n, n, n, torch.bfloat16))
    # 64 x 32 tiles are 15.5 waves of 132: sixteen are paid
    waves = 16 * 2 * 128 * 256 * n / (0.8 * 989.4e12 / 132)
    assert model.time(of).bounds["matmul"] == pytest.approx(waves)
    assert model.time(of).bound == "matmul"
    assert model.time(of).unhidden == pytest.approx(2 * n * n / (0.9 * 4.8e12))


def test_both_is_one_call_less_of_overhead(model):
    made = model.predict("geglu", {"tokens": 4096, "hidden": 4096}, "bfloat16")
    alone = made["forward"]["us"] + made["backward"]["us"]
    assert made["both"]["us"] == pytest.approx(alone - 5 + 1, abs=0.1)


def test_few_programs_take_as_long_as_one(model):
    """What one program alone takes is a bound: 5 rounds of a column sum, on a few multiprocessors."""
    passes = model.trace("rms_norm", {"tokens": 2048, "hidden": 1024}, "bfloat16")
    model.prepare([passes])
    total = passes["backward"].launches[-1]
    assert (total.name, total.programs, total.trips) == ("column_sum", 32, (5,))
    time = model.time(total)
    assert time.bound == "latency"
    assert time.seconds > 5 * model.device.latency


# --- the committed predictions


def committed():
    return sorted(PREDICTIONS.glob("*.json"))


def test_predictions_are_there_for_every_device():
    assert [p.stem for p in committed()] == sorted(devices.DEVICES)


@pytest.mark.parametrize("path", committed(), ids=lambda p: p.stem)
def test_predictions_say_that_they_are(path):
    content = json.loads(path.read_text())
    assert content["label"] == roofline.LABEL == pictures.LABEL == "PREDICTION, not measured"
    assert content["predicted"] is True
    for row in content["rows"]:
        assert set(row) - {"provider"} == {"operator", "dtype", "sizes", "pass", "predicted"}
        assert row["predicted"]["us"] > 0


def test_predictions_are_of_what_the_package_launches_today():
    """`python benchmarks/roofline.py predict` writes them anew."""
    content, model = json.loads((PREDICTIONS / "H200.json").read_text()), roofline.Model("H200")
    rows = {(roofline.identity(row), row.get("provider")): row["predicted"] for row in content["rows"]}
    assert len(rows) == len(content["rows"])
    for operator, dtype, sizes in roofline.cases():
        for name, made in model.trace(operator, sizes, dtype).items():
            row = rows[roofline.identity({"operator": operator, "dtype": dtype, "sizes": sizes, "pass": name}), None]
            assert (row["launches"], row["bytes"], row["flops"]) == (len(made.launches), made.moved, made.flops)


def test_every_case_that_a_gpu_run_times_has_a_prediction():
    from gpu.cases import plan

    predicted = {(operator, tuple(sorted(sizes.items()))) for operator, _, sizes in roofline.cases()}
    assert [case for case in plan() if (case[0], tuple(sorted(case[1].items()))) not in predicted] == []


def test_tables_say_that_they_predict(capsys):
    roofline.show_predictions(json.loads((PREDICTIONS / "H200.json").read_text()))
    out = capsys.readouterr().out
    assert out.startswith("PREDICTION, not measured: H200")
    assert "predicted" in out.partition("\n")[2].partition("rms_norm")[0]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("candidates")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, candidates.__file__, "90", folder, "--choice", "column_sum"]
    subprocess.run(command, env=environment, check=True)
    return folder


def test_proposals_change_what_they_say_and_nothing_else(compiled, model):
    proposed = proposals.Model("H200", compiled)
    (trial,) = [t for t in candidates.CHOICES["column_sum"].tried if (t["ROWS"], t["BLOCK"]) == (32, 128)]
    launches = []
    trace = proposed.trace
    proposed.trace = lambda *case: launches.append(trace(*case)) or launches[-1]
    then = proposed.predicted("column_sum", trial, "rms_norm", candidates.SMALL)
    now = proposed.predict("rms_norm", candidates.SMALL, "bfloat16")
    (bwd, sums), (old, shipped) = (found["backward"].launches for found in launches)
    assert bwd == old
    assert (sums.programs, sums.trips) == (8, (17,))  # 528 rows of sums of 1024 columns
    assert (shipped.programs, shipped.trips, shipped.read) == (32, (5,), sums.read)
    assert then["backward"]["us"] > now["backward"]["us"]
    assert then["forward"] == now["forward"]
    assert now == model.predict("rms_norm", candidates.SMALL, "bfloat16")


def test_loops_of_candidates_load_ahead_where_they_are_to(compiled, pack):
    found = candidates.opened(compiled, ARCH)
    for trial in candidates.CHOICES["column_sum"].tried:
        tried = candidates.Tried(pack, found, "column_sum", trial)
        of = [("column_sum", v) for v in tried.tables["column_sum"].values()]
        ahead = [any(i.opcode == "LDGSTS" for i in code.instructions) for code in sass.disassemble(tried, of).values()]
        assert ahead == [trial.get("num_stages", 1) > 1]


def test_proposals_are_of_what_is_compiled(compiled, monkeypatch):
    """Of numbers that need no kernels of their own, and of the kernels that are there; as shipped, nothing is gained."""
    monkeypatch.setattr(proposals, "MORE", {})
    for name in [name for name in candidates.CHOICES if name not in ("column_sum", "RESIDENT at 1024", "rope")]:
        monkeypatch.delitem(candidates.CHOICES, name)
    found = list(proposals.rows("H200", compiled))
    assert [(choice, which) for choice, _, _, which, _, made in found if made] == [
        *([("column_sum", "backward"), ("column_sum", "both")] * 2),
        *([("RESIDENT at 1024", "backward")] * 2),
    ]
    pack = _runtime.open_pack(_runtime.pack_paths()["90"])
    for choice, operator, _, which, now, made in found:
        same = [then for trial, then in made if candidates.is_shipped(choice, trial, operator, which, pack, 132)]
        assert same == ([now] if made else [])


def test_proposals_of_more_sizes_are_of_choices():
    for choice, more in proposals.MORE.items():
        assert more.keys() <= candidates.CHOICES[choice].cases.keys()


def test_proposals_as_a_table(compiled, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["proposals.py", str(compiled)])
    for name in [name for name in candidates.CHOICES if name != "column_sum"]:
        monkeypatch.delitem(candidates.CHOICES, name)
    proposals.main()
    out = capsys.readouterr().out
    assert out.startswith("PREDICTION, not measured: H200, bfloat16")
    assert "ROWS 32, BLOCK 128, num_warps 4" in out
    assert "ROWS 128, BLOCK 32, num_warps 4" not in out
    assert "predicted to differ by less than 1%" in out


def test_tables_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.box", None)
    show.table("Title", ["name", "us"], [["a", "1"], ["longer", "23"]], right=("us",))
    assert capsys.readouterr().out == "Title\nname    us\na        1\nlonger  23\n"


# --- measured against predicted


def measured(**environment):
    """A file of `make gpu`, made up."""
    case = {"dtype": "bfloat16", "peak_MiB": None}
    norm = {"operator": "rms_norm", "sizes": {"tokens": 2048, "hidden": 4096}, "provider": "liger-aot"} | case
    head = {"operator": "linear_cross_entropy", "sizes": dict(SIZES), "provider": "bare matmuls"} | case
    speed = [
        norm | {"pass": "forward", "us": 26.02, "bytes": 33570816, "flops": 0},
        norm | {"pass": "backward", "us": None, "bytes": 1, "flops": 0},
        norm | {"pass": "both", "us": 64.0, "bytes": 92577792, "flops": 0, "peak_MiB": 48.0},
        norm | {"pass": "both", "us": 128.0, "bytes": 92577792, "flops": 0, "peak_MiB": 64.0, "provider": "torch eager"},
        norm | {"pass": "forward", "us": 9.0, "bytes": 1, "flops": 0, "sizes": {"tokens": 3, "hidden": 4}},
        head | {"pass": "both", "us": 16540.0, "bytes": 1, "flops": 6 * 4096 * 4096 * 128256},
    ]
    found = {"gpu": {"name": "NVIDIA H200"}, "when": "2026-11-21T12:00:00+00:00", "commit": "0123456789abcdef"} | environment
    ceilings = [{"what": "copy", "unit": "GB/s", "value": 4300.0}, {"what": "matmul", "unit": "TFLOP/s", "value": 790.0}]
    return {"schema": 1, "dry": False, "environment": found, "ceilings": ceilings, "speed": speed}


def test_compare(capsys):
    predicted = json.loads((PREDICTIONS / "H200.json").read_text())
    us = {roofline.identity(row): row["predicted"]["us"] for row in predicted["rows"] if "provider" not in row}
    file = measured()
    assert roofline.device_of(file) == "H200"
    pairs, without = roofline.compare(file, predicted)
    assert [row["sizes"] for row in without] == [{"tokens": 3, "hidden": 4}]
    ratios = {(row["operator"], row["pass"]): ratio for row, _, ratio in pairs}
    assert ratios["rms_norm", "forward"] == 26.02 / us[roofline.identity(file["speed"][0])]
    assert set(ratios) == {("rms_norm", "forward"), ("rms_norm", "both"), ("linear_cross_entropy", "both")}
    assert [ratio for *_, ratio in pairs] == sorted(ratios.values(), reverse=True)
    roofline.show_comparison("H200", pairs, without)
    out = capsys.readouterr().out
    assert all(word in out for word in ("H200: measured against predicted", "predicted us", "ratio"))
    assert "1 measured cases have no prediction" in out


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (measured() | {"dry": True}, "dry run"),
        (measured(gpu=None), "dry run"),
        (measured(gpu={"name": "NVIDIA T4"}), "NVIDIA T4 is none of A100, H100"),
    ],
)
def test_compare_refuses(content, text):
    with pytest.raises(SystemExit, match=text):
        roofline.device_of(content)


def test_compare_as_a_command(tmp_path, monkeypatch, capsys):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(measured()))
    monkeypatch.setattr(sys, "argv", ["roofline.py", "compare", str(path)])
    roofline.main()
    assert "H200: measured against predicted" in capsys.readouterr().out


# --- pictures


def texts(drawn):
    return [t.get_text() for axes in drawn.axes for t in axes.texts]


def test_without_figures_the_picture_is_a_prediction(tmp_path):
    notes = pictures.draw(tmp_path / "none", PREDICTIONS / "H200.json", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["predicted-roofline.png"]
    assert pictures.LABEL in notes[0]
    assert "no picture of speed-up or memory" in notes[1]


def test_the_picture_of_a_prediction_says_so_inside():
    drawn = pictures.of_predicted(json.loads((PREDICTIONS / "H200.json").read_text()))
    assert texts(drawn).count("PREDICTION, not measured") == 2
    assert drawn.get_suptitle().startswith("PREDICTION, not measured")
    assert all(axes.get_ylabel().startswith("predicted ") for axes in drawn.axes)


def test_operators_of_a_picture_can_be_told_apart():
    """However many are predicted."""
    drawn = pictures.of_predicted(json.loads((PREDICTIONS / "H200.json").read_text()))
    lines = [line for axes in drawn.axes for line in axes.lines if ", forward" in str(line.get_label())]
    marks = {(line.get_label().partition(",")[0], line.get_color(), line.get_marker()) for line in lines}
    assert {name for name, *_ in marks} == set(pictures.DRAWN)
    assert len({(colour, shape) for _, colour, shape in marks}) == len(pictures.DRAWN)


def test_pictures_of_measured_figures(tmp_path):
    for name, content in {
        "old": measured(when="2026-01-01T00:00:00+00:00", commit="0ld"),
        "new": measured(),
        "dry": measured(when="2027-01-01T00:00:00+00:00") | {"dry": True},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = pictures.measured_files(tmp_path)
    assert [content["environment"]["commit"] for content in found.values()] == ["0123456789abcdef"]
    notes = pictures.draw(tmp_path, PREDICTIONS / "H200.json", tmp_path / "out")
    names = {f"{what}-nvidia-h200.png" for what in ("roofline", "speedup", "memory")}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert len(notes) == 3
    drawn = pictures.of_measured("NVIDIA H200", measured())
    assert not any(pictures.LABEL in text for text in texts(drawn["roofline"]))
    for figure in drawn.values():
        assert "NVIDIA H200, 2026-11-21, commit 012345678" in figure.get_suptitle()
    (line,) = [x for x in drawn["speedup"].axes[0].lines if list(x.get_xdata()) == [2.0]]  # 128 us over ours, 64
    assert line.get_linestyle() == "None"
    assert sorted(bar.get_width() for bar in drawn["memory"].axes[0].patches) == [48 / 1024, 64 / 1024]
