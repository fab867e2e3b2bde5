"""Compile Triton kernels ahead of time, into one pack per GPU architecture.

A kernel file declares with @variants what to build of each kernel. CMake runs, for each file and architecture,
    python _aot.py compile rms_norm.py 100f OUT/rms_norm.zip
then, once for an architecture, and once for all,
    python _aot.py pack 100f VERSION OUT/sm_100f.zip OUT/*.zip
    python _aot.py contract VERSION OUT/_build.py
and `python _aot.py toolchain` says what compiles.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import tempfile
import time
import zipfile

SCHEMA = 1  # the manifest's form
ABI = 1  # how the launcher packs arguments: by C alignment, then the two scratch pointers that Triton appends
OPTIONS = ("num_warps", "num_stages", "maxnreg")
EPOCH = (1980, 1, 1, 0, 0, 0)
FOLDER = pathlib.Path(__file__).resolve().parent


def variants(where=lambda: True, scalar=(), mixed=(), **spec):
    """Declare the forms of a kernel to build, one keyword per kernel parameter.

    A string is a Triton type ("*bf16", "i32", "fp32"). A list is a constexpr, or a name standing in types, to try value
    by value. num_warps, num_stages and maxnreg are numbers or functions of the lists; `where` drops forms.

    Every form is built twice: for any arguments, and faster for pointers and "i32:16" integers divisible by 16.
    `scalar` names "loads" or "stores" where the kernel moves single numbers only, so that none can be 128 bits wide; `mixed`,
    where beside those that are it looks up so many single numbers that they are the most.
    """

    def attach(kernel):
        unknown = [k for k, v in spec.items() if k not in (*kernel.arg_names, *OPTIONS) and not isinstance(v, list)]
        if unknown:
            raise TypeError(f"{kernel.__name__}: {', '.join(unknown)} is neither a parameter, an option nor a list")
        kernel.variants = list(_expand(kernel.arg_names, where, spec))
        kernel.scalar, kernel.mixed = scalar, mixed
        kernel.parameters = {p: spec[p] for p in kernel.arg_names if not isinstance(spec[p], list)}
        pointers = [t.startswith("*") for t in kernel.parameters.values()]
        if pointers != sorted(pointers, reverse=True):
            raise TypeError(f"{kernel.__name__}: pointers must come before the other parameters, for the launcher's sake")
        return kernel

    return attach


def _expand(names, where, spec):
    axes = {name: values for name, values in spec.items() if isinstance(values, list)}
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        if _evaluate(where, point):
            yield (
                {p: _fill(spec[p], point) for p in names if p not in axes},
                {p: point[p] for p in names if p in axes},
                {option: _evaluate(spec[option], point) for option in OPTIONS if option in spec},
            )


def _fill(type_, point):
    name = type_.lstrip("*")
    return f"*{point[name]}" if name in point else type_


def _evaluate(value, point):
    return value(*(point[p] for p in inspect.signature(value).parameters)) if callable(value) else value


def source_files():
    """The kernel files: a leading underscore marks machinery."""
    return sorted(FOLDER.glob("[a-z]*.py"))


def contract():
    """The hash that ties a package to its packs: over every kernel's source and signature, and the ABI."""
    digest = hashlib.sha256(f"schema {SCHEMA}, ABI {ABI}".encode())
    for source in sorted(FOLDER.glob("*.py")):
        digest.update(f"\n{source.name}\n".encode() + source.read_bytes())
    return digest.hexdigest()


@functools.cache
def ptxas():
    """The pinned assembler: what LIGER_AOT_PTXAS names, else the one of the nvidia-cuda-nvcc package."""
    if named := os.environ.get("LIGER_AOT_PTXAS"):
        return pathlib.Path(named)
    spec = importlib.util.find_spec("nvidia")
    found = [
        p for folder in (spec.submodule_search_locations if spec else []) for p in pathlib.Path(folder).glob("*/bin/ptxas")
    ]
    if len(found) != 1:
        raise SystemExit(
            f"ptxas: need exactly one from an nvidia-cuda-nvcc package, found {found or 'none'}; or set LIGER_AOT_PTXAS"
        )
    return found[0]


@functools.cache
def ptxas_version():
    text = subprocess.run([ptxas(), "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", text)[1]


def ptx_version():
    """The newest PTX that the pinned assembler reads, as Triton counts: CUDA 12.9 reads PTX 8.8, CUDA 13.0 PTX 9.0."""
    major, minor = map(int, ptxas_version().split(".")[:2])
    return {12: 80 + minor - (minor >= 6), 13: 90 + minor}[major]


def min_driver(arch):
    """The oldest CUDA driver API version (12090 is 12.9) that loads what this ptxas writes for arch."""
    major, minor = map(int, ptxas_version().split(".")[:2])
    if major == 12 and int(arch.rstrip("af")) <= 90:  # which CUDA 12.0 knew
        return 12000
    return 1000 * major + 10 * minor


def assemble(ptx, arch):
    """(cubin, ptxas -v report). Triton writes `.target sm_100a`, which one chip runs; sm_100f runs on its family."""
    ptx = re.sub(r"^\.target sm_\w+", f".target sm_{arch}", ptx, count=1, flags=re.M)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = pathlib.Path(folder, "kernel.ptx"), pathlib.Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [ptxas(), "-v", f"--gpu-name=sm_{arch}", source, "-o", binary]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ptxas {ptxas_version()}: {done.stderr}")
        return binary.read_bytes(), done.stderr


def compile_variant(kernel, types, constants, options, aligned, arch):
    """(manifest entry, cubin) of one form of a kernel; refused by the build gate when it is not what it must be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import _gate

    report = []

    def own_assembler(backend, stages, *_):
        def cubin(ptx, metadata):
            binary, text = assemble(ptx, arch)
            report.append(text)
            return binary

        stages["cubin"] = cubin

    signature = {p: types.get(p, "constexpr").removesuffix(":16") for p in kernel.arg_names}
    divisible = [
        i for i, p in enumerate(kernel.arg_names) if types.get(p, "").startswith("*") or types.get(p, "").endswith(":16")
    ]
    dtypes = [t.strip("*") for t in types.values() if t.startswith("*")]
    parts = [*dtypes, *(f"{k}{v}" for k, v in constants.items()), "aligned" if aligned else "any"]
    file = "-".join([kernel.__name__, *parts]) + ".cubin"
    name = f"{file} for sm_{arch}"
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in divisible if aligned})
    target = GPUTarget("cuda", int(arch.rstrip("af")), 32)
    with triton.knobs.runtime.scope():
        # Triton asks the hook without arguments for its part of the cache key.
        triton.knobs.runtime.add_stages_inspection_hook = lambda *a: own_assembler(*a) if a else (ptxas_version(), arch)
        try:
            binary = triton.compile(source, target=target, options={**options, "ptx_version": ptx_version()})
        except BaseException:
            print(f"{name} does not compile", file=sys.stderr)
            raise

    entry = {
        "cubin": file,
        "dtypes": dtypes,
        "constants": constants,
        "aligned": aligned,
        "warps": binary.metadata.num_warps,
        "shared": binary.metadata.shared,
    }
    entry["registers"] = _gate.check(name, binary.asm["cubin"], binary.metadata, report[0], kernel, types, aligned)
    return entry, binary.asm["cubin"]


@contextlib.contextmanager
def whole(out, **options):
    """A zip to write to, which has its name only when it is complete: half of one would look new to the next build."""
    started = out.with_suffix(".part")
    with zipfile.ZipFile(started, "w", **options) as archive:
        yield archive
    started.replace(out)


def compile_file(source, arch, out):
    """Every declared form of every kernel in one file, into one partial pack."""
    import _gate

    started = time.monotonic()
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # without paths and line numbers, half the size and reproducible
    kernels = {name: k for name, k in runpy.run_path(source).items() if hasattr(k, "variants")}
    count, aligned = 0, []
    with tempfile.TemporaryDirectory() as cache, whole(out) as part:
        os.environ["TRITON_CACHE_DIR"] = cache
        for name, kernel in sorted(kernels.items()):
            forms = [(*v, aligned) for v in kernel.variants for aligned in (True, False)]
            built = [compile_variant(kernel, *form, arch) for form in forms]
            table = {"name": name, "parameters": list(kernel.parameters.items()), "variants": [entry for entry, _ in built]}
            part.writestr(f"{name}.json", json.dumps(table))
            for entry, cubin in built:
                part.writestr(entry["cubin"], cubin)
                if entry["aligned"]:
                    aligned.append((f"{entry['cubin']} for sm_{arch}", kernel, cubin))
            count += len(built)
        _gate.check_widths(aligned, arch)
    print(f"sm_{arch} {source.stem}: {count} variants in {time.monotonic() - started:.0f} s")


def pack(arch, version, out, parts):
    """Merge the partial packs of one architecture; the same parts always give the same bytes."""
    import triton

    entries = {}
    for part in parts:
        with zipfile.ZipFile(part) as archive:
            for name in archive.namelist():
                if name in entries:
                    raise SystemExit(
                        f"{part}: {name} exists already; kernels, and variants of a kernel, need names of their own"
                    )
                entries[name] = archive.read(name)
    manifest = {
        "schema": SCHEMA,
        "version": version,
        "contract": contract(),
        "arch": arch,
        "triton": triton.__version__,
        "ptxas": ptxas_version(),
        "min_driver": min_driver(arch),
        "kernels": sorted(name.removesuffix(".json") for name in entries if name.endswith(".json")),
        "variants": sum(name.endswith(".cubin") for name in entries),
        "sha256": hashlib.sha256(b"".join(entries[name] for name in sorted(entries))).hexdigest(),
    }
    entries["manifest.json"] = json.dumps(manifest, indent=1).encode()
    with whole(out, compression=zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(entries):
            archive.writestr(zipfile.ZipInfo(name, EPOCH), entries[name], zipfile.ZIP_DEFLATED)
    print(f"sm_{arch}: {manifest['variants']} variants, {out.stat().st_size / 1e6:.1f} MB")


def toolchain():
    import triton

    print(f"Triton {triton.__version__}, ptxas {ptxas_version()}")


def write_build_file(version, out):
    out.write_text(f'"""Written by the build."""\n\nVERSION = "{version}"\nSCHEMA = {SCHEMA}\nCONTRACT = "{contract()}"\n')


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("compile")
    command.add_argument("source", type=pathlib.Path)
    command.add_argument("arch")
    command.add_argument("out", type=pathlib.Path)
    command = commands.add_parser("pack")
    command.add_argument("arch")
    command.add_argument("version")
    command.add_argument("out", type=pathlib.Path)
    command.add_argument("parts", nargs="+", type=pathlib.Path)
    command = commands.add_parser("contract")
    command.add_argument("version")
    command.add_argument("out", type=pathlib.Path)
    commands.add_parser("toolchain")
    given = vars(parser.parse_args())
    run = {"compile": compile_file, "pack": pack, "contract": write_build_file, "toolchain": toolchain}
    run[given.pop("command")](**given)


if __name__ == "__main__":
    main()
