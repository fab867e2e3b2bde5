"""Versions, devices and packs, and which pack serves which device."""

import json
import platform
import sys

import torch

from . import _build
from ._driver import driver
from ._explain import fit
from ._runtime import Device
from ._runtime import open_pack
from ._runtime import pack_paths
from ._runtime import version_text


def packs():
    """{architecture: what is in its pack, or what is wrong with it}."""
    return {f"sm_{arch}": describe(path) for arch, path in pack_paths().items()}


def describe(path):
    try:
        manifest = open_pack(path).manifest
    except RuntimeError as error:
        return {"path": str(path), "error": str(error)}
    return {"path": str(path), "bytes": path.stat().st_size} | {
        name: manifest[name] for name in ("variants", "version", "triton", "ptxas", "min_driver", "kernels")
    }


def devices():
    """(what is known of the driver, of each device); why not, where there is none."""
    try:
        found = driver()
        about = {"back end": found.backend.name, "serves CUDA": version_text(found.version)}
    except RuntimeError as error:
        return {"none": str(error)}, []
    return about, [about_device(found, index) for index in range(torch.cuda.device_count())]


def about_device(found, index):
    about = {"name": torch.cuda.get_device_name(index), "capability": "{}.{}".format(*found.capability(index))}
    try:
        arch = Device(found, index).pack.arch
        return about | {"pack": f"sm_{arch}", "fit": fit(arch, found.capability(index))}
    except RuntimeError as error:  # NotImplementedError is one
        return about | {"pack": None, "error": str(error)}


def collect():
    about, found = devices()
    versions = {
        "liger_aot": _build.VERSION,
        "contract": _build.CONTRACT[:12],
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
    }
    return {"versions": versions, "driver": about, "devices": found, "packs": packs()}


def add_arguments(parser):
    parser.add_argument("--json", action="store_true")


def main(args):
    known = collect()
    if args.json:
        print(json.dumps(known, indent=1))
    else:
        for part in ("versions", "driver"):
            print("".join(f"{name:12} {value}\n" for name, value in known[part].items()), end="")
        for index, about in enumerate(known["devices"]):
            served = about.get("error") or f"{about['pack']} ({about['fit']})"
            print(f"cuda:{index:<7} {about['name']}, compute capability {about['capability']}: {served}")
        if not known["devices"]:
            print("devices      none: operators on CPU tensors run the CPU kernels")
        for arch, about in known["packs"].items():
            what = about.get("error") or (
                f"{about['variants']} variants of {len(about['kernels'])} kernels, {about['bytes'] / 1e6:.1f} MB, "
                f"Triton {about['triton']}, ptxas {about['ptxas']}, needs a driver for CUDA {version_text(about['min_driver'])}"
            )
            print(f"{arch:12} {what}\n{'':12} {about['path']}")
    bad = [p for p in (*known["devices"], *known["packs"].values()) if "error" in p]
    return 1 if bad or not known["packs"] else 0
