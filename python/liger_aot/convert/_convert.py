"""Plan everything from headers, say all that is wrong, then copy one rule at a time into files of the final size."""

import os
import re
import secrets
import shutil
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import torch

from . import _parallel
from . import _settings
from ._bits import finite
from ._bits import same_bits
from ._error import ConvertError
from ._hf import HFSource
from ._hf import HFWriter
from ._hf import bytes_of
from ._hf import size
from ._job import Job
from ._job import Report
from ._job import choose_hf
from ._job import choose_sat
from ._lora import without_adapters
from ._progress import Progress
from ._rules import Alias
from ._rules import Drop
from ._rules import Frequencies
from ._rules import Tied
from ._rules import Zeros
from ._rules import frequencies
from ._sat import SATSource
from ._sat import SATWriter
from ._verify import Shown
from ._verify import back
from ._verify import compare_back
from ._verify import compare_logits

NARROW = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CARRIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".py", ".md")
TEMPLATES = "additional_chat_templates/*.jinja"
CARRIED_NAMES = ("LICENSE", "NOTICE", "MODEL_LICENSE")
WRITTEN = ("config.json", "model_config.json")  # by the conversion itself, and so never carried


def hf_to_sat(
    source: str | Path,
    target: str | Path,
    *,
    family: str = "auto",
    dtype: str | torch.dtype | None = None,
    mp: int = 1,
    allow_rope_theta: bool = False,
    verify: bool = False,
    text: str | Path | None = None,
    image: str | Path | None = None,
    progress: TextIO | None = None,
) -> Report:
    """Write the Hugging Face checkpoint in `source` as a SAT one into the folder `target`, which must not exist or be empty.

    `dtype` casts what is floating, `mp` is the number of ranks of model parallelism, `allow_rope_theta` lets a rotary base
    through that SAT's class would lose in 16 bits. `verify` computes everything back and compares, and runs both frameworks
    where they are installed, on the file `text` or `image` if given. `progress` is a stream to show it on. A checkpoint that
    does not fit is a ConvertError that lists every reason, before anything is written.
    """
    source, target, dtype, shown = Path(source), fresh(target), narrow(dtype), Shown(verify, text, image)
    if isinstance(mp, bool) or not isinstance(mp, int) or not 1 <= mp <= 99:
        raise ConvertError(f"convert: mp must be a whole number from 1 to 99, got {mp!r}")
    hf = HFSource(source)
    job = Job(choose_hf(family, hf.config), source, target, dtype, allow_rope_theta)
    job.report.notes += left_behind(source, hf.read())
    shown.fits(job.family)
    plan_to_sat(job, hf, mp)
    plan = sat_plan(job, hf)
    job.report.tensors, job.report.bytes = len(plan), mp * sum(map(size, plan.values()))
    with staged(target, job.report.bytes, SATWriter.last) as folder:
        writer = SATWriter(folder, [plan] * mp)
        bar = Progress(job.report.bytes, progress)
        job.underflowed(sum(write_sat(job, hf, item, writer.ranks, bar) for item in job.items if item.sat))
        bar.end()
        job.report.files = carry(source, folder)
        shutil.copyfile(hf.config.path, folder / "config.json")
        writer.close(job.args)
        if verify:
            sat = with_layout(SATSource(folder, writer.tag), job)
            compare_back(job, hf, sat, sat)
            compare_logits(job, source, sat, shown)
        writer.seal()
    return job.report


def sat_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    family: str = "auto",
    dtype: str | torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    allow_rope_theta: bool = False,
    merge_lora: bool = False,
    lora_alpha: float | None = None,
    verify: bool = False,
    text: str | Path | None = None,
    image: str | Path | None = None,
    progress: TextIO | None = None,
) -> Report:
    """Write the SAT checkpoint in `source` as a Hugging Face one into the folder `target`, which must not exist or be empty.

    `merge_lora` adds low-rank adapters to their weights, with the `lora_alpha` they were trained with, which no file records.
    The rest is as in hf_to_sat.
    """
    source, target, dtype, shown = Path(source), fresh(target), narrow(dtype), Shown(verify, text, image)
    max_bytes = bytes_of(max_shard_size)
    sat = SATSource(source)
    carried = _settings.read(source / "config.json") if (source / "config.json").is_file() else None
    job = Job(choose_sat(family, sat.config, carried), source, target, dtype, allow_rope_theta)
    job.report.notes += left_behind(source, sat.read())
    shown.fits(job.family)
    sat = without_adapters(sat, merge_lora, lora_alpha, job.report)
    plan_to_hf(job, sat, carried)
    plan = hf_plan(job, sat)
    job.config["dtype"] = job.config["torch_dtype"] = str(next(iter(plan.values()))[1]).removeprefix("torch.")
    job.report.tensors, job.report.bytes = len(plan), sum(map(size, plan.values()))
    with staged(target, job.report.bytes, HFWriter.last) as folder:
        writer = HFWriter(folder, plan, max_bytes)
        bar = Progress(job.report.bytes, progress)
        job.underflowed(sum(write_hf(job, sat, item, writer.tensors, bar) for item in job.items))
        bar.end()
        job.report.files = carry(source, folder)
        writer.close()
        if verify:
            written = HFSource(folder, job.config)
            compare_back(job, written, sat, written)
            compare_logits(job, folder, sat, shown)
        writer.seal(job.config)
    return job.report


def plan_to_sat(job, hf, ranks):
    if hf.config.get("quantization_config"):
        raise ConvertError(f"{hf.config.path}: has a quantization_config; save the model unquantised first")
    hf.config = job.family.filled(hf.config)
    job.family.check_hf(hf.config, job.problems)
    job.family.check_code(hf.config, job.problems)
    job.problems.end()
    args = _settings.Settings(job.family.args(hf.config), hf.config.path)
    for part in (args, *(value for value in args.values() if isinstance(value, dict))):
        part["model_parallel_size"] = ranks
    job.plan(hf.config, args, ranks)
    renamed = hf.name_as({name for item in job.items for name in item.hf}, job.family.prefix, job.family.old_names)
    if renamed:
        old, new = next(iter(renamed.items()))
        job.report.notes.append(f"{len(renamed)} names, old ones or of a base model, were read as today's: {old} as {new}")
    job.theta_kept()
    job.compare(hf, "hf", hf.config.path)
    job.split_evenly()
    job.problems.end()
    job.hf_values(hf)
    job.problems.end()


def plan_to_hf(job, sat, carried):
    args = sat.config
    for key in ("num_layers", "vocab_size"):
        args.count(key)
    args.divide("hidden_size", "num_attention_heads")
    job.family.check_sat(args, job.problems)
    job.problems.end()
    config = own = _settings.Settings(job.family.config(args), args.path)
    if carried is not None:
        config = job.merged(own, args, carried)
        job.problems.end()
    if job.family.head():
        may_be_tied = config is own or job.family.sizes(config, args)["tied"]
        config["tie_word_embeddings"] = False
        job.plan(config, args, len(sat.ranks))
        config["tie_word_embeddings"] = may_be_tied and same(with_layout(sat, job), *job.family.head())
    job.plan(config, args, len(sat.ranks))
    with_layout(sat, job)
    job.theta_found(sat)
    job.family.check_hf(job.config, job.problems)
    job.split_evenly()
    job.compare(sat, "sat", args.path)
    job.problems.end()
    if job.ranks > 1:
        sat.unequal(job.problems.add)
    job.problems.end()


def with_layout(sat, job):
    sat.layout = job.layouts
    return sat


def narrow(dtype):
    dtype = NARROW.get(dtype, dtype)
    if dtype is not None and dtype not in NARROW.values():
        raise ConvertError(f"convert: dtype must be one of {', '.join(NARROW)}, got {dtype!r}")
    return dtype


def fresh(target):
    """Where a link leads, since nothing can be renamed onto a link."""
    target = Path(os.path.realpath(target))
    if not target.exists():
        return target
    if not target.is_dir():
        raise ConvertError(f"{target}: must not exist, or be an empty folder; it is a file")
    held = sorted(path.name for path in target.iterdir() if not is_partial(path, target))
    if held:
        killed = any(is_partial(path, target) for path in target.iterdir())
        why = "; a run that was killed while it moved its files there may have left them" if killed else ""
        raise ConvertError(f"{target}: must not exist, or be an empty folder; it holds {', '.join(held[:5])}{why}")
    return target


def is_partial(path, target):
    """What a run that was killed has left in a folder that was there before it."""
    return re.fullmatch(rf"\.{re.escape(target.name)}\.partial-[0-9a-f]{{8}}", path.name) is not None


@contextmanager
def staged(target, needed, last):
    """A folder that becomes the target when all of it is there.

    A target that is there may be a mount point or somebody's working directory, onto which nothing can be renamed: the folder
    is inside it then, and its files move up, `last` after the others.
    """
    parent = target if target.exists() else target.parent
    made = [path for path in (parent, *parent.parents) if not path.exists()]
    folder, moved = parent / f".{target.name}.partial-{secrets.token_hex(4)}", []
    folder.mkdir(parents=True)
    try:
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise ConvertError(f"{target}: needs {needed:,} bytes, and {parent} has {free:,} left")
        yield folder
        if parent is not target:
            folder.rename(target)
            return
        if any(not is_partial(path, target) for path in target.iterdir()):
            raise ConvertError(f"{target}: was empty, and no longer is")
        for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
            moved.append(path.rename(target / path.name))
        folder.rmdir()
    except BaseException:
        for path in moved:
            path.rename(folder / path.name)
        shutil.rmtree(folder)
        for path in made:
            with suppress(OSError):  # somebody else has put something there
                path.rmdir()
        raise


def same(sat, head, embedding):
    if not {head, embedding} <= set(sat.keys()):
        return False
    for key in (head, embedding):
        if len({rank[key].shape for rank in sat.ranks}) > 1:
            return False
    if sat.about(head) != sat.about(embedding):
        return False
    ours, theirs = sorted((sat.pieces(head), sat.pieces(embedding)), key=len)
    return all(map(same_bits, theirs, ours if ours[1:] else ours[0].split([len(piece) for piece in theirs])))


def sat_plan(job, hf):
    """{name: (shape, dtype)} of each rank's file."""
    plan = {}
    for item in job.items:
        for key, shape in zip(item.sat, item.sat_shapes, strict=True):
            dtype = torch.float32 if isinstance(item.rule, Frequencies) else job.dtype or hf.about(item.hf[0])[1]
            plan[key] = _parallel.local_shape(shape, job.layouts[key], job.ranks), dtype
    return plan


def hf_plan(job, sat):
    plan = {}
    for item in job.items:
        rule, dtype = item.rule, None
        if isinstance(rule, Frequencies):
            dtype = torch.float32 if rule.write else None
        elif isinstance(rule, Zeros):
            dtype = job.dtype or next(iter(plan.values()))[1]
        elif item.sat and not isinstance(rule, Tied):
            dtype = job.dtype or sat.about(item.sat[0])[1]
        if dtype is not None:
            plan |= {key: (shape, dtype) for key, shape in zip(item.hf, item.hf_shapes, strict=True)}
    return plan


def write_sat(job, hf, item, ranks, bar):
    """How many numbers became zero."""
    if isinstance(item.rule, Frequencies):
        origin, results = "rope_theta", [[frequencies(item.sizes["rope_dim"], item.sizes["rope_theta"])]]
    else:
        origin, results = origin_of(hf, item.hf), item.to_sat([hf.get(key) for key in item.hf])
    zeros = 0
    for key, pieces in zip(item.sat, results, strict=True):
        own = [pieces] if job.ranks == 1 else _parallel.split(together(pieces), job.layouts[key], job.ranks)
        for rank, part in zip(ranks, own, strict=True):
            made = fill(rank[key], part, origin)
            zeros += made if job.layouts[key].kind or rank is ranks[0] else 0  # the others hold the same
            bar.add(rank[key].nbytes, key)
    return zeros


def write_hf(job, sat, item, tensors, bar):
    """How many numbers became zero."""
    if not item.hf or item.hf[0] not in tensors or isinstance(item.rule, Alias | Drop | Tied):
        return 0
    origin = origin_of(sat, item.sat)
    if isinstance(item.rule, Frequencies):
        theta = job.family.buffer_theta(item.sizes["rope_theta"])
        results = [[frequencies(item.sizes["rope_dim"], theta)]] * len(item.hf)
    elif isinstance(item.rule, Zeros):
        results = [[torch.zeros(shape)] for shape in item.hf_shapes]
    else:
        results = back(sat, item)
    zeros = 0
    for key, pieces in zip(item.hf, results, strict=True):
        zeros += fill(tensors[key], pieces, origin)
        bar.add(tensors[key].nbytes, key)
    return zeros


def together(pieces):
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def origin_of(source, keys):
    return ", ".join(f"{source.place(key)}: {key}" for key in keys)


def fill(target, pieces, origin):
    """The pieces below each other; what is no number, or is none after a cast, is an error. How many a cast made zero."""
    at = zeros = 0
    for piece in pieces:
        own = target[at : at + len(piece)].copy_(piece)
        at += len(piece)
        if piece.dtype is not target.dtype:
            zeros += int(piece.count_nonzero() - own.count_nonzero())
    if finite(target):
        return zeros
    if not all(map(finite, pieces)):
        raise ConvertError(f"{origin} holds NaN or infinity; no model computes with it")
    name = str(target.dtype).removeprefix("torch.")
    wider = "bfloat16 or float32 holds it" if name == "float16" else "float32 holds more"
    raise ConvertError(f"{origin} does not fit into {name}; --dtype {wider}")


def carried_names(source):
    """Tokenizer files, generation settings, remote code, licences."""
    found = [path for path in sorted(source.iterdir()) if path.suffix in CARRIED or path.stem in CARRIED_NAMES]
    keep = [path for path in found if path.is_file() and path.name not in WRITTEN and not path.name.endswith(".index.json")]
    return [path.relative_to(source) for path in [*keep, *sorted(source.glob(TEMPLATES))]]


def left_behind(source, read):
    """A note of what is neither read nor carried through, beside the weights and beside the configuration."""
    read = {source / name for name in read}
    folders = {source, *(path.parent for path in read)}
    known = read | folders | {source / name.parts[0] for name in carried_names(source)}
    left = sorted(str(path.relative_to(source)) for folder in folders for path in folder.iterdir() if path not in known)
    return [f"left behind, of no kind that is read or carried through: {', '.join(left)}"] if left else []


def carry(source, folder):
    names = carried_names(source)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    return list(map(str, names))
