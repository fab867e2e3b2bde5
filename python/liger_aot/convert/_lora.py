"""Low-rank adapters of SAT's LoRA mixin: W + B A alpha / r, for each of the parts that a fused weight has."""

import math
import re

from ._bits import parts
from ._error import ConvertError

ADAPTED = re.compile(r"^(.*)\.(?:matrix_[AB]\.\d+|original\.\w+)$")


def adapters(keys):
    """The modules that have adapters."""
    return sorted({match[1] for key in keys if (match := ADAPTED.match(key))})


def without_adapters(sat, merge, alpha, report):
    """The source itself, or one whose adapters are merged."""
    found = adapters(sat.keys())
    if alpha is not None and not merge:
        raise ConvertError("convert: --lora-alpha is for --merge-lora, which was not given")
    if merge and not found:
        raise ConvertError(f"{sat.folder}: --merge-lora was given, and there are no LoRA adapters (matrix_A, matrix_B)")
    if not found:
        return sat
    if not merge:
        raise ConvertError(
            f"{sat.folder}: holds LoRA adapters that are not merged, of {len(found)} weights, the first {found[0]}; "
            "--merge-lora --lora-alpha A merges them, with the alpha they were trained with (CogVLM's default is 1)"
        )
    merged = Merged(sat, found, alpha)
    report.notes.append(f"LoRA adapters of {len(found)} weights were merged, alpha {alpha:g}")
    return merged


def is_matrix(tensor):
    return tensor is not None and tensor.dtype.is_floating_point and tensor.dim() == 2


class Merged:
    """A SAT source whose adapters are part of the weights."""

    def __init__(self, sat, found, alpha):
        if alpha is None:
            raise ConvertError("convert: --merge-lora needs --lora-alpha A, what it was trained with; no file records it")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise ConvertError(f"convert: --lora-alpha must be a number above zero, got {alpha!r}")
        if len(sat.ranks) > 1:
            raise ConvertError(f"{sat.folder}: LoRA adapters in {len(sat.ranks)} model-parallel files; merge them in SAT first")
        self.sat, self.folder, self.config, self.alpha, rank = sat, sat.folder, sat.config, alpha, sat.ranks[0]
        self.parts = {f"{name}.weight": self.parts_of(name, rank) for name in found}
        plain = {
            f"{name}.{p}": f"{name}.original.{p}"
            for name in found
            for p in ("weight", "bias")
            if f"{name}.original.{p}" in rank
        }
        kept = {key: key for key in rank if not ADAPTED.match(key)}
        if twice := sorted(kept.keys() & plain):
            raise ConvertError(
                f"{sat.folder}: holds {twice[0]} beside {plain[twice[0]]}; take the one away that is not the weight"
            )
        self.names = kept | plain
        self.ranks = [{key: rank[stored] for key, stored in self.names.items()}]
        self.layout = {}

    def parts_of(self, name, rank):
        """(A, B) of each part, checked against the weight."""
        weight = rank.get(f"{name}.original.weight")
        if not is_matrix(weight):
            raise ConvertError(f"{self.folder}: {name}.original.weight must be there, in floating point, to merge LoRA into")
        count = sum(key.startswith(f"{name}.matrix_A.") for key in rank)
        pairs = [(rank.get(f"{name}.matrix_A.{k}"), rank.get(f"{name}.matrix_B.{k}")) for k in range(count)]
        if not pairs or any(not is_matrix(part) for pair in pairs for part in pair):
            raise ConvertError(f"{self.folder}: {name}: matrix_A.k and matrix_B.k must come in pairs, in floating point")
        rows, columns = sum(len(b) for _, b in pairs), {a.shape[1] for a, _ in pairs}
        if (rows, columns) != (weight.shape[0], {weight.shape[1]}) or any(b.shape[1] != len(a) for a, b in pairs):
            shapes = [(list(b.shape), list(a.shape)) for a, b in pairs]
            raise ConvertError(
                f"{self.folder}: {name}: B A of shapes {shapes} do not make up the weight's {list(weight.shape)}"
            )
        return pairs

    def keys(self):
        return list(self.names)

    def about(self, key):
        tensor = self.ranks[0][key]
        return tuple(tensor.shape), tensor.dtype

    def place(self, key):
        return self.sat.place(key)

    def get(self, key):
        return self.merged(key) if key in self.parts else self.ranks[0][key]

    def pieces(self, key):
        return [self.get(key)]

    def merged(self, key):
        """Some rows at a time, since this is done in fp32."""
        whole = self.ranks[0][key].clone()
        for rows, (a, b) in zip(whole.split([len(b) for _, b in self.parts[key]]), self.parts[key], strict=True):
            for some, own in zip(parts(rows), b.split(len(parts(rows)[0])), strict=True):
                some.copy_(some.float() + own.float() @ a.float() * (self.alpha / len(a)))
        return whole
