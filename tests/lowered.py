"""What Inductor writes down of the kernels in lowered graphs, through Triton's front end:  python tests/lowered.py

In a process in which Triton compiles, without a GPU. Every launch of every operator is tried as it is; with integers of 64
bits, as Inductor gives sizes that may pass 2**31; and of 1, which it makes constants. Prints how many of each kernel.
"""

import collections
import importlib.util
import json
import pathlib
import re
import sys
import tempfile
import warnings

import torch
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import make_backend
from triton.runtime import JITFunction

from liger_aot import _op
from liger_aot import export

from examples import EXAMPLES
from examples import Everything
from examples import bodies_of
from examples import example

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}


def launches():
    """(kernel, its arguments, how many warps) in two lowered programs: all operators, and all that these are made of."""
    public = {name: example(name, torch.bfloat16) for name in _op.PUBLIC}
    bodies = [found[1:] for name in EXAMPLES for found in bodies_of(name)]
    for some in public, {str(n): found for n, found in enumerate(bodies)}:
        module = Everything({name: found[0] for name, found in some.items()})
        program = torch.export.export(module, ({name: found[1] for name, found in some.items()},))
        for node in export.lower(program).graph.nodes:
            if "triton_kernel_wrapper" in str(node.target):
                kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                constants = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
                yield kernel.fn, {**node.kwargs["kwargs"], **constants}, kernel.configs[0].num_warps


def specialised(kernel, arguments, size):
    """(signature, constants) as Inductor gives them for these arguments, integers being as they are, of 64 bits or 1."""
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            kind = "constexpr"
        elif isinstance(value, torch.fx.Node):
            kind = POINTERS[value.meta["val"].dtype]
        elif isinstance(value, float):
            kind = "fp32"
        else:
            value = 1 if size == "1" else value
            wide = size == "i64" and parameter.name != "n"  # which is a row's width
            kind = "constexpr" if value == 1 else "i64" if wide else "i32"
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
    return signature, constants


def front_end(kernel, signature, constants, warps):
    backend = make_backend(TARGET)
    options = backend.parse_options({"num_warps": warps})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(kernel, signature, constants)
    module = source.make_ir(TARGET, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    return re.sub(r'@"?\w+\.', "@", module.str_nodebug())  # functions that kernels call are named after their files


def written(kernel, folder):
    """The kernel of the file that Inductor would write, which knows nothing of the file that it is from."""
    path = folder / f"{kernel.__name__}.py"
    text = user_defined_triton_kernel_transitive_closure_source_code(kernel, None)
    path.write_text(f"{TritonKernel.gen_common_triton_imports()}\n@triton.jit\n{text}")
    module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location(f"written_{path.stem}", path))
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, kernel.__name__)


def main():
    seen, tried = set(), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        copies = {name: written(kernel, pathlib.Path(folder)) for name, kernel in export.sources().items()}
        assert all(isinstance(kernel, JITFunction) for kernel in copies.values())
        for kernel, arguments, warps in launches():
            for size in ("as it is", "i64", "1"):
                form = specialised(kernel, arguments, size)
                if (key := (kernel.__name__, *map(str, form))) not in seen:
                    seen.add(key)
                    got = front_end(copies[kernel.__name__], *form, warps)
                    if size == "as it is":
                        assert got == front_end(kernel, *form, warps), f"{key}: another kernel"
                    tried[kernel.__name__] += 1
    print(json.dumps({"kernels": sorted(export.sources()), "tried": tried}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
