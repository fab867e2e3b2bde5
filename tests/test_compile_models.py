"""Whole bound models, compiled and exported: each equals the plain model in eager execution.

Inductor and AOTInductor take minutes for all of them (pytest -m slow); what Dynamo and AOTAutograd make of them does not.
"""

import shutil

import pytest
import torch

import liger_aot
from liger_aot import export

from tiny import DECODER
from tiny import MODELS
from tiny import batch
from tiny import build
from tiny import check_equal
from tiny import nodes
from tiny import recorder
from tiny import step

ONE = {"num_hidden_layers": 1}
# Dynamo cannot enter the lock by which transformers collects router logits; the plain model compiles without them alone too.
FAMILIES = {"llama": ONE, "qwen3": ONE, "gemma2": ONE, "mixtral": ONE | {"output_router_logits": False}}
SIZES = {False: [(2, 11)], True: [(2, 11), (3, 14)]}  # dynamic or not -> rows and lengths of batches
EVERY = pytest.mark.parametrize("family", FAMILIES)
DYNAMIC = pytest.mark.parametrize("dynamic", [False, True])
compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor wants a C++ compiler, and there is no g++")


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setitem(MODELS, "qwen3", ("Qwen3Config", "Qwen3ForCausalLM", DECODER | {"head_dim": 8}))
    torch._dynamo.reset()


def check_compiled(family, dynamic, mode, **options):
    model = build(family, **FAMILIES[family])
    liger_aot.bind(model, compile=mode)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, **options)
    for size in SIZES[dynamic]:
        check_equal(step(compiled, **batch(*size)), step(build(family, **FAMILIES[family]), **batch(*size)))


@EVERY
@pytest.mark.parametrize("mode", ["inductor", "liger"])
def test_compiles_whole_with_the_loss_inside(family, mode):
    graphs = []
    check_compiled(family, False, mode, backend=recorder(graphs))
    assert len(graphs) == 2  # forward and backward
    assert "linear_cross_entropy_fwd" in nodes(graphs)
    assert ("rms_norm_bwd" in nodes(graphs)) == (mode == "liger")


@pytest.mark.slow
@compiles
@DYNAMIC
@EVERY
def test_inductor_trains_as_plain(family, dynamic):
    check_compiled(family, dynamic, "inductor")


@pytest.mark.slow
@compiles
@EVERY
def test_inductor_trains_as_plain_with_every_operator(family):
    check_compiled(family, True, "liger")


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).logits


def for_inference(family, dynamic):
    """(the plain model, the program of the bound one)."""
    plain, model = (build(family, **FAMILIES[family]).eval() for _ in "pb")
    liger_aot.bind(model)
    sizes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},) if dynamic else None
    return plain, torch.export.export(Logits(model), (batch()["input_ids"],), dynamic_shapes=sizes)


@EVERY
@DYNAMIC
def test_exported_for_inference(tmp_path, family, dynamic):
    """By way of a file."""
    plain, program = for_inference(family, dynamic)
    torch.export.save(program, tmp_path / "model.pt2")
    program = export.load(tmp_path / "model.pt2")
    operators = {str(node.target) for node in program.graph.nodes}
    assert {"liger.rms_norm.default", "liger.rope.default"} <= operators
    for size in SIZES[dynamic]:
        ids = batch(*size)["input_ids"]
        check_equal({"logits": program.module()(ids)}, {"logits": plain(input_ids=ids).logits})


@pytest.mark.slow
@compiles
@DYNAMIC
@EVERY
def test_packages_of_aot_inductor_answer_as_eager(tmp_path, family, dynamic):
    plain, program = for_inference(family, dynamic)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = export.load(path)
    for size in SIZES[dynamic]:
        ids = batch(*size)["input_ids"]
        check_equal({"logits": loaded(ids)}, {"logits": plain(input_ids=ids).logits})
