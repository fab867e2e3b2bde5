"""A family's rules as a table, for the documentation and the command line."""

from ._rules import Alias
from ._rules import Copy
from ._rules import Drop
from ._rules import Frequencies
from ._rules import Halves
from ._rules import Heads
from ._rules import Split
from ._rules import Stack
from ._rules import Tied
from ._rules import Transpose
from ._rules import View
from ._rules import Zeros

WORDS = {
    Copy: "the same",
    Transpose: "transposed",
    View: "reshaped",
    Stack: "stacked",
    Split: "split",
    Halves: "stacked, rotary rows of q and k from pairs to halves",
    Heads: "q, k, v from per head to per tensor",
    Tied: "tied in HF, a copy in SAT",
    Alias: "a second name in HF, not stored",
    Drop: "left out",
    Zeros: "must be zero",
    Frequencies: "computed from rope_theta, fp32",
}


def document(families):
    """Every family with its table: the last part of docs/convert.md."""
    return "\n\n".join(f"### {family.name}: {family.title}\n\n{sides(family)}\n\n{table(family)}" for family in families)


def sides(family):
    kinds = f" ({', '.join(family.model_types)})" if family.model_types else ""
    return f"`{family.architecture}`{kinds} and {', '.join(f'`{name}`' for name in family.model_classes)}."


def table(family):
    head = ["Hugging Face", "SAT", "how", "shape in SAT", "model parallel", "when"]
    rows = [row(rule) for rule in family.rules]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


def row(rule):
    hf = [rule.alias] if isinstance(rule, Alias) else rule.hf
    how = WORDS[type(rule)] + (f": {rule.why}" if isinstance(rule, Drop) and rule.why else "")
    shape = "; ".join(f"[{dims.replace(chr(32), chr(44) + chr(32))}]" for dims in rule.sat_dims)
    return [code(hf), code(rule.sat), how, shape, rule.mp, rule.when]


def code(names):
    return ", ".join(f"`{name}`" for name in names if name)
