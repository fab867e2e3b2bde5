"""Numbers in the operators that are plain Python, and what else could stand there: timed in turns, for a choice."""

import contextlib
import dataclasses
import time
from collections.abc import Callable

import torch

from liger_aot.ops import _linear
from liger_aot.ops import _norm
from liger_aot.ops.layer_norm import LEAST_BLOCK

from . import cases
from . import timing


@dataclasses.dataclass
class Number:
    values: tuple
    sizes: list
    passes: tuple  # which it has a part in
    use: Callable  # puts a value in its place
    shipped: Callable  # (operator, sizes) -> the value that is used


def use_chunk(rows):
    _linear.CHUNK = _linear.LEAST = rows


def shipped_chunk(operator, sizes):
    return _linear.chunk_rows(sizes["tokens"], sizes["hidden"], cases.DTYPE.itemsize, _linear.LEAST)


def use_resident(programs):
    _norm.RESIDENT.update(dict.fromkeys(_norm.RESIDENT, programs))


def shipped_resident(operator, sizes):
    return _norm.RESIDENT[block(operator, sizes)]


def block(operator, sizes):
    """What a norm's backward takes of a row at once."""
    least = LEAST_BLOCK if operator == "layer_norm" else _norm.BLOCKS[0]
    *_, block, _ = _norm.layout(torch.empty(1, sizes["hidden"], device="meta"), least)
    return block


NUMBERS = {
    "CHUNK": Number(
        (1024, 2048, 4096, 8192),
        [{"tokens": 16384, "hidden": 4096, "vocabulary": 128256}],
        timing.PASSES,
        use_chunk,
        shipped_chunk,
    ),
    "RESIDENT": Number(  # a width for each BLOCK, and one that takes a loop
        (1, 2, 4, 8, 16),
        [{"tokens": 2**26 // hidden, "hidden": hidden} for hidden in (128, 1024, 2048, 4096, 8192, 16384)],
        ("backward",),
        use_resident,
        shipped_resident,
    ),
}
JOBS = [
    *(f"CHUNK of {operator}" for operator in ("linear_cross_entropy", "linear_logprob")),
    *(f"RESIDENT of {operator}" for operator in ("rms_norm", "layer_norm")),
]


@contextlib.contextmanager
def put_back():
    chunk, least, resident = _linear.CHUNK, _linear.LEAST, dict(_norm.RESIDENT)
    try:
        yield
    finally:
        _linear.CHUNK, _linear.LEAST = chunk, least
        _norm.RESIDENT.update(resident)


def tune(machine, record, job):
    name, operator = job.split(" of ")
    for sizes in NUMBERS[name].sizes:
        if record.left() <= 0:
            record.cut(f"{name} of {cases.text(operator, sizes)}")
            continue
        with machine.serving(), put_back():
            for row in rows(machine, record, name, operator, sizes):
                record.add("tune", **row, **({"stands_for": sizes} if machine.dry else {}))
        record.write()


def rows(machine, record, name, operator, sizes):
    number = NUMBERS[name]
    shipped = number.shipped(operator, sizes)
    bench = timing.Bench(machine, operator, cases.tiny(sizes) if machine.dry else sizes, None, False)
    ours, eager = bench.contenders[cases.OURS].call, bench.contenders[cases.EAGER]

    def using(value):
        def call(*inputs):
            number.use(value)  # which stays for the backward
            return ours(*inputs)

        return timing.Contender(call, backward=True, spoils=False)

    values = {f"{cases.OURS}, {name} {value}": value for value in sorted({*number.values, shipped})}
    bench.contenders = {cases.EAGER: eager} | {text: using(value) for text, value in values.items()}
    bench.warm_up(record, cases.text(operator, sizes))
    bench.contenders.pop(cases.EAGER, None)
    bench.rounds(timing.SWEEP, time.monotonic() + max(record.left(), 0))
    for text, which, row in bench.measured():
        if which in number.passes:
            value = values[text]
            yield {
                "operator": operator,
                "sizes": bench.sizes,
                "number": name if name != "RESIDENT" else f"RESIDENT[{block(operator, sizes)}]",
                "tried": value,
                "shipped": value == shipped,
                **row,
            }
