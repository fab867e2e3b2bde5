"""PREDICTIONS of how long each operator takes on GPUs, to hold a later measurement against; nothing here was measured.

python benchmarks/roofline.py predict [--out benchmarks/predictions]
python benchmarks/roofline.py compare RESULT.json        a file of `make gpu`
"""

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import statistics

import devices
import launches
import operators
import sass
import show

from liger_aot import _runtime

FOLDER = pathlib.Path(__file__).parent / "predictions"
LABEL = "PREDICTION, not measured"


@dataclasses.dataclass(frozen=True)
class Assumption:
    value: float
    why: str


ASSUMPTIONS = {
    "bandwidth": Assumption(0.90, "of the datasheet's: a device-to-device copy of 8.6 GB on one H200 moved 4.3 of 4.8 TB/s"),
    "matmul": Assumption(0.80, "of the datasheet's: an 8192³ bf16 product on one H200 did 769 to 798 of 989 TFLOP/s"),
    "l2": Assumption(0.60, "of what the L2 does a clock: no source; it decides where a row is read twice alone"),
    "first": Assumption(
        5.0e-6,
        "s that one launch between two events takes beyond its work: Liger's published medians of rms_norm forward on an H100 "
        "NVL, 7.9 us for 8.4 MB and 10.7 us for twice that",
    ),
    "next": Assumption(
        1.0e-6, "s that each further launch adds: NVIDIA, Getting Started with CUDA Graphs, 3.8 us a kernel of 2.9 us"
    ),
}
# NVIDIA, Matrix Multiplication Background, "Tile Quantization" and "Wave Quantization": cuBLAS's most efficient tile.
TILE, FP32 = (128, 256), 4
SPLITS, LEAST_K = 8, 1024  # the longer dimension may be split, which costs partial sums in fp32
# Of a multiprocessor, a clock: lanes of any instruction, of comparisons and logic, of special functions (CUDA C++ Programming
# Guide, "Throughput of Native Arithmetic Instructions"); bytes from the L2 (NVIDIA's V100 whitepaper).
LANES, HALF, MUFU, FROM_L2 = 128, 64, 16, 64
FLOAT = {"80": 64}  # lanes of multiply-adds; elsewhere LANES


def assumed(name):
    return ASSUMPTIONS[name].value


@dataclasses.dataclass
class Time:
    """Seconds of one launch: by what bounds it, and what a matmul takes more where its result's traffic is not hidden."""

    bounds: dict
    ramp: float = 0.0
    unhidden: float = 0.0

    @property
    def bound(self):
        return max(self.bounds, key=self.bounds.get)

    @property
    def seconds(self):
        return self.bounds[self.bound] + self.ramp


class Model:
    """One device, and the pack that serves it."""

    def __init__(self, name):
        self.name, self.device = name, devices.DEVICES[name]
        paths = _runtime.pack_paths()
        if self.device.arch not in paths:
            raise NotImplementedError(f"{name}: needs the pack sm_{self.device.arch}, found {', '.join(paths)}; build it")
        self.pack, self.codes, self.works = _runtime.open_pack(paths[self.device.arch]), {}, {}

    def trace(self, operator, sizes, dtype):
        return launches.trace(operator, sizes, dtype, self.pack, self.device.multiprocessors)

    def prepare(self, traces):
        """Disassemble at once what these passes launch."""
        found = [(x.name, self.variant(x)) for passes in traces for p in passes.values() for x in p.launches if x.programs]
        wanted = {v.cubin: (kernel, v) for kernel, v in found if v.cubin not in self.codes}
        if wanted:
            self.codes |= sass.disassemble(self.pack, list(wanted.values()))

    def variant(self, launch):
        return self.pack.table(launch.name)[launch.key]

    def time(self, launch):
        if launch.matmul:
            return self.matmul(launch)
        moved = (launch.read + launch.written) / (self.device.bandwidth * assumed("bandwidth"))
        if not launch.programs:
            return Time({"bytes": moved}, self.device.latency)
        return self.kernel(launch, self.variant(launch))

    def matmul(self, launch):
        m, n, k, dtype = launch.matmul
        bandwidth = self.device.bandwidth * assumed("bandwidth")
        rate = self.device.matmul[str(dtype).removeprefix("torch.")] * assumed("matmul") / self.device.multiprocessors
        arithmetic = math.inf
        for (a, b), split in itertools.product((TILE, TILE[::-1]), range(1, max(1, min(SPLITS, k // LEAST_K)) + 1)):
            waves = math.ceil(math.ceil(m / a) * math.ceil(n / b) * split / self.device.multiprocessors)
            sums = 2 * FP32 * m * n * split / bandwidth if split > 1 else 0.0
            arithmetic = min(arithmetic, waves * 2 * a * b * k / split / rate + sums)
        inputs = (m * k + k * n) * dtype.itemsize
        results = launch.read + launch.written - inputs
        bounds = {"matmul": arithmetic, "bytes": (inputs + results) / bandwidth}
        unhidden = max(arithmetic, inputs / bandwidth) + results / bandwidth - max(bounds.values())
        return Time(bounds, self.device.latency, unhidden)

    def kernel(self, launch, variant):
        d = self.device
        resident, _ = devices.occupancy(d.arch, variant.threads, variant.registers, variant.shared)
        once = launch.read + launch.written
        held = min(launch.programs, d.multiprocessors * resident) * launch.between
        missed = launch.again * max(0.0, 1 - d.l2 / held) if held else 0.0
        key = variant.cubin, launch.trips
        executed = self.works.get(key) or self.works.setdefault(key, work(self.codes[variant.cubin], launch.trips))
        warps = launch.programs / launch.branches * variant.threads / devices.WARP
        active = min(launch.programs, d.multiprocessors) * d.clock
        busy = active / devices.WARP  # warps a second, for each lane of a clock
        l2 = min(d.l2_bandwidth * assumed("l2"), active * FROM_L2)
        waves = math.ceil(launch.programs / (d.multiprocessors * resident))
        # A program by itself: it waits, then takes what came, then computes.
        alone = (
            (executed.rounds + launch.ahead) * d.latency
            + (once + launch.again) / launch.programs / (FROM_L2 * d.clock)
            + warps / launch.programs * executed.issued * devices.WARP / (LANES * d.clock)
        )
        return Time(
            {
                "bytes": (once + missed) / (d.bandwidth * assumed("bandwidth")),
                "L2": (once + launch.again) / l2,
                "instructions": warps * executed.issued / (busy * LANES),
                "floats": warps * executed.floats / (busy * FLOAT.get(d.arch, LANES)),
                "comparisons": warps * executed.half_rate / (busy * HALF),
                "MUFU": warps * executed.mufu / (busy * MUFU),
                "latency": waves * alone,
            },
            d.latency,
        )

    def total(self, passes):
        """What a prediction says of one pass or of several in a row."""
        every = [x for p in passes for x in p.launches]
        times = [self.time(x) for x in every]
        seconds = assumed("first") + assumed("next") * (len(every) - 1) + sum(t.seconds for t in times)
        by_bound = {}
        for t in times:
            by_bound[t.bound] = by_bound.get(t.bound, 0.0) + t.seconds
        bound, most = max(by_bound.items(), key=lambda item: item[1])
        moved = sum(p.moved for p in passes)
        return {
            "us": figures(1e6 * seconds),
            "us_unhidden": figures(1e6 * (seconds + sum(t.unhidden for t in times))),
            "bound": bound if most > seconds / 2 else "launches",
            "launches": len(every),
            "bytes": moved,
            "least_bytes": sum(p.least for p in passes),
            "flops": sum(p.flops for p in passes),
        }

    def predict(self, operator, sizes, dtype):
        """{pass: what is predicted of it}."""
        passes = self.trace(operator, sizes, dtype)
        self.prepare([passes])
        chosen = {"forward": [passes["forward"]], "backward": [passes["backward"]], "both": list(passes.values())}
        return {name: self.total(ps) for name, ps in chosen.items()}

    def bare_matmuls(self, sizes, dtype):
        """The three products of a linear loss over all rows at once, and nothing else."""
        rows, width, classes = sizes["tokens"], sizes["hidden"], sizes["vocabulary"]
        t = operators.DTYPES[dtype]
        shapes = [(rows, classes, width), (rows, width, classes), (classes, width, rows)]
        records = [
            launches.Launch("mm", (m * k + k * n) * t.itemsize, m * n * t.itemsize, matmul=(m, n, k, t)) for m, n, k in shapes
        ]
        return self.total([launches.Pass(records, sum(x.read + x.written for x in records))])


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one warp: how many instructions of a kind it issues, and how often it waits for memory."""

    issued: float
    floats: float
    half_rate: float
    mufu: float
    rounds: float


def work(code, trips):
    times, rounds = code.executed(trips), {}
    issued = floats = half_rate = mufu = 0.0
    for at, (i, n) in enumerate(zip(code.instructions, times, strict=True)):
        if i.opcode == "NOP":
            continue
        issued += n
        floats += n * (sass.CLASS_OF[i.opcode] == "float")
        half_rate += n * (i.opcode in sass.HALF_RATE)
        mufu += n * (i.opcode == "MUFU")
        if i.opcode == "LDG":  # loads of one turn of a loop are under way together
            rounds[next((loop for loop in code.loops if loop[0] <= at <= loop[1]), None)] = n
    return Work(issued, floats, half_rate, mufu, sum(rounds.values()))


def figures(x):
    """Four significant ones: no prediction holds more."""
    return float(f"{x:.4g}")


# --- the cases: Liger's sweep, one size at a time


TOKENS, HIDDEN = ([2**i for i in range(10, 16)] for _ in range(2))
VOCABULARY = [32768, 65536, 128256, 262144]
LLAMA = {"tokens": 4096, "hidden": 4096, "vocabulary": 128256}


OF_CLASSES = "vocab_parallel_cross_entropy", "kl_div", "jsd", "tvd"


def sizes_of(operator):
    if operator.startswith("linear_") or operator == "embedding":
        axes = {"tokens": TOKENS, "vocabulary": VOCABULARY, "hidden": HIDDEN[:4]}
        sizes = [LLAMA | {axis: value} for axis, values in axes.items() for value in values]
    elif operator in OF_CLASSES or operator.startswith("cross_entropy"):
        axes = {"tokens": TOKENS, "vocabulary": VOCABULARY}
        sizes = [{key: (LLAMA | {axis: value})[key] for key in axes} for axis, values in axes.items() for value in values]
        if operator == "vocab_parallel_cross_entropy":
            sizes.append({"tokens": LLAMA["tokens"], "vocabulary": LLAMA["vocabulary"] // 4})
    else:
        width = 14336 if operator.endswith("glu") else 4096
        sizes = [{"tokens": 2048, "hidden": h} for h in HIDDEN] + [{"tokens": t, "hidden": width} for t in TOKENS]
    return list({tuple(s.items()): s for s in sizes}.values())


def cases():
    for operator in operators.OPERATORS:
        yield from ((operator, "bfloat16", sizes) for sizes in sizes_of(operator))


def identity(row):
    return row["operator"], row["dtype"], tuple(sorted(row["sizes"].items())), row["pass"]


def predictions(name):
    """Every case on one device, as the committed file has it."""
    model, rows = Model(name), []
    every = [(operator, dtype, sizes, model.trace(operator, sizes, dtype)) for operator, dtype, sizes in cases()]
    model.prepare([passes for *_, passes in every])
    for operator, dtype, sizes, _ in every:
        case = {"operator": operator, "dtype": dtype, "sizes": sizes}
        rows += [case | {"pass": what, "predicted": made} for what, made in model.predict(operator, sizes, dtype).items()]
        if operator == "linear_cross_entropy":
            made = model.bare_matmuls(sizes, dtype)
            rows.append(case | {"provider": "bare matmuls", "pass": "both", "predicted": made})
    return {
        "label": LABEL,
        "predicted": True,
        "device": {"name": name} | dataclasses.asdict(model.device),
        "assumptions": {key: dataclasses.asdict(a) for key, a in ASSUMPTIONS.items()},
        "pack": {key: model.pack.manifest[key] for key in ("arch", "contract", "triton", "ptxas")},
        "rows": rows,
    }


def write(content, path):
    """JSON with a line for each row, so that what changes can be read in a diff."""
    head, rows = json.dumps(content | {"rows": []}, indent=1), ",\n".join("  " + json.dumps(row) for row in content["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head.replace('"rows": []', f'"rows": [\n{rows}\n ]') + "\n")


def show_predictions(content):
    """A line a case: predicted times, and how the least that must be moved fares."""
    passes = "forward", "backward", "both"
    head = ["operator", "sizes", *(f"predicted {p}, us" for p in passes), "bound by", "predicted GB/s", "moved / least"]
    found = {}
    for row in content["rows"]:
        if "provider" not in row:
            found.setdefault(identity(row)[:-1], {})[row["pass"]] = row
    lines = []
    for rows in found.values():
        p = rows["both"]["predicted"]
        times = [f"{rows[name]['predicted']['us']:.1f}" for name in passes]
        rate, ratio = f"{p['least_bytes'] / p['us'] / 1e3:.0f}", f"{p['bytes'] / p['least_bytes']:.2f}"
        lines.append([rows["both"]["operator"], sizes_text(rows["both"]), *times, p["bound"], rate, ratio])
    show.table(f"{LABEL}: {content['device']['name']}, bfloat16", head, lines, right=(*head[2:5], *head[6:]))


def sizes_text(row):
    return " ".join(f"{key[0].upper()}{value}" for key, value in row["sizes"].items())


# --- a measurement held against a prediction


def device_of(measured):
    """The device that a measured file is of."""
    gpu = (measured["environment"] or {}).get("gpu")
    if measured.get("dry") or not gpu:
        raise SystemExit("compare: the file is of a dry run, which measures nothing; give one of `make gpu` on a GPU")
    name = next((name for name in devices.DEVICES if name in gpu["name"]), None)
    if name is None:
        raise SystemExit(f"compare: {gpu['name']} is none of {', '.join(devices.DEVICES)}; add it to benchmarks/devices.py")
    return name


def compare(measured, predicted):
    """[(measured row, predicted us, measured / predicted)], the worst first, and the measured rows without a prediction."""
    known = {(*identity(row), row.get("provider", "liger-aot")): row["predicted"] for row in predicted["rows"]}
    pairs, without = [], []
    for row in measured["speed"]:
        found = known.get((*identity(row), row["provider"]))
        if row["us"] is None or row["provider"] not in ("liger-aot", "bare matmuls"):
            continue
        if found is None:
            without.append(row)
        else:
            pairs.append((row, found["us"], row["us"] / found["us"]))
    return sorted(pairs, key=lambda pair: -pair[2]), without


def show_comparison(name, pairs, without):
    head = ["operator", "provider", "dtype", "sizes", "pass", "measured us", "predicted us", "ratio"]
    lines = [
        [
            row["operator"],
            row["provider"],
            row["dtype"],
            sizes_text(row),
            row["pass"],
            f"{row['us']:.1f}",
            f"{us:.1f}",
            f"{ratio:.2f}",
        ]
        for row, us, ratio in pairs
    ]
    show.table(f"{name}: measured against predicted, the ratio of the two", head, lines, right=head[-3:])
    if pairs:
        ratios = [ratio for *_, ratio in pairs]
        print(f"median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}, of {len(ratios)} cases")
    print(f"{len(without)} measured cases have no prediction")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("predict")
    command.add_argument("--out", type=pathlib.Path, default=FOLDER)
    command.add_argument("--device", choices=devices.DEVICES, action="append", help="default: all")
    command.add_argument("--quiet", action="store_true", help="no tables")
    command = commands.add_parser("compare")
    command.add_argument("measured", type=pathlib.Path)
    command.add_argument("--predictions", type=pathlib.Path, default=FOLDER)
    given = parser.parse_args()
    if given.command == "compare":
        measured = json.loads(given.measured.read_text())
        name = device_of(measured)
        show_comparison(name, *compare(measured, json.loads((given.predictions / f"{name}.json").read_text())))
        return
    for name in given.device or devices.DEVICES:
        content = predictions(name)
        write(content, given.out / f"{name}.json")
        if not given.quiet:
            show_predictions(content)
    print(f"{LABEL}: written to {given.out}")


if __name__ == "__main__":
    main()
