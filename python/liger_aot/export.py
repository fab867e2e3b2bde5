"""Programs that run without this library:  lower(exported_program)  puts its Triton kernels into the graph.
Programs from other versions of it:  load(path)  refuses those whose operators are not this version's.

An exported program holds nodes torch.ops.liger.*, for which whoever runs it needs this package. AOTInductor compiles Triton
kernels in a graph into its package itself, which a C++ program can load then without Python. So each node becomes what the
operator's body does: allocations, and launches of the kernels whose sources are part of the wheel. Triton is needed to lower
and to compile, not to run.
"""

import functools
import importlib
import json
import pathlib
import re
import sys
import zipfile

import torch
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.export import ExportedProgram
from torch.library import wrap_triton

from . import _build
from ._op import BODIES
from ._op import PUBLIC
from ._op import on_cpu
from ._runtime import kernels

SOURCES = pathlib.Path(__file__).parent / "_triton"
CHUNKED = {f"linear_{loss}_{way}" for loss in ("cross_entropy", "jsd", "logprob") for way in ("fwd", "bwd")}
WHOLE_ROWS = "fused_add_rms_norm", "gated_rms_norm", "layer_norm", "rms_norm", "rope", "softmax"
# Whose kernels hold a row in one tile, which is chosen by its width, and the argument of which that is the last dimension.
TILED = {f"{op}_{way}": 2 if op == "rope" else 0 for op in WHOLE_ROWS for way in ("fwd", "bwd")}
MODELS, PACKAGES = "*/models/*.json", "*/data/aotinductor/*/*.json"  # where .pt2 files have their graphs
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


def load_sources(folder=SOURCES):
    """{name: Triton kernel} of the kernel files in a folder; modules of other people by these names are left alone."""
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "_gate")
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        modules = [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(others)
    return {name: kernel for module in modules for name, kernel in vars(module).items() if hasattr(kernel, "variants")}


@functools.cache
def sources():
    """{name: Triton kernel} of the package, to be compiled."""
    try:
        found = load_sources()
    except ImportError as error:
        if error.name != "triton":
            raise
        raise RuntimeError("lower: needs Triton, which is missing: pip install triton") from None
    # The kernel files have imported Triton, if it is there: this file does not.
    if not all(isinstance(kernel, sys.modules["triton"].JITFunction) for kernel in found.values()):
        raise RuntimeError("lower: Triton interprets kernels in this process; unset TRITON_INTERPRET and start it again")
    return found


class Tracer:
    """A launcher that puts launches into the graph that is being traced, with as many warps as the kernel is built with.

    torch takes no limit of registers, which one of them is built with too: that costs time, not numbers.
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
    multiprocessors is how many the device has for which it is compiled: backward kernels start as many programs as fit there,
    and run anywhere. A program is lowered where it lies, and the linear losses take other chunks and matmuls on a CPU: move one
    that was exported there first, with torch.export.passes.move_to_device_pass. Raises ValueError on what is no exported
    program or no number of multiprocessors, and NotImplementedError, with the operator's name, for one whose body a graph
    cannot hold: the linear losses where the number of rows is dynamic, since they take as many steps as there are chunks;
    norms over the last dimension, softmax and rope where that dimension is dynamic, since their tiles are chosen by it.
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
    with on_cpu(), kernels.launched_by(Tracer(multiprocessors)):
        bodies = {getattr(torch.ops.liger, name).default: body_of(name) for name in BODIES}
        program = program.run_decompositions({**torch.export.default_decompositions()} | bodies)
    left = named(program)
    if left:
        raise NotImplementedError(
            f"lower: the graph still holds {', '.join(sorted(left))}, which has no form as Triton kernels"
        )
    for node in program.graph.nodes:
        if node.target is triton_kernel_wrapper_functional:
            # Triton finds what a kernel writes only where there is a GPU, and says everything elsewhere: we allocate it.
            given = node.kwargs["kwargs"]
            written = [key for key, value in given.items() if allocated(value)]
            node.kwargs = {**node.kwargs, "tensors_to_clone": written}
            # What it reads alone is itself for a later kernel too, and no result of this one.
            for result in [user for user in node.users if user.args[1] not in written]:
                result.replace_all_uses_with(given[result.args[1]])
                program.graph.erase_node(result)
    program.graph_module.recompile()
    return program


def allocated(value):
    """Whether a node is new memory, which only kernels write to, or a view of it."""
    target = getattr(value, "target", None)
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return allocated(value.args[0]) if target.is_view else target.overloadpacket.__name__ in ALLOCATIONS


def named(program):
    """The names of the liger operators in a program's graph."""
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return {target for target in targets if target.startswith("liger.")}


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


def load(path):
    """torch.export.load(path), or aoti_load_package(path) of a package, where the operators in it are this version's.

    torch itself drops an argument that an operator no longer has, and the program computes something else then. Raises
    RuntimeError with the operator, what the file passes and what this version takes; ValueError for what is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [pathlib.PurePosixPath(name) for name in archive.namelist()]
            models, packages = ([n for n in names if n.match(form)] for form in (MODELS, PACKAGES))
            nodes = [node for name in (*models, *packages) for node in nodes_of(json.loads(archive.read(str(name))))]
    except zipfile.BadZipFile:
        models = packages = ()
    if not models and not packages:
        raise ValueError(f"load: {path} must be a whole .pt2 file of torch.export.save or AOTInductor, got one that is not")
    if unlike := sorted({why for node in nodes if (why := difference(*node))}):
        raise RuntimeError(
            f"load: {path} was made with another version of liger-aot:\n  " + "\n  ".join(unlike) + "\n"
            f"Remedy: export the program again with this version, {_build.VERSION}, or install the one that it was made with"
        )
    return torch.export.load(path) if models else torch._inductor.aoti_load_package(path)


def nodes_of(part):
    """(operator, arguments, number of results) of the nodes of liger operators in serialized graphs."""
    target = part.get("target") if isinstance(part, dict) else None
    if isinstance(target, str) and (found := re.fullmatch(r"(?:torch\.ops\.liger\.|liger::)(\w+)(?:\.default)?", target)):
        return [(found[1], [argument["name"] for argument in part["inputs"]], len(part["outputs"]))]
    values = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return [node for value in values for node in nodes_of(value)]


def difference(name, passed, results):
    """In words, how a node differs from the operator of its name; None where it does not."""
    if name not in BODIES and name not in PUBLIC:
        return f"liger::{name}({', '.join(passed)}), which this version does not have"
    schema = getattr(torch.ops.liger, name).default._schema
    known = {argument.name for argument in schema.arguments}
    needed = {argument.name for argument in schema.arguments if not argument.has_default_value()}
    if needed <= set(passed) <= known and results == len(schema.returns):
        return None
    return f"liger::{name}({', '.join(passed)}) with {results} results, which this version has as {schema}"
