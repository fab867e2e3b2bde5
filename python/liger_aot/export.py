"""Programs that run without this library:  lower(exported_program)  puts its Triton kernels into the graph.
Programs from other versions of it:  save(program, path)  writes down its operators' schemas, and  load(path)  refuses a file
whose operators are not this version's.

An exported program holds nodes torch.ops.liger.*, for which whoever runs it needs this package. AOTInductor compiles Triton
kernels in a graph into its package itself, which a C++ program can load then without Python. So each node becomes what the
operator's body does: allocations, and launches of the kernels whose sources are part of the wheel. Triton is needed to lower
and to compile, not to run.
"""

import contextlib
import functools
import importlib
import json
import logging
import math
import os
import pathlib
import re
import sys
import tempfile
import zipfile

import torch
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.export import ExportedProgram
from torch.library import wrap_triton

from . import _build
from ._op import BODIES
from ._op import PUBLIC
from ._op import on_cpu
from ._runtime import DAMAGE
from ._runtime import kernels

SOURCES = pathlib.Path(__file__).parent / "_triton"
CHUNKED = {f"linear_{loss}_{way}" for loss in ("cross_entropy", "jsd", "kl_div", "logprob") for way in ("fwd", "bwd")}
CHUNKED.add("linear_distillation_fwd")
WHOLE_ROWS = "attn_res", "fused_add_rms_norm", "gated_rms_norm", "layer_norm", "rms_norm", "rope", "softmax"
# Whose kernels hold a row in one tile, which is chosen by its width, and the argument of which that is the last dimension.
TILED = {f"{op}_{way}": 2 if op == "rope" else 0 for op in WHOLE_ROWS for way in ("fwd", "bwd")}
TILED["modulated_rms_norm_bwd"] = 0  # its forward takes one tile for all widths
MODELS, PACKAGES = "*/models/*.json", "*/data/aotinductor/*/*.json"  # where .pt2 files have their graphs
SCHEMAS = "liger_aot.json"  # beside them, in files that save wrote: the schemas of their operators
VERSION = "liger_aot.txt"  # and our version
# As what torch serializes an argument of a type. A float may be given as a whole number.
FORMS = {
    "Tensor": {"as_tensor"},
    "int": {"as_int", "as_sym_int"},
    "List[int]": {"as_ints", "as_sym_ints"},
    "float": {"as_float", "as_sym_float", "as_int", "as_sym_int"},
    "bool": {"as_bool", "as_sym_bool"},
    "str": {"as_string"},
    "ScalarType": {"as_scalar_type"},
}
POSITIONAL = 1  # of torch's ArgumentKind
ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "zeros",
    "zeros_like",
    "new_zeros",
    "full",
}


def load_modules(folder):
    """The kernel files in a folder, imported; modules of other people by these names are left alone."""
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "_gate")
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(others)


def kernels_of(modules):
    """{name: Triton kernel} of kernel files."""
    return {name: kernel for module in modules for name, kernel in vars(module).items() if hasattr(kernel, "variants")}


def load_sources(folder=SOURCES):
    """{name: Triton kernel} of the kernel files in a folder."""
    return kernels_of(load_modules(folder))


class Spelled(float):
    """A number whose repr is Python: Inductor writes what kernels take from their modules by repr, and `inf` names nothing."""

    def __repr__(self):
        return f"float('{float(self)}')"


@functools.cache
def sources():
    """{name: Triton kernel} of the package, to be compiled."""
    try:
        modules = load_modules(SOURCES)
    except ImportError as error:
        if error.name != "triton":
            raise
        raise RuntimeError("lower: needs Triton, which is missing: pip install triton") from None
    # The kernel files have imported Triton, if it is there: this file does not.
    triton, found = sys.modules["triton"], kernels_of(modules)
    if not all(isinstance(kernel, triton.JITFunction) for kernel in found.values()):
        raise RuntimeError("lower: Triton interprets kernels in this process; unset TRITON_INTERPRET and start it again")
    constexpr = triton.language.constexpr
    for module in modules:
        for name, value in list(vars(module).items()):
            if type(value) is constexpr and type(value.value) is float and not math.isfinite(value.value):
                setattr(module, name, constexpr(Spelled(value.value)))
    return found


class Tracer:
    """A launcher that puts launches into the graph that is being traced, with as many warps as the kernel is built with.

    torch takes no limit of registers, which some kernels are built with too: that costs time, not numbers.
    """

    def __init__(self, multiprocessors):
        self.count, self.kernels = multiprocessors, sources()

    def multiprocessors(self, tensor):
        return self.count

    def launch(self, name, grid, *args, **constants):
        kernel = self.kernels[name]
        options = next(options for _, built, options in kernel.variants if built == constants)
        # As the launcher packs them; what is symbolic stays so.
        given = [
            float(a) if t == "fp32" else int(a) if type(a) is bool else a
            for t, a in zip(kernel.parameters.values(), args, strict=True)
        ]
        wrap_triton(kernel)[grid](*given, **constants, num_warps=options["num_warps"])


def lower(program: ExportedProgram, *, multiprocessors: int = 132) -> ExportedProgram:
    """program with Triton kernels in the place of its torch.ops.liger nodes, for AOTInductor.

    An operator of one launch becomes it; a linear loss, for each chunk of rows, matmuls and the kernels of its logits' loss.
    docs/export.md lists all.
    multiprocessors is how many the device has for which it is compiled: backward kernels start as many programs as fit there,
    and run anywhere. A program is lowered where it lies, and the linear losses take other chunks and matmuls on a CPU: move one
    that was exported there first, with torch.export.passes.move_to_device_pass. Where the number of rows is dynamic, the
    backward kernels of norms and dyt, whose programs are counted while the graph is made, are one program each: right, and
    slow. Kernels that the program brought stay as they are. Other threads must not run operators meanwhile.

    Raises ValueError on what is no exported program or no number of multiprocessors, and NotImplementedError, with the
    operator's name, for one whose body a graph cannot hold: the linear losses where the number of rows is dynamic, since they
    take as many steps as there are chunks; norms over the last dimension, softmax and rope where that dimension is dynamic,
    since their tiles are chosen by it.
    """
    if not isinstance(program, ExportedProgram):
        raise ValueError(
            f"lower: program must be a torch.export.ExportedProgram, got {type(program).__name__}; export it first"
        )
    if type(multiprocessors) is not int or multiprocessors < 1:
        raise ValueError(
            f"lower: multiprocessors must be an integer of at least 1, got {multiprocessors!r}; "
            "torch.cuda.get_device_properties(device).multi_processor_count has that of a device"
        )
    with on_cpu(), kernels.launched_by(Tracer(multiprocessors)), without_a_gpu():
        bodies = {getattr(torch.ops.liger, name).default: body_of(name) for name in BODIES}
        try:
            program = program.run_decompositions({**torch.export.default_decompositions()} | bodies)
        except NotImplementedError as error:  # to which torch adds where in the graph it was, with a traceback
            raise NotImplementedError(str(error).partition("\n\nWhile executing")[0]) from None
    left = {str(node.target) for node in nodes(program) if str(node.target).startswith("liger.")}
    if left:
        raise NotImplementedError(
            f"lower: the graph still holds {', '.join(sorted(left))}, which has no form as Triton kernels"
        )
    for node in nodes(program):
        if node.target is triton_kernel_wrapper_functional and is_ours(node):
            # Triton finds what a kernel writes only where there is a GPU, and says everything elsewhere: we allocate it.
            given = node.kwargs["kwargs"]
            written = [key for key, value in given.items() if allocated(value)]
            node.kwargs = {**node.kwargs, "tensors_to_clone": written}
            # What it reads alone is itself for a later kernel too, and no result of this one.
            for result in [user for user in node.users if user.args[1] not in written]:
                result.replace_all_uses_with(given[result.args[1]])
                node.graph.erase_node(result)
    for graph in graphs(program):
        graph.recompile()
    return program


def is_ours(node):
    """Whether a node launches a kernel of ours, around which torch puts one that says how many warps, or one of the program."""
    kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    return any(own is kernel.fn for own in sources().values())


def graphs(program):
    """The graph modules of a program: its own, and those of its conditions and loops."""
    return [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]


def nodes(program):
    """What a program calls."""
    return [node for graph in graphs(program) for node in graph.graph.nodes if node.op == "call_function"]


@contextlib.contextmanager
def without_a_gpu():
    """Inside the `with`, torch does not log a traceback for each kernel of which it cannot find what it writes: lower says."""
    log = logging.getLogger("torch._dynamo")  # which the module of triton_kernel_wrapper_functional logs to

    def other(record):
        return "identify_accessed_tensors" not in record.getMessage()

    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


def allocated(value):
    """Whether a node is new memory, which only kernels write to, or a view of it."""
    target = getattr(value, "target", None)
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return allocated(value.args[0]) if target.is_view else target.overloadpacket.__name__ in ALLOCATIONS


def body_of(name):
    """What takes the place of an operator while a graph is traced: its body, with launches as functions of what they write."""
    functional = dispatch_functionalize(BODIES[name])

    @functools.wraps(BODIES[name])
    def traced(*args, **kwargs):
        if name in CHUNKED and isinstance(args[0].shape[0], torch.SymInt):
            raise NotImplementedError(
                f"lower: {name} takes as many steps as there are chunks of rows, got a dynamic number; export with a fixed one"
            )
        if name in TILED and isinstance(args[TILED[name]].shape[-1], torch.SymInt):
            raise NotImplementedError(
                f"lower: {name} takes a tile for the width of its rows, got a dynamic last dimension; export with a fixed one"
            )
        return functional(*args, **kwargs)

    return traced


def save(program: ExportedProgram, path, **options):
    """torch.export.save(program, path, **options), with the schemas of the program's operators and our version.

    torch writes down the arguments that a call gives, and no defaults: without this a load cannot see that one has changed.
    A file that is there already is replaced when the new one is whole. Raises ValueError on what is no exported program or has
    been lowered: torch has no form for Triton kernels in a file.
    """
    if not isinstance(program, ExportedProgram):
        raise ValueError(f"save: program must be a torch.export.ExportedProgram, got {type(program).__name__}; export it first")
    if any(node.target is triton_kernel_wrapper_functional for node in nodes(program)):
        raise ValueError(
            "save: program must hold no Triton kernels, which torch does not write to a .pt2 file, got a lowered one; save it "
            "before lower(), or compile it with torch._inductor.aoti_compile_and_package"
        )
    used = {node.target for node in nodes(program) if str(node.target).startswith("liger.")}
    schemas = {overload._schema.name.partition("::")[2]: str(overload._schema) for overload in used}
    ours = {SCHEMAS: json.dumps(schemas, sort_keys=True), VERSION: _build.VERSION}
    options["extra_files"] = {**(options.get("extra_files") or {}), **ours}
    target = pathlib.Path(os.path.realpath(path)) if isinstance(path, str | os.PathLike) else None
    if target is None or (target.exists() and not target.is_file()):  # a buffer; a pipe
        torch.export.save(program, path, **options)
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        torch.export.save(program, whole := pathlib.Path(folder, target.name), **options)
        whole.replace(target)


def load(path, **options):
    """torch.export.load(path, **options), or aoti_load_package, of a whole file whose operators are this version's.

    torch itself drops an argument that an operator no longer has, gives one to another where one was put before it, and reads
    weights without their checksums: the program computes something else then. Raises RuntimeError with the operator, what the
    file passes and what this version takes; ValueError for what is no such file or is damaged.
    """
    damaged = None
    try:
        with zipfile.ZipFile(path) as archive:
            names = [pathlib.PurePosixPath(name) for name in archive.namelist()]
            models, packages = ([n for n in names if n.match(form)] for form in (MODELS, PACKAGES))
            damaged = archive.testzip() if models or packages else None
            written = [n for n in names if n.match(f"*/extra/{SCHEMAS}")]
            contents, schemas = ([json.loads(archive.read(str(n))) for n in some] for some in ([*models, *packages], written))
            versions = [archive.read(str(n)).decode() for n in names if n.match(f"*/extra/{VERSION}")]
    except OSError:
        raise
    except DAMAGE:
        models = packages = None
    if damaged or not (models or packages):
        wrong = f"of which {damaged} is damaged; copy it again" if damaged else "that is not"
        raise ValueError(f"load: {path} must be a whole .pt2 file of torch.export.save or AOTInductor, got one {wrong}")
    unlike = {why for content in contents for call in calls_in(content) if (why := difference(*call))}
    unlike |= {why for known in schemas for name, schema in known.items() if (why := change(name, schema))}
    if unlike:
        raise RuntimeError(
            f"load: {path} was made with another version of liger-aot:\n  " + "\n  ".join(sorted(unlike)) + "\n"
            f"Remedy: export the program again with this version, {_build.VERSION}, or install the one that it was made with"
            + "".join(f", liger-aot {version}" for version in versions)
        )
    if not isinstance(path, str | os.PathLike):
        path.seek(0)  # from where a save or the look into the archive left it, torch would read on
    return (torch.export.load if models else torch._inductor.aoti_load_package)(path, **options)


def calls_in(part):
    """(operator, arguments, number of results) of the calls of liger operators in serialized graphs."""
    target = part.get("target") if isinstance(part, dict) else None
    if isinstance(target, str) and (found := re.fullmatch(r"(?:torch\.ops\.liger\.|liger::)(\w+)(?:\.default)?", target)):
        return [(found[1], part["inputs"], len(part["outputs"]))]
    values = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return [call for value in values for call in calls_in(value)]


def takes(argument, given):
    """Whether an argument of a schema takes what was serialized for it."""
    (form,) = given["arg"].get("as_optional_tensor", given["arg"])
    optional = re.fullmatch(r"Optional\[(.*)\]", type_ := str(argument.real_type))
    return form in FORMS[optional[1] if optional else type_] | ({"as_none"} if optional else set())


def difference(name, given, results):
    """In words, how a call differs from the operator of its name; None where it does not."""
    passed = ", ".join(argument["name"] for argument in given)
    if name not in BODIES and name not in PUBLIC:
        return f"liger::{name}({passed}), which this version does not have"
    schema = getattr(torch.ops.liger, name).default._schema
    known = {argument.name: argument for argument in schema.arguments}
    needed = {argument.name for argument in schema.arguments if not argument.has_default_value()}
    in_order = [argument["name"] for argument in given if argument["kind"] == POSITIONAL]
    if (
        needed <= {argument["name"] for argument in given} <= known.keys()
        and in_order == list(known)[: len(in_order)]
        and results == len(schema.returns)
    ):
        if all(takes(known[argument["name"]], argument) for argument in given):
            return None
        passed = ", ".join(f"{next(iter(argument['arg'])).removeprefix('as_')} {argument['name']}" for argument in given)
    return f"liger::{name}({passed}) with {results} results, which this version has as {schema}"


def change(name, schema):
    """In words, how an operator's schema differs from what it was in a file; None where its calls mean the same."""
    if name not in BODIES and name not in PUBLIC:
        return f"{schema}, which this version does not have"
    now = getattr(torch.ops.liger, name).default._schema
    if now.is_backward_compatible_with(torch._C.parse_schema(schema)):
        return None
    return f"{schema}, which this version has as {now}"
