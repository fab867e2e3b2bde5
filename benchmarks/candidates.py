"""Other rows, blocks and warps than the kernels are shipped with: compiled here, to be chosen among by what is measured.

python benchmarks/candidates.py 90 FOLDER [--choice NAME]      compiles them into FOLDER/sm_90.zip

`make gpu` times them (gpu/tune.py); proposals.py predicts their times.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable

import launches

from liger_aot import _build
from liger_aot import _runtime
from liger_aot.export import SOURCES
from liger_aot.export import load_sources
from liger_aot.ops import _glu
from liger_aot.ops import _linear
from liger_aot.ops import _norm
from liger_aot.ops import cross_entropy
from liger_aot.ops import geglu
from liger_aot.ops import rope
from liger_aot.ops import softmax
from liger_aot.ops import swiglu

sys.path.append(str(pathlib.Path(__file__).parent.parent / "tests"))
from stub import machinery

DTYPE, WARPS, STAGES = "bfloat16", "num_warps", "num_stages"
HEAD = {"hidden": 4096, "vocabulary": 128256}
WIDE = 2**26  # numbers of what is normalised: 128 MB


@dataclasses.dataclass(frozen=True)
class Choice:
    """Numbers that belong together, and in the place of which operators at which sizes they are tried."""

    cases: dict  # {operator: sizes}
    tried: list  # of {number: value}; num_warps is the kernels' own, and num_stages their loops', 1 where it is not said
    # a number, or several that the package has together -> [(dictionary, key)], the places where it has them
    places: dict = dataclasses.field(default_factory=dict)
    kernels: tuple = ()  # that have the numbers among their constants
    of: dict = dataclasses.field(default_factory=dict)  # constants of the forms that are meant
    passes: tuple = ("forward", "backward", "both")  # which the numbers have a part in
    shipped: Callable = None  # (operator, sizes) -> {number: value}, where neither places nor kernels say it


def warps(*values):
    return [{WARPS: n} for n in values]


def grid(**values):
    """[{name: value, ...}] of lists that belong together."""
    return [dict(zip(values, some, strict=True)) for some in zip(*values.values(), strict=True)]


def rows_of(hidden):
    return {"tokens": WIDE // hidden, "hidden": hidden}


NORMS = "rms_norm_fwd", "rms_norm_bwd", "layer_norm_fwd", "layer_norm_bwd", "fused_add_rms_norm_fwd"
SMALL = {"tokens": 2048, "hidden": 1024}
HERE = {module: vars(module) for module in (_glu, _linear, _norm, cross_entropy, geglu, rope, softmax, swiglu)}


def norm(block, tried, places=None):
    """Of rows that one BLOCK holds: the kernels of RMSNorm's smallest are no other norm's. A multiprocessor has 16 warps."""
    tried = [trial | {"RESIDENT": max(1, 16 // trial[WARPS])} for trial in tried]
    places = (places or {}) | {"RESIDENT": [(_norm.RESIDENT, block)]}
    least = block == _norm.BLOCKS[0]
    operators = ("rms_norm",) if least else ("rms_norm", "layer_norm", "fused_add_rms_norm")
    kernels, of = NORMS[:2] if least else NORMS, {"BLOCK": block, "LOOP": False}
    return Choice(dict.fromkeys(operators, rows_of(block)), tried, places, kernels, of)


def resident(block):
    """How many programs of a norm's backward there are for a multiprocessor."""
    operators = ("rms_norm", "layer_norm") if block != _norm.BLOCKS[0] else ("rms_norm",)
    tried, places = [{"RESIDENT": n} for n in (1, 2, 4, 8, 16)], {"RESIDENT": [(_norm.RESIDENT, block)]}
    return Choice(dict.fromkeys(operators, rows_of(block)), tried, places, passes=("backward",))


def ahead(block, warps):
    """A norm's backward that loads rows before their turn comes, as far as num_stages says."""
    tried = grid(num_warps=[warps] * 3, num_stages=[1, 2, 3])
    cases = dict.fromkeys(("rms_norm", "layer_norm"), rows_of(block))
    return Choice(cases, tried, {}, ("rms_norm_bwd", "layer_norm_bwd"), {"BLOCK": block, "LOOP": False}, ("backward",))


def unit(module):
    """A gated unit, every program of which takes BLOCK numbers."""
    tried = grid(BLOCK=[512, 1024, 1024, 2048, 2048, 4096], num_warps=[2, 2, 4, 4, 8, 8])
    places, name = {"BLOCK": [(HERE[_glu], "BLOCK"), (HERE[module], "BLOCK")]}, module.__name__.rpartition(".")[2]
    sizes = {"tokens": 8192, "hidden": 14336}
    return Choice({name: sizes}, tried, places, (f"{name}_fwd", f"{name}_bwd"), {"TANH": True})


def chunk(operator, sizes):
    """The rows of a chunk as shipped, which is between CHUNK and LEAST."""
    return {"CHUNK": _linear.chunk_rows(sizes["tokens"], sizes["hidden"], _runtime.DTYPES["bf16"].itemsize, _linear.LEAST)}


CHOICES = {
    "CHUNK": Choice(
        dict.fromkeys(("linear_cross_entropy", "linear_logprob"), {"tokens": 16384} | HEAD),
        [{"CHUNK": rows} for rows in (1024, 1280, 2048, 4096, 8192)],
        {"CHUNK": [(HERE[_linear], "CHUNK"), (HERE[_linear], "LEAST")]},
        shipped=chunk,
    ),
    "column_sum": Choice(
        {"rms_norm": SMALL, "layer_norm": rows_of(8192)},
        [
            *grid(ROWS=[32, 32, 64, 64, 128, 256], BLOCK=[128, 32, 64, 32, 32, 32], num_warps=[4, 4, 4, 4, 4, 8]),
            {"ROWS": 128, "BLOCK": 32, WARPS: 4, STAGES: 2},
        ],
        {name: [(HERE[_norm], f"SUM_{name}")] for name in ("ROWS", "BLOCK")},
        ("column_sum",),
        passes=("backward", "both"),
    ),
    "norm at 128": norm(128, grid(ROWS=[8, 16, 16, 32], num_warps=[4, 2, 4, 8]), {"ROWS": [(_norm.ROWS, 128)]}),
    "norm at 1024": norm(1024, grid(ROWS=[1, 1, 2, 2, 4], num_warps=[2, 4, 2, 4, 8]), {"ROWS": [(_norm.ROWS, 1024)]}),
    "norm at 2048": norm(2048, warps(2, 4, 8)),
    "norm at 4096": norm(4096, warps(4, 8, 16)),
    "norm at 8192": norm(8192, warps(8, 16, 32)),
    "norm's forward in a loop": Choice(
        dict.fromkeys(("rms_norm", "layer_norm", "fused_add_rms_norm"), rows_of(16384)),
        grid(ROWS=[1, 1, 1, 1, 1], BLOCK=[2048, 4096, 4096, 8192, 8192], num_warps=[4, 8, 16, 16, 32]),
        {("ROWS", "BLOCK"): [(HERE[_norm], "LOOP_FORWARD")]},
        ("rms_norm_fwd", "layer_norm_fwd", "fused_add_rms_norm_fwd"),
        {"LOOP": True},
        ("forward",),
    ),
    "norm's backward in a loop": Choice(
        dict.fromkeys(("rms_norm", "layer_norm"), rows_of(16384)),
        grid(
            ROWS=[1, 1, 2, 2, 2, 2, 4, 4, 4, 4, 8],
            BLOCK=[4096, 4096, 2048, 2048, 4096, 4096, 1024, 1024, 2048, 2048, 1024],
            num_warps=[8, 8, 8, 8, 16, 16, 8, 8, 16, 16, 16],
            RESIDENT=[1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1],
        ),
        {("ROWS", "BLOCK"): [(HERE[_norm], "LOOP_BACKWARD")], "RESIDENT": [(HERE[_norm], "LOOP_RESIDENT")]},
        ("rms_norm_bwd", "layer_norm_bwd"),
        {"LOOP": True},
        ("backward",),
    ),
    **{f"norm's loads ahead at {block}": ahead(block, n) for block, n in ((1024, 4), (2048, 4), (4096, 8), (8192, 16))},
    **{f"RESIDENT at {block}": resident(block) for block in _norm.BLOCKS},
    "swiglu": unit(swiglu),
    "geglu": unit(geglu),
    "cross_entropy": Choice(
        {"cross_entropy": {"tokens": 4096, "vocabulary": 128256}},
        [
            *grid(BLOCK=[1024, 2048, 2048, 4096, 4096, 4096, 8192, 8192], num_warps=[4, 4, 8, 4, 8, 16, 8, 16]),
            *grid(BLOCK=[1024, 2048, 4096], num_warps=[4, 4, 4], num_stages=[3, 2, 2]),
        ],
        {"BLOCK": [(HERE[cross_entropy], "BLOCK")]},
        ("cross_entropy_fwd", "cross_entropy_bwd"),
        {"SOFTCAP": False, "PREDICT": False},
    ),
    "rope": Choice(
        {"rope": {"tokens": 8192, "hidden": 4096}},
        grid(HEADS=[4, 4, 8, 8, 8, 16, 16], num_warps=[1, 2, 1, 2, 4, 2, 4]),
        {"HEADS": [(HERE[rope], "HEADS")]},
        ("rope",),
        {"HALF": 64, "LOOP": False, "PLAIN": True},
    ),
    "softmax": Choice(
        {"softmax": {"tokens": 8192, "hidden": 4096}},
        warps(4, 8, 16),
        kernels=("softmax_fwd", "softmax_bwd"),
        of={"BLOCK": 4096, "LOOP": False},
    ),
}


def text(trial):
    return ", ".join(f"{name} {value}" for name, value in trial.items())


def agree(constants, wanted):
    return all(constants[name] == value for name, value in wanted.items() if name in constants)


def forms(kernel, choice, trial):
    """(types, constants, options) of a kernel as the trial has it, in bfloat16, each once."""
    loose = [p for p, type_ in kernel.parameters.items() if type_.startswith("*") and type_[1:] not in _runtime.DTYPES]
    found = []
    for types, constants, options in kernel.variants:
        if agree(constants, choice.of) and all(types[p] == "*bf16" for p in loose):
            form = types, constants | {k: v for k, v in trial.items() if k in constants}, options | {WARPS: trial[WARPS]}
            if form not in found:
                found.append(form)
    return found


def entry(choice, trial, kernel):
    """What the table of a kernel's forms in a trial is called in the pack of all trials."""
    return f"{choice}, {text(trial)}, {kernel}"


def staged(stages, folder):
    """{name: kernel}, whose loops load `stages` turns ahead: Triton's tl.range says so."""
    if stages == 1:
        return load_sources()
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in folder.glob("*.py"):
        text = re.sub(r"( in )range\((.*)\):$", rf"\1tl.range(\2, {STAGES}={stages}):", path.read_text(), flags=re.M)
        path.write_text(text)
    return load_sources(folder)


def build(arch, folder, names=tuple(CHOICES)):
    """Compile the trials of these choices into one pack. One that spills, which the build gate refuses, is not in it."""
    aot, kernels, built = machinery("_aot"), {}, {}
    sys.path.insert(0, str(SOURCES))  # where the gate is
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"sm_{arch}.parts.zip"
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(part, "w") as archive:
        os.environ |= {"TRITON_CACHE_DIR": f"{scratch}/cache", "TRITON_DISABLE_LINE_INFO": "1"}  # as for a wheel
        for name, trial, kernel in [(n, t, k) for n in names for t in CHOICES[n].tried for k in CHOICES[n].kernels]:
            stages, rows = trial.get(STAGES, 1), []
            if stages not in kernels:
                kernels[stages] = staged(stages, pathlib.Path(scratch, str(stages)))
            function = kernels[stages][kernel]
            for form in forms(function, CHOICES[name], trial):
                if (key := (function.src, str(form))) not in built:  # without a loop the source is the same
                    built[key] = compiled(aot, function, form, stages, arch, archive)
                rows.append(built[key])
            if all(rows):
                table = {"name": kernel, "parameters": list(function.parameters.items()), "variants": rows}
                archive.writestr(f"{entry(name, trial, kernel)}.json", json.dumps(table))
    aot.pack(arch, _build.VERSION, folder / f"sm_{arch}.zip", [part])
    part.unlink()


def compiled(aot, kernel, form, stages, arch, archive):
    """The table's row of a form, whose cubin goes into the archive; None if the build gate refuses it."""
    try:
        row, cubin = aot.compile_variant(kernel, *form, True, arch)
    except SystemExit as refused:
        print(f"{str(refused).partition(chr(10))[0]} with {form[-1][WARPS]} warps")
        return None
    row["cubin"] = f"{row['cubin'].removesuffix('.cubin')}-{row['warps']}-{stages}.cubin"
    archive.writestr(row["cubin"], cubin)
    return row


class Tried:
    """The shipped pack, with the forms of one trial in it."""

    def __init__(self, shipped, candidates, choice, trial):
        self.path, self.arch, self.manifest, self.parameters = shipped.path, shipped.arch, shipped.manifest, shipped.parameters
        self.shipped, self.candidates = shipped, candidates
        self.tables = {k: candidates.table(entry(choice, trial, k)) for k in CHOICES[choice].kernels}
        self.own = {variant.cubin for table in self.tables.values() for variant in table.values()}

    def table(self, kernel):
        return self.shipped.table(kernel) | self.tables.get(kernel, {})

    def read(self, cubin):
        return (self.candidates if cubin in self.own else self.shipped).read(cubin)


def opened(folder, arch):
    """The pack of all trials, or None."""
    path = pathlib.Path(folder) / f"sm_{arch}.zip"
    return _runtime.Pack(path) if path.exists() else None


def compiled_trials(candidates, name):
    """The trials of a choice that can be run: all that need no kernels of their own, and those that were compiled."""
    choice = CHOICES[name]
    there = () if candidates is None else candidates.manifest["kernels"]
    return [t for t in choice.tried if all(entry(name, t, kernel) in there for kernel in choice.kernels)]


def valued(trial, number):
    """What a place holds of a trial: the value of one number, or those of several."""
    return tuple(trial[name] for name in number) if isinstance(number, tuple) else trial[number]


def put(choice, trial):
    """Put a trial's numbers where the package looks for them."""
    for number, places in choice.places.items():
        for dictionary, key in places:
            dictionary[key] = valued(trial, number)
    _norm._tile.cache_clear()


@contextlib.contextmanager
def put_back():
    """What `put` changes inside the `with` is afterwards as it was."""
    places = [place for choice in CHOICES.values() for some in choice.places.values() for place in some]
    before = [dictionary[key] for dictionary, key in places]
    try:
        yield
    finally:
        for (dictionary, key), value in zip(places, before, strict=True):
            dictionary[key] = value
        _norm._tile.cache_clear()


def is_shipped(name, trial, operator, which, pack, multiprocessors):
    """Whether the package has these numbers, in one pass of an operator."""
    choice, sizes = CHOICES[name], CHOICES[name].cases[operator]
    if choice.shipped:
        return choice.shipped(operator, sizes) == trial
    for number, places in choice.places.items():
        if any(dictionary[key] != valued(trial, number) for dictionary, key in places):
            return False
    passes = launches.trace(operator, sizes, DTYPE, pack, multiprocessors)
    made = [x for part in (passes.values() if which == "both" else [passes[which]]) for x in part.launches]
    found = [pack.table(x.name)[x.key] for x in made if x.name in choice.kernels]
    own = [v.constants | {WARPS: v.threads // _runtime.THREADS_PER_WARP, STAGES: 1} for v in found]
    return all(agree(trial, numbers) for numbers in own)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--choice", action="append", choices=CHOICES, help="default: all")
    given = parser.parse_args()
    build(given.arch, given.folder, given.choice or tuple(CHOICES))


if __name__ == "__main__":
    main()
