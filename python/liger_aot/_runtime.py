"""Find, load and launch compiled kernels:  kernels.name[grid](*args, **constants),  as in Triton.

Selection is a lookup. The architecture of the device picks a pack; alignment, dtypes and constants pick a variant in it.
"""

import contextlib
import ctypes
import errno
import functools
import json
import os
import pathlib
import re
import struct
import threading
import zipfile
import zlib
from collections import Counter
from functools import partial
from types import MethodType

import torch

from . import _driver

try:
    from . import _build
except ImportError as error:
    raise ImportError("liger_aot: the sources that Python found were not built; pip install . in their folder") from error

FOLDER = pathlib.Path(__file__).parent / "cubins"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "i64": torch.int64}
CODES = {"i32": "i", "i64": "q", "fp32": "f"}  # how struct packs a scalar; a pointer is "P"
THREADS_PER_WARP = 32
# What kernels walk over, in int32, by steps that must not pass its end.
WALKED, MOST = ("rows", "n", "width_at", "tokens", "groups", "each"), 2**31 - 2**15
BUFFER_POINTER, BUFFER_SIZE = 1, 2  # CU_LAUNCH_PARAM_*
EXACT, FAMILY, SAME_MAJOR = range(3)
OLDEST = 7, 5  # for which any flavour's ptxas assembles
# What is read of a pack's manifest, besides the schema and the contract.
MANIFEST = {
    "arch": str,
    "version": str,
    "triton": str,
    "ptxas": str,
    "min_driver": int,
    "variants": int,
    "kernels": list,
    "sha256": str,
}
# And of a kernel's entry, and of each of its variants.
ENTRY = {"parameters": list, "variants": list}
VARIANT = {"cubin": str, "dtypes": list, "constants": dict, "aligned": bool, "warps": int, "shared": int, "registers": int}
# What reading a zip raises when bytes of it are missing or changed, its headers' flags and methods among them.
DAMAGE = zipfile.BadZipFile, zlib.error, struct.error, KeyError, ValueError, EOFError, OSError, RuntimeError


class Pack:
    """The variants for one architecture: a zip of cubins and, for each kernel, the table of its variants."""

    def __init__(self, path):
        self.path, self.lock = path, threading.Lock()
        try:
            self.archive = zipfile.ZipFile(path)
        except DAMAGE as error:
            raise self.damaged("its directory", error) from error
        self.manifest = manifest = self.parsed("manifest.json")
        if manifest.get("schema") != _build.SCHEMA or manifest.get("contract") != _build.CONTRACT:
            raise RuntimeError(
                f"liger_aot: {path} was built for liger-aot {manifest.get('version')} (contract "
                f"{str(manifest.get('contract'))[:12]}), this is {_build.VERSION} (contract {_build.CONTRACT[:12]}); "
                "install liger-aot again, or build the pack anew from the sources of this version"
            )
        self.hold("manifest.json", manifest, MANIFEST)
        self.arch = manifest["arch"]
        if path.stem != f"sm_{self.arch}":
            raise RuntimeError(f"liger_aot: {path} holds kernels for sm_{self.arch}; name it sm_{self.arch}.zip")
        self.entries = {}

    def damaged(self, what, error):
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is a wrong offset, in the file
            return RuntimeError(
                f"liger_aot: {what} of {self.path} cannot be read ({error}); let this user read it, or start the process again "
                "if the file was replaced meanwhile"
            )
        remedy = "install liger-aot again" if own(self.path) else "make the pack again, or unset LIGER_AOT_PACKS"
        return RuntimeError(f"liger_aot: {self.path} is damaged: {what} cannot be read ({error}); {remedy}")

    def read(self, name):
        with self.lock:  # a ZipFile has one file position
            try:
                return self.archive.read(name)
            except DAMAGE as error:
                raise self.damaged(name, error) from error

    def parsed(self, name):
        """An entry that is a JSON object."""
        text = self.read(name)
        try:
            found = json.loads(text)
        except ValueError as error:
            raise self.damaged(name, error) from error
        if not isinstance(found, dict):
            raise self.damaged(name, f"a JSON object is needed, got a {type(found).__name__}")
        return found

    def hold(self, name, found, fields):
        """An object of an entry has all that is read of it; a list holds something."""
        values = {field: found.get(field) for field in fields}
        if wrong := [field for field, value in values.items() if not isinstance(value, fields[field]) or value == []]:
            raise self.damaged(name, f"{', '.join(wrong)}: missing, empty or of another type")

    def entry(self, kernel):
        """What was built of one kernel, as ([(name, Triton type)], {key: Variant}); no other kernel's entry is read."""
        if kernel not in self.entries:
            if kernel not in self.manifest["kernels"]:
                raise NotImplementedError(
                    f"{kernel}: not in {self.path.name}, which holds {', '.join(self.manifest['kernels'])}"
                )
            name = f"{kernel}.json"
            self.hold(name, found := self.parsed(name), ENTRY)
            try:
                for row in found["variants"]:
                    self.hold(name, row, VARIANT)
                for _, type_ in found["parameters"]:
                    code(type_)
                variants = [Variant(**row) for row in found["variants"]]
            except (AttributeError, KeyError, TypeError, ValueError) as error:  # in what the fields hold
                raise self.damaged(name, f"{type(error).__name__}: {error}") from error
            self.entries[kernel] = found["parameters"], {v.key: v for v in variants}
        return self.entries[kernel]

    def parameters(self, kernel):
        """[(name, Triton type)], constants left out."""
        return self.entry(kernel)[0]

    def table(self, kernel):
        """{key: Variant}."""
        return self.entry(kernel)[1]


class Variant:
    """One form of a kernel: a cubin, what it is for, and how many threads and bytes of shared memory a program takes."""

    def __init__(self, *, cubin, dtypes, constants, aligned, warps, shared, registers):
        self.cubin, self.constants, self.aligned, self.registers = cubin, constants, aligned, registers
        self.dtypes, self.threads, self.shared = [DTYPES[d] for d in dtypes], warps * THREADS_PER_WARP, shared
        self.key = self.aligned, *self.dtypes, *self.constants.values()


LOADING = threading.RLock()


class Arguments(threading.local):
    """This thread's launch buffer: backward runs on other threads, and the driver reads it with the GIL released."""

    def __init__(self, size):
        self.buffer = ctypes.create_string_buffer(size)
        self.size = ctypes.c_size_t(size)
        self.extra = (ctypes.c_void_p * 5)(
            BUFFER_POINTER, ctypes.addressof(self.buffer), BUFFER_SIZE, ctypes.addressof(self.size), 0
        )
        self.here = self.buffer, ctypes.addressof(self.extra)


class Device:
    """A GPU: its driver, its pack, and for each kernel what was selected on it so far."""

    def __init__(self, driver, index):
        self.driver, self.index = driver, index
        self.capability = driver.capability(index)
        self.multiprocessors = driver.multiprocessors(index)
        self.max_shared_memory = driver.max_shared_memory(index)
        self.pack = select_pack(self.capability)
        if driver.version < self.pack.manifest["min_driver"]:
            raise RuntimeError(
                f"liger_aot: the NVIDIA driver serves CUDA {version_text(driver.version)}, the sm_{self.pack.arch} kernels "
                f"need {version_text(self.pack.manifest['min_driver'])} or newer; update the driver, or "
                "install the wheel for an older CUDA, where there is one with kernels for this device (docs/wheels.md)"
            )
        self.plans = {}

    def plan(self, kernel):
        return self.plans.setdefault(kernel, Plan(self, kernel))

    def loaded(self, kernel, key):
        """What a launch of the variant for a key takes: (handle, threads, bytes of shared memory, index of the device)."""
        return *self.plan(kernel).load(self, kernel, key), self.index

    def variant(self, kernel, key):
        table = self.pack.table(kernel)
        found = table.get(key)
        if found is None or found.shared > self.max_shared_memory:
            raise NotImplementedError(refusal(self, kernel, key, table))
        return found


class Plan:
    """How the variants of one kernel are launched on one device: they differ in dtypes and constants, not in parameters."""

    def __init__(self, device, kernel):
        parameters = device.pack.parameters(kernel)
        self.parameters = parameters
        # The build makes pointers come first. Triton appends two to every kernel's parameters: global and profiler scratch.
        form = struct.Struct("".join(code(type_) for _, type_ in parameters) + "PP")
        self.pack_into, self.size = form.pack_into, form.size
        self.loaded = {}  # key -> (handle, threads, shared)

    def load(self, device, kernel, key):
        variant = device.variant(kernel, key)
        with LOADING:
            if key not in self.loaded:
                image = device.pack.read(variant.cubin)
                try:
                    handle = device.driver.load(image, kernel, variant.shared, device.index)
                except RuntimeError as error:
                    raise RuntimeError(
                        f"liger_aot: {variant.cubin} of {device.pack.path} was not loaded: {error}; whether the pack is whole "
                        "says python -m liger_aot verify"
                    ) from error
                self.loaded[key] = handle, variant.threads, variant.shared
        return self.loaded[key]

    def mismatch(self, kernel, pointers, scalars):
        """Which argument it was that struct did not pack."""
        values = [*pointers, *scalars]
        for (name, type_), value in zip(self.parameters, values, strict=True):
            try:
                struct.pack(form := code(type_), value)
                if name in WALKED and value > MOST:
                    return f"{kernel}: {name} must be an integer up to 2**31 - 2**15 (split the tensor), got {value}"
            except (struct.error, OverflowError, TypeError):
                what = {"i": "an integer below 2**31 (split the tensor, or make it contiguous)", "f": "a number"}
                return f"{kernel}: {name} must be {what.get(form, 'an integer below 2**63')}, got {value}"
        return f"{kernel}: {self.size} bytes of arguments are more than the launch buffer holds"


def code(type_):
    """How struct packs an argument of a Triton type."""
    return "P" if type_.startswith("*") else CODES[type_.removesuffix(":16")]


def version_text(version):
    return f"{version // 1000}.{version % 1000 // 10}"


def reject(variant, device, key):
    """Why a variant does not serve a key; None if it does."""
    aligned, *rest = key
    dtypes, constants = rest[: len(variant.dtypes)], rest[len(variant.dtypes) :]
    if list(dtypes) != variant.dtypes:
        return f"for {short(variant.dtypes)}"
    if list(constants) != list(variant.constants.values()):
        return f"for {', '.join(f'{k}={v}' for k, v in variant.constants.items())}"
    if aligned != variant.aligned:
        return "for pointers and sizes divisible by 16" if variant.aligned else "for any alignment: the aligned one is faster"
    if variant.shared > device.max_shared_memory:
        return f"needs {variant.shared} B of shared memory, the device has {device.max_shared_memory}"
    return None


def short(dtypes):
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def refusal(device, kernel, key, table):
    reasons = Counter(reject(v, device, key) for v in table.values())
    trace = [f"\n  {count} x {reason}" for reason, count in reasons.items()]
    return (
        f"{kernel}: no variant in {device.pack.path.name} for {'aligned' if key[0] else 'any'} pointers, {short_key(key)}. "
        f"Built are {len(table)}, rejected for:{''.join(trace)}\nRemedy: cast the inputs to a built combination, or declare "
        "the variant in csrc_triton and build; liger_aot.explain lists every candidate"
    )


def short_key(key):
    return ", ".join(str(k).removeprefix("torch.") for k in key[1:])


def pack_paths():
    """{architecture: path} of every pack: the package's own, then those in the folder LIGER_AOT_PACKS."""
    return packs_beside(os.environ.get("LIGER_AOT_PACKS"))


@functools.cache
def packs_beside(folder):
    folders = [FOLDER, *filter(None, [folder])]
    found = [p for folder in folders for p in sorted(pathlib.Path(folder).glob("sm_*.zip"))]
    return {p.stem.removeprefix("sm_"): p for p in found if re.fullmatch(r"sm_\d+[af]?", p.stem)}


def own(path):
    """Whether a pack is the package's, and not somebody's in LIGER_AOT_PACKS."""
    return path.parent == FOLDER


open_pack = functools.cache(Pack)


def fitness(arch, capability):
    """How a pack serves a device: (EXACT | FAMILY | SAME_MAJOR, minor distance), or a sentence why it does not."""
    number, (major, minor) = int(arch.rstrip("af")), capability
    if number == 10 * major + minor:
        return EXACT, 0
    if number // 10 != major:
        return f"runs on {number // 10}.x"
    if arch.endswith("a"):
        return f"runs on {number // 10}.{number % 10} alone"
    if number % 10 > minor:
        return f"needs {number // 10}.{number % 10} or a newer minor version"
    return FAMILY if arch.endswith("f") else SAME_MAJOR, minor - number % 10


def select_pack(capability):
    paths = pack_paths()
    ranks = {arch: fitness(arch, capability) for arch in paths}
    fitting = sorted((rank, arch) for arch, rank in ranks.items() if not isinstance(rank, str))
    if not fitting:
        trace = "".join(f"\n  sm_{arch}: {why}" for arch, why in ranks.items()) or " none"
        if (folder := os.environ.get("LIGER_AOT_PACKS")) and not pathlib.Path(folder).is_dir():
            trace += f"\n  LIGER_AOT_PACKS: {folder} is no folder"
        remedy = (
            "install the wheel for another CUDA, where that has them (docs/wheels.md), or build a pack from the sources, "
            f"make pack ARCH={capability[0]}{capability[1]} (or a wheel with LIGER_AOT_ARCHS), and name its folder in "
            "LIGER_AOT_PACKS"
        )
        if capability < OLDEST:
            remedy = "none: kernels can be built for 7.5 and newer; unbind the model, or use torch's own functions"
        raise NotImplementedError(
            f"liger_aot: no kernels for compute capability {capability[0]}.{capability[1]}. Packs:{trace}\nRemedy: {remedy}"
        )
    return open_pack(paths[fitting[0][1]])


class Cuda:
    """Launches on the device of a kernel's first tensor."""

    def __init__(self, driver=_driver.driver):
        self.find_driver, self.devices, self.launches = driver, {}, {}

    def device(self, tensor, what="liger_aot"):
        index = tensor.get_device()
        if index < 0 and index not in self.devices:
            raise ValueError(f"{what}: tensors must be on a CUDA device, got {tensor.device}")
        return self.at(index)

    def at(self, index):
        return self.devices.get(index) or self.devices.setdefault(index, Device(self.find_driver(), index))

    def multiprocessors(self, tensor):
        device = self.devices.get(tensor.get_device())
        if device is None and tensor.is_meta:
            return 1
        return (device or self.device(tensor)).multiprocessors

    def prepare(self, kernel, tensor):
        """What launches a kernel: of a grid, the kernel's arguments and its constants."""
        if kernel not in self.launches:
            self.launches[kernel] = spell_out(self, kernel, self.device(tensor, kernel))
        return self.launches[kernel]


# A launch in so many words: going through the parameters in loops takes half as long again.
LAUNCH = """\
def {kernel}(grid_, {names}):
    if {first}.is_meta or 0 in grid_:
        return  # tracing: the shapes are known, nothing runs; an empty grid: nothing to do, and the driver refuses it
    buffer_, address_ = arguments_.here
    {pointers} = {addresses}
    try:
        pack_into_(buffer_, 0, {values}, 0, 0)
        if {beyond}:
            raise OverflowError
    except UNFIT_:
        raise ValueError(mismatch_("{kernel}", [{pointers}], [{scalars}])) from None
    key_ = {first}.get_device(), not ({divisible}) & 15, {dtypes}, {constants}
    found_ = variants_.get(key_) or select_({first}, key_)
    handle_, threads_, shared_, index_ = found_
    if current_device_() != index_:
        with guard_(index_):
            return {kernel}(grid_, {passed})
    x_, y_ = grid_ if len(grid_) == 2 else (grid_[0], 1)
    (status_,) = launch_(handle_, x_, y_, 1, threads_, 1, 1, shared_, stream_(index_), 0, address_)
    if status_:
        relaunch_(status_, "{kernel}", index_, handle_, x_, y_, 1, threads_, 1, 1, shared_, stream_(index_), 0, address_)
"""


def spell_out(launcher, kernel, device):
    plan, driver, variants = device.plan(kernel), device.driver, {}
    parameters = dict(plan.parameters)
    constants = list(next(iter(device.pack.table(kernel).values())).constants)
    tensors = [name for name, type_ in parameters.items() if type_.startswith("*")]
    scalars = [name for name in parameters if name not in tensors]
    pointers = [f"{name}_" for name in tensors]

    def select(tensor, key):
        variants[key] = launcher.device(tensor, kernel).loaded(kernel, key[1:])
        return variants[key]

    text = LAUNCH.format(
        kernel=kernel,
        names=", ".join([*parameters, *(["*", *constants] if constants else [])]),
        passed=", ".join([*parameters, *(f"{name}={name}" for name in constants)]),
        first=tensors[0],
        pointers=", ".join(pointers) + ",",
        addresses=", ".join(f"{name}.data_ptr()" for name in tensors) + ",",
        scalars=", ".join(scalars),
        values=", ".join([*pointers, *scalars]),
        beyond=" or ".join(f"{name} > MOST_" for name in parameters if name in WALKED) or "False",
        divisible=" | ".join([*pointers, *(name for name, type_ in parameters.items() if type_.endswith(":16"))]),
        dtypes=", ".join(f"{name}.dtype" for name in tensors),
        constants=", ".join(constants),
    )
    scope = {
        "arguments_": Arguments(plan.size),
        "pack_into_": plan.pack_into,
        "MOST_": MOST,
        "UNFIT_": (struct.error, OverflowError, TypeError),
        "mismatch_": plan.mismatch,
        "variants_": variants,
        "select_": select,
        "current_device_": driver.current_device,
        "guard_": driver.guard,
        "launch_": driver.launch,
        "stream_": driver.stream,
        "relaunch_": driver.relaunch,
    }
    exec(text, scope)
    return scope[kernel]


class Kernel:
    """One Triton kernel by name, whichever variants of it exist."""

    def __init__(self, name, launcher):
        self.name = name
        self.launched_by(launcher)

    def launched_by(self, launcher):
        self.launcher, self.launch = launcher, self.first

    def first(self, grid, *args, **constants):
        if hasattr(self.launcher, "prepare"):
            if args[0].is_meta or 0 in grid:
                return
            self.launch = self.launcher.prepare(self.name, args[0])
        else:
            self.launch = partial(self.launcher.launch, self.name)
        self.launch(grid, *args, **constants)

    def __getitem__(self, grid):
        return MethodType(self.launch, grid)


class Kernels:
    """Kernels by name, and what launches them."""

    def __init__(self):
        self.launcher = Cuda()

    def __getattr__(self, name):
        kernel = self.__dict__[name] = Kernel(name, self.launcher)
        return kernel

    @property
    def launcher(self):
        return self.__dict__["launcher_"]

    @launcher.setter
    def launcher(self, launcher):
        self.__dict__["launcher_"], self.multiprocessors = launcher, launcher.multiprocessors
        for kernel in list(vars(self).values()):
            if isinstance(kernel, Kernel):
                kernel.launched_by(launcher)

    @contextlib.contextmanager
    def launched_by(self, launcher):
        """Launch with something else inside the `with`: an interpreter, a stub, a trace."""
        before, self.launcher = self.launcher, launcher
        try:
            yield
        finally:
            self.launcher = before


kernels = Kernels()


def cdiv(a, b):
    return -(-a // b)


def fit(n, blocks):
    """The smallest block that holds n, else the largest, over which the kernel loops. Under tracing any will do."""
    return next((b for b in blocks if b >= n), blocks[-1]) if type(n) is int else blocks[0]


def programs(tensor, rows, each=1):
    """As many programs as the device has multiprocessors, times `each`, but no more than rows."""
    if type(rows) is not int:
        return 1
    most = each * kernels.multiprocessors(tensor)
    return rows if rows < most else most


def after_fork():
    """The driver does not survive a fork: say so instead of crashing in it."""
    open_pack.cache_clear()  # parent and child would move one file position
    if _driver.driver.cache_info().currsize or getattr(kernels.launcher, "devices", None):

        def refuse():
            raise RuntimeError("liger_aot: this process was forked after CUDA was used; start it with the spawn method")

        kernels.launcher = Cuda(refuse)


os.register_at_fork(after_in_child=after_fork)
