"""What the machine code of every variant of every pack says, the suspicious first; no GPU takes part.

python benchmarks/static.py [--arch 90] [--out out/static.json] [--lines 40]
"""

import argparse
import collections
import itertools
import json
import pathlib

import devices
import launches
import operators
import sass
import show
import traffic

from liger_aot import _runtime

LOW_WARPS = 0.25  # of the warps that a multiprocessor holds
NARROW = 0.5  # of the bits that an aligned variant loads or stores, in accesses below 128 bits
MOVED = 1.2  # times the least
# What weighs how much in the order of the table.
SPILLS, NARROWED, FEW_WARPS, MOVES, CALLS, DECLARED = 100, 50, 20, 10, 5, 1


def ratios(pack):
    """{(kernel, LOOP, dtype of its first tensor): bytes moved / the least, each tensor once}, of nominal calls."""
    found = {}
    for operator in operators.OPERATORS:
        # What takes a loop: half of a head of 512 columns, a row of 4096 scores.
        for tokens, hidden, head in ((1024, 1024, 128), (4096, 16384, 512)):
            for dtype in operators.DTYPES:
                sizes = {"tokens": tokens, "hidden": hidden, "vocabulary": 32768, "head": head}
                for made in launches.trace(operator, sizes, dtype, pack, 132).values():
                    for x in made.launches:
                        if x.programs:
                            found[x.name, loops(pack.table(x.name)[x.key]), x.key[1]] = 1 + x.again / (x.read + x.written)
    return found


def ratio(moved, kernel, variant):
    """Of `moved`, which ratios gives; 1 for a kernel that moves nothing again, and that no nominal call launches so."""
    return 1.0 if traffic.KERNELS[kernel].again is traffic.never else moved[kernel, loops(variant), variant.dtypes[0]]


def loops(variant):
    return variant.constants.get("LOOP", False)


def share_below(widths, bits):
    """Of what is moved."""
    whole = sum(width * count for width, count in widths.items())
    return sum(width * count for width, count in widths.items() if width < bits) / whole if whole else 0.0


def row(pack, kernel, variant, code, moved):
    programs, limit = devices.occupancy(pack.arch, variant.threads, variant.registers, variant.shared)
    warps, most = programs * -(-variant.threads // devices.WARP), devices.MULTIPROCESSORS[pack.arch].warps
    classes = code.classes
    loads, stores = code.widths("LDG"), code.widths("STG")
    made = {
        "arch": pack.arch,
        "kernel": kernel,
        "variant": variant.cubin.removesuffix(".cubin").removeprefix(f"{kernel}-"),
        "aligned": variant.aligned,
        "registers": variant.registers,
        "shared": variant.shared,
        "threads": variant.threads,
        "programs": programs,
        "warps": warps,
        "occupancy": warps / most,
        "limited_by": limit,
        "spills": classes.get("local memory", 0),
        "loads": loads,
        "stores": stores,
        "instructions": sum(classes.values()),
        "classes": classes,
        "loops": [end - start + 1 for start, end in code.loops],
        "calls": sum(i.opcode == "CALL" for i in code.instructions),
        "moved_to_least": moved,
    }
    found = list(findings(made))
    return made | {"findings": [text for _, text in found], "weight": sum(weight for weight, _ in found)}


def findings(r):
    """(weight, what), in words that are the same for the same suspicion."""
    if r["spills"]:
        yield SPILLS, "spills: its threads keep numbers in local memory"
    if r["occupancy"] <= LOW_WARPS:
        yield FEW_WARPS, f"few warps: at most {LOW_WARPS:.0%} of a multiprocessor's, for want of {r['limited_by']}"
    for what in ("loads", "stores") if r["aligned"] else ():
        if r[what] and max(r[what]) < 128:
            yield DECLARED, f"no 128-bit {what}: the build lets a kernel pass that is declared to move single numbers"
        elif share_below(r[what], 128) > NARROW:
            yield NARROWED, f"narrow {what}: over {NARROW:.0%} of what they move in less than 128 bits"
    if r["moved_to_least"] > MOVED:
        yield MOVES, f"moves over {MOVED} times the least bytes"
    if r["calls"]:
        yield CALLS, "calls a function: a division has a slow path"


def report(archs, kernels=None):
    """A row for each variant of these kernels, or of all."""
    rows = []
    for arch in archs:
        pack = _runtime.open_pack(_runtime.pack_paths()[arch])
        moved = ratios(pack)
        every = [(kernel, v) for kernel in kernels or pack.manifest["kernels"] for v in pack.table(kernel).values()]
        codes = sass.disassemble(pack, every)
        rows += [row(pack, k, v, codes[v.cubin], ratio(moved, k, v)) for k, v in every]
    return sorted(rows, key=lambda r: (-r["weight"], r["occupancy"], r["kernel"], r["variant"], r["arch"]))


HEAD = "sm", "kernel", "variant", "regs", "shared", "threads", "programs", "warps", "loads", "stores", "instr.", "moved"


def short(r):
    """A variant in few words: dtypes with how many pointers in a row have them, and the constants that are not False."""
    *parts, alignment = r["variant"].split("-")
    runs = [(name, len(list(same))) for name, same in itertools.groupby(parts)]
    words = [name if count == 1 else f"{name}x{count}" for name, count in runs if not name.endswith("False")]
    return " ".join([*words, *(["any"] if alignment == "any" else [])])


def widths_text(widths):
    return " ".join(f"{count}x{bits}" for bits, count in sorted(widths.items(), reverse=True)) or "-"


def show_rows(rows):
    def cells(r):
        numbers = r["registers"], r["shared"], r["threads"], r["programs"]
        made = [widths_text(r["loads"]), widths_text(r["stores"]), str(r["instructions"]), f"{r['moved_to_least']:.2f}"]
        return [r["arch"], r["kernel"], short(r), *map(str, numbers), f"{r['warps']} {r['occupancy']:.0%}", *made]

    title = "Variants, the suspicious first (programs, warps: of one multiprocessor; number x bits; bytes moved / least)"
    show.table(title, HEAD, [cells(r) for r in rows], right=(*HEAD[3:8], *HEAD[10:]))


def grouped(rows):
    """[(finding, aligned or not, its kernels with how many variants each)], the weightiest first."""
    found = collections.defaultdict(collections.Counter)
    for r in rows:
        for text in r["findings"]:
            found[text, r["aligned"]][r["kernel"]] += 1
    return [(text, aligned, dict(kernels)) for (text, aligned), kernels in found.items()]


def show_findings(rows):
    suspicious = sum(bool(r["findings"]) for r in rows)
    print(f"{len(rows)} variants, {suspicious} with a suspicion; (any): of variants for any alignment")
    for text, aligned, kernels in grouped(rows):
        where = ", ".join(f"{kernel} {count}" for kernel, count in kernels.items())
        print(f"- {'' if aligned else '(any) '}{text}: {where}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=_runtime.pack_paths(), action="append", help="default: all packs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/static.json"))
    parser.add_argument("--lines", type=int, default=40, help="of the table; all are in the file")
    given = parser.parse_args()
    rows = report(given.arch or list(_runtime.pack_paths()))
    show_rows(rows[: given.lines])
    show_findings(rows)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(given.out)


if __name__ == "__main__":
    main()
