"""A SwissArmyTransformer folder: `latest`, model_config.json and one file of torch.save per rank of model parallelism."""

import mmap
import pickle
import zipfile
from collections import OrderedDict

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from . import _parallel
from . import _settings
from ._bits import same_bits
from ._error import ConvertError
from ._error import said
from ._hf import allocate
from ._hf import refuse_adapters
from ._hf import refuse_pointer

OLD = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # torch.save before 1.6: a pickle of this number comes first


class SATSource:
    """`tag` is what `latest` is going to say."""

    def __init__(self, folder, tag=None):
        self.folder = folder
        if not folder.is_dir():
            raise ConvertError(f"{folder}: no such folder")
        self.config = _settings.read(folder / "model_config.json")
        self.tag = tag or latest(folder)
        refuse_adapters(folder)
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

    def read(self):
        """The files that the conversion is made of."""
        return ["latest", "model_config.json", "config.json", *(path.relative_to(self.folder) for path in self.paths())]

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

    def pieces(self, key):
        """What makes up the tensor, one below the other: embeddings are never put together in memory."""
        if self.layout[key].kind == "column" and len(self.layout[key].parts) == 1:
            return [rank[key] for rank in self.ranks]
        return [self.get(key)]

    def unequal(self, report):
        """Ranks whose shapes or dtypes differ, and tensors that every rank must hold alike and does not."""
        for path, rank in zip(self.paths()[1:], self.ranks[1:], strict=True):
            for key, first in self.ranks[0].items():
                here = f"{path.name}: {key}"
                if rank[key].shape != first.shape:
                    report(f"{here}: the shapes of the ranks differ: {list(first.shape)} in rank 0, {list(rank[key].shape)}")
                elif rank[key].dtype is not first.dtype:
                    report(f"{here}: the dtypes of the ranks differ: {first.dtype}, {rank[key].dtype}".replace("torch.", ""))
                elif not self.layout[key].kind and not same_bits(rank[key], first):
                    report(f"{here}: every rank must hold the same numbers, and rank 0 has others")


def latest(folder):
    path = folder / "latest"
    if not path.is_file():
        raise ConvertError(f"{folder}: there is no file 'latest', which names the iteration; a SAT folder has one")
    tag = path.read_text(encoding="utf-8", errors="replace").strip()
    if tag == "release" or (tag.isascii() and tag.isdecimal() and len(tag) < 19 and int(tag) > 0):
        return tag if tag == "release" else str(int(tag))
    raise ConvertError(f"{path}: must hold an iteration above 0 or 'release', got {tag[:80]!r}")


def load(path):
    """What is under 'module' in a file of torch.save; never a pickle that could run anything."""
    refuse_pointer(path)
    with path.open("rb") as file:
        if file.read(len(OLD)) == OLD:
            raise ConvertError(f"{path}: written as torch did before 1.6; load it and save it once with a newer torch")
    if not zipfile.is_zipfile(path):
        raise ConvertError(f"{path}: {path.stat().st_size} bytes, not a file of torch.save, or cut off")
    try:
        with torch.serialization.safe_globals(numpy_state()):
            saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged pickle is a program that may fail in any way
        unsafe = foreign(path)
        if unsafe:
            raise ConvertError(f"{path}: refused, because reading it could run code: it names {', '.join(unsafe)}") from None
        reason = str(error).partition("WeightsUnpickler error:")[2] or error  # before it torch advises to run the file
        raise ConvertError(f"{path}: cannot be read: {said(reason)}") from None
    if not isinstance(saved, dict) or not isinstance(saved.get("module"), dict):
        keys = ", ".join(map(str, list(saved)[:8])) if isinstance(saved, dict) else f"a {type(saved).__name__}"
        raise ConvertError(f"{path}: must hold a dict with 'module', got {keys}")
    for key, value in saved["module"].items():
        if not isinstance(key, str):
            raise ConvertError(f"{path}: names of tensors must be texts, got {key!r}")
        if not isinstance(value, torch.Tensor):
            why = "; a quantised model, save it in 16 bits first" if "quant_state" in str(key) else ""
            raise ConvertError(f"{path}: {key} must be a tensor, got a {type(value).__name__}{why}")
        if value.layout is not torch.strided or value.device.type != "cpu":
            kind = f"{value.layout} on {value.device}".removeprefix("torch.")
            raise ConvertError(f"{path}: {key} must be a dense tensor, got one that is {kind}")
    return {key: value.detach() for key, value in saved["module"].items()}


def foreign(path):
    """What a pickle names that is neither torch's nor numpy's."""
    try:
        return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - numpy_names())
    except Exception:  # as above: it walks through the same damaged pickle
        return []


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

    last = "latest"
    tag = "1"

    def __init__(self, folder, plans):
        self.folder = folder
        (folder / self.tag).mkdir()
        self.ranks = [self.reserve(rank, plan) for rank, plan in enumerate(plans)]

    def reserve(self, rank, plan):
        path = self.folder / self.tag / f"mp_rank_{rank:02d}_model_states.pt"
        with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(
                {"module": OrderedDict((key, torch.empty(shape, dtype=dtype)) for key, (shape, dtype) in plan.items())}, path
            )
        allocate(path)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            return torch.load(path, mmap=True, weights_only=True)["module"]

    def close(self, config):
        self.ranks.clear()
        _settings.write(self.folder / "model_config.json", config)

    def seal(self):
        """The file without which the folder is no checkpoint."""
        (self.folder / self.last).write_text(self.tag)
