"""Graphs that leave this machine, CUDA graphs, checkpointing, files of other versions, the command line as scripts use it."""

import errno
import functools
import io
import json
import re
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch
from test_export import OPERATORS
from test_export import PUBLIC
from test_export import Logits
from test_export import exported
from test_export import tiny_llama
from test_operators import SCHEMAS
from test_runtime import packs  # noqa: F401 (a fixture)
from test_runtime import sum_up
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.passes import move_to_device_pass
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import liger_aot
from liger_aot import _op
from liger_aot import _runtime
from liger_aot import export
from liger_aot.__main__ import main

from examples import EXAMPLES
from examples import bodies_of
from examples import call
from examples import example
from examples import leaves
from stub import copy_pack
from stub import stubbed
from tiny import nodes
from tiny import operators
from tiny import recorder

# --- a graph exported without a GPU runs on one


def on(device, tensors):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=device) for t in tensors)


def fixed_sizes(name):
    module, tensors = example(name)
    return module, tensors, {}, torch.export.export(module, tensors)


HOW = {
    "fixed": fixed_sizes,
    "any rows": lambda name: exported(name, False),
    "any rows, strict": lambda name: exported(name, True),
}


@pytest.mark.parametrize("how", HOW)
@PUBLIC
def test_a_graph_exported_on_the_cpu_is_the_graph_exported_on_cuda(name, how):
    """Node by node, with the same guards; and it gives tensors on cuda for tensors there. One of the three decomposed, too."""
    module, tensors, options, ours = HOW[how](name)
    with FakeTensorMode(shape_env=ShapeEnv()):
        there = torch.export.export(module, on("cuda", tensors), **options)
    bounds = [sorted(map(str, program.range_constraints.values())) for program in (there, ours)]
    assert bounds[0] == bounds[1], "of symbols, whose names are others where sizes are equal"
    assert there._guards_code == ours._guards_code
    for decompose in (False, True) if how == "any rows" else (False,):
        if decompose:
            ours, there = ours.run_decompositions(), there.run_decompositions()
        assert str(there.graph) == str(ours.graph)
        assert "cpu" not in str(ours.graph)
        assert not ours.constants
        with FakeTensorMode(shape_env=ShapeEnv()):
            results = ours.module()(*on("cuda", tensors))
        assert {r.device.type for r in results} == {"cuda"}


def test_a_bound_model_exported_on_the_cpu_moves_as_torch_moves_programs():
    """To another device that a machine without a GPU has."""
    program = torch.export.export(Logits(tiny_llama()), (torch.zeros(2, 7, dtype=torch.int64),))
    before = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("liger.")]
    moved = move_to_device_pass(program, "meta")
    assert [str(node.target) for node in moved.graph.nodes if str(node.target).startswith("liger.")] == before
    assert all("cpu" not in f"{node.args} {node.kwargs}" for node in moved.graph.nodes)
    assert moved.module()(torch.zeros(2, 7, dtype=torch.int64, device="meta")).device.type == "meta"


# --- CUDA graphs


class Where(TorchDispatchMode):
    """What devices the results of all operations inside are on."""

    def __init__(self):
        super().__init__()
        self.devices = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **kwargs or {})
        self.devices |= {r.device.type for r in torch.utils._pytree.tree_leaves(results) if isinstance(r, torch.Tensor)}
        return results


@OPERATORS
def test_bodies_look_at_no_number_and_make_no_tensor_elsewhere(name):
    """Neither waits for the device: on tensors that are shapes alone a look at a number is an error."""
    for overload, body, tensors in bodies_of(name):
        given = dict(zip(body.places, (t.to("meta") for t in tensors), strict=True))
        with Where() as where:
            _op.BODIES[overload.name().removeprefix("liger::")](*(given.get(n, a) for n, a in enumerate(body.others)))
        assert where.devices == {"meta"}


@OPERATORS
def test_after_preload_a_capture_sees_launches_alone(name):
    """No module is loaded, nothing is asked of the driver, no memory is had but from torch."""
    arguments, options = EXAMPLES[name](torch.bfloat16)
    arguments = leaves(arguments)
    with stubbed() as stub:
        liger_aot.preload()
        stub.calls.clear()
        stub.capturing, stub.thread.mode = True, 0
        outputs = call(name, arguments, options)
        wanted = [a for a in arguments if torch.is_tensor(a) and a.requires_grad]
        torch.autograd.grad([o.sum() for o in outputs], wanted)
    assert {function for function, _ in stub.calls} == {"cuLaunchKernel"}
    assert len(stub.launches) == len(stub.calls) > 1
    assert {launch.stream for launch in stub.launches} == {stub.stream}


# --- activation checkpointing, selected by operator


def stepped(name, saved, function):
    """The gradients of a step in which the results of these operators are saved, the others' made anew."""
    arguments, options = EXAMPLES[name](torch.float32)
    arguments = leaves(arguments)
    contexts = functools.partial(create_selective_checkpoint_contexts, saved)

    def step(*given):
        return checkpoint(lambda *a: tuple(call(name, a, options)), *given, use_reentrant=False, context_fn=contexts)

    wanted = [a for a in arguments if torch.is_tensor(a) and a.requires_grad]
    return torch.autograd.grad([o.sum() for o in function(step)(*arguments)], wanted)


@OPERATORS
def test_selective_checkpointing_by_name(path, name):
    forward = getattr(torch.ops.liger, f"{name}_fwd").default
    found = []
    for saved in ([forward], []):
        torch.manual_seed(0)
        with operators() as seen:
            found.append(stepped(name, saved, lambda step: step))
        assert seen.count(f"{name}_fwd") == (1 if saved else 2)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# What these compute is no part of their gradients: there is nothing to make anew.
AS_THEY_COME = "rope", "swiglu", "geglu", "packed_glu", "moe_permute", "moe_unpermute", "relu_squared", "dyt", "embedding"
AS_THEY_COME += "mhc_pre", "mhc_post_res"


@pytest.mark.parametrize("name", [n for n in EXAMPLES if n not in AS_THEY_COME])
def test_selective_checkpointing_in_compiled_graphs(name):
    forward = getattr(torch.ops.liger, f"{name}_fwd").default
    for saved in ([forward], []):
        torch._dynamo.reset()
        graphs = []
        stepped(name, saved, functools.partial(torch.compile, fullgraph=True, backend=recorder(graphs)))
        first, second = (f"{name}_fwd" in nodes([graph]) for graph in graphs)
        assert (first, second) == (True, not saved)


# --- files of other versions


OTHER = """
import sys, torch
library = torch.library.Library("liger", "DEF")
def define(schema, function):
    name = schema.split("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"liger::{name}", function, lib=library)
    return getattr(torch.ops.liger, name).default
def like(x, *_, **__):
    return torch.empty_like(x)
renamed = define("swiglu(Tensor gate, Tensor up, *, float alpha=1.) -> Tensor", like)
gone = define("rms_normal(Tensor x) -> Tensor", like)
fewer = define("rope_fwd(Tensor q, Tensor k) -> (Tensor, Tensor)", lambda q, k: (like(q), like(k)))
results = define("geglu(Tensor gate, Tensor up) -> (Tensor, Tensor)", lambda gate, up: (like(gate), like(up)))
before = define("rms_norm(Tensor x, float? eps=None) -> Tensor", like)
type_ = define("softmax(Tensor x, str dim='last') -> Tensor", like)
calls = {
    "renamed": lambda x: renamed(x, x, alpha=3.0), "gone": gone,
    "fewer": lambda x: fewer(x, x), "results": lambda x: results(x, x),
    "before": lambda x: before(x, 1e-6), "type": lambda x: type_(x, "first"),
    "within": lambda x: torch.cond(x.sum() > 0, lambda x: gone(x), lambda x: x + 1, (x,)),
}
for name, call in calls.items():
    class Module(torch.nn.Module):
        def forward(self, x):
            return call(x)
    torch.export.save(torch.export.export(Module(), (torch.ones(2, 8),)), f"{sys.argv[1]}/{name}.pt2")
"""
WHY = {
    "renamed": r"liger::swiglu\(gate, up, alpha\) with 1 results, which this version has as liger::swiglu\(Tensor gate, ",
    "gone": r"liger::rms_normal\(x\), which this version does not have",
    "fewer": r"liger::rope_fwd\(q, k\) with 2 results, which this version has as liger::rope_fwd\(Tensor q, .* Tensor cos",
    "results": r"liger::geglu\(gate, up\) with 2 results, which this version has as liger::geglu\(.*\) -> Tensor",
    "within": r"liger::rms_normal\(x\), which this version does not have",
    "before": r"liger::rms_norm\(x, eps\) with 1 results, which this version has as liger::rms_norm\(Tensor x, Tensor\? weight",
    "type": r"liger::softmax\(tensor x, string dim\) with 1 results, which this version has as liger::softmax\(Tensor x, Sym",
}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Programs that a version with other operators exported."""
    folder = tmp_path_factory.mktemp("others")
    subprocess.run([sys.executable, "-c", OTHER, folder], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("case", WHY)
def test_programs_of_another_version_are_refused_by_operator(others, case):
    path = others / f"{case}.pt2"
    with pytest.raises(RuntimeError, match=WHY[case]) as error:
        export.load(path)
    assert str(error.value).startswith(f"load: {path} was made with another version of liger-aot:\n")
    remedy = f"export the program again with this version, {liger_aot.__version__}, or install the one that it was made with"
    assert str(error.value).endswith(f"\nRemedy: {remedy}")


def test_packages_of_another_version_are_refused_by_operator(tmp_path):
    """In the form that AOTInductor writes for operators that it calls."""
    inputs = [{"name": name, "arg": {"as_tensor": {}}, "kind": 1} for name in ("gate", "up")]
    node = {"target": "liger::swiglu_fwd", "inputs": inputs, "outputs": [{}]}
    path = tmp_path / "package.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/data/aotinductor/model/c1.wrapper.json", json.dumps({"nodes": [{"name": "b", "node": node}]}))
    with pytest.raises(RuntimeError, match=r"liger::swiglu_fwd\(gate, up\) with 1 results, which this version has as"):
        export.load(path)


def saved(path, change=lambda schemas: None):
    """A file of export.save, in which another version wrote down other schemas."""
    export.save(torch.export.export(*example("softmax")), first := path.with_suffix(".first"))
    with zipfile.ZipFile(first) as archive, zipfile.ZipFile(path, "w") as copy:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith("/extra/liger_aot.json"):
                change(schemas := json.loads(data))
                data = json.dumps(schemas)
            copy.writestr(name, data)
    return path


OTHER_SCHEMAS = {
    "default": (
        {"softmax": "liger::softmax(Tensor x, SymInt dim=0) -> Tensor"},
        r"liger::softmax\(Tensor x, SymInt dim=0\) -> Tensor, which this version has as liger::softmax\(.* dim=-1\)",
    ),
    "gone": (
        {"rms_normal": "liger::rms_normal(Tensor x) -> Tensor"},
        r"liger::rms_normal\(Tensor x\) -> Tensor, which this version does not have",
    ),
}


@pytest.mark.parametrize("case", OTHER_SCHEMAS)
def test_programs_are_held_to_the_schemas_that_they_were_saved_with(tmp_path, case):
    """A default is in no graph: of a file that torch.export.save wrote nobody can say what it was."""
    schemas, text = OTHER_SCHEMAS[case]
    path = saved(tmp_path / "program.pt2", lambda known: known.update(schemas))
    with pytest.raises(RuntimeError, match=text):
        export.load(path)


def test_what_save_writes_down_is_what_load_takes(tmp_path):
    found = {}
    path = saved(tmp_path / "program.pt2", found.update)
    assert found == {"softmax": str(torch.ops.liger.softmax.default._schema)}
    x = torch.randn(3, 4, 24)
    assert torch.equal(export.load(path).module()(x)[0], torch.ops.liger.softmax(x))
    before = {"rms_norm": "liger::rms_norm(Tensor x, Tensor? weight=None, float? eps=None) -> Tensor"}
    export.load(saved(tmp_path / "older.pt2", lambda known: known.update(before)))  # arguments were appended since
    with pytest.raises(
        ValueError, match=r"save: program must be a torch\.export\.ExportedProgram, got Linear; export it first"
    ):
        export.save(torch.nn.Linear(2, 2), path)


def test_the_version_that_saved_a_program_is_named(tmp_path):
    path = saved(tmp_path / "program.pt2", lambda known: known.update(gone="liger::gone(Tensor x) -> Tensor"))
    with pytest.raises(RuntimeError, match=rf"that it was made with, liger-aot {re.escape(liger_aot.__version__)}$"):
        export.load(path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(before := tmp_path / "before.pt2", "w") as copy:
        for name in archive.namelist():
            if not name.endswith(f"/extra/{export.VERSION}"):
                copy.writestr(name, archive.read(name))
    with pytest.raises(RuntimeError, match=r"liger::gone.*\nRemedy: .* that it was made with$"):
        export.load(before)


def test_a_program_that_cannot_be_saved_replaces_nothing(tmp_path, monkeypatch):
    path = saved(tmp_path / "program.pt2", lambda known: None)
    before = path.read_bytes()
    module, tensors = example("softmax")
    lowered = torch.export.export(module, tensors)
    monkeypatch.setattr(export, "triton_kernel_wrapper_functional", torch.ops.liger.softmax.default)
    with pytest.raises(ValueError, match=r"save: program must hold no Triton kernels, .*, got a lowered one; save it"):
        export.save(lowered, path)
    monkeypatch.undo()

    def fail(program, path, **options):
        path.write_bytes(b"half")
        raise OSError("no space left on the device")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        export.save(lowered, path)
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "program.first"}


def test_torchs_options_of_save_and_load_are_passed_on(tmp_path):
    module, tensors = example("softmax")
    export.save(torch.export.export(module, tensors), path := tmp_path / "program.pt2", extra_files={"notes.txt": "by us"})
    export.load(path, extra_files=(files := {"notes.txt": ""}))
    assert (files["notes.txt"], files[export.VERSION]) == ("by us", liger_aot.__version__)


def test_a_program_goes_through_memory():
    """As save leaves the buffer: at its end."""
    buffer, (module, tensors) = io.BytesIO(), example("softmax")
    export.save(torch.export.export(module, tensors), buffer)
    assert torch.equal(export.load(buffer).module()(*tensors)[0], module(*tensors)[0])


@pytest.mark.parametrize("place", ["weights/weight_0", "model.json"])
def test_a_program_with_one_wrong_bit_is_refused(tmp_path, place):
    """torch does not look at the checksums of weights: it would compute with others."""
    program, path = torch.export.export(torch.nn.Linear(64, 64), (torch.randn(2, 64),)), tmp_path / "program.pt2"
    export.save(program, path)
    with zipfile.ZipFile(path) as archive:
        (info,) = (i for i in archive.infolist() if i.filename.endswith(place))
    data = bytearray(path.read_bytes())
    data[info.header_offset + 200 + info.file_size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"program\.pt2 must be a whole .*, got one of which \S*{place} is damaged; copy it"):
        export.load(path)


def test_files_that_are_no_whole_programs_are_refused(tmp_path):
    whole, weights, path = io.BytesIO(), io.BytesIO(), tmp_path / "program.pt2"
    torch.export.save(torch.export.export(*example("rms_norm")), whole)
    torch.save({}, weights)
    data = whole.getvalue()
    for wrong in (data[:-100], data[:1000], data.replace(b"torch.ops.liger", b"torch.ops.tiger"), weights.getvalue(), b""):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"program\.pt2 must be a whole \.pt2 file of torch\.export\.save or AOTInductor"):
            export.load(path)


def test_the_committed_schemas_are_of_every_operator_in_the_namespace():
    registered = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("liger::")}
    assert registered == {line.split("(")[0] for line in SCHEMAS.read_text().splitlines()}


def test_lowering_without_triton_or_with_its_interpreter_is_refused():
    script = """
        import sys
        sys.modules["triton"] = None
        import torch
        from liger_aot import export
        program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
        export.lower(program)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.stderr.endswith("RuntimeError: lower: needs Triton, which is missing: pip install triton\n")
    text = "lower: Triton interprets kernels in this process; unset TRITON_INTERPRET and start it again"
    with pytest.raises(RuntimeError, match=text):
        export.lower(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)))


def test_modules_of_other_people_keep_their_names(monkeypatch):
    """The kernel files are called rope.py and so on: a program may have a rope.py of its own, before or after."""
    monkeypatch.setitem(sys.modules, "rope", theirs := object())
    before = set(sys.modules)
    assert {"rope", "swiglu_bwd"} <= export.load_sources().keys()
    assert sys.modules["rope"] is theirs
    assert set(sys.modules) == before


# --- packs that cannot be had


def test_a_cubin_that_the_driver_refuses_is_named():
    with stubbed() as stub:
        stub.failures["cuLibraryLoadData"].append(200)
        text = (
            r"liger_aot: column_sum-\S+\.cubin of \S+/sm_90\.zip was not loaded: cuLibraryLoadData: device kernel image is "
            r"invalid \(CUDA driver error 200\); whether the pack is whole says python -m liger_aot verify"
        )
        with pytest.raises(RuntimeError, match=text):
            sum_up()
        assert not stub.launches
        sum_up()
    assert len(stub.launches) == 1


def test_a_pack_that_went_away_is_named_and_serves_when_it_is_back(packs):  # noqa: F811
    path = copy_pack(packs)
    data = path.read_bytes()
    assert _runtime.pack_paths()["90"] == path
    path.unlink()
    with stubbed() as stub:
        with pytest.raises(RuntimeError, match=r"its directory of \S+/sm_90\.zip cannot be read \(.*No such file.*\); let"):
            sum_up()
        path.write_bytes(data)
        sum_up()
    assert len(stub.launches) == 1


def test_a_pack_that_was_replaced_on_a_shared_file_system_is_named(packs, monkeypatch):  # noqa: F811
    copy_pack(packs)

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    with stubbed() as stub:
        sum_up()
        with monkeypatch.context() as broken:
            broken.setattr(zipfile.ZipFile, "read", stale)
            with pytest.raises(RuntimeError, match=r"-any\.cubin of \S+ cannot be read \(.*Stale.*or start the process again"):
                sum_up(n=65)
        sum_up(n=65)
    assert len(stub.launches) == 2


# --- the command line


def test_explain_takes_shapes_of_any_size(capsys):
    """Nothing of that size is allocated or computed."""
    shapes = ["4096x4096", "262144x4096", "4096:int64"]
    assert main(["explain", "linear_cross_entropy", *shapes, "--arch", "90", "--backward", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert {launch["kernel"] for launch in known["launches"]} == {
        "cross_entropy_fwd",
        "cross_entropy_bwd",
        "cross_entropy_reduce",
    }
    assert all(launch["cubin"].endswith("-aligned.cubin") for launch in known["launches"])
    assert known["packs"]["90"] == "exact"
    assert [row["cubin"] for row in known["candidates"] if row["rejected"] is None] == [n["cubin"] for n in known["launches"]]


def test_explain_takes_a_gpus_chunks(capsys):
    """Of 1024 rows where a CPU's are of 128."""
    assert main(["explain", "linear_cross_entropy", "2048x64", "256x64", "2048:int64", "--arch", "90", "--json"]) == 0
    launches = [launch["kernel"] for launch in json.loads(capsys.readouterr().out)["launches"]]
    assert launches == ["cross_entropy_fwd"] * 2 + ["cross_entropy_reduce"]


@pytest.mark.parametrize(
    ("line", "kernels"),
    [
        ("rope 1x4x8x64 1x2x8x64 1x8x64 1x8x64", ["rope", "rope"]),
        (
            "cross_entropy 8x64 8:int64 64:float32 --set loss_dtype=float32 softcap=None label_smoothing=0",
            ["cross_entropy_fwd", "cross_entropy_reduce", "cross_entropy_bwd"],
        ),
    ],
)
def test_explain_of_gradients_where_some_tensors_may_have_none(line, kernels, capsys):
    assert main(["explain", *line.split(), "--arch", "90", "--backward", "--json"]) == 0
    assert [launch["kernel"] for launch in json.loads(capsys.readouterr().out)["launches"]] == kernels


@OPERATORS
def test_explain_says_the_same_of_shapes_as_of_tensors(name):
    arguments, options = EXAMPLES[name](torch.bfloat16)
    tensors = leaves(arguments)
    shapes = [a.detach().to("meta").requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in tensors]
    of_tensors, of_shapes = (liger_aot.explain(name, *given, arch="90", **options) for given in (tensors, shapes))
    assert str(of_shapes) == str(of_tensors)
    assert len(of_shapes.launches) > 1


def test_a_call_that_no_variant_serves_ends_with_1(packs, capsys):  # noqa: F811
    def without_bf16(manifest, entries):
        table = json.loads(entries["relu_squared_fwd.json"])
        table["variants"] = [row for row in table["variants"] if "bf16" not in row["dtypes"]]
        entries["relu_squared_fwd.json"] = json.dumps(table).encode()

    copy_pack(packs, without_bf16, kernel="relu_squared_fwd")
    line = ["explain", "relu_squared", "8x64", "--arch", "90"]
    assert main(line) == 1
    assert "NO VARIANT" in capsys.readouterr().out
    assert main([*line, "--json"]) == 1
    known = json.loads(capsys.readouterr().out)
    assert [launch["cubin"] for launch in known["launches"]] == [None]
    assert all(row["rejected"] for row in known["candidates"])
    assert main([*line, "--dtype", "float32"]) == 0


MISUNDERSTOOD = {
    "explain rms_norm 8x64 64 1e-6 --arch 90": "must be sizes like 8x4096 or 8x4096:int64, got '1e-6'",
    "explain rms_norm 8x64 --arch hopper": "arch must be a GPU architecture like '90', '100f' or '8.6', got 'hopper'",
    "info --arch hopper": "arch must be a GPU architecture like '90', '100f' or '8.6', got 'hopper'",
    "explain rms_norm 8x64 --dtype half2": "must be a dtype of torch like float32, got 'half2'",
    "explain rms_norm 8x64 --arch 90 --set eps": "must be NAME=VALUE, got 'eps'",
    "explain rms_norm 8x64 64 1 --arch 90": "a shape was given of eps, which is no tensor: use --set eps=VALUE",
    "explain swiglu 8x64 --arch 90": "swiglu takes gate, up, gate_multiplier, down_multiplier; missing ['up']",
    "explain rms_norm 1 1 1 1 1 1 --arch 90": "rms_norm takes x, weight, eps, offset, casting; got 6 shapes",
    "explain rms_norm 99999999999999999999x5 --arch 90": "fewer than 2**60 numbers, got 99999999999999999999x5",
    "explain rms_norm 4294967296x4294967296 64 --arch 90": "fewer than 2**60 numbers, got 4294967296x4294967296, 64",
    "explain softmax 0x99999999999999999999 --arch 90": "fewer than 2**60 numbers, got 0x99999999999999999999",
    "explain rmsnorm 8x64 --arch 90": "if rmsnorm is meant as an operator, it must be one of attn_res,",
    "explain rmsnorm": "must be given an operator (attn_res, ",
    "explain rms_norm 8x64 63 --arch 90": "rms_norm: weight must have shape (64,), got (63,)",
    "explain rms_norm 8x64 --arch 90 --set eps=abc": "explain: eps must be of type float or None, got 'abc'",
    "explain rms_norm 8x64 --arch 90 --set casting=1": "explain: casting must be of type str, got 1",
    "explain rms_norm 8x64 --arch 90 --set weight=1": "explain: weight must be given as a shape, like 8x4096, got 1",
    "explain softmax 8x64 --arch 90 --set dim=99999999999999999999": "dim must be of type int, got 99999999999999999999",
    "explain softmax 8x64 --arch 90 --set dim=True": "explain: dim must be of type int, got True",
    "explain tvd 8x64 8x64 --arch 90 --set loss_dtype=half2": "loss_dtype must be a dtype of torch like float32, got 'h",
    "explain rms_norm 2147483648x64 --arch 90": "rms_norm_fwd: rows must be an integer below 2**31 (split",
    "explain rms_norm 2147483647x64 --arch 90": "rms_norm_fwd: rows must be an integer up to 2**31 - 2**15 (split",
    "explain swiglu 4294967296x1024 4294967296x1024 --arch 90": "swiglu_fwd: rows must be such that at most 2**31 - 1 prog",
    "explain attn_res 2x2147483647x64 64 64 --arch 90": "attn_res_fwd: tokens must be an integer up to 2**31 - 2**15 (split",
    "explain neighborhood_attention 1x1x2147483647x64 1x1x2147483647x64 1x1x2147483647x64 --arch 90": "_fwd: tokens must be an",
    "explain modulated_rms_norm 2147483647x64 2147483647x64 --arch 90 --backward": "_bwd: groups must be an integer up to 2**",
    "explain modulated_rms_norm 2147483647x64 64 --arch 90": "_fwd: each must be an integer up to 2**31 - 2**15 (split the",
    "explain embedding 9x67107841 1:int64 --arch 90": "embedding_fwd: a row must be such that at most 2**16 - 1 programs serve",
    "explain embedding 9x8388481 1:int64 --arch 90 --backward": "embedding_shares: a row must be such that at most 2**16",
    "explain linear_cross_entropy 1000000000x64 128x64 1000000000:int64 --arch 90": "must take at most 3000 launches, takes",
    "explain linear_cross_entropy 4294967296x64 128x64 4294967296:int64 --arch 90": "at most 2**31 - 2**15 rows, got 4294967",
    "explain rms_norm 8x64": "without a CUDA device, --arch must say for which, like 90",
}


@pytest.mark.parametrize("line", MISUNDERSTOOD)
def test_a_command_that_is_not_understood_ends_with_2_and_says_why(line, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        status = main(line.split())
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2
    assert MISUNDERSTOOD[line] in captured.err
    assert not captured.out


@pytest.mark.parametrize("command", ["", "info", "verify", "explain"])
def test_help_says_what_the_statuses_mean(command, capsys):
    with pytest.raises(SystemExit) as error:
        main([*command.split(), "--help"])
    assert error.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Exit status: 0 where all is well, 1 where something is not, 2 for a command that is not understood." in said
