"""All benchmarks that need no GPU, held to the numbers to reach: a table, a JSON file and a plot beside it.

python benchmarks/run.py [--out out/bench.json] [--wheel FILE] [--quick]
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
import time

import host
import plot
import startup
import torch

import liger_aot
from liger_aot import _runtime

ROOT = pathlib.Path(__file__).parent.parent
VARIANTS, WHEEL_MB, BUILD_SECONDS, CORES, ARCHITECTURES = 1500, 50.0, 1200.0, 2, 4  # of all operators
SAME_RUN = 10.0  # seconds: ninja counts from its start, which its log does not hold
PACKAGES = "torch", "triton", "liger-kernel", "matplotlib"
CAPTION = f"""forward: without gradients, ours through torch.ops; both: forward and backward, called from Python as Liger is.
Host cost is the calling thread's CPU time on CPU tensors, the least of interleaved rounds. No kernel runs. What is stubbed out:
  ours:   the driver, by Python functions that take 0.1 us a launch; all else is what runs on a GPU machine
  Liger:  Triton's driver and the C function that launches, by such functions; Triton's JIT dispatch and Liger's functions are
          theirs, their kernels compiled beforehand. CPU tensors need no torch.cuda.device(), which Liger enters for each launch
empty is an autograd.Function that saves and allocates the same; operators: the same, allocating in two operators of its own.
Numbers to reach: the allocations + {host.FORWARD_ABOVE_ALLOCATIONS:g} us, and the factors.
start is wall clock, median over fresh processes."""


def row(part, what, value, unit, bar=None, note=""):
    return {
        "part": part,
        "what": what,
        "value": value,
        "unit": unit,
        "bar": bar,
        "met": None if bar is None else value <= bar,
        "note": note,
    }


def host_rows(results):
    for name, t in results.items():
        if "forward, allocations" in t:
            bar = t["forward, allocations"] + host.FORWARD_ABOVE_ALLOCATIONS
            yield row(name, "forward", t["forward"], "us", bar, f"allocations {t['forward, allocations']:.1f} us")
        else:
            yield row(name, "forward", t["forward"], "us")
        if "forward, Liger" in t:
            ratio = t["forward"] / t["forward, Liger"]
            yield row(name, "forward / Liger's", ratio, "x", host.FORWARD_OF_LIGER, f"Liger {t['forward, Liger']:.1f} us")
        yield row(name, "both", t["both"], "us", note=f"through torch.ops {t['both, torch.ops']:.1f} us")
        if "both, empty" in t:
            empty = t["both, empty"]
            note = (
                f"empty {empty:.1f} us; through torch.ops {t['both, torch.ops'] / empty:.2f} x; empty in operators "
                f"{t['both, empty operators'] / empty:.2f} x, with the launches {t['both, empty and launches'] / empty:.2f} x"
            )
            yield row(name, "both / empty", t["both"] / empty, "x", host.BOTH_OF_EMPTY, note)
        if "both, Liger" in t:
            ratio = t["both"] / t["both, Liger"]
            yield row(name, "both / Liger's", ratio, "x", host.BOTH_OF_LIGER, f"Liger {t['both, Liger']:.1f} us")


def startup_rows(times):
    name, (wall, cpu) = max(times["first call"].items(), key=lambda item: item[1])
    yield row("start", "first call", wall, "ms", startup.FIRST_CALL, f"of {name}, the slowest; CPU time {cpu:.1f} ms")
    wall, cpu = times["import"]
    yield row("start", "import", wall, "ms", startup.IMPORT, f"after torch; CPU time {cpu:.1f} ms")


def size_rows(wheel):
    for arch, path in _runtime.pack_paths().items():
        count = _runtime.open_pack(path).manifest["variants"]
        yield row("size", f"variants, sm_{arch}", count, "", VARIANTS, f"pack of {path.stat().st_size / 1e6:.1f} MB")
    if wheel:
        packs = len(_runtime.pack_paths())
        whole = packs >= ARCHITECTURES
        note = f"{packs} architectures" + ("" if whole else f"; the number to reach is for {ARCHITECTURES}")
        yield row("size", "wheel", wheel.stat().st_size / 1e6, "MB", WHEEL_MB if whole else None, note)


def build_rows(log):
    """The wall-clock time from the first compiling edge's start to the last one's end, if one run of ninja built all."""
    if not log.exists():
        return
    edges, origins = {}, []
    for line in log.read_text().splitlines()[1:]:
        start, end, changed, output, _ = line.split("\t")
        if "/parts/" in output:
            edges[pathlib.Path(output).stem] = int(start) / 1000, int(end) / 1000
            origins.append(int(changed) / 1e9 - int(end) / 1000)
    if not edges or max(origins) - min(origins) > SAME_RUN:
        return
    archs = {name.rpartition("sm_")[2] for name in edges}
    seconds = max(end for _, end in edges.values()) - min(start for start, _ in edges.values())
    note = f"wall clock, {len(edges)} edges, {len(archs)} architectures, {os.cpu_count()} cores"
    judged = len(archs) >= ARCHITECTURES and os.cpu_count() <= CORES
    yield row("build", "compiling", seconds, "s", BUILD_SECONDS if judged else None, note)


def environment():
    def output(*command):
        if shutil.which(command[0]) is None:
            return None
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip() if not done.returncode else None

    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    cpus = pathlib.Path("/proc/cpuinfo")
    names = (
        [line.partition(": ")[2] for line in cpus.read_text().splitlines() if line.startswith("model name")]
        if cpus.exists()
        else []
    )
    return {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": output("git", "rev-parse", "HEAD"),
        "changed since": bool(output("git", "status", "--porcelain")),
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "gpu": None,
        "python": platform.python_version(),
        "python built with": [
            o
            for o in ("optimizations", "lto")
            if f"--with-{o}" in str(sysconfig.get_config_var("CONFIG_ARGS"))
            or f"--enable-{o}" in str(sysconfig.get_config_var("CONFIG_ARGS"))
        ],
        "liger-aot": liger_aot.__version__,
        **{package: version(package) for package in PACKAGES},
    }


HEAD = "part", "what", "value", "number to reach", "", "note"


def cells(r):
    def number(value):
        digits = 0 if isinstance(value, int) else 2 if r["unit"] == "x" else 1
        return f"{value:.{digits}f} {r['unit']}".strip()

    bar = "" if r["bar"] is None else f"<= {number(r['bar'])}"
    return r["part"], r["what"], number(r["value"]), bar, {True: "met", False: "NOT MET", None: ""}[r["met"]], r["note"]


def show(rows):
    lines = [cells(r) for r in rows]
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(HEAD, *lines, strict=True)]
        for line in (HEAD, *lines):
            print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for head in HEAD:
        table.add_column(head, justify="right" if head in ("value", "number to reach") else "left")
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        style = {"met": "green", "NOT MET": "red", "": ""}[line[4]]
        table.add_row(
            *line[:4], f"[{style}]{line[4]}[/]" if style else "", line[5], end_section=not following or following[0] != line[0]
        )
    Console(width=max(110, shutil.get_terminal_size().columns)).print(table)


def newest_wheel():
    return max((ROOT / "dist").glob("*.whl"), key=lambda p: p.stat().st_mtime, default=None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("out/bench.json"), help="JSON; the plot goes beside it"
    )
    parser.add_argument("--wheel", type=pathlib.Path, default=newest_wheel(), help="default: the newest in dist/")
    parser.add_argument("--build-log", type=pathlib.Path, default=ROOT / "build/Release/.ninja_log", help="ninja's")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    given = parser.parse_args()
    started = time.monotonic()

    def progress(text):
        print(f"[{time.monotonic() - started:4.0f} s] {text}", file=sys.stderr, flush=True)

    results, notes = host.measure(11 if given.quick else 51, progress)
    times = startup.measure(1 if given.quick else 3, progress)
    rows = [*host_rows(results), *startup_rows(times), *size_rows(given.wheel), *build_rows(given.build_log)]
    found = environment()
    show(rows)
    print(CAPTION)
    for name, note in notes.items():
        print(f"left out: {name}: {note}")
    judged = [r for r in rows if r["met"] is not None]
    met = sum(r["met"] for r in judged)
    print(f"{met} of {len(judged)} met; torch {torch.__version__}, {found['cpu']}, load {found['load']:.1f}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": found, "rows": rows, "host": results, "startup": times, "left out": notes, "caption": CAPTION}
    given.out.write_text(json.dumps(content, indent=1) + "\n")
    picture = given.out.with_suffix(".png")
    drawn = plot.draw(content, picture)
    print(f"{given.out}" + (f", {picture}" if drawn else ""))


if __name__ == "__main__":
    main()
