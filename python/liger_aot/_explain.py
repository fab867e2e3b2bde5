"""Which kernels a call launches and why these; and loading kernels before the first call."""

import ast
import json
import math
import re
import struct
import sys
from argparse import ArgumentTypeError
from collections import Counter

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _op
from ._driver import check_grid
from ._runtime import EXACT
from ._runtime import FAMILY
from ._runtime import MOST
from ._runtime import WALKED
from ._runtime import Plan
from ._runtime import fitness
from ._runtime import kernels
from ._runtime import pack_paths
from ._runtime import reject
from ._runtime import select_pack
from ._runtime import short

# KiB of shared memory that a program may have, by compute capability: CUDA Programming Guide, "Technical Specifications".
SHARED_MEMORY = {(7, 5): 64, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99, (12, 1): 99}
ASSUMED_MULTIPROCESSORS = 100
LARGEST = 2**60  # numbers of a tensor, of which 8 bytes each are below 2**63
MOST_LAUNCHES = 3000  # of one call, which take some seconds to look at: those of a linear loss over a million rows
CONSTANT = {"rope": {"cos", "sin"}, "cross_entropy": {"weight"}, "cross_entropy_stats": {"weight"}}  # may not require gradients
FITS = {EXACT: "exact", FAMILY: "same family"}


def preload(*names, device=None):
    """Load these kernels (default: all) onto a CUDA device (default: the current one) now, and return how many variants.

    What is loaded before a CUDA graph is captured need not be loaded during it.
    """
    launcher = kernels.launcher
    index = device if isinstance(device, int) or device is None else cuda_index(device)
    found = launcher.at(launcher.find_driver().current_device() if index is None else index)
    if unknown := [name for name in names if name not in found.pack.manifest["kernels"]]:
        raise ValueError(
            f"preload: names must be of kernels, {', '.join(found.pack.manifest['kernels'])}, got {', '.join(unknown)}; "
            "liger_aot.explain says which ones an operator launches"
        )
    count = 0
    for kernel in names or found.pack.manifest["kernels"]:
        for key, variant in found.pack.table(kernel).items():
            if variant.shared <= found.max_shared_memory:
                found.plan(kernel).load(found, kernel, key)
                count += 1
    return count


def cuda_index(device):
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"preload: device must be a CUDA device, got {device}")
    return device.index


def explain(op, *args, arch=None, **kwargs):
    """What op(*args, **kwargs) would launch, and its backward where an argument requires a gradient; nothing is launched.

    op is a function of liger_aot, an operator or its name. Without a GPU, say for which: arch="90", and pass CPU tensors, whose
    alignment counts, or meta tensors, which take no memory; of CPU tensors, a linear loss takes a CPU's chunks. Returns a
    Trace: print it, or read .launches and .rows. Other threads must not run operators meanwhile.
    """
    if isinstance(op, str) and op not in _op.PUBLIC and op not in _op.BODIES:
        raise ValueError(
            f"explain: op must be an operator of torch.ops.liger, like {', '.join(sorted(_op.PUBLIC))}, got {op!r}"
        )
    function = getattr(torch.ops.liger, op).default if isinstance(op, str) else op
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    trace = Trace(op if isinstance(op, str) else getattr(op, "__name__", str(op)).split(".")[0], target(arch, tensors))
    with kernels.launched_by(trace), _op.on_cpu():
        results = function(*args, **kwargs)
        outputs = [r for r in (results if isinstance(results, tuple) else (results,)) if r is not None and r.requires_grad]
        inputs = [t for t in tensors if t.requires_grad]
        if outputs and inputs:
            torch.autograd.grad(outputs, inputs, [torch.empty_like(o) for o in outputs], allow_unused=True)
    return trace


def fit(arch, capability):
    """In words, how a pack serves a device or why it does not."""
    why = fitness(arch, capability)
    return why if isinstance(why, str) else FITS.get(why[0], "same major")


def target(arch, tensors):
    if arch is not None:
        return Target(arch)
    for t in tensors:
        if t.is_cuda:
            return kernels.launcher.at(t.get_device())
    raise ValueError("explain: for CPU tensors, arch must name a GPU architecture like '90', got None")


def capability(arch):
    """(major, minor) of a GPU architecture by name."""
    digits = re.fullmatch(r"(\d+)\.?(\d)[af]?", str(arch))
    if not digits:
        raise ValueError(f"arch must be a GPU architecture like '90', '100f' or '8.6', got {arch!r}")
    return int(digits[1]), int(digits[2])


class Target:
    """A device that need not be there."""

    def __init__(self, arch):
        self.capability = capability(arch)
        self.max_shared_memory = 1024 * SHARED_MEMORY.get(self.capability, 163)
        self.multiprocessors = ASSUMED_MULTIPROCESSORS
        self.pack = select_pack(self.capability)


class Launch:
    """A launch that did not take place: `rows` has each candidate (cubin, why not); `variant` is the one without a reason."""

    def __init__(self, device, kernel, grid, args, constants):
        types = [type_ for _, type_ in device.pack.parameters(kernel)]
        pointers = [a.data_ptr() for a, type_ in zip(args, types, strict=True) if type_.startswith("*")]
        refuse(Plan(device, kernel), kernel, grid, pointers, args[len(pointers) :])
        sizes = [a for a, type_ in zip(args, types, strict=True) if type_.endswith(":16")]
        dtypes = [a.dtype for a in args[: len(pointers)]]
        self.kernel, self.grid, self.dtypes, self.constants = kernel, tuple(grid), dtypes, constants
        self.aligned = all(value % 16 == 0 for value in (*pointers, *sizes))
        key = self.aligned, *dtypes, *constants.values()
        table = device.pack.table(kernel).values()
        self.rows = [(v.cubin, reject(v, device, key)) for v in table]
        self.variant = next((v for v, (_, why) in zip(table, self.rows, strict=True) if why is None), None)

    def __str__(self):
        asked = ", ".join([short(self.dtypes), *(f"{k}={v}" for k, v in self.constants.items())])
        v = self.variant
        chosen = (
            f"{v.cubin}\n   {v.threads} threads, {v.registers} registers, {v.shared} B of shared memory" if v else "NO VARIANT"
        )
        counts = Counter(why for _, why in self.rows if why).most_common()
        others = "".join(f"\n   {count:4} x {why}" for why, count in counts)
        return (
            f"{self.kernel}, grid {self.grid}, {'aligned' if self.aligned else 'any alignment'}, {asked}\n   {chosen}{others}"
        )


def refuse(plan, kernel, grid, pointers, scalars):
    """The errors that a launch ends with where a size is too large."""
    walked = [value for (name, _), value in zip(plan.parameters, [*pointers, *scalars], strict=True) if name in WALKED]
    try:
        plan.pack_into(bytearray(plan.size), 0, *pointers, *scalars, 0, 0)
        fits = max(walked, default=0) <= MOST
    except (struct.error, OverflowError, TypeError):
        fits = False
    if not fits:
        raise ValueError(plan.mismatch(kernel, pointers, scalars))
    check_grid(kernel, *grid)


class Trace:
    """A launcher that launches nothing, and remembers what was asked of it."""

    def __init__(self, name, device):
        self.name, self.device, self.launches = name, device, []
        self.packs = {arch: fit(arch, device.capability) for arch in pack_paths()}

    def multiprocessors(self, tensor):
        return self.device.multiprocessors

    def launch(self, kernel, grid, *args, **constants):
        if not isinstance(args[0], FakeTensor) and 0 not in grid:
            if len(self.launches) == MOST_LAUNCHES:
                raise ValueError(
                    f"explain: {self.name} must take at most {MOST_LAUNCHES} launches, takes more; give fewer rows"
                )
            self.launches.append(Launch(self.device, kernel, grid, args, constants))

    @property
    def chosen(self):
        """What each launch takes: dicts of kernel, grid and cubin, which is None where no variant serves."""
        return [{"kernel": n.kernel, "grid": n.grid, "cubin": n.variant and n.variant.cubin} for n in self.launches]

    @property
    def rows(self):
        """Every candidate of every launch: dicts of launch (from 0), kernel, cubin and the reason against it, or None."""
        return [
            {"launch": n, "kernel": launch.kernel, "cubin": cubin, "rejected": why}
            for n, launch in enumerate(self.launches)
            for cubin, why in launch.rows
        ]

    def __str__(self):
        major, minor = self.device.capability
        assumed = f", as if it had {ASSUMED_MULTIPROCESSORS} multiprocessors" if isinstance(self.device, Target) else ""
        chosen = f"sm_{self.device.pack.arch}: {self.packs[self.device.pack.arch]}"
        others = "".join(f"; not sm_{arch}: {why}" for arch, why in self.packs.items() if arch != self.device.pack.arch)
        launches = "".join(f"\n{n}. {launch}" for n, launch in enumerate(self.launches, 1))
        head = f"{self.name} on compute capability {major}.{minor}{assumed}\npack {chosen}{others}"
        return head + (launches or "\nlaunches nothing")


def add_arguments(parser):
    names = ", ".join(sorted(_op.PUBLIC))
    parser.add_argument("what", help=f"an operator ({names}); or a model: its type (llama), a config.json or the folder of one")
    parser.add_argument("shape", nargs="*", type=parse_shape, help="of each tensor argument: 8x4096, or 8x4096:int64")
    parser.add_argument(
        "--set", nargs="*", default=[], type=parse_option, metavar="NAME=VALUE", help="other arguments, of bind for a model"
    )
    parser.add_argument("--json", action="store_true", help="for programs; errors go to stderr all the same")
    operator = parser.add_argument_group("for an operator")
    operator.add_argument("--dtype", type=parse_dtype, help="of the tensors without their own (bfloat16)")
    operator.add_argument("--arch", type=parse_arch, help="a GPU architecture, like 90; default: that of the current device")
    operator.add_argument("--backward", action="store_true", help="also what the gradients of the floating tensors launch")


def parse_shape(text):
    shape, _, dtype = text.partition(":")
    if not re.fullmatch(r"\d+(x\d+)*", shape):
        raise ArgumentTypeError(f"must be sizes like 8x4096 or 8x4096:int64, got {text!r}")
    return [int(n) for n in shape.split("x")], parse_dtype(dtype) if dtype else None


def parse_dtype(text):
    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype):
        raise ArgumentTypeError(f"must be a dtype of torch like float32, got {text!r}")
    return dtype


def parse_arch(text):
    try:
        capability(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
    return text


def parse_option(text):
    name, equals, value = text.partition("=")
    if not equals:
        raise ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def option(argument, value):
    """The value of an option, which an argument of a schema takes; a ValueError says what it must be."""
    optional, kind = re.fullmatch(r"(Optional\[)?(\w+)\]?", str(argument.real_type)).groups()
    if optional and value is None:
        return None
    if kind == "ScalarType":
        if isinstance(dtype := getattr(torch, str(value), None), torch.dtype):
            return dtype
        raise ValueError(f"explain: {argument.name} must be a dtype of torch like float32, got {value!r}")
    if kind == "Tensor":
        raise ValueError(f"explain: {argument.name} must be given as a shape, like 8x4096, got {value!r}")
    number = kind in ("int", "float") and type(value) is int and -(2**63) <= value < 2**63
    if number or {"float": float, "bool": bool, "str": str}.get(kind) is type(value):
        return value
    raise ValueError(f"explain: {argument.name} must be of type {kind}{' or None' if optional else ''}, got {value!r}")


def misunderstood(args, declared):
    """What is wrong with a command line for an operator of these arguments; None where nothing is."""
    shaped, rest = declared[: len(args.shape)], declared[len(args.shape) :]
    takes = f"{args.what} takes {', '.join(a.name for a in declared)}"
    if len(args.shape) > len(declared):
        return f"{takes}; got {len(args.shape)} shapes"
    if any(math.prod(max(n, 1) for n in shape) >= LARGEST for shape, _ in args.shape):
        return f"a tensor must have fewer than 2**60 numbers, got {', '.join('x'.join(map(str, s)) for s, _ in args.shape)}"
    if other := [a.name for a in shaped if "Tensor" not in str(a.type)]:
        return f"{takes}; a shape was given of {', '.join(other)}, which is no tensor: use --set {other[0]}=VALUE"
    if unknown := sorted(dict(args.set).keys() - {a.name for a in rest}):
        return f"{takes}; unknown {unknown}"
    if missing := [a.name for a in rest if not a.has_default_value() and a.name not in dict(args.set)]:
        return f"{takes}; missing {missing}"
    if args.what.startswith("linear") and math.prod(args.shape[0][0][:-1]) > MOST:
        return f"{args.what} must have at most 2**31 - 2**15 rows, got {math.prod(args.shape[0][0][:-1])}"
    return None if args.arch or torch.cuda.is_available() else "without a CUDA device, --arch must say for which, like 90"


def main(args):
    if args.what not in _op.PUBLIC:
        from . import _report_config

        return _report_config.main(args)
    declared = getattr(torch.ops.liger, args.what).default._schema.arguments
    if wrong := misunderstood(args, declared):
        print(f"explain: {wrong}", file=sys.stderr)
        return 2
    device = "meta" if args.arch else "cuda"  # where tensors are shapes alone, any size costs nothing
    tensors = [torch.zeros(shape, dtype=dtype or args.dtype or torch.bfloat16, device=device) for shape, dtype in args.shape]
    for t, argument in zip(tensors, declared, strict=False):
        constant = argument.name in CONSTANT.get(args.what, ())
        t.requires_grad_(args.backward and t.is_floating_point() and not constant)
    given = dict(args.set)
    try:
        options = {a.name: option(a, given[a.name]) for a in declared if a.name in given}
        trace = explain(args.what, *tensors, arch=args.arch, **options)
    except ValueError as error:  # what the command gives is not what the operator takes
        print(error, file=sys.stderr)
        return 2
    if args.json:
        about = {"arch": trace.device.pack.arch, "packs": trace.packs, "launches": trace.chosen, "candidates": trace.rows}
        print(json.dumps(about, indent=1))
    else:
        print(trace)
    return 0 if all(launch.variant for launch in trace.launches) else 1
