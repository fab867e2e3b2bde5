"""Programs for other machines: Inductor's own compiler, AOTInductor's packages, and graphs that hold our Triton kernels."""

import collections
import functools
import inspect
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import triton.language as tl
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch.library import wrap_triton
from transformers import LlamaConfig
from transformers import LlamaForCausalLM
from triton.runtime.jit import JITFunction

import liger_aot
from liger_aot import _jit
from liger_aot import _op
from liger_aot import export

from examples import EXAMPLES
from examples import Body
from examples import Call
from examples import Everything
from examples import bodies_of
from examples import call
from examples import example
from examples import leaves
from examples import routing

OPERATORS = pytest.mark.parametrize("name", EXAMPLES)
PUBLIC = pytest.mark.parametrize("name", _op.PUBLIC)  # those that give statistics besides, too
compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor wants a C++ compiler, and there is no g++")


class Stand(JITFunction):
    """A kernel that Triton would compile, for torch; it is interpreted where it runs."""

    cache_key = "interpreted"

    def __init__(self, kernel):
        self.kernel, self.fn, self.variants, self.parameters = kernel, kernel.fn, kernel.variants, kernel.parameters
        self.arg_names, self.params, self.__name__ = list(inspect.signature(kernel.fn).parameters), [], kernel.fn.__name__

    def run(self, *args, grid, warmup, **options):
        self.kernel[grid](*args, **{name: value for name, value in options.items() if name in self.arg_names})


@pytest.fixture
def lower(monkeypatch):
    stands = {name: Stand(kernel) for name, kernel in _jit.load().items()}
    monkeypatch.setattr(export, "sources", lambda: stands)
    return export.lower


def sizes(name, tensors):
    """The sizes that may change: those of rows, of every tensor but weights."""
    weights = {
        "layer_norm": (1, 2),
        "rms_norm": (1,),
        "fused_add_rms_norm": (2,),
        "gated_rms_norm": (2,),
        "modulated_rms_norm": (3,),
    }
    weights |= {"dyt": (1, 2, 3), "poly_norm": (1, 2), "attn_res": (1, 2), "embedding": (0,), "linear_jsd": (1, 3)}
    weights["mhc_coeffs"] = 1, 2, 3, 4, 5
    weights = weights.get(name, (1,) if "linear" in name else ())
    rows = [range(max(t.dim() - 1, 1)) if n not in weights else () for n, t in enumerate(tensors)]
    if name == "multi_token_attention":  # whose matrices are square, and whose channels its weight says
        rows = [(0, 2, 3), (), ()]
    if name.startswith("mhc"):  # the number of whose streams is fixed
        rows = [range(2) if n not in weights else () for n in range(len(tensors))]
    return tuple(dict.fromkeys(dims, torch.export.Dim.DYNAMIC) for dims in rows)


def larger(name, tensors, dynamic):
    """Three times as many rows; a routing of as many tokens."""
    more = [t.repeat([3 if n in sizes else 1 for n in range(t.dim())]) for t, sizes in zip(tensors, dynamic, strict=True)]
    if name.startswith("moe"):
        more[-2:] = routing(*more[-1].shape, experts=9)
    return tuple(more)


def kernels_of(program):
    return [node for node in program.graph.nodes if "triton_kernel_wrapper" in str(node.target)]


def liger_nodes(program):
    return [node for node in program.graph.nodes if str(node.target).startswith("liger.")]


@functools.cache
def exported(name, strict):
    """(module, its tensors, how it was exported, the program) of an operator for any number of rows, for several tests."""
    module, tensors = example(name)
    how = {"dynamic_shapes": (sizes(name, tensors),), "strict": strict}
    return module, tensors, how, torch.export.export(module, tensors, **how)


@pytest.mark.parametrize("strict", [False, True])
@PUBLIC
def test_exported_operators_are_one_node_of_any_number_of_rows(tmp_path, name, strict):
    """Through a file, which a process of another time loads."""
    module, tensors, how, program = exported(name, strict)
    (dynamic,) = how["dynamic_shapes"]
    assert [str(node.target) for node in liger_nodes(program)] == [f"liger.{name}.default"]
    torch.export.save(program, tmp_path / "program.pt2")
    program = export.load(tmp_path / "program.pt2")
    assert [str(node.target) for node in liger_nodes(program)] == [f"liger.{name}.default"]
    decomposed = program.run_decompositions()
    assert f"liger.{name.removesuffix('_stats')}_fwd.default" in {str(node.target) for node in liger_nodes(decomposed)}
    more = larger(name, tensors, dynamic)
    for got, again, want in zip(program.module()(*more), decomposed.module()(*more), module(*more), strict=True):
        assert torch.equal(got, want)
        assert torch.equal(again, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@PUBLIC
def test_lowered_graphs_hold_kernels_and_compute_the_same(lower, name, dtype):
    module, tensors = example(name, dtype)
    program = torch.export.export(module, tensors)
    assert liger_nodes(program)
    lowered = lower(program)
    assert kernels_of(lowered)
    assert not liger_nodes(lowered)
    with _jit.interpreted():
        for got, want in zip(lowered.module()(*tensors), module(*tensors), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", [n for n in EXAMPLES if not n.startswith("linear")])
def test_lowered_graphs_keep_dynamic_sizes(lower, name):
    module, tensors = example(name)
    dynamic = sizes(name, tensors)
    lowered = lower(torch.export.export(module, tensors, dynamic_shapes=(dynamic,)))
    more = larger(name, tensors, dynamic)
    with _jit.interpreted():
        for got, want in zip(lowered.module()(*more), module(*more), strict=True):
            assert torch.equal(got, want)


WITHOUT_KERNELS = "linear_cross_entropy_scale"  # one multiplication, which is torch's
PAGE = (pathlib.Path(__file__).parents[1] / "docs/export.md").read_text()
LOWERED = {row.split("`")[1]: row for row in re.findall(r"^\| `\w+` \|.*\|$", PAGE, re.M)}
INSIDE = {
    "softmax_jsd_fwd",
    "softmax_jsd_bwd",
    "softmax_kl_div_fwd",
    "softmax_kl_div_bwd",
    "logprob_fwd",
    "logprob_bwd",
    "causal_softmax_fwd",
}  # of other operators' bodies
MOVES = {*export.ALLOCATIONS, "copy", "slice_scatter"}


def made_of(program):
    """(kernels, functions of torch) that a lowered program calls; its allocations, copies and views aside."""
    kernels = {kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__ for node in kernels_of(program)}
    targets = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return kernels, {t.overloadpacket.__name__ for t in targets if not t.is_view} - MOVES


def test_the_page_lists_what_every_operator_lowers_to():
    assert LOWERED.keys() == _op.BODIES.keys() - INSIDE
    assert all(any(f"`{name}`" in row for row in LOWERED.values()) for name in INSIDE)


@OPERATORS
def test_what_an_operator_is_made_of_lowers_too(lower, name):
    """Each of the operators of a training step by itself, as programs that hold gradients do."""
    found = collections.defaultdict(lambda: (set(), set()))
    for overload, module, tensors in bodies_of(name):
        lowered = lower(torch.export.export(module, tensors))
        assert not liger_nodes(lowered)
        assert bool(kernels_of(lowered)) == (overload.name() != f"liger::{WITHOUT_KERNELS}")
        for known, more in zip(found[overload.name().removeprefix("liger::")], made_of(lowered), strict=True):
            known |= more
        with _jit.interpreted():
            got, want = lowered.module()(*tensors), module(*tensors)
        for g, w in zip(*([r] if isinstance(r, torch.Tensor) else r for r in (got, want)), strict=True):
            assert torch.equal(g, w)
    for operator, parts in found.items():
        cells = [", ".join(f"`{part}`" for part in sorted(part)) for part in parts]
        assert LOWERED[operator] == f"| `{operator}` | {cells[0]} | {cells[1]} |"


def test_distillation_lowers(lower):
    """The operator of losses that are functions alone: of which no public one has an example."""
    overload, found = torch.ops.liger.linear_distillation_fwd.default, (set(), set())
    heads = torch.randn(9, 16), torch.randn(40, 16), torch.randn(40), torch.randn(9, 24), torch.randn(40, 24), None
    for soft in ("jsd", "cosine"):
        given = *heads, torch.arange(9), soft, 0.3, 2.0, -100, 0.2, 0.8, 4, True, True, True, True, True
        module, tensors = Body(overload, given), tuple(a for a in given if isinstance(a, torch.Tensor))
        lowered = lower(torch.export.export(module, tensors))
        assert not liger_nodes(lowered)
        for known, more in zip(found, made_of(lowered), strict=True):
            known |= more
        with _jit.interpreted():
            for got, want in zip(lowered.module()(*tensors), module(*tensors), strict=True):
                assert torch.equal(got, want)
        rows = tuple({0: torch.export.Dim("rows")} if len(t) == len(heads[0]) else None for t in tensors)
        with pytest.raises(
            NotImplementedError, match="linear_distillation_fwd takes as many steps as there are chunks of rows"
        ):
            lower(torch.export.export(module, tensors, dynamic_shapes=(rows,)))
    cells = [", ".join(f"`{part}`" for part in sorted(part)) for part in found]
    assert LOWERED["linear_distillation_fwd"] == f"| `linear_distillation_fwd` | {cells[0]} | {cells[1]} |"


@pytest.mark.parametrize("name", [n for n in EXAMPLES if n.startswith("linear")])
def test_chunks_of_rows_unknown_are_refused_by_name(lower, name):
    module, tensors = example(name)
    rows = torch.export.Dim("rows", min=2, max=4096)
    sizes = tuple({0: rows} if len(t) == len(tensors[0]) else None for t in tensors)
    program = torch.export.export(module, tensors, dynamic_shapes=(sizes,))
    with pytest.raises(NotImplementedError) as error:
        lower(program)
    steps = "takes as many steps as there are chunks of rows, got a dynamic number; export with a fixed one"
    assert str(error.value) == f"lower: {name}_fwd {steps}", "and nothing of torch's"
    assert error.value.__suppress_context__


def test_load_knows_the_types_of_all_arguments():
    schemas = [getattr(torch.ops.liger, name).default._schema for name in {*_op.PUBLIC, *_op.BODIES}]
    types = {str(argument.real_type) for schema in schemas for argument in schema.arguments}
    assert {re.sub(r"^Optional\[(.*)\]$", r"\1", type_) for type_ in types} <= export.FORMS.keys()


# Operators of whole rows, of tensors of these shapes; and what a dynamic width W is refused with.
WIDTHS = {
    "rms_norm": (("3W", "W"), True),
    "layer_norm": (("3W", "W", "W"), True),
    "fused_add_rms_norm": (("3W", "3W", "W"), True),
    "gated_rms_norm": (("3W", "3W", "W"), True),
    "softmax": (("3W",), True),
    "sparsemax": (("3W",), False),
    "rope": (("123W", "123W", "13W", "13W"), True),
    "swiglu": (("3W", "3W"), False),
    "geglu": (("3W", "3W"), False),
    "packed_glu": (("3W",), False),
    "relu_squared": (("3W",), False),
    "dyt": (("3W", "1", "W", "W"), False),
    "poly_norm": (("3W", "3", "1"), False),
    "modulated_rms_norm": (("3W", "W", "W", "W"), False),
    "attn_res": (("23W", "W", "W"), True),
    "kl_div": (("3W", "3W"), False),
    "jsd": (("3W", "3W"), False),
    "tvd": (("3W", "3W"), False),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_dynamic_widths_are_served_or_refused_by_name(lower, name):
    """A tile of the width while tracing would leave the columns beyond it unwritten."""
    forms, refused = WIDTHS[name]
    tensors, wider = (
        tuple(torch.randn([width if c == "W" else int(c) for c in form]) for form in forms) for width in (64, 2500)
    )
    if name in ("kl_div", "jsd", "tvd"):
        tensors, wider = (tuple(t.log_softmax(-1) for t in ts) for ts in (tensors, wider))
    half = torch.export.Dim("half", min=8, max=4500)
    sizes = tuple({n: 2 * half for n, c in enumerate(form) if c == "W"} for form in forms)
    program = torch.export.export(Call(name, tensors, {}), tensors, dynamic_shapes=(sizes,))
    if refused:
        with pytest.raises(
            NotImplementedError, match=f"lower: {name}_fwd takes a tile .* dynamic last dimension; export with a"
        ):
            lower(program)
        return
    lowered = lower(program)
    with _jit.interpreted():
        for got, want in zip(lowered.module()(*wider), Call(name, wider, {})(*wider), strict=True):
            assert torch.equal(got, want)


def test_a_backward_that_takes_a_tile_is_refused_by_name(lower):
    x, scale, rstd = torch.randn(3, 64), torch.randn(64), torch.rand(3)
    width = torch.export.Dim("width", min=8, max=4500)

    class Backward(torch.nn.Module):
        def forward(self, dy, x, scale, rstd):
            return torch.ops.liger.modulated_rms_norm_bwd(dy, x, scale, None, rstd, 0.0, False, False, True, True)

    sizes = {1: width}, {1: width}, {0: width}, None
    program = torch.export.export(Backward(), (x, x, scale, rstd), dynamic_shapes=sizes)
    with pytest.raises(NotImplementedError, match=r"lower: modulated_rms_norm_bwd takes a tile .* dynamic last dimension"):
        lower(program)


def test_columns_that_rope_does_not_turn_may_be_any_number(lower):
    angles = [torch.randn(3, 16) for _ in range(2)]
    q, wider = ([torch.randn(1, 2, 3, n) for _ in range(2)] for n in (32, 300))
    width, given = torch.export.Dim("width", min=17), (*q, *angles)
    program = torch.export.export(Call("rope", given, {}), given, dynamic_shapes=(({3: width}, {3: width}, None, None),))
    lowered = lower(program)
    with _jit.interpreted():
        for got, want in zip(lowered.module()(*wider, *angles), liger_aot.rope(*wider, *angles), strict=True):
            assert torch.equal(got, want)


def test_a_bound_model_lowers_whole(lower):
    model = tiny_llama()
    ids = torch.randint(97, (2, 7))
    program = torch.export.export(Logits(model), (ids,))
    lowered = lower(program)
    assert len(kernels_of(lowered)) == len(liger_nodes(program)) == 5
    assert not liger_nodes(lowered)
    with _jit.interpreted():
        # Decompositions, such as those of attention, sum in another order.
        torch.testing.assert_close(lowered.module()(ids), Logits(model)(ids))


def test_what_is_no_program_is_refused():
    with pytest.raises(
        ValueError, match=r"lower: program must be a torch\.export\.ExportedProgram, got Linear; export it first"
    ):
        export.lower(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("count", [0, -1, 132.0, True, "132", None])
def test_a_number_of_multiprocessors_that_is_none_is_refused(lower, count):
    module, tensors = example("swiglu")
    program = torch.export.export(module, tensors)
    with pytest.raises(ValueError, match=r"lower: multiprocessors must be an integer of at least 1, got"):
        lower(program, multiprocessors=count)


def grids(program):
    return {node.kwargs["grid"][0][0] for node in kernels_of(program)}


@JITFunction  # whatever Triton does in this process
def double(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, 2 * tl.load(x + at, at < n), at < n)


class Doubled(torch.nn.Module):
    def forward(self, x):
        y = torch.ops.liger.softmax(x) + 1
        wrap_triton(double)[(1,)](y, y.numel(), BLOCK=64)
        return y


def test_a_kernel_that_the_program_brought_still_writes_in_place(lower):
    lowered = lower(torch.export.export(Doubled(), (torch.ones(3, 8),)))
    assert [export.is_ours(node) for node in kernels_of(lowered)] == [True, False]
    *_, launch, result = (node for node in lowered.graph.nodes if node.op == "call_function")
    assert launch.kwargs["tensors_to_clone"] == ["x"]
    (out,) = lowered.graph.output_node().args[0]
    assert out is result
    assert result.args == (launch, "x")


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "dyt", "poly_norm"])
def test_backward_takes_as_many_programs_as_the_device_has_room_for(lower, name):
    """Where the number of rows is known; else one, as docs/export.md says: no more could be counted."""
    ((_, module, tensors),) = [found for found in bodies_of(name) if found[0].name() == f"liger::{name}_bwd"]
    of_rows = [len(t) in (3, 12) for t in tensors]  # which are 3 by 4
    tensors = tuple(t.repeat(100, *[1] * (t.dim() - 1)) if many else t for t, many in zip(tensors, of_rows, strict=True))
    rows = tuple({0: torch.export.Dim.DYNAMIC} if many else None for many in of_rows)
    fixed, dynamic = (torch.export.export(module, tensors, dynamic_shapes=shapes) for shapes in (None, (rows,)))
    few, more, one = lower(fixed, multiprocessors=2), lower(fixed, multiprocessors=3), lower(dynamic)
    assert 2 * max(grids(more)) == 3 * max(grids(few))
    assert 1 in grids(one)


class Either(torch.nn.Module):
    """Operators in the two ways of a condition."""

    def forward(self, x):
        return torch.cond(x.sum() > 0, torch.ops.liger.softmax, torch.ops.liger.relu_squared, (x,))


def test_operators_of_conditions_lower(lower):
    program = torch.export.export(Either(), (torch.ones(3, 24),))
    lowered = lower(program)
    found = {str(node.target) for node in export.nodes(lowered)}
    assert "triton_kernel_wrapper_functional" in found
    assert not {name for name in found if name.startswith("liger.")}
    with _jit.interpreted():
        for x in (torch.rand(3, 24), -torch.rand(3, 24)):
            assert torch.equal(lowered.module()(x), Either()(x))


def test_what_inductor_writes_of_the_kernels_is_these_kernels():
    """On the machine with a GPU it compiles files of its own, not ours: each kernel there is the same to Triton, and whole."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    script = pathlib.Path(__file__).with_name("lowered.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert set(said["kernels"]) == said["tried"].keys() == _jit.load().keys()


def test_lowering_takes_the_kernels_of_the_package():
    """In a process of its own, in which Triton compiles."""
    script = """
        import torch, liger_aot
        from liger_aot import export
        class Module(torch.nn.Module):
            def forward(self, gate, up):
                return liger_aot.swiglu(gate, up)
        program = export.lower(torch.export.export(Module(), (torch.randn(2, 8), torch.randn(2, 8))))
        nodes = [node for node in program.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        print(len(nodes), type(export.sources()["swiglu_fwd"]).__name__, nodes[0].kwargs["tensors_to_clone"])
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "1 JITFunction ['y']"
    assert "Traceback" not in done.stderr, "that torch cannot ask Triton what a kernel writes is no news"


def tiny_llama():
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, use_cache=False))
    liger_aot.bind(model)
    return model.eval()


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).logits


@compiles
def test_aot_inductor_packages_answer_as_eager(tmp_path):
    model, ids = Logits(tiny_llama()), torch.randint(97, (2, 7))
    program = torch.export.export(model, (ids,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "llama.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(ids), model(ids))


LOAD = """
import sys, torch
from liger_aot import export
package, inputs, outputs = sys.argv[1:]
torch.save(export.load(package)(torch.load(inputs)), outputs)
"""


@compiles
def test_a_package_of_every_operator_answers_in_another_process(tmp_path):
    """For other numbers of rows than it was made with."""
    modules, inputs = ({name: found[n] for name, found in {n: example(n) for n in _op.PUBLIC}.items()} for n in range(2))
    dynamic = {name: sizes(name, inputs[name]) for name in inputs}
    program = torch.export.export(Everything(modules), (inputs,), dynamic_shapes=(dynamic,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "all.pt2"))
    more = {name: larger(name, inputs[name], dynamic[name]) for name in inputs}
    torch.save(more, tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-c", LOAD, package, tmp_path / "inputs.pt", tmp_path / "outputs.pt"], check=True)
    got, want = torch.load(tmp_path / "outputs.pt"), Everything(modules)(more)
    assert got.keys() == want.keys() == set(_op.PUBLIC)
    for name in want:
        for g, w in zip(got[name], want[name], strict=True):
            torch.testing.assert_close(g, w)


@compiles
@pytest.mark.parametrize("dynamic", [False, True])
@torch._dynamo.config.patch(error_on_recompile=True)
@torch.fx.experimental._config.patch(use_duck_shape=False)  # sizes that are equal here need not stay so: 3 rows, 3 weights
def test_inductor_compiles_every_operator_with_its_gradients(dynamic):
    examples = {name: EXAMPLES[name.removesuffix("_stats")](torch.float32) for name in _op.PUBLIC}
    inputs = {name: leaves(arguments) for name, (arguments, _) in examples.items()}

    def everything(inputs):
        outputs = [call(name, inputs[name], options) for name, (_, options) in examples.items()]
        return [output for found in outputs for output in found]

    def gradients(function, inputs):
        wanted = [a for arguments in inputs.values() for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        outputs = function(inputs)  # of which statistics have no gradients
        return [*outputs, *torch.autograd.grad([o.float().sum() for o in outputs if o.requires_grad], wanted)]

    def of_rows(change):
        """The inputs, each a tensor of its own: a view is guarded by what it is a view of."""
        for name, arguments in inputs.items():
            tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
            new = iter([t.detach().clone() for t in change(name, tensors, sizes(name, tensors))])
            yield name, [next(new).requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in arguments]

    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic)
    for change in [lambda name, tensors, _: tensors, larger][: 1 + dynamic]:
        given = dict(of_rows(change))
        for got, want in zip(gradients(compiled, given), gradients(everything, given), strict=True):
            torch.testing.assert_close(got, want)
