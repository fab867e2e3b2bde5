"""README's table of figures: python benchmarks/gpu/table.py [benchmarks/results]. Only what was committed there is in it.

python benchmarks/gpu/table.py --tune FILE      what a run found that is faster than what is shipped
"""

import json
import pathlib
import sys

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "results"
NONE = "No figure of a GPU exists: nothing of this project has been timed on one."
# Columns: provider -> heading.
OTHERS = {"liger-kernel": "Liger", "torch eager": "torch", "torch.compile": "torch.compile"}


def render(folder=RESULTS):
    """In Markdown: a part for each file, the newest first; a sentence where there is none."""
    files = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))} if folder.is_dir() else {}
    measured = {path: content for path, content in files.items() if content.get("speed") and not content["dry"]}
    newest_first = sorted(measured.items(), key=lambda item: item[1]["environment"]["when"], reverse=True)
    return "\n\n".join([part(path.name, content) for path, content in newest_first]) or NONE


def part(name, content):
    found, failures = content["environment"], len(content["failures"])
    versions = [f"{p} {found[p]}" for p in ("torch", "triton", "transformers", "liger-kernel") if found.get(p)]
    ceilings = [f"{c['what']} {c['value']:.0f} {c['unit']}" for c in content["ceilings"]]
    head = [
        f"{found['gpu']['name']}, {found['when'][:10]}, commit {(found['commit'] or 'unknown')[:12]}"
        f"{', changed since' if found.get('changed since') else ''}, driver {found['gpu']['driver']}, {', '.join(versions)}.",
        f"Reached in the same run: {', '.join(ceilings)}. {failures or 'No'} failure{'' if failures == 1 else 's'}. "
        f"Forward and backward, bf16, medians; all of it in `benchmarks/results/{name}`.",
    ]
    lines = [
        "| operator | sizes | µs | of the ceiling | MiB |" + "".join(f" {heading} |" for heading in OTHERS.values()),
        "|---|---|---|---|---|" + "---|" * len(OTHERS),
    ]
    return "\n".join([*head, "", *lines, *rows(content["speed"])])


def first(speed):
    """Of each operator the sizes that come first, which are the most important."""
    sizes = {}
    for row in speed:
        sizes.setdefault(row["operator"], row["sizes"])
    return [row for row in speed if row["sizes"] == sizes[row["operator"]]]


def rows(speed):
    cases = {}
    for row in speed:
        if row["pass"] == "both":
            cases.setdefault((row["operator"], json.dumps(row["sizes"])), {})[row["provider"]] = row
    for (operator, sizes), providers in cases.items():
        if "liger-aot" not in providers:
            continue
        ours = providers["liger-aot"]
        others = [f" {providers[p]['us'] / ours['us']:.2f} x |" if p in providers else " |" for p in OTHERS]
        size = in_words(json.loads(sizes))
        yield (
            f"| `{operator}` | {size} | {ours['us']:.0f} | {100 * ours['fraction']:.0f} % of {ours['bound']} "
            f"| {ours['peak_MiB']:.0f} |{''.join(others)}"
        )


def faster(tune):
    """A line for each choice, operator and pass in which a trial's `high` is below the `low` of the shipped numbers."""
    cases, found = {}, []
    for row in tune:
        cases.setdefault((row["number"], row["operator"], json.dumps(row["sizes"]), row["pass"]), []).append(row)
    for (number, operator, sizes, which), rows in cases.items():
        shipped, best = next((row for row in rows if row["shipped"]), None), min(rows, key=lambda row: row["us"])
        if shipped and best["high"] < shipped["low"]:
            gain, times = 1 - best["us"] / shipped["us"], f"{best['us']:.1f} us, shipped {shipped['us']:.1f}"
            case = f"{number}: {operator} {which}, {in_words(json.loads(sizes))}: {in_words(best['tried'])}"
            peaks = [row["peak_MiB"] for row in (best, shipped)]
            memory = "" if peaks[0] == peaks[1] else f", {peaks[0]:.0f} MiB for {peaks[1]:.0f}"
            found.append((gain, f"{case}: {times} ({gain:.0%} less{memory})"))
    return [line for _, line in sorted(found, reverse=True)]


def in_words(numbers):
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--tune"]:
        print("\n".join(faster(json.loads(pathlib.Path(sys.argv[2]).read_text())["tune"])))
    else:
        print(render(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS))
