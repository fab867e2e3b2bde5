"""A SwissArmyTransformer folder: `latest`, model_config.json and one file of torch.save per rank of model parallelism."""

import mmap
import os
import pickle
import zipfile
from collections import OrderedDict

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from . import _parallel
from . import _settings
from ._error import ConvertError
from ._hf import refuse_pointer


class SATSource:
    def __init__(self, folder):
        self.folder = folder
        if not folder.is_dir():
            raise ConvertError(f"{folder}: no such folder")
        self.config = _settings.read(folder / "model_config.json")
        self.tag = latest(folder)
        self.ranks = [load(path) for path in self.paths()]
        self.layout = {}
        for path, rank in zip(self.paths(), self.ranks, strict=True):
            if rank.keys() != self.ranks[0].keys():
                odd = sorted(rank.keys() ^ self.ranks[0].keys())
                raise ConvertError(f"{path}: holds other names than rank 0: {', '.join(odd)}")

    def paths(self):
        inside = self.folder / self.tag
        if not inside.is_dir():
            raise ConvertError(f"{self.folder / 'latest'}: names {self.tag!r}, but there is no such folder")
        paths = sorted(inside.glob("mp_rank_*_model_states.pt"))
        if not paths and list(inside.glob("z3_rank_*")):
            raise ConvertError(f"{inside}: holds partitions of ZeRO-3, not tensors; gather them with zero_to_fp32.py first")
        ranks = self.config.count("model_parallel_size", 1, most=99)
        wanted = [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(ranks)]
        if [path.name for path in paths] != wanted:
            got = ", ".join(path.name for path in paths) or "none"
            raise ConvertError(
                f"{inside}: model_parallel_size is {ranks}, so {', '.join(wanted)} must be there; {len(paths)} found: {got}"
            )
        return paths

    def keys(self):
        return list(self.ranks[0])

    def about(self, key):
        """Of the whole tensor, where the layout is known."""
        tensor = self.ranks[0][key]
        shape = tuple(tensor.shape)
        if key in self.layout and len(self.ranks) > 1:
            shape = _parallel.whole_shape(shape, self.layout[key], len(self.ranks))
        return shape, tensor.dtype

    def place(self, key):
        return self.folder / self.tag / "mp_rank_00_model_states.pt"

    def get(self, key):
        if len(self.ranks) == 1:
            return self.ranks[0][key]
        return _parallel.merge([rank[key] for rank in self.ranks], self.layout[key])

    def unequal(self, keys, report):
        """Ranks whose shapes differ, and tensors that every rank must hold alike and does not."""
        for key in keys:
            tensors = [rank[key] for rank in self.ranks]
            shapes = [tuple(tensor.shape) for tensor in tensors]
            if len(set(shapes)) > 1:
                report(f"{key}: the shapes of the ranks differ: {shapes}")
            elif not self.layout[key].kind and any(not torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
                report(f"{key}: every rank must hold the same numbers, and they differ")


def latest(folder):
    path = folder / "latest"
    if not path.is_file():
        raise ConvertError(f"{folder}: there is no file 'latest', which names the iteration; a SAT folder has one")
    tag = path.read_text(encoding="utf-8", errors="replace").strip()
    if tag == "release" or (tag.isascii() and tag.isdecimal() and int(tag) > 0):
        return tag if tag == "release" else str(int(tag))
    raise ConvertError(f"{path}: must hold an iteration above 0 or 'release', got {tag[:80]!r}")


def load(path):
    """What is under 'module' in a file of torch.save; never a pickle that could run anything."""
    refuse_pointer(path)
    if not zipfile.is_zipfile(path):
        raise ConvertError(f"{path}: {path.stat().st_size} bytes, not a file of torch.save, or cut off")
    try:
        with torch.serialization.safe_globals(numpy_state()):
            saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - numpy_names())
        what = f"it names {', '.join(unsafe)}" if unsafe else str(error).splitlines()[0]
        raise ConvertError(f"{path}: refused, because reading it could run code: {what}") from None
    except (RuntimeError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise ConvertError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(saved, dict) or not isinstance(saved.get("module"), dict):
        keys = ", ".join(map(str, list(saved)[:8])) if isinstance(saved, dict) else f"a {type(saved).__name__}"
        raise ConvertError(f"{path}: must hold a dict with 'module', got {keys}")
    for key, value in saved["module"].items():
        if not isinstance(value, torch.Tensor):
            why = "; a quantised model, save it in 16 bits first" if "quant_state" in str(key) else ""
            raise ConvertError(f"{path}: {key} must be a tensor, got a {type(value).__name__}{why}")
    return saved["module"]


def numpy_state():
    """What DeepSpeed's files need of numpy: arrays of numbers, the state of its random generator."""
    try:
        import numpy
    except ImportError:
        return []
    rebuild = numpy.empty(0).__reduce__()[0]
    places = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    return [*((rebuild, place) for place in places), numpy.ndarray, numpy.dtype, type(numpy.dtype("uint32"))]


def numpy_names():
    return {entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}" for entry in numpy_state()}


class SATWriter:
    """Files of the final size, mapped into memory: what is copied into `ranks[r]` is in them."""

    def __init__(self, folder, plans, iteration="1"):
        self.folder, self.iteration = folder, iteration
        (folder / iteration).mkdir()
        self.ranks = [self.reserve(rank, plan) for rank, plan in enumerate(plans)]

    def reserve(self, rank, plan):
        path = self.folder / self.iteration / f"mp_rank_{rank:02d}_model_states.pt"
        with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(
                {"module": OrderedDict((key, torch.empty(shape, dtype=dtype)) for key, (shape, dtype) in plan.items())}, path
            )
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            return torch.load(path, mmap=True, weights_only=True)["module"]

    def close(self, config):
        """The files that make the folder a checkpoint, `latest` last."""
        self.ranks.clear()
        _settings.write(self.folder / "model_config.json", config)
        (self.folder / "latest.partial").write_text(self.iteration)
        os.replace(self.folder / "latest.partial", self.folder / "latest")  # noqa: PTH105
