"""Rules tie names of a Hugging Face checkpoint to names of a SAT one, and compute either side from the other.

A name may hold `{i}`, which runs over what the family's sizes say, and `{i+1}`. A shape is a text of sizes, "q+kv+kv hidden":
where the first dimension is a sum, model parallelism splits each summand by itself. Results are lists of pieces to be put below
each other, views wherever possible, so that a tensor is never held twice.
"""

import itertools
import re
from dataclasses import dataclass

import torch

FIELD = re.compile(r"\{(\w+?)(\+1)?\}")


@dataclass(eq=False)
class Rule:
    """`mp` is how model parallelism splits the SAT tensors: column, row, vocab, or not at all."""

    hf: tuple
    sat: tuple
    hf_dims: tuple
    sat_dims: tuple
    mp: str = ""
    when: str = ""

    def applies(self, sizes):
        return not self.when or sizes[self.when.removeprefix("not ")] != self.when.startswith("not ")

    def expand(self, sizes):
        fields = sorted({name for text in self.hf + self.sat for name, _ in FIELD.findall(text)})
        for put in combinations(fields, sizes):
            yield Item(
                self,
                names(self.hf, put),
                names(self.sat, put),
                shapes(self.hf_dims, sizes),
                shapes(self.sat_dims, sizes),
                sizes,
            )


@dataclass(frozen=True)
class Item:
    """A rule for one layer."""

    rule: Rule
    hf: tuple
    sat: tuple
    hf_shapes: tuple
    sat_shapes: tuple
    sizes: dict

    def to_sat(self, tensors):
        return self.rule.to_sat(tensors, self)

    def to_hf(self, tensors):
        return self.rule.to_hf(tensors, self)


def names(texts, put):
    return tuple(FIELD.sub(lambda m: str(put[m[1]] + 1 if m[2] else put[m[1]]), text) for text in texts)


def shapes(texts, sizes):
    return tuple(tuple(sum(summands(dim, sizes)) for dim in text.split()) for text in texts)


def summands(dim, sizes):
    return [int(term) if term.isdigit() else sizes[term] for term in dim.split("+")]


def spelled(text, sizes):
    """'q 64 + kv 32 + kv 32 by hidden 64': the numbers with where they come from."""
    dims = [[f"{term} {sizes[term]}" if not term.isdigit() else term for term in dim.split("+")] for dim in text.split()]
    return " by ".join(" + ".join(dim) for dim in dims)


class Copy(Rule):
    """The same tensor."""

    def __init__(self, hf, sat, dims, mp="", when=""):
        super().__init__((hf,), (sat,), (dims,), (dims,), mp, when)

    def to_sat(self, tensors, item):
        return [[tensors[0]]]

    to_hf = to_sat


class Transpose(Rule):
    """The other way round in HF, as GPT-2's Conv1D has it."""

    def __init__(self, hf, sat, dims, mp="", when=""):
        super().__init__((hf,), (sat,), (" ".join(dims.split()[::-1]),), (dims,), mp, when)

    def to_sat(self, tensors, item):
        return [[tensors[0].t()]]

    to_hf = to_sat


class View(Rule):
    """The same numbers in another shape."""

    def __init__(self, hf, sat, hf_dims, sat_dims, when=""):
        super().__init__((hf,), (sat,), (hf_dims,), (sat_dims,), "", when)

    def to_sat(self, tensors, item):
        return [[tensors[0].reshape(item.sat_shapes[0])]]

    def to_hf(self, tensors, item):
        return [[tensors[0].reshape(item.hf_shapes[0])]]


class Stack(Rule):
    """Several HF tensors below each other are one SAT tensor."""

    def __init__(self, hf, sat, dims, mp="", when=""):
        super().__init__(tuple(hf), (sat,), tuple(dims), (stacked(dims),), mp, when)

    def to_sat(self, tensors, item):
        return [list(tensors)]

    def to_hf(self, tensors, item):
        return [[piece] for piece in tensors[0].split([shape[0] for shape in item.hf_shapes])]


class Split(Rule):
    """One HF tensor is several SAT tensors below each other."""

    def __init__(self, hf, sat, dims, mp="", when=""):
        super().__init__((hf,), tuple(sat), (stacked(dims),), tuple(dims), mp, when)

    def to_sat(self, tensors, item):
        return [[piece] for piece in tensors[0].split([shape[0] for shape in item.sat_shapes])]

    def to_hf(self, tensors, item):
        return [list(tensors)]


def stacked(dims):
    first = "+".join(dim.split()[0] for dim in dims)
    return " ".join([first, *dims[0].split()[1:]])


class Halves(Stack):
    """Stack, with the rotary rows of each head of q and k in pairs in HF and in halves in SAT: 0 2 4 … 1 3 5 …"""

    def to_sat(self, tensors, item):
        return [[self.reorder(t, item, 2) if k < 2 else t for k, t in enumerate(tensors)]]

    def to_hf(self, tensors, item):
        pieces = super().to_hf(tensors, item)
        return [[self.reorder(t, item, item.sizes["rope_dim"] // 2)] if k < 2 else [t] for k, (t,) in enumerate(pieces)]

    def reorder(self, tensor, item, inner):
        heads = tensor.unflatten(0, (-1, item.sizes["head_dim"]))
        turned, kept = heads.split([item.sizes["rope_dim"], item.sizes["head_dim"] - item.sizes["rope_dim"]], 1)
        turned = turned.unflatten(1, (-1, inner)).transpose(1, 2).flatten(1, 2)
        return torch.cat([turned, kept], 1).flatten(0, 1)


class Heads(Rule):
    """q, k and v of each head together in HF, of all heads together in SAT."""

    def __init__(self, hf, sat, dims, mp="", when=""):
        super().__init__((hf,), (sat,), (dims,), (dims,), mp, when)

    def to_sat(self, tensors, item):
        heads = tensors[0].unflatten(0, (-1, 3, item.sizes["head_dim"]))
        return [[heads[:, k].flatten(0, 1) for k in range(3)]]

    def to_hf(self, tensors, item):
        return [[tensors[0].unflatten(0, (3, -1, item.sizes["head_dim"])).transpose(0, 1).flatten(0, 2)]]


class Tied(Rule):
    """SAT's own copy of an HF tensor; `alias` is a name under which an HF file may hold it once more."""

    def __init__(self, hf, sat, dims, alias, mp="", when=""):
        super().__init__((hf,), (sat,), (dims,), (dims,), mp, when)
        self.alias = alias

    def to_sat(self, tensors, item):
        return [[tensors[0]]]


class Alias(Rule):
    """An HF name under which a file may hold another of its tensors once more; neither SAT nor we write it."""

    def __init__(self, hf, of, dims, when=""):
        super().__init__((of,), (), (dims,), (), "", when)
        self.alias = hf


class Drop(Rule):
    """An HF tensor that SAT's class has no place for; `why` goes into the report, where it is more than a buffer."""

    def __init__(self, hf, why="", when=""):
        super().__init__((hf,), (), ("",), (), "", when)
        self.why = why


class Zeros(Rule):
    """An HF tensor that SAT's class has no place for and that must be zero; written back as zeros."""

    def __init__(self, hf, dims, remedy):
        super().__init__((hf,), (), (dims,), ())
        self.remedy = remedy


class Frequencies(Rule):
    """The rotary frequencies of rope_theta and rope_dim, which SAT keeps in the file; `write` where HF's code does too."""

    def __init__(self, hf, sat, write=False, when=""):
        super().__init__((hf,) if hf else (), (sat,), ("rope_half",) if hf else (), ("rope_half",), "", when)
        self.write = write

    def expand(self, sizes):
        hf = [name for text in self.hf for name in spread(text, sizes)]
        shape = (sizes["rope_dim"] // 2,)
        yield Item(self, tuple(hf), self.sat, (shape,) * len(hf), (shape,), sizes)


def spread(text, sizes):
    fields = sorted({name for name, _ in FIELD.findall(text)})
    for put in combinations(fields, sizes):
        yield names((text,), put)[0]


def combinations(fields, sizes):
    for values in itertools.product(*(sizes[name] for name in fields)):
        yield dict(zip(fields, values, strict=True))


def frequencies(dim, theta):
    return 1.0 / (theta ** (torch.arange(0, dim, 2).float() / dim))


def base_of(values, dim, candidates):
    """The rope_theta whose frequencies `values` are, or None; a candidate if one is, so that it comes out to the last digit."""
    exact, values = values.dtype is torch.float32, values.float()
    if values.shape != (dim // 2,) or not bool(values.isfinite().all()) or bool((values <= 0).any()) or values[0] != 1:
        return None
    at = int((values > 1e-4).sum()) - 1  # below, 16 bits hold few digits
    estimate = float(values[at]) ** (-dim / (2 * at)) if at else 1.0
    for theta in [*candidates, float(f"{estimate:.2g}"), float(f"{estimate:.4g}"), estimate]:
        if are_frequencies(values, frequencies(dim, theta), exact):
            return float(theta)
    return None


def are_frequencies(values, wanted, exact):
    """Models that were in 16 bits once leave them rounded, whatever their dtype is now."""
    if torch.allclose(values, wanted, rtol=1e-5 if exact else 1e-2, atol=0 if exact else 1e-7):
        return True
    return any(torch.equal(values, wanted.to(dtype).float()) for dtype in (torch.bfloat16, torch.float16))


def linear(hf, sat, dims, mp="", when=""):
    """Weight and bias of a linear layer; a row split leaves the bias whole."""
    bias = "" if mp == "row" else mp
    return Copy(f"{hf}.weight", f"{sat}.weight", dims, mp, when), Copy(f"{hf}.bias", f"{sat}.bias", dims.split()[0], bias, when)


def norm(hf, sat, dims="hidden", when=""):
    return tuple(Copy(f"{hf}.{name}", f"{sat}.{name}", dims, "", when) for name in ("weight", "bias"))


def expand(rules, sizes):
    return [item for rule in rules if rule.applies(sizes) for item in rule.expand(sizes)]
