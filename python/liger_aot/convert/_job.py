"""One conversion: what is known of it, and every check that needs no byte to be written."""

import re
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

from . import _parallel
from ._bits import same_bits
from ._error import ConvertError
from ._error import Problems
from ._family import DEFAULTS
from ._hf import DTYPES
from ._rules import Alias
from ._rules import Drop
from ._rules import Frequencies
from ._rules import Tied
from ._rules import Zeros
from ._rules import base_of
from ._rules import expand
from ._rules import spelled
from ._settings import Settings
from .families import FAMILIES

HINTS = {
    r"\.(matrix_A|matrix_B|original)\.|lora_[AB]|\.lora_linear\.\d+\.[QKVO]_[AB]$": "; LoRA, which must be merged first",
    r"scale|zeros|qweight|quant_state|absmax|SCB": "; of a quantised model, which must be saved in 16 bits first",
    r"^mixins\.ptuning": "; prompt tuning, which has no place in HF",
    r"^mixins\.\d+\.": "; mixins were numbered before SAT 0.1; load and save it with a newer SAT first",
}


@dataclass
class Report:
    """What was converted, and what to know about it."""

    family: str
    source: Path
    target: Path
    tensors: int = 0
    bytes: int = 0
    files: list = field(default_factory=list)
    notes: list = field(default_factory=list)

    def __str__(self):
        lines = [f"{self.source} -> {self.target}: {self.family}, {self.tensors} tensors, {self.bytes / 1e6:,.1f} MB"]
        lines += [f"carried through: {', '.join(self.files)}"] * bool(self.files)
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


class Job:
    """`config` is HF's configuration and `args` SAT's: one was read, the other made from it."""

    def __init__(self, family, source, target, dtype, allow_rope_theta):
        self.family, self.dtype, self.allow = family, dtype, allow_rope_theta
        self.problems = Problems(f"{source}, as {family.name}")
        self.report = Report(family.name, source, target)

    def merged(self, config, args, carried):
        """What SAT's arguments cannot say is as in the configuration that came through with the weights; they win over it."""
        if not self.family.claims_hf(carried):
            other, own = kind_of(carried), self.family.name
            self.report.notes.append(f"{carried.path} was left out: it is of {other!r}, the weights of {own}")
            return config
        own = {key: carried[key] for key in ("model_type", "architectures", "auto_map") if key in carried}
        # SAT scales no rotary angles, and holds no quantised weights: such keys are not about these weights.
        kept = {key: value for key, value in carried.items() if key not in ("rope_scaling", "quantization_config")}
        merged = self.family.filled(Settings({**kept, **config, **own}, carried.path))
        says = self.family.args(merged)
        for key in ("use_bias", "use_qkv_bias"):
            here, there = args.get(key, DEFAULTS[key]), says.get(key, DEFAULTS[key])
            if here != there:
                kind = f"{carried.path} is of {kind_of(carried)!r}, for which it is {there}"
                self.problems.add(f"{args.path}: {key} is {here}; {kind}; put the weights' own there, or take it away")
        return merged

    def plan(self, config, args, ranks):
        """`sizes["rope_theta"]` is what the configuration says, until the file's frequencies say something else."""
        self.config, self.args, self.ranks = config, args, ranks
        self.sizes = self.family.sizes(config, args) | {"rope_theta": self.family.theta(config)}
        self.items = expand(self.family.rules, self.sizes)
        self.layouts = {key: _parallel.layout(item, k) for item in self.items for k, key in enumerate(item.sat)}

    def underflowed(self, zeros):
        if zeros:
            kind = str(self.dtype).removeprefix("torch.")
            self.report.notes.append(f"{zeros} numbers that were not zero became zero in {kind}")

    def kept(self):
        """Items whose tensors must be on both sides."""
        return [item for item in self.items if not isinstance(item.rule, Alias | Drop | Frequencies)]

    def compare(self, source, side, path):
        """Every name and shape of one side with what the configuration says."""
        wanted = described(self.kept(), side)
        computed = described(self.rules(Frequencies), side)
        free = computed.keys() | {key for item in self.items for key in may_be(item, side)}
        have = set(source.keys())
        for key in sorted(wanted.keys() - have):
            shape, text = wanted[key]
            self.problems.add(f"missing: {key} of shape {list(shape)}, {text}, which {path.name} asks for")
        for key in sorted(have - wanted.keys() - free):
            self.problems.add(f"unknown: {key} of shape {list(source.about(key)[0])} in {source.place(key).name}{hint(key)}")
        for key, (shape, text) in (wanted | computed).items():
            if key in have:
                self.compare_one(key, source, shape, f"{path.name} says {list(shape)}: {text}")
        for names in () if self.dtype else [item.hf if side == "hf" else item.sat for item in self.kept()]:
            self.compare_dtypes([key for key in names if key in have], source)

    def compare_one(self, key, source, shape, says):
        (got, dtype), file = source.about(key), source.place(key).name
        if got != shape:
            self.problems.add(f"mis-shaped: {key} is {list(got)} in {file}; {says}")
        if dtype not in DTYPES.values():
            kind = str(dtype).removeprefix("torch.")
            self.problems.add(f"{key} holds {kind} in {file}; a quantised model must be saved in 16 bits first")

    def compare_dtypes(self, keys, source):
        """What becomes one tensor has one dtype, or bits would be lost."""
        kinds = {key: source.about(key)[1] for key in keys}
        odd = next((key for key in keys if kinds[key] != kinds[keys[0]]), None)
        if odd:
            found = [f"{key} is {kinds[key]} in {source.place(key).name}".replace("torch.", "") for key in (keys[0], odd)]
            self.problems.add(f"{', '.join(found)}, and they become one tensor; --dtype casts them all")

    def split_evenly(self):
        if self.ranks == 1:
            return
        by = f"cannot be divided by {self.ranks}, the number of ranks"
        for name in ("heads", "kv_heads", "seen_heads"):
            if self.sizes.get(name, self.ranks) % self.ranks:
                self.problems.add(f"model parallelism: {name} {self.sizes[name]} {by}")
        for item in self.items:
            for key, shape in zip(item.sat, item.sat_shapes, strict=True):
                for part in _parallel.uneven(shape, self.layouts[key], self.ranks):
                    self.problems.add(f"model parallelism: {key}: {part} {by}")

    def rules(self, kind):
        return [item for item in self.items if isinstance(item.rule, kind)]

    def theta_kept(self):
        """SAT's class has a rotary base of its own; another one lives in the file alone, as long as the model is in fp32."""
        theta = self.sizes["rope_theta"]
        if not self.rules(Frequencies) or theta == self.family.rope_base(self.args):
            return
        if self.allow:
            self.args["rope_theta"] = theta
            repair = f"liger_aot.convert.set_rope_theta(model, {theta:.12g})"
            self.report.notes.append(f"{self.lost(theta)}; after loading, {repair} repairs it")
        else:
            remedy = "--allow-rope-theta converts all the same and records it in model_config.json"
            self.problems.add(f"{self.config.path.name}: rope_theta: {self.lost(theta)}; {remedy}")

    def lost(self, theta):
        own, name = self.family.rope_base(self.args), self.args["model_class"]
        return f"the rotary base is {theta:.12g}, {name} computes with {own:.12g} once the model is cast to 16 bits"

    def theta_found(self, sat):
        """The base that the frequencies in the file have."""
        if not self.rules(Frequencies):
            return
        item = self.rules(Frequencies)[0]
        key, own = item.sat[0], self.family.rope_base(self.args)
        recorded = None if self.args.get("rope_theta") is None else self.args.number("rope_theta")
        theta = recorded or own
        if key in sat.keys():  # noqa: SIM118 (not a dict)
            values = sat.get(key)
            theta = base_of(values, self.sizes["rope_dim"], [theta, own])
            if theta is None:
                shown, dim = f"{list(values.shape)} {values.flatten()[:3].tolist()} …", self.sizes["rope_dim"]
                wrong = f"{shown} are no frequencies of a rotary embedding of {dim} dimensions"
                self.problems.add(f"{sat.place(key).name}: {key}: {wrong}")
                return
        else:
            origin = "model_config.json" if recorded else self.args["model_class"]
            self.report.notes.append(f"{key} is missing; rope_theta {theta:.12g} is taken from {origin}")
        if recorded and theta != recorded:
            says = f"{self.args.path.name} says rope_theta {recorded:.12g}; take the one away that is wrong"
            self.problems.add(f"{sat.place(key).name}: {key}: the frequencies of rotary base {theta:.12g}, and {says}")
        elif theta not in (own, recorded) and not self.allow:
            self.problems.add(f"{sat.place(key).name}: {key}: {self.lost(theta)}; --allow-rope-theta takes the file's")
        self.sizes["rope_theta"] = theta
        self.family.set_theta(self.config, theta)

    def hf_values(self, hf):
        """What must be equal, zero or computable, of what SAT does not store."""
        have = set(hf.keys())
        for item in self.items:
            rule = item.rule
            if isinstance(rule, Alias | Tied) and rule.alias in have:
                self.same_twice(hf, rule.alias, item.hf[0])
            if isinstance(rule, Zeros) and bool(hf.get(item.hf[0]).any()):
                key = item.hf[0]
                text = f"{key} is not zero, and SAT's class has no place for it; {rule.remedy}"
                self.problems.add(f"{hf.place(key).name}: {text}")
            if isinstance(rule, Frequencies):
                for key in sorted(have.intersection(item.hf)):
                    self.same_theta(key, hf)
            if isinstance(rule, Drop) and rule.why:
                self.report.notes += [f"left out: {key}; {rule.why}" for key in item.hf if key in have]

    def same_twice(self, hf, alias, name):
        if not same_bits(hf.get(alias), hf.get(name)):
            why = f"tie_word_embeddings is true; set it to false in {self.config.path}"
            found = [f"{key} {list(hf.about(key)[0])} in {hf.place(key).name}" for key in (alias, name)]
            self.problems.add(f"{' differs from '.join(found)}, while {why}")

    def same_theta(self, key, hf):
        theta, file = self.sizes["rope_theta"], hf.place(key).name
        accepted = list({theta: None, self.family.buffer_theta(theta): None})
        if base_of(hf.get(key), self.sizes["rope_dim"], accepted) not in accepted:
            bases = f"rope_theta {' or '.join(f'{base:.12g}' for base in accepted)}"
            self.problems.add(f"{file}: {key}: not the frequencies of {bases}, which {self.config.path.name} says")


def described(items, side):
    """{name: (shape, the shape with where it comes from)}"""
    found = {}
    for item in items:
        names, shapes, dims = (item.hf, item.hf_shapes, item.rule.hf_dims) if side == "hf" else sat_side(item)
        dims = dims * len(names) if isinstance(item.rule, Frequencies) else dims
        found |= {name: (shape, spelled(dim, item.sizes)) for name, shape, dim in zip(names, shapes, dims, strict=True)}
    return found


def sat_side(item):
    return item.sat, item.sat_shapes, item.rule.sat_dims


def may_be(item, side):
    """Names that may be there and need not."""
    if side == "hf" and isinstance(item.rule, Drop):
        return item.hf
    return (item.rule.alias,) if side == "hf" and isinstance(item.rule, Alias | Tied) else ()


def hint(key):
    return next((text for pattern, text in HINTS.items() if re.search(pattern, key)), "")


def kind_of(config):
    return config.get("model_type") or ", ".join(map(str, config.listed("architectures"))) or "no model_type"


def choose_hf(name, config):
    return choose(name, [family for family in FAMILIES.values() if family.claims_hf(config)], config, kind_of(config))


def choose_sat(name, args, carried):
    """Classes that several families read are those whose configuration came through with them."""
    found = [family for family in FAMILIES.values() if carried and family.sat_class(args) and family.claims_hf(carried)]
    found = found or [family for family in FAMILIES.values() if family.claims_sat(args)]
    return choose(name, found, args, args["model_class"])


def choose(name, found, config, about):
    if name != "auto":
        if name not in FAMILIES:
            raise ConvertError(f"convert: family must be auto or one of {', '.join(FAMILIES)}, got {name!r}")
        return FAMILIES[name]
    if len(found) == 1:
        return found[0]
    if found:
        which = " or ".join(family.name for family in found)
        raise ConvertError(f"{config.path}: {about!r} may be one of several, say which: --family {which}")
    raise ConvertError(f"{config.path}: no family for {about!r}; there are {', '.join(FAMILIES)}")
