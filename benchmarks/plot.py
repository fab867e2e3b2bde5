"""Draw a result of run.py:  python benchmarks/plot.py out/bench.json"""

import json
import pathlib
import sys

SERIES = {"allocations or empty function": "#bdbdbd", "liger-aot": "#1f77b4", "Liger": "#ff7f0e"}
PANELS = {
    "forward, no gradients": ("forward, allocations", "forward", "forward, Liger"),
    "forward + backward": ("both, empty", "both", "both, Liger"),
}


def draw(content, path):
    """True if there is a plotting library."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    results, found = content["host"], content["environment"]
    names = [name for name, times in results.items() if "both, empty" in times][::-1]
    figure = Figure(figsize=(10, 0.62 * len(names) + 1.6), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    height = 0.8 / len(SERIES)
    for ax, (title, keys) in zip(axes, PANELS.items(), strict=True):
        for place, (key, (label, colour)) in enumerate(zip(keys, SERIES.items(), strict=True)):
            values = [results[name].get(key, 0.0) for name in names]
            at = [y + (1 - place) * height for y in range(len(names))]
            bars = ax.barh(at, values, height, label=label, color=colour)
            ax.bar_label(bars, [f"{v:.0f}" if v else "" for v in values], padding=2, fontsize=7)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("CPU time of a call, us", fontsize=9)
        ax.margins(x=0.08)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"Host cost with stubbed drivers, no GPU ({found['cpu']}, torch {found['torch']})", fontsize=11)
    figure.savefig(path, dpi=150)
    return True


if __name__ == "__main__":
    source = pathlib.Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_suffix(".png"))
