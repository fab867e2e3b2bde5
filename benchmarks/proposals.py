"""PREDICTIONS of what other numbers in the kernels and operators would gain: what to try first on a GPU.

python benchmarks/proposals.py [--device H200]
"""

import argparse
import contextlib
import dataclasses
from unittest import mock

import devices
import roofline
import show

from liger_aot._runtime import cdiv
from liger_aot.ops import _linear
from liger_aot.ops import _norm

HEAD = {"tokens": 4096, "hidden": 4096, "vocabulary": 128256}
TILE = 4096  # numbers that a program of a looped norm or of column_sum takes at once


class Changed(roofline.Model):
    """A model in which one kernel is launched in another way; a variant not built is taken to run as the one beside it."""

    def __init__(self, name, relaunched):
        super().__init__(name)
        self.relaunched = relaunched

    def trace(self, operator, sizes, dtype):
        passes = super().trace(operator, sizes, dtype)
        return {name: dataclasses.replace(p, launches=[self.relaunched(x) for x in p.launches]) for name, p in passes.items()}

    def variant(self, launch):
        *of, rows, block, loop = launch.key
        if loop is True and (rows, block) != (1, TILE):
            launch = dataclasses.replace(launch, key=(*of, 1, TILE, True))
        return super().variant(launch)


def same(launch):
    return launch


def as_is():
    return contextlib.nullcontext()


@contextlib.contextmanager
def chunks_of(rows):
    """The linear losses' chunks, whatever memory they take."""
    with mock.patch.multiple(_linear, CHUNK=rows, LEAST=rows):
        yield


@contextlib.contextmanager
def rows_in_loop(rows, resident):
    """Norms of wide rows that take several rows at once, in blocks of as many numbers: for all of them dw is read once."""
    tile = _norm._tile
    with (
        mock.patch.object(_norm, "_tile", lambda n: (rows, TILE // rows, True) if n > _norm.BLOCKS[-1] else tile(n)),
        mock.patch.dict(_norm.RESIDENT, {TILE // rows: resident}),
    ):
        yield


def column_sum(rows, block):
    def relaunched(launch):
        if launch.name != "column_sum":
            return launch
        columns = launch.written // 2  # of bfloat16, and what is read is fp32
        trips = (cdiv(launch.read // 4 // columns, rows),)
        return dataclasses.replace(launch, programs=cdiv(columns, block), trips=trips)

    return relaunched


def in_two(launch):
    """A kernel for each row's sums, and one that walks down columns, with dw in registers: only x and dy are read twice."""
    if not launch.again or not launch.name.endswith("_norm_bwd"):
        return launch
    return dataclasses.replace(launch, read=2 * launch.read, again=0, between=0)


def changes():
    """(what, operators, sizes, the package's numbers, how a launch is made)."""
    linear, norms = ["linear_cross_entropy", "linear_logprob"], ["rms_norm", "layer_norm"]
    for tokens in (4096, 16384):
        for rows in (2048, 4096):
            yield f"chunks of {rows} rows", linear, HEAD | {"tokens": tokens}, chunks_of(rows), same
    for sizes in ({"tokens": 2048, "hidden": 1024}, {"tokens": 8192, "hidden": 4096}):
        yield "column_sum: tiles of 128 x 32, not 32 x 128", norms, sizes, as_is(), column_sum(128, 32)
    for hidden in (16384, 32768):
        sizes = {"tokens": 2048, "hidden": hidden}
        for rows, resident in ((2, 2), (4, 2)):
            what = f"wide rows' backward: {rows} rows at once"
            yield what, norms, sizes, rows_in_loop(rows, resident), same
        yield "wide rows' backward: in two kernels", norms, sizes, as_is(), in_two


def which(operator):
    return "both" if operator.startswith("linear") else "backward"


def rows(name):
    plain = roofline.Model(name)
    for what, operators, sizes, numbers, relaunched in changes():
        changed = Changed(name, relaunched)
        with numbers:
            made = {operator: changed.predict(operator, sizes, "bfloat16")[which(operator)] for operator in operators}
        for operator in operators:
            yield what, operator, sizes, plain.predict(operator, sizes, "bfloat16")[which(operator)], made[operator]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=devices.DEVICES, default="H200")
    name = parser.parse_args().device
    head = ["change", "operator", "sizes", "pass", "predicted now, us", "then, us", "gain", "gain, no overlap"]
    lines = []
    for what, operator, sizes, now, then in rows(name):
        gains = (f"{1 - then[key] / now[key]:.1%}" for key in ("us", "us_unhidden"))
        case = roofline.sizes_text({"sizes": sizes}), which(operator)
        lines.append([what, operator, *case, f"{now['us']:.1f}", f"{then['us']:.1f}", *gains])
    show.table(f"{roofline.LABEL}: {name}, bfloat16", head, lines, right=head[4:])


if __name__ == "__main__":
    main()
