"""A bound model under torch.compile and torch.export: whole graphs, with the operators that were asked for."""

import shutil

import pytest
import torch

import liger_aot

from binding import LAYERS
from binding import bound
from binding import check_runs_bound
from tiny import batch
from tiny import build
from tiny import check_equal
from tiny import nodes
from tiny import recorder
from tiny import step

pytestmark = pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
ONE = {"num_hidden_layers": 1}


POINTWISE = {"swiglu_fwd", "swiglu_bwd", "rope_fwd", "rope_bwd"}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("mode", ["inductor", "liger"])
def test_compiles_whole_with_pointwise_operators_as_asked(mode, family):
    model = build(family, **ONE)
    liger_aot.bind(model, compile=mode)
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=recorder(graphs))
    for _ in range(2):
        check_equal(step(compiled, **batch()), step(build(family, **ONE), **batch()))
    assert len(graphs) == 2  # one forward, one backward, and none more in the second turn
    pointwise = {name.replace("swiglu", "geglu") if family == "gemma2" else name for name in POINTWISE}
    assert "linear_cross_entropy_fwd" in nodes(graphs)
    assert nodes(graphs) & pointwise == (pointwise if mode == "liger" else set())
    if mode == "liger":
        assert {"rms_norm_fwd", "rms_norm_bwd"} <= nodes(graphs)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles for the CPU with a C++ compiler, and there is none")
@pytest.mark.parametrize("mode", ["inductor", "liger"])
def test_compiles_with_inductor(mode):
    model = build(**ONE)
    liger_aot.bind(model, compile=mode)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    check_equal(step(compiled, **batch()), step(build(**ONE), **batch()))


def test_compiled_with_dynamic_shapes_once():
    model, _ = bound(**ONE)
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=recorder(graphs))
    for length in 9, 12, 15:
        check_equal(step(compiled, **batch(2, length)), step(build(**ONE), **batch(2, length)))
    assert len(graphs) == 2


def test_compiled_before_bind_is_compiled_anew():
    model, plain = build(**ONE), step(build(**ONE), **batch())
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=recorder(graphs))
    check_equal(step(compiled, **batch()), plain)
    assert not nodes(graphs)
    liger_aot.bind(model, compile="liger")
    check_equal(step(compiled, **batch()), plain)
    assert nodes(graphs) >= LAYERS
    graphs.clear()
    liger_aot.unbind(model)
    check_equal(step(compiled, **batch()), plain)
    assert not nodes(graphs)


def test_eager_steps_after_a_compiled_one_run_the_operators():
    model, _ = bound(**ONE)
    torch._dynamo.reset()
    step(torch.compile(model, fullgraph=True, backend="eager"), **batch())
    check_runs_bound(model, step(build(**ONE), **batch()))


@pytest.mark.parametrize("first", ["compile", "bind"])
def test_compiled_in_place(first):
    model, plain = build(**ONE), step(build(**ONE), **batch())
    torch._dynamo.reset()
    acts = [lambda: model.compile(backend="eager"), lambda: liger_aot.bind(model)]
    for act in acts if first == "compile" else reversed(acts):
        act()
    check_equal(step(model, **batch()), plain)
    liger_aot.unbind(model)
    check_equal(step(model, **batch()), plain)


def test_a_compiled_wrapper_is_bound():
    torch._dynamo.reset()
    graphs = []
    wrapped = torch.compile(build(**ONE), fullgraph=True, backend=recorder(graphs))
    assert liger_aot.bind(wrapped, compile="liger").bound
    check_equal(step(wrapped, **batch()), step(build(**ONE), **batch()))
    assert "linear_cross_entropy_fwd" in nodes(graphs)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mode", ["inductor", "liger"])
def test_export_keeps_operators_as_nodes(model, strict, mode):
    liger_aot.bind(model.eval(), compile=mode)
    inputs = {"input_ids": batch()["input_ids"]}
    program = torch.export.export(model, (), inputs, strict=strict)
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("liger.rms_norm.default") == 5
    assert names.count("liger.rope.default") == 2
    assert names.count("liger.swiglu.default") == 2
    expected = build().eval()(**inputs).logits
    check_equal({"logits": program.module()(**inputs).logits}, {"logits": expected})


def test_export_of_the_loss_keeps_it_fused(model):
    liger_aot.bind(model)
    program = torch.export.export(model, (), batch(), strict=False)
    assert "liger.linear_cross_entropy.default" in {str(node.target) for node in program.graph.nodes}
    check_equal({"loss": program.module()(**batch()).loss}, {"loss": build()(**batch()).loss})
