"""Hold what was written to what was read: bit by bit always, by running both frameworks where they are installed."""

import importlib
import importlib.util
import os
import random
import sys
import tempfile
import time
import types
from contextlib import ExitStack
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)

from . import _settings
from ._bits import finite
from ._bits import parts
from ._bits import same_bits
from ._error import ConvertError
from ._error import said
from ._lora import Merged
from ._rules import Copy
from ._rules import Frequencies
from ._rules import Tied
from ._rules import Zeros
from ._rules import frequencies
from ._sat import numpy_state

NEAR = 1e-5  # of the largest logit; a tensor in the wrong place moves logits by their own size
PACKAGES = {
    "transformers": "pip install transformers",
    "sat": "pip install numpy tqdm einops requests && pip install --no-deps SwissArmyTransformer",
}
KERNEL, ROTARY = (f"sat.model.position_embedding.triton_rotary{end}" for end in ("", "_embeddings"))
TOKENS = 64
SHORT = 4  # RoBERTa counts from 2, and the loss is of a token and the next


class Shown:
    """The text or the picture of the user's that the models are to see; without one, what chance gives."""

    def __init__(self, verify, text, image):
        self.text, self.image = text and Path(text), image and Path(image)
        for path in (self.text, self.image):
            if path and not verify:
                raise ConvertError(f"convert: {path} is for --verify, which was not given")
            if path and not path.is_file():
                raise ConvertError(f"convert: {path}: no such file")

    def fits(self, family):
        for path in (self.text, self.image):
            if path and family.foreign:
                raise ConvertError(f"convert: {path}: --verify of {family.name} runs neither side: {family.foreign}")
        wrong, takes = (self.text, "--image, a picture") if family.sees else (self.image, "--text")
        if wrong:
            raise ConvertError(f"convert: {wrong}: --verify of {family.name} takes {takes}")


def compare_back(job, hf, sat, written):
    """Compute each HF tensor from what SAT holds: with what was read, every bit must be the same.

    Rotary frequencies are read to the digits that 16 bits hold, and `written`, which is one of the two, has them exactly.
    """
    wrong, count = [], 0
    for item in job.rules(Frequencies):
        theta = item.sizes["rope_theta"] if written is sat else job.family.buffer_theta(item.sizes["rope_theta"])
        exact = frequencies(item.sizes["rope_dim"], theta)
        for key in item.sat if written is sat else item.hf if item.rule.write else ():
            wrong += [f"{key} differs from the frequencies of rotary base {theta:.12g}"] * (
                not same_bits(written.get(key), exact)
            )
    for item in job.kept():
        if isinstance(item.rule, Zeros):
            continue
        for key, pieces in zip(item.hf, back(sat, item), strict=True):
            count += 1
            wrong += [f"{key} {what}" for what in faults(pieces, hf.get(key), job.dtype)]
    if wrong:
        raise ConvertError("\n  ".join([f"{job.report.target}: verification failed, nothing was written", *wrong]))
    cast = f" after the cast to {job.dtype}".replace("torch.", "") if job.dtype else ""
    job.report.notes.append(f"verified: {count} tensors computed back are bit for bit what was read{cast}, all finite")


def back(sat, item):
    """Of each HF tensor, the pieces below each other that SAT holds of it."""
    if isinstance(item.rule, Copy | Tied):
        return [sat.pieces(item.sat[0])]
    return item.to_hf([sat.get(key) for key in item.sat])


def faults(pieces, wanted, dtype):
    found, at = set(), 0
    for piece in pieces:
        for ours, theirs in zip(parts(piece), parts(wanted[at : at + len(piece)]), strict=True):
            found |= {"differs"} if not same_bits(ours.to(dtype or ours.dtype), theirs.to(dtype or theirs.dtype)) else set()
            found |= {"is not finite"} if not finite(theirs) else set()
        at += len(piece)
    return sorted(found)


def compare_logits(job, hf_folder, sat, shown):
    """The same input through both frameworks, in fp32; what could not be compared is said."""
    notes = job.report.notes
    if job.family.foreign:
        notes.append(f"not verified by running: {job.family.foreign}")
        return
    with undisturbed():
        why = not_run(job, sat) or [text for name in PACKAGES if (text := broken(name))]
        notes.append(f"not verified by running: {'; '.join(why)}" if why else run_both(job, hf_folder, sat, shown))


def not_run(job, sat):
    """Why one of the two cannot be run, as far as that is seen without importing it."""
    merged = isinstance(sat, Merged)
    short = not job.family.sees and job.args["max_sequence_length"] < SHORT
    typeless, derived = "model_type" not in job.config, job.args["model_class"] not in job.family.model_classes
    why = [f"{name} is not installed ({PACKAGES[name]})" for name in PACKAGES if importlib.util.find_spec(name) is None]
    why += [f"SAT would need the adapters' own model for {sat.folder}"] * merged
    why += ["one process cannot run model-parallel files"] * (job.ranks > 1)
    why += [f"{job.config.path} has no model_type, by which transformers chooses the model"] * typeless
    why += [f"texts of max_sequence_length {job.args['max_sequence_length']} are too short to compare"] * short
    why += [f"SAT has no {job.args['model_class']}, which derives from one of its classes"] * derived
    return why


def broken(name):
    """Why a package that is there cannot be imported: SAT does not declare all that it needs."""
    try:
        importlib.import_module("sat.model" if name == "sat" else name)
    except ImportError as error:
        lacks = (error.name or name).partition(".")[0]
        remedy = PACKAGES[name] if lacks in PACKAGES[name].split() or lacks == name else f"pip install {lacks}"
        return f"{name} is installed, and cannot be imported: {said(error)} ({remedy})"
    return ""


def run_both(job, hf_folder, sat, shown):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = running("transformers", job, lambda: read_config(job, hf_folder))
    inputs, about = read_inputs(job, hf_folder, config, shown)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    theirs, hf_time = timed("transformers", job, lambda: load_hf(job, hf_folder, config).to(device)(**inputs).logits)
    positional, named = job.family.sat_inputs(inputs)
    ours, sat_time = timed("sat", job, lambda: load_sat(job, sat).to(device)(*positional, **named)[0])
    off = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    agree = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    losses = [loss(job.family, logits, inputs) for logits in (theirs, ours)]
    text = f"logits of {about} differ by {off:.2g} of the largest, {agree:.1%} agree on the first choice"
    text += f"; both with the exact frequencies of rotary base {job.sizes['rope_theta']:.12g}" if job.family.rotates() else ""
    text += f"; loss {losses[0]:.6f} in transformers and {losses[1]:.6f} in SAT" if losses[0] is not None else ""
    text += f"; {hf_time:.2f} s and {sat_time:.2f} s on {device}, loading included"
    if not off <= NEAR:
        raise ConvertError(
            f"{job.report.target}: verification failed, nothing was written\n  {text}; at most {NEAR} is rounding"
        )
    return f"verified by running: {text}"


@contextmanager
def undisturbed():
    """SAT draws from, sets and opens what belongs to the process: random numbers, a process group, its level of logging.

    Its rotary kernel runs on a GPU alone: elsewhere what it computes, in torch, takes its place for as long.
    """
    distributed = is_distributed()
    drop_stale_groups()
    parallel = has_groups()
    drawn, numpy = random.getstate(), sys.modules.get("numpy")
    drawn_by_numpy = numpy.random.get_state() if numpy else None
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(put(os.environ, "SAT_LOGLEVEL", os.environ.get("SAT_LOGLEVEL", "ERROR")))
        if not torch.cuda.is_available():
            stub = types.ModuleType(KERNEL)
            stub.apply_rotary = apply_rotary
            stack.enter_context(put(sys.modules, KERNEL, stub))
            if ROTARY in sys.modules:
                stack.enter_context(put(vars(sys.modules[ROTARY]), "apply_rotary", apply_rotary))
        try:
            yield
        finally:
            random.setstate(drawn)
            if numpy:
                numpy.random.set_state(drawn_by_numpy)
            if has_groups() and not parallel:
                sys.modules["sat.mpu.initialize"].destroy_model_parallel()
            if is_distributed() and not distributed:
                torch.distributed.destroy_process_group()


def is_distributed():
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def drop_stale_groups():
    """SAT keeps groups of a process group that somebody has destroyed since, and then begins no others."""
    if has_groups() and not is_distributed():
        sys.modules["sat.mpu.initialize"].destroy_model_parallel()


def has_groups():
    initialize = sys.modules.get("sat.mpu.initialize")
    return initialize is not None and initialize.model_parallel_is_initialized()


@contextmanager
def put(where, key, value):
    """For a while, in place of what is there."""
    there, kept = key in where, where.get(key)
    where[key] = value
    try:
        yield
    finally:
        if there:
            where[key] = kept
        else:
            where.pop(key, None)


@torch.no_grad()
def timed(name, job, run):
    start = time.perf_counter()
    result = running(name, job, run).float().cpu()
    return result, time.perf_counter() - start


def running(name, job, run):
    try:
        return run()
    except Exception as error:  # whatever a framework has against the files is why they are not verified
        what = f"{type(error).__name__}: {said(error)}"
        raise ConvertError(
            f"{job.report.target}: verification failed, nothing was written\n  {name} cannot run it: {what}"
        ) from error


def read_config(job, folder):
    """As transformers reads it, also while the folder is not complete."""
    import transformers

    with tempfile.TemporaryDirectory() as apart:
        if not (folder / "config.json").is_file():
            folder = Path(apart)
            _settings.write(folder / "config.json", job.config)
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_hf(job, folder, config):
    """By the model's type: `architectures` may be missing, or name another model on the same weights."""
    import transformers

    kind = "ImageClassification" if job.family.sees else "CausalLM" if job.family.causal else "MaskedLM"
    auto = getattr(transformers, f"AutoModelFor{kind}")
    model = auto.from_pretrained(folder, config=config, dtype=torch.float32, trust_remote_code=False)
    return rounded(model, job.dtype)


def load_sat(job, sat):
    """SAT's own loader, given a folder with `latest` and a link, since the target has none before all is well.

    The frequencies are those of the rotary base that was decided on, exact as in transformers: the file may have them
    rounded, or not at all.
    """
    from sat.model import AutoModel
    from sat.training.model_io import load_checkpoint

    model, args = AutoModel.from_pretrained(str(sat.folder), build_only=True)
    exact = {item.sat[0]: frequencies(item.sizes["rope_dim"], item.sizes["rope_theta"]) for item in job.rules(Frequencies)}

    def excuse(model, keys):
        keys.missing_keys[:] = [key for key in keys.missing_keys if key not in exact]

    model.register_load_state_dict_post_hook(excuse)
    with tempfile.TemporaryDirectory() as apart:
        (Path(apart) / "latest").write_text(sat.tag)
        (Path(apart) / sat.tag).symlink_to(sat.folder.absolute() / sat.tag)
        with torch.serialization.safe_globals(numpy_state()):  # of DeepSpeed, whose files SAT cannot read without
            load_checkpoint(model, args, load_path=apart)
    for key, values in exact.items():
        model.get_buffer(key).copy_(values)
    job.family.prepare_sat(model, job.args)
    return rounded(model.float(), job.dtype)


def rounded(model, dtype):
    """The side that was not cast takes the other's numbers; it still computes in fp32."""
    for parameter in model.parameters() if dtype else ():
        parameter.data = parameter.data.to(dtype).float()
    return model.eval()


def apply_rotary(x, cos, sin, position_ids, interleaved=False, inplace=False, **unused):
    """x [batch, heads, length, dim]; the first twice as many of dim as cos has are turned."""
    width = cos.shape[1] * 2
    c, s = cos[position_ids][:, None], sin[position_ids][:, None]
    first, second = (x[..., 0:width:2], x[..., 1:width:2]) if interleaved else x[..., :width].chunk(2, -1)
    turned = first * c - second * s, first * s + second * c
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    out = x if inplace else x.clone()
    out[..., :width] = joined
    return out


def read_inputs(job, folder, config, shown):
    """The user's own text or picture, or what chance gives; and which it was."""
    torch.manual_seed(0)
    if job.family.sees:
        size, channels = job.config["image_size"], job.config.get("num_channels", 3)
        if shown.image is None:
            return {"pixel_values": torch.randn(1, channels, size, size)}, "a random picture"
        return {"pixel_values": picture(folder, shown.image, size)}, str(shown.image)
    longest = job.args["max_sequence_length"] - 2  # RoBERTa counts from 2
    if shown.text is None:
        count = min(TOKENS, longest)
        vocabulary = job.args["vocab_size"]
        return {"input_ids": torch.randint(min(3, vocabulary - 1), vocabulary, (1, count))}, f"{count} random tokens"
    import transformers

    text = shown.text.read_text(encoding="utf-8", errors="replace")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :longest]
    except Exception as error:  # a tokenizer's files may be wrong in any way, and each library fails in its own
        what = f"{type(error).__name__}: {said(error)}"
        raise ConvertError(f"{folder}: --text needs a tokenizer there: {what}") from None
    if ids.shape[1] < 2:
        raise ConvertError(f"{shown.text}: must be two tokens or more, got {ids.shape[1]}")
    if ids.max() >= job.args["vocab_size"]:
        raise ConvertError(f"{folder}: its tokenizer makes token {ids.max()}, of vocab_size {job.args['vocab_size']}")
    return {"input_ids": ids}, f"{ids.shape[1]} tokens of {shown.text}"


def picture(folder, path, size):
    try:
        from PIL import Image
    except ImportError:
        raise ConvertError("convert: --image needs pillow: pip install pillow") from None
    settings = folder / "preprocessor_config.json"
    settings = _settings.read(settings) if settings.is_file() else _settings.Settings({}, settings)
    mean, std = (torch.tensor(settings.colours(name)).view(3, 1, 1) for name in ("image_mean", "image_std"))
    try:
        pixels = bytearray(Image.open(path).convert("RGB").resize((size, size)).tobytes())
    except (OSError, ValueError, SyntaxError) as error:  # what pillow raises
        raise ConvertError(f"{path}: not a picture that pillow reads: {said(error)}") from None
    pixels = torch.frombuffer(pixels, dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1).float() / 255
    return ((pixels - mean) / std)[None]


def loss(family, logits, inputs):
    """Of the text itself: each next token, or each token where the model reads both ways."""
    if family.sees:
        return None
    ids = inputs["input_ids"].cpu()
    logits, ids = (logits[:, :-1], ids[:, 1:]) if family.causal else (logits, ids)
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten()).item()
