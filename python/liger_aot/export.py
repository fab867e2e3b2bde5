"""Programs that run without this library:  lower(exported_program)  puts its Triton kernels into the graph.

An exported program holds nodes torch.ops.liger.*, for which whoever runs it needs this package. AOTInductor compiles Triton
kernels in a graph into its package itself, which a C++ program can load then without Python. So each node becomes what the
operator's body does: allocations, and launches of the kernels whose sources are part of the wheel. Triton is needed to lower
and to compile, not to run.
"""

import functools
import importlib
import pathlib
import sys

import torch
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.export import ExportedProgram
from torch.library import wrap_triton

from ._op import BODIES
from ._op import on_cpu
from ._runtime import kernels

SOURCES = pathlib.Path(__file__).parent / "_triton"
DEPTH = 3  # public operators call _fwd operators, and the linear losses' bodies call those of cross_entropy
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


@functools.cache
def sources():
    """{name: Triton kernel} of the package's kernel files."""
    sys.path.insert(0, str(SOURCES))
    try:
        modules = [importlib.import_module(p.stem) for p in sorted(SOURCES.glob("*.py")) if p.stem != "_gate"]
    finally:
        sys.path.remove(str(SOURCES))
    return {name: kernel for module in modules for name, kernel in vars(module).items() if hasattr(kernel, "variants")}


class Tracer:
    """A launcher that puts launches into the graph that is being traced, with the options that the kernel is built with."""

    def __init__(self, multiprocessors):
        self.count = multiprocessors

    def multiprocessors(self, tensor):
        return self.count

    def launch(self, name, grid, *args, **constants):
        kernel = sources()[name]
        options = next(options for _, built, options in kernel.variants if built == constants)
        # As the launcher packs them; what is symbolic stays so.
        given = [
            float(a) if t == "fp32" else int(a) if type(a) is bool else a
            for t, a in zip(kernel.parameters.values(), args, strict=True)
        ]
        wrap_triton(kernel)[grid](*given, **constants, num_warps=options["num_warps"])


def lower(program: ExportedProgram, *, multiprocessors: int = 132) -> ExportedProgram:
    """program with Triton kernels in the place of its torch.ops.liger nodes, for AOTInductor.

    multiprocessors is how many the device has for which it is compiled: backward kernels start as many programs as fit there,
    and run anywhere. Raises ValueError on what is no exported program, and NotImplementedError, with the operator's name, for
    one whose body a graph cannot hold: the linear losses where the number of rows is dynamic, since they take as many steps as
    there are chunks.
    """
    if not isinstance(program, ExportedProgram):
        raise ValueError(
            f"lower: program must be a torch.export.ExportedProgram, got {type(program).__name__}; export it first"
        )
    with on_cpu(), kernels.launched_by(Tracer(multiprocessors)):
        for _ in range(DEPTH):
            table = {**torch.export.default_decompositions()} if named(program) else {}
            table |= {getattr(torch.ops.liger, name).default: body_of(name) for name in BODIES}
            program = program.run_decompositions(table)
    left = named(program)
    if left:
        raise NotImplementedError(
            f"lower: the graph still holds {', '.join(sorted(left))}, which has no form as Triton kernels"
        )
    for node in program.graph.nodes:
        if node.target is triton_kernel_wrapper_functional:
            # Triton finds what a kernel writes only where there is a GPU, and says everything elsewhere: we allocate it.
            written = [key for key, value in node.kwargs["kwargs"].items() if allocated(value)]
            node.kwargs = {**node.kwargs, "tensors_to_clone": written}
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
        if name.startswith("linear_") and isinstance(args[0].shape[0], torch.SymInt):
            raise NotImplementedError(
                f"lower: {name} takes as many steps as there are chunks of rows, got a dynamic number; export with a fixed one"
            )
        return functional(*args, **kwargs)

    return traced
