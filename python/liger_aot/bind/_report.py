"""What bind did."""

import collections
import re
from typing import NamedTuple


class Row(NamedTuple):
    """A module: its path and class, the operator that computes its formula, if one does, the formula, and a remark.

    status is "bound", "left", or "shadowed": an instance has a forward of its own, which a class cannot change.
    """

    path: str
    kind: str
    operator: str | None
    status: str
    formula: str = ""
    why: str = ""


class Counts(collections.Counter):
    """How often losses were fused, and logits computed and why; one for all copies of a model's head.

    What torch.compile traces is counted under "..., traced", once for each graph and not at its runs.
    """

    def __deepcopy__(self, memo):
        return self


class Report(list):
    """A Row for each module that was bound, or could have been. counts says how the losses since then were computed."""

    def __init__(self, rows, base="", compile="inductor", counts=None):
        super().__init__(rows)
        self.base, self.compile, self.counts = base, compile, Counts() if counts is None else counts

    bound = property(lambda self: [row for row in self if row.status == "bound"])
    left = property(lambda self: [row for row in self if row.status != "bound"])

    def __str__(self):
        groups = collections.defaultdict(list)
        for row in self:
            groups[row._replace(path=re.sub(r"\d+", "*", row.path))].append(row)
        lines = [f"base model: {self.base or 'the model itself'}", COMPILE[self.compile]]
        for row, rows in groups.items():
            what = ": ".join(text for text in (row.formula, row.why) if text)
            lines.append(f"{row.status:8}  {row.operator or '-':20}  {len(rows):3} x {row.kind:24}  {row.path:40}  {what}")
        return "\n".join([*lines, *(f"{count} x {what}" for what, count in sorted(self.counts.items()))])


COMPILE = {
    "inductor": "under torch.compile: norms, gated units and rope are Inductor's, which fuses them with what is around them",
    "liger": "under torch.compile: every operator stays in the graph",
}
