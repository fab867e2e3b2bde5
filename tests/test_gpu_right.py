"""What the program that measures on a GPU demands of kernels: its allowances and its checks, on interpreted kernels."""

import contextlib
import itertools
import pathlib
import shutil
import sys

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder
from triton.runtime.interpreter import TensorHandle

import liger_aot
from liger_aot import _jit
from liger_aot.ops import _norm

import examples
import harness
from calls import CALLS
from calls import WIDTHS
from calls import few

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
from gpu import behaviour
from gpu import instructions
from gpu import numerics
from gpu.machine import Dry
from gpu.machine import Gpu

compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor wants a C++ compiler, and there is no g++")


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


def test_calls_that_time_does_not_suffice_for_are_listed(record, monkeypatch):
    """What came before them counts."""
    monkeypatch.setattr(record, "left", itertools.chain([1.0, 1.0], itertools.repeat(0.0)).__next__)
    numerics.numerics(Interpreted(), "few", "swiglu", record, None)
    (row,) = record.content["correctness"]["numerics"]
    assert (row["rows"], row["calls"], row["failed"]) == ("few", 2, 0)
    assert [c["case"] for c in record.content["cut"]] == ["few swiglu: its calls after 2"]


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


@pytest.mark.parametrize("multiprocessors", [132, 148])
@pytest.mark.parametrize("n", WIDTHS)
def test_many_rows_are_several_turns_of_each_program(n, multiprocessors):
    """Of a norm's backward: a weight's gradient is summed over turns, and over programs."""
    for least in _norm.BLOCKS[:2]:
        *_, groups, _, block, loop = _norm.layout(torch.empty(numerics.many(n), n, device="meta"), least, backward=True)
        assert groups > 2 * multiprocessors * _norm.resident(block, loop)


HELD_BY_BITS = [
    *((check, "rms_norm") for check in (behaviour.first_call_in_a_graph, behaviour.thread_without_a_context)),
    *((behaviour.cuda_graph, name) for name in ("fused_add_rms_norm", "swiglu", "linear_logprob")),
    *((behaviour.two_streams, name) for name in ("rms_norm", "geglu", "linear_cross_entropy")),
    *((behaviour.same_bits, name) for name in ("rms_norm", "swiglu", "mhc_pre", "mhc_post_res")),
    *((behaviour.same_bits_of_wide_rows, name) for name in ("rms_norm", "layer_norm")),
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
