"""The kernels run here as they are in the wheel's sources, interpreted on the CPU, through the operators."""

import functools
import gc
import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else every process that compiles starts one more, which imports torch
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"  # scalar code, for which the C++ compiler takes a fifth less time

import pytest
import torch
import torch._export.utils
from triton.runtime import interpreter

from liger_aot import _jit

# Begun first, so that the processes of make test end together.
LONGEST = ["test_export.py", "test_gpu.py", "test_sweep.py", "test_mutate.py", "test_ways_in.py", "test_bind_compile.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish():
    """The garbage collector walks through millions of imported objects again and again, unless it is told that they stay."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def done_once():
    """What torch and Triton do over and over, for what does not change while tests run.

    For each program that is decomposed, torch lists its own operators 60 times, which takes 0.1 s. Triton's interpreter
    exchanges the functions of triton.language at each launch and at each call of a function by a kernel, and back after the
    launch, which takes two fifths of its time: here they are exchanged for good, at the first call from each module. For each
    result it makes a table of all types, which takes another tenth.
    """
    exchange, modules, types, type_of = interpreter._patch_lang, {}, {}, interpreter._get_np_dtype

    class Stays:
        def restore(self):
            pass

    def exchange_once(function):
        if id(function.__globals__) not in modules:
            exchange(function)
            modules[id(function.__globals__)] = function  # whose module's id nothing else gets while it is held
        return Stays()

    def type_once(type_):
        name = type_.scalar.name
        if name not in types:
            types[name] = type_of(type_)
        return types[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", exchange_once)
        patch.setattr(interpreter, "_get_np_dtype", type_once)
        listed = functools.cache(torch._export.utils._materialize_cpp_cia_ops)
        patch.setattr(torch._export.utils, "_materialize_cpp_cia_ops", listed)
        yield


@pytest.fixture(autouse=True)
def reproducible():
    """Fixed seeds, and uninitialised memory filled with NaN: an output that a kernel does not write shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def last_program_first(monkeypatch):
    """On a GPU programs run together: interpreted from last to first, none can put right what the one before it spoilt."""
    builder = interpreter.interpreter_builder
    forwards = builder.set_grid_idx

    def backwards(*index):
        forwards(*(size - 1 - i for size, i in zip(builder.grid_dim, index, strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", backwards)


@pytest.fixture
def interpreted():
    """The launcher of interpreted kernels; operators on CPU tensors run them for the length of the test."""
    with _jit.interpreted() as launcher:
        yield launcher


@pytest.fixture(params=["kernels", "cpu"])
def path(request):
    """Once through the Triton kernels, once through the CPU kernel."""
    if request.param == "cpu":
        yield None
    else:
        with _jit.interpreted() as launcher:
            yield launcher


@pytest.fixture
def no_flavour(monkeypatch):
    """Nothing outside asks for a flavour or architectures."""
    for name in ("LIGER_AOT_CUDA", "LIGER_AOT_ARCHS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model():
    """A small Llama in training."""
    from tiny import build  # here, as most tests do without transformers, which takes seconds to import

    return build()


@pytest.fixture
def plain():
    """What a step of the model gives, and a change of it would give, that nobody has bound."""
    from tiny import batch
    from tiny import build
    from tiny import step

    return step(build(), **batch())


@pytest.fixture
def record(tmp_path):
    """The file of a run on a GPU, which those write who put benchmarks/ on the path."""
    from gpu.record import Record

    return Record(tmp_path / "record.json", dry=False, arguments=[], environment={}, seconds=1000.0)
