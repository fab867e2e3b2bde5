"""The kernels run here as they are in the wheel's sources, interpreted on the CPU, through the operators."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from triton.runtime import interpreter

from liger_aot import _jit


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
