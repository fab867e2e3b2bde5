"""Pictures of the committed figures of real GPUs; of a prediction, which says so, where there is none.

python benchmarks/pictures.py [--results DIR] [--prediction benchmarks/predictions/H200.json] [--out docs/pictures]
"""

import argparse
import json
import pathlib
import statistics

HERE = pathlib.Path(__file__).parent
LABEL = "PREDICTION, not measured"
OURS = "liger-aot"
# Paul Tol's "muted" colours, which all kinds of sight tell apart, and a shape for each.
COLOURS = "#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#882255", "#44AA99", "#AA4499", "#999933"
SHAPES = "o", "s", "^", "D", "v", "P", "X", "<", ">"
# In the roofline: as many as there are colours; more cannot be told apart.
DRAWN = (
    *("rms_norm", "fused_add_rms_norm", "layer_norm", "rope", "swiglu", "geglu"),
    *("cross_entropy", "linear_cross_entropy", "linear_logprob"),
)
PASSES = {"forward": "white", "both": None}  # how a marker is filled


def styles(names):
    return {name: (COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)]) for i, name in enumerate(names)}


def measured_files(folder):
    """{device: the newest file of it}, dry runs left out."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if content.get("speed") and not content["dry"]:
            name, before = content["environment"]["gpu"]["name"], found.get(content["environment"]["gpu"]["name"])
            if before is None or before["environment"]["when"] < content["environment"]["when"]:
                found[name] = content
    return found


def figure(width, height):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plain(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def points(rows):
    """(operator, pass, least bytes, GB/s of them, tokens, TFLOP/s of the three products) of our rows, measured or predicted."""
    for row in rows:
        numbers, sizes = row.get("predicted", row), row["sizes"]
        us, moved = numbers["us"], numbers.get("least_bytes", numbers.get("bytes"))
        if us and row.get("provider", OURS) == OURS and row["pass"] in PASSES and row["operator"] in DRAWN:
            multiplies = {"hidden", "vocabulary"} <= set(sizes)
            flops = 6 * sizes["tokens"] * sizes["hidden"] * sizes["vocabulary"] if multiplies else 0
            if row["pass"] == "both" or not multiplies:  # whose forward may do the backward's work
                yield row["operator"], row["pass"], moved, moved / us / 1e3, sizes["tokens"], flops / us / 1e6


def roofline(title, rows, ceilings, label=None):
    """Left: bandwidth of what moves bytes. Right: rate of what multiplies matrices. ceilings: {what: {text: value}}."""
    found = list(points(rows))
    style = styles(sorted({name for name, *_ in found}))
    drawn = figure(11, 4.6)
    left, right = drawn.subplots(1, 2)
    for name, (colour, shape) in style.items():
        for which, filled in PASSES.items():
            if not (mine := [p for p in found if p[0] == name and p[1] == which]):
                continue
            multiplies = any(p[5] for p in mine)
            axes, x, y = (right, 4, 5) if multiplies else (left, 2, 3)
            axes.plot(
                *([p[i] / (1e6 if i == 2 else 1) for p in mine] for i in (x, y)),
                linestyle="none",
                marker=shape,
                markersize=6,
                color=colour,
                markerfacecolor=filled or colour,
                label=f"{name}, {'forward' if which == 'forward' else 'forward + backward'}",
            )
    for axes, what, unit in ((left, "copy", "GB/s"), (right, "matmul", "TFLOP/s")):
        for text, value in ceilings[what].items():
            axes.axhline(value, color="#444444", linewidth=1, linestyle="--")
            at = 0.01, value
            axes.annotate(f"{text}: {value:.0f} {unit}", at, xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
        axes.set_xscale("log", base=2 if what == "matmul" else 10)
        axes.set_ylim(0, 1.12 * max(ceilings[what].values()))
        axes.set_ylabel(f"{'predicted ' if label else ''}{unit}")
        plain(axes)
        if label:
            axes.text(0.5, 0.05, label, transform=axes.transAxes, ha="center", color="#B00000", fontsize=14)
    left.set_title("Other operators: bandwidth of the least they must move", fontsize=10)
    left.set_xlabel("least bytes of the call, MB")
    right.set_title("Linear losses: rate of their three products", fontsize=10)
    right.set_xlabel("tokens")
    handles = {text: handle for axes in (left, right) for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawn.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    drawn.suptitle(title, fontsize=11)
    return drawn


def speedup(title, rows):
    """Each provider's time over ours, forward and backward: the geometric mean over the sizes, and the range."""
    times = {}
    for row in rows:
        if row["pass"] == "both" and row["us"]:
            times.setdefault((row["operator"], json.dumps(row["sizes"], sort_keys=True)), {})[row["provider"]] = row["us"]
    factors = {}
    for (operator, _), found in times.items():
        for provider, us in found.items():
            if OURS in found and provider != OURS:
                factors.setdefault(operator, {}).setdefault(provider, []).append(us / found[OURS])
    operators = sorted(factors, reverse=True)
    style = styles(sorted({row["provider"] for row in rows}))  # as in the picture of memory
    style.pop(OURS, None)
    drawn = figure(9, 1.4 + 0.62 * len(operators))
    axes = drawn.subplots()
    for at, operator in enumerate(operators):
        for place, (provider, (colour, shape)) in enumerate(style.items()):
            if values := factors[operator].get(provider):
                y = at + 0.7 * ((place + 0.5) / len(style) - 0.5)
                axes.plot([min(values), max(values)], [y, y], color=colour, linewidth=1.2, alpha=0.6)
                axes.plot(statistics.geometric_mean(values), y, marker=shape, color=colour, markersize=6, linestyle="none")
    for provider, (colour, shape) in style.items():
        axes.plot([], [], marker=shape, color=colour, linestyle="none", label=provider)
    axes.axvline(1, color="#444444", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_yticks(range(len(operators)), operators)
    axes.set_xlabel("its time / ours, forward + backward (mean and range over the sizes; right of 1 we are faster)")
    plain(axes)
    drawn.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    drawn.suptitle(title, fontsize=11)
    return drawn


def memory(title, rows):
    """Peak memory of a forward and backward at each operator's largest size that every provider has run."""
    found = {}
    for row in rows:
        if row["pass"] == "both" and row["peak_MiB"]:
            size = json.dumps(row["sizes"], sort_keys=True)
            found.setdefault(row["operator"], {}).setdefault(size, {})[row["provider"]] = row["peak_MiB"] / 1024
    chosen = {}
    for operator, sizes in found.items():
        size, peaks = max(sizes.items(), key=lambda item: (len(item[1]), sum(item[1].values())))
        chosen[operator + "\n" + ", ".join(f"{key} {value}" for key, value in json.loads(size).items())] = peaks
    names = sorted(chosen, reverse=True)
    style = styles(sorted({row["provider"] for row in rows}))
    style = {provider: of for provider, of in style.items() if any(provider in peaks for peaks in chosen.values())}
    drawn = figure(9, 1.4 + 0.72 * len(names))
    axes = drawn.subplots()
    height = 0.8 / max(1, len(style))
    for place, (provider, (colour, _)) in enumerate(style.items()):
        at = [y + (len(style) / 2 - place - 0.5) * height for y in range(len(names))]
        axes.barh(at, [chosen[name].get(provider, 0.0) for name in names], height, label=provider, color=colour)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("peak memory of forward + backward beyond the inputs, GiB")
    plain(axes)
    drawn.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    drawn.suptitle(title, fontsize=11)
    return drawn


def of_measured(name, content):
    """{what: figure} of a measured file."""
    found = content["environment"]
    title = f"{name}, {found['when'][:10]}, commit {str(found['commit'])[:9]}"
    ceilings = {row["what"]: {f"{row['what']}, measured": row["value"]} for row in content["ceilings"]}
    rows = content["speed"]
    return {
        "roofline": roofline(title, rows, ceilings),
        "speedup": speedup(f"Time of others over ours: {title}", rows),
        "memory": memory(f"Peak memory: {title}", rows),
    }


def of_predicted(content):
    device, assumed = content["device"], content["assumptions"]
    share = {key: assumed[key]["value"] for key in ("bandwidth", "matmul")}
    rate = device["matmul"]["bfloat16"] / 1e12
    ceilings = {
        "copy": {"datasheet": device["bandwidth"] / 1e9, "assumed": device["bandwidth"] * share["bandwidth"] / 1e9},
        "matmul": {"datasheet": rate, "assumed": rate * share["matmul"]},
    }
    return roofline(f"{LABEL}: {device['name']}, bfloat16", content["rows"], ceilings, LABEL)


def slug(name):
    return "-".join(name.lower().split())


def draw(results, prediction, out):
    """Write the pictures; [what was drawn, or why not]."""
    out.mkdir(parents=True, exist_ok=True)
    notes, measured = [], measured_files(results)
    for name, content in measured.items():
        for what, drawn in of_measured(name, content).items():
            drawn.savefig(path := out / f"{what}-{slug(name)}.png", dpi=150)
            notes.append(f"{path}")
    if not measured:
        of_predicted(json.loads(prediction.read_text())).savefig(path := out / "predicted-roofline.png", dpi=110)
        notes.append(f"{path}: {LABEL}")
        notes.append(f"no picture of speed-up or memory: {results} holds no figure of a GPU; `make gpu` on one makes it")
    return notes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--prediction", type=pathlib.Path, default=HERE / "predictions/H200.json")
    parser.add_argument("--out", type=pathlib.Path, default=HERE.parent / "docs/pictures")
    given = parser.parse_args()
    print("\n".join(draw(given.results, given.prediction, given.out)))


if __name__ == "__main__":
    main()
