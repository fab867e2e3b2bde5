"""The demo, with a few steps of a tiny model."""

import json
import re
import sys
from functools import partial

import pytest

import liger_aot
from liger_aot import _demo
from liger_aot.__main__ import main
from liger_aot.ops.swiglu import SwiGLUFunction


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(_demo, "SIZE", {**_demo.TINY, "vocab_size": 500})
    monkeypatch.setattr(_demo, "BATCH", 2)
    monkeypatch.setattr(_demo, "LENGTH", 32)


def test_passes_and_leaves_a_picture_and_numbers(tmp_path, capsys):
    assert main(["demo", "--steps", "3", "--device", "cpu", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "CPU reference: no speed claim" in text
    assert re.search(r"bound +linear_cross_entropy +1 x Linear +lm_head", text)
    assert text.splitlines()[-1].startswith("PASS")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "demo.json").read_text())
    assert len(numbers["curves"]["bound"]) == 3
    assert numbers["memory"]["plain"] > 0
    launched = set(numbers["interpreted"]["launched"])
    assert {
        "rms_norm_fwd",
        "rms_norm_bwd",
        "rope",
        "swiglu_fwd",
        "swiglu_bwd",
        "cross_entropy_fwd",
        "cross_entropy_bwd",
    } <= launched


@pytest.mark.parametrize("fault", [lambda y: y * 1.0001, lambda y: y.detach() + 0 * y], ids=["values", "gradients"])
def test_fails_where_an_operator_is_wrong(fault, tmp_path, capsys, monkeypatch):
    def bind(model):
        """The fault comes after bind, which would have seen it."""
        report = liger_aot.bind(model)
        monkeypatch.setattr(SwiGLUFunction, "apply", lambda *given: fault(apply(*given)))
        return report

    apply = SwiGLUFunction.apply
    monkeypatch.setattr(_demo, "bind", bind)
    monkeypatch.setattr(_demo, "run_interpreted", lambda: {"missing": "want of Triton"})
    assert main(["demo", "--steps", "2", "--device", "cpu", "--out", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "TOO FAR" in text
    assert "not run: one step through the kernels as Triton interprets them, for want of Triton" in text
    assert text.splitlines()[-1].startswith("FAIL")


def test_without_matplotlib_says_so(tmp_path, capsys, monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'matplotlib'")

    monkeypatch.setattr(_demo, "draw", missing)
    monkeypatch.setattr(_demo, "run_interpreted", lambda: {"missing": "want of Triton"})
    assert main(["demo", "--steps", "1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "No picture, for No module named 'matplotlib': pip install liger-aot[plots]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--steps", "0"], "demo: --steps must be at least 1, got 0"),
        (["--device", "cud"], "demo: --device must be cpu, or cuda where torch finds a device, got cud"),
    ],
    ids=["steps", "device"],
)
def test_rejects(arguments, text, capsys):
    assert main(["demo", *arguments]) == 1
    assert text in capsys.readouterr().err


def test_without_transformers_says_so(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["demo", "--device", "cpu"]) == 1
    assert "demo: needs transformers: pip install liger-aot[transformers]" in capsys.readouterr().err


def test_without_source_text_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(_demo.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match="demo: needs the standard library's source files as text, found none in"):
        _demo.corpus(500)


def test_memory_is_counted_alike_in_any_order():
    ids = _demo.torch.randint(500, (16, 256))
    counts = []
    for order in (False, True), (True, False):
        for bound in order:
            model = _demo.new_model(_demo.SIZE, "cpu")
            if bound:
                liger_aot.bind(model)
            counts.append((bound, _demo.peak_memory(partial(_demo.step_and_forget, model, ids), "cpu")))
    assert counts[:2] == counts[:1:-1]
    (_, plain), (_, bound) = counts[:2]
    assert 4 * sum(p.numel() for p in model.parameters()) < bound < plain
