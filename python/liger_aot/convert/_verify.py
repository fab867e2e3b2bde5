"""Hold what was written to what was read: bit by bit always, by running both frameworks where they are installed."""

import importlib.util
import json
import os
import sys
import time
import types

import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)

from ._error import ConvertError
from ._rules import Tied
from ._rules import Zeros

NEAR = 1e-4  # of the largest logit; a tensor in the wrong place moves logits by their own size
PACKAGES = {"transformers": "pip install transformers", "sat": "pip install --no-deps SwissArmyTransformer"}
KERNEL = "sat.model.position_embedding.triton_rotary"
TOKENS = 64


def compare_back(job, hf, sat):
    """Compute each HF tensor from what SAT holds: with what was read, every bit must be the same."""
    wrong, count = [], 0
    for item in job.kept():
        if isinstance(item.rule, Zeros):
            continue
        tensors = [sat.get(key) for key in item.sat]
        back = [tensors] if isinstance(item.rule, Tied) else item.to_hf(tensors)
        for key, pieces in zip(item.hf, back, strict=True):
            count += 1
            wrong += [f"{key} {what}" for what in faults(pieces, hf.get(key), job.dtype)]
    if wrong:
        raise ConvertError("\n  ".join([f"{job.report.target}: verification failed, nothing was written", *wrong]))
    job.report.notes.append(f"verified: {count} tensors computed back are bit for bit what was read, all finite")


def faults(pieces, wanted, dtype):
    found, at = set(), 0
    for piece in pieces:
        for ours, theirs in zip(parts(piece), parts(wanted[at : at + len(piece)]), strict=True):
            found |= {"differs"} if not torch.equal(ours.to(dtype or ours.dtype), theirs.to(dtype or theirs.dtype)) else set()
            found |= {"is not finite"} if not bool(theirs.isfinite().all()) else set()
        at += len(piece)
    return sorted(found)


def parts(tensor):
    """Rows of at most 16 million numbers together: casts and comparisons need memory of their size."""
    return tensor.split(max(1, 2**24 // max(1, tensor[:1].numel())))


def compare_logits(job, hf_folder, sat_folder, text, image, merged=False):
    """The same input through both frameworks, in fp32; what could not be compared is said."""
    notes = job.report.notes
    if job.family.foreign:
        notes.append(f"not verified by running: {job.family.foreign}")
        return
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing or merged or job.ranks > 1:
        why = [f"{name} is not installed ({PACKAGES[name]})" for name in missing]
        why += [f"SAT would need the adapters' own model for {sat_folder}"] * merged
        why += ["one process cannot run model-parallel files"] * (job.ranks > 1)
        notes.append(f"not verified by running: {'; '.join(why)}")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, about = read_inputs(job, hf_folder, text, image)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    theirs, hf_time = timed(lambda: load_hf(job, hf_folder).to(device)(**inputs).logits)
    positional, named = job.family.sat_inputs(inputs)
    ours, sat_time = timed(lambda: load_sat(job, sat_folder).to(device)(*positional, **named)[0])
    off = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    agree = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    losses = [loss(job.family, logits, inputs) for logits in (theirs, ours)]
    text = f"logits of {about} differ by {off:.2g} of the largest, {agree:.1%} agree on the first choice"
    text += f"; loss {losses[0]:.6f} in transformers and {losses[1]:.6f} in SAT" if losses[0] is not None else ""
    text += f"; {hf_time:.2f} s and {sat_time:.2f} s on {device}, loading included"
    if not off <= NEAR:
        raise ConvertError(
            f"{job.report.target}: verification failed, nothing was written\n  {text}; at most {NEAR} is rounding"
        )
    notes.append(f"verified by running: {text}")


@torch.no_grad()
def timed(run):
    start = time.perf_counter()
    result = run().float().cpu()
    return result, time.perf_counter() - start


def load_hf(job, folder):
    import transformers

    names = [name for name in job.config.listed("architectures") if name in dir(transformers)]
    model_class = getattr(transformers, (names or [job.family.architecture])[0])
    return rounded(model_class.from_pretrained(folder, dtype=torch.float32), job.dtype)


def load_sat(job, folder):
    """SAT's own loader. Its rotary kernel runs on a GPU alone: elsewhere what it computes, in torch, takes its place."""
    os.environ.setdefault("SAT_LOGLEVEL", "ERROR")
    if not torch.cuda.is_available() and KERNEL not in sys.modules:
        sys.modules[KERNEL] = types.ModuleType(KERNEL)
        sys.modules[KERNEL].apply_rotary = apply_rotary
    import sat.model

    model, _ = sat.model.AutoModel.from_pretrained(str(folder))
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


def read_inputs(job, folder, text, image):
    """The user's own text or picture, or what chance gives; and which it was."""
    torch.manual_seed(0)
    if job.family.sees:
        size, channels = job.config["image_size"], job.config.get("num_channels", 3)
        if image is None:
            return {"pixel_values": torch.randn(1, channels, size, size)}, "a random picture"
        return {"pixel_values": picture(folder, image, size)}, str(image)
    longest = job.args["max_sequence_length"] - 2  # RoBERTa counts from 2
    if text is None:
        count = min(TOKENS, longest)
        return {"input_ids": torch.randint(3, job.args["vocab_size"], (1, count))}, f"{count} random tokens"
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConvertError(f"{folder}: --text needs a tokenizer there: {str(error).splitlines()[0]}") from None
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :longest]
    return {"input_ids": ids}, f"{ids.shape[1]} tokens of {text}"


def picture(folder, path, size):
    try:
        from PIL import Image
    except ImportError:
        raise ConvertError("convert: --image needs pillow: pip install pillow") from None
    settings = folder / "preprocessor_config.json"
    settings = json.loads(settings.read_text()) if settings.is_file() else {}
    mean, std = (torch.tensor(settings.get(name, [0.5] * 3)).view(3, 1, 1) for name in ("image_mean", "image_std"))
    pixels = bytearray(Image.open(path).convert("RGB").resize((size, size)).tobytes())
    pixels = torch.frombuffer(pixels, dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1).float() / 255
    return ((pixels - mean) / std)[None]


def loss(family, logits, inputs):
    """Of the text itself: each next token, or each token where the model reads both ways."""
    if family.sees:
        return None
    ids = inputs["input_ids"].cpu()
    logits, ids = (logits[:, :-1], ids[:, 1:]) if family.causal else (logits, ids)
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten()).item()
