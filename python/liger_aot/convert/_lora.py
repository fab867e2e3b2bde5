"""Low-rank adapters of SAT's LoRA mixin: W + B A alpha / r, for each of the parts that a fused weight has."""

import math
import re
from itertools import chain

from ._bits import parts
from ._error import ConvertError
from ._error import Problems

ADAPTED = re.compile(r"^(?P<module>.*)\.(?:matrix_[AB]\.(?P<part>\d{1,9})|original\.(?P<own>\w+))$")


def adapters(keys):
    """The names under each module that has adapters, as matches."""
    found = {}
    for key in keys:
        if match := ADAPTED.match(key):
            found.setdefault(match["module"], []).append(match)
    return found


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
        first = next(iter(found))
        raise ConvertError(
            f"{sat.place(first)}: holds LoRA adapters that are not merged, of {len(found)} weights, the first {first}; "
            "--merge-lora --lora-alpha A merges them, with the alpha they were trained with (CogVLM's default is 1)"
        )
    merged = Merged(sat, found, alpha)
    report.notes.append(f"LoRA adapters of {len(found)} weights were merged, alpha {alpha:g}")
    return merged


def is_matrix(tensor):
    return tensor is not None and tensor.dtype.is_floating_point and tensor.dim() == 2 and tensor.numel() > 0


def parts_of(name, rank, count, problems):
    """(A, B) of each part, held to the weight."""
    names = [(f"{name}.matrix_A.{k}", f"{name}.matrix_B.{k}") for k in range(max(1, count))]
    odd = [key for key in (f"{name}.original.weight", *chain(*names)) if not is_matrix(rank.get(key))]
    for key in odd:
        problems.add(f"{key} must be there, a matrix in floating point; A.k and B.k come in pairs, from 0 on, with the weight")
    if odd:
        return []
    weight, pairs = rank[f"{name}.original.weight"], [(rank[a], rank[b]) for a, b in names]
    rows, columns = sum(len(b) for _, b in pairs), {a.shape[1] for a, _ in pairs}
    if (rows, columns) != (weight.shape[0], {weight.shape[1]}) or any(b.shape[1] != len(a) for a, b in pairs):
        shapes = [(list(b.shape), list(a.shape)) for a, b in pairs]
        problems.add(f"{name}: B A of shapes {shapes} do not make up the weight's {list(weight.shape)}")
    return pairs


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
        problems = Problems(f"{sat.place(next(iter(found)))}, whose LoRA adapters are to be merged")
        self.parts, plain = {}, {}
        for name, matches in found.items():
            count = len({match["part"] for match in matches if match["part"]})
            self.parts[f"{name}.weight"] = parts_of(name, rank, count, problems)
            plain |= {f"{name}.{match['own']}": match[0] for match in matches if match["own"]}
        kept = {key: key for key in rank if not ADAPTED.match(key)}
        for key in sorted(kept.keys() & plain):
            problems.add(f"holds {key} beside {plain[key]}; take the one away that is not the weight")
        problems.end()
        self.names = kept | plain
        self.ranks = [{key: rank[stored] for key, stored in self.names.items()}]
        self.layout = {}

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
