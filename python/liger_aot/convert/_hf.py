"""A Hugging Face folder: safetensors files, read lazily and written in place."""

import json
import math
import os
import re
import sys
from pathlib import Path

import torch

from . import _settings
from ._error import ConvertError
from ._error import Problems
from ._error import said

INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


class HFSource:
    """Shapes and dtypes of every tensor from the headers, tensors on request. `config` is what config.json is going to say."""

    def __init__(self, folder, config=None):
        self.folder = folder
        if not folder.is_dir():
            raise ConvertError(f"{folder}: no such folder")
        self.config = config or _settings.read(folder / "config.json")
        refuse_adapters(folder)
        self.files = {}
        self.where = self.index()
        self.stored = {key: key for key in self.where}
        for name in sorted(set(self.where.values())):
            self.open(name)
        problems = Problems(folder)
        for key, name in self.where.items():
            if key not in self.files[name][1]:
                problems.add(f"{folder / INDEX}: puts {key} into {name}, which does not hold it")
        for name, (_, held) in self.files.items():
            odd = [key for key in held if self.where.get(key) != name]
            for key in odd:
                problems.add(f"{folder / name}: holds {key}, which {INDEX} does not put there")
        problems.end()

    def index(self):
        single = "model.safetensors"
        if (self.folder / INDEX).is_file():
            if (self.folder / single).is_file():
                raise ConvertError(f"{self.folder}: holds both {single} and {INDEX}, which may differ; take one of them away")
            where = _settings.read(self.folder / INDEX).section("weight_map")
            for key, name in where.items():
                if not isinstance(name, str) or not name or Path(name).name != name:
                    raise ConvertError(f"{self.folder / INDEX}: must put {key} into a file beside it, got {repr(name)[:80]}")
            missing = sorted({name for name in where.values() if not (self.folder / name).is_file()})
            if missing:
                raise ConvertError(f"{self.folder}: {INDEX} names files that are not there: {', '.join(missing)}")
            return where
        if (self.folder / single).is_file():
            self.open(single)
            return dict.fromkeys(self.files[single][1], single)
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(pattern))
        if pickles:
            raise ConvertError(
                f"{self.folder}: holds pickles alone ({', '.join(pickles)}); save the model as safetensors first"
            )
        raise ConvertError(f"{self.folder}: there is neither {single} nor {INDEX}")

    def open(self, name):
        if name in self.files:
            return
        try:
            from safetensors import SafetensorError
            from safetensors import safe_open
        except ImportError:
            raise ConvertError("convert: needs safetensors: pip install 'liger-aot[convert]'") from None
        path = self.folder / name
        refuse_pointer(path)
        try:
            file = safe_open(path, "pt")
        except SafetensorError as error:
            raise ConvertError(f"{path}: not a safetensors file, or cut off: {said(error)}") from None
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        self.files[name] = file, {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}

    def name_as(self, known, prefix, ends):
        """What had to be renamed: files of a base model alone lack the whole one's prefix, old files have other ends."""
        self.stored, renamed = {key: key for key in self.where}, {}
        for key in self.where:
            old = next((end for end in ends if key.endswith(end)), None)
            new = key.removesuffix(old) + ends[old] if old else key
            found = [name for name in (new, prefix + new) if name in known and name not in self.stored]
            if key not in known and found:
                renamed[key] = found[0]
                self.stored[found[0]] = self.stored.pop(key)
        return renamed

    def read(self):
        """The files that the conversion is made of."""
        return ["config.json", INDEX, *self.files]

    def keys(self):
        return list(self.stored)

    def about(self, key):
        key = self.stored[key]
        shape, code = self.files[self.where[key]][1][key]
        return shape, DTYPES.get(code, INTEGERS.get(code, code))

    def place(self, key):
        return self.folder / self.where[self.stored[key]]

    def get(self, key):
        key = self.stored[key]
        return self.files[self.where[key]][0].get_tensor(key)


def refuse_pointer(path):
    with path.open("rb") as file:
        head = file.read(200)
    if head.startswith(b"version https://git-lfs"):
        raise ConvertError(f"{path}: a Git LFS pointer, not the file itself; fetch it with: git lfs pull")


def refuse_adapters(folder):
    """transformers would add them to the model that it loads from there."""
    path = folder / "adapter_config.json"
    if path.is_file():
        raise ConvertError(
            f"{path}: LoRA adapters of PEFT lie beside the model; merge them first (merge_and_unload), or take them away"
        )


def allocate(path):
    """Without blocks of its own, what is copied into a mapped file ends the process (SIGBUS) where the disk is full."""
    if sys.platform != "linux":  # macOS has no such call
        return
    length = path.stat().st_size
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, length)
        except OSError as error:
            raise ConvertError(f"{path}: needs {length:,} bytes: {error.strerror}") from None


class HFWriter:
    """Files of the final size, mapped into memory: what is copied into `tensors` is in them."""

    last = "config.json"

    def __init__(self, folder, plan, max_bytes):
        self.folder = folder
        self.total = sum(size(about) for about in plan.values())
        shards = sharded(plan, max_bytes)
        self.index = {}
        self.tensors = {}
        for number, keys in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self.reserve(name, {key: plan[key] for key in keys})

    def reserve(self, name, plan):
        header, at = {"__metadata__": {"format": "pt"}}, 0
        # The widest first: each then begins at a multiple of its own width.
        for key, about in sorted(plan.items(), key=lambda entry: -entry[1][1].itemsize):
            header[key] = {"dtype": CODES[about[1]], "shape": about[0], "data_offsets": [at, at := at + size(about)]}
            self.index[key] = name
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path = self.folder / name
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + at)
        allocate(path)
        whole = torch.from_file(str(path), shared=True, size=8 + len(text) + at, dtype=torch.uint8)[8 + len(text) :]
        for key, (shape, dtype) in plan.items():
            begin, end = header[key]["data_offsets"]
            self.tensors[key] = whole[begin:end].view(dtype).view(shape)

    def close(self):
        self.tensors.clear()
        if len(set(self.index.values())) > 1:
            _settings.write(self.folder / INDEX, {"metadata": {"total_size": self.total}, "weight_map": self.index})

    def seal(self, config):
        """The file without which the folder is no checkpoint."""
        _settings.write(self.folder / self.last, config)


def size(about):
    return math.prod(about[0]) * about[1].itemsize


def sharded(plan, max_bytes):
    shards, used = [[]], 0
    for key, about in plan.items():
        if shards[-1] and used + size(about) > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(key)
        used += size(about)
    return shards


def bytes_of(text):
    """'5GB', as transformers spells it."""
    match = re.fullmatch(r"(\d{1,15})\s*([KMGT]?)(I?)B?", str(text).strip().upper())
    if not match or int(match[1]) == 0:
        raise ConvertError(f"convert: --max-shard-size must be like 5GB or 500MB, got {repr(text)[:80]}")
    return int(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " ")
