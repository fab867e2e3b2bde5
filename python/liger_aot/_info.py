"""Versions, devices and packs, and which pack serves which device."""

import base64
import ctypes
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import sys

import torch

from . import _build
from ._driver import driver
from ._explain import Target
from ._explain import fit
from ._explain import parse_arch
from ._runtime import FOLDER
from ._runtime import Device
from ._runtime import open_pack
from ._runtime import pack_paths
from ._runtime import version_text

BESIDE = "cuda-bindings", "triton", "transformers"  # what changes what we do, where it is installed
MANIFEST = "variants", "version", "triton", "ptxas", "min_driver", "kernels"


def packs():
    """{architecture: what is in its pack, or what is wrong with it}; and what should be there and is not."""
    return {f"sm_{arch}": describe(path) for arch, path in pack_paths().items()} | wrong_folder() | missing()


def wrong_folder():
    folder = os.environ.get("LIGER_AOT_PACKS")
    if not folder or pathlib.Path(folder).is_dir():
        return {}
    return {"LIGER_AOT_PACKS": {"path": folder, "error": f"must be a folder of packs, got {folder}, which is none; unset it"}}


@functools.cache
def recorded():
    """{path: SHA-256} of the packs that were installed, as the wheel's RECORD has them; none where it was not by a wheel."""
    try:
        files = importlib.metadata.files("liger-aot") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    packs = [f for f in files if f.parent.name == "cubins" and f.hash and f.hash.mode == "sha256"]
    return {pathlib.Path(f.locate()).resolve(): base64.urlsafe_b64decode(f.hash.value + "=") for f in packs}


def missing():
    """As wrong_folder, of the packs that were installed in the package's own folder and are no longer there."""
    own = FOLDER.resolve()
    lost = [path for path in recorded() if path.parent == own and not path.is_file()]
    return {
        path.name: {"path": str(path), "error": f"{path}: was installed and is missing; install liger-aot again"}
        for path in lost
    }


def describe(path):
    try:
        manifest = open_pack(path).manifest
    except RuntimeError as error:
        return {"path": str(path), "error": str(error)}
    about = {"path": str(path), "bytes": path.stat().st_size} | {name: manifest[name] for name in MANIFEST}
    own = FOLDER / path.name
    return about | ({"instead of": str(own)} if path != own and own.exists() else {})


def devices():
    """(what is known of the driver, of each device); why not, where there is none."""
    try:
        found = driver()
        about = {"back end": found.backend.name, "serves CUDA": version_text(found.version)}
    except RuntimeError as error:
        return {"error" if has_driver() else "none": str(error)}, []
    indices = range(torch.cuda.device_count())
    return about, [about_device(found, n) | {"fits": fits(found.capability(n))} for n in indices]


def has_driver():
    """Whether there is a driver that torch would use, in whatever state."""
    if torch.cuda.device_count():
        return True
    if not torch.backends.cuda.is_built():
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def about_device(found, index):
    about = {"name": torch.cuda.get_device_name(index), "capability": "{}.{}".format(*found.capability(index))}
    try:
        arch = Device(found, index).pack.arch
        return about | {"pack": f"sm_{arch}", "fit": fit(arch, found.capability(index))}
    except RuntimeError as error:  # NotImplementedError is one
        return about | {"pack": None, "error": str(error)}


def about_arch(arch):
    """As about_device, of a device that need not be there."""
    about = {"name": f"as if it were {arch}"}
    try:
        target = Target(arch)
    except RuntimeError as error:
        return about | {"pack": None, "error": str(error)}
    chosen, capability = target.pack.arch, target.capability
    about |= {"capability": "{}.{}".format(*capability), "pack": f"sm_{chosen}", "fit": fit(chosen, capability)}
    return about | {"fits": fits(capability)}


def fits(capability):
    """{architecture: how its pack fits a device, or why it does not}."""
    return {f"sm_{arch}": fit(arch, capability) for arch in pack_paths()}


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def collect(arch=None):
    about, found = devices()
    versions = {
        "liger_aot": _build.VERSION,
        "contract": _build.CONTRACT[:12],
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
    } | {package: version(package) for package in BESIDE}
    known = {"versions": versions, "driver": about, "devices": found, "packs": packs()}
    return known | ({"asked": about_arch(arch)} if arch else {})


def served(about):
    """Which pack a device gets and why; the other packs, and why not."""
    if "error" in about:
        return about["error"]
    rest = "".join(f"; not {arch}: {why}" for arch, why in about["fits"].items() if arch != about["pack"])
    return f"{about['pack']} ({about['fit']}){rest}"


def show(known):
    def line(name, value):
        print(f"{name:14} {value}")

    for name, value in known["versions"].items():
        line(name, "none" if value is None else value)
    for name, value in known["driver"].items():
        line("driver", value if name in ("none", "error") else f"{name} {value}")
    for index, about in enumerate(known["devices"]):
        line(f"cuda:{index}", f"{about['name']}, compute capability {about['capability']}: {served(about)}")
    if not known["devices"]:
        line("devices", "none: operators on CPU tensors run the CPU kernels")
    if "asked" in known:
        line(known["asked"]["name"].removeprefix("as if it were "), served(known["asked"]))
    if not known["packs"]:
        line("packs", "none: installed without kernels, only CPU tensors are served")
    for arch, about in known["packs"].items():
        what = about.get("error") or (
            f"{about['variants']} variants of {len(about['kernels'])} kernels, {about['bytes'] / 1e6:.1f} MB, "
            f"Triton {about['triton']}, ptxas {about['ptxas']}, needs a driver for CUDA {version_text(about['min_driver'])}"
        )
        line(arch, what)
        line("", about["path"])
        if "instead of" in about:
            line("", f"instead of {about['instead of']}")


def add_arguments(parser):
    parser.add_argument(
        "--arch", type=parse_arch, help="also which pack a device of this architecture would get, like 90 or 8.6"
    )
    parser.add_argument("--json", action="store_true", help="for programs; errors go to stderr all the same")


def main(args):
    known = collect(args.arch)
    if args.json:
        print(json.dumps(known, indent=1))
    else:
        show(known)
    parts = known["driver"], *known["devices"], *known["packs"].values(), known.get("asked", {})
    bad = [part for part in parts if "error" in part]
    return 1 if bad or not known["packs"] else 0
