"""Folders that a conversion reads and writes: all or nothing, whatever happens, and what lies beside the weights."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from liger_aot.convert import ConvertError
from liger_aot.convert import hf_to_sat
from liger_aot.convert import sat_to_hf

from checkpoints import FILE
from checkpoints import copy
from checkpoints import identical
from checkpoints import refused
from checkpoints import state
from checkpoints import tensors

pytest_plugins = ["converted"]


def test_files_are_read_by_their_own_libraries(llama, tmp_path):
    from safetensors import safe_open

    sat_to_hf(llama / "sat", tmp_path / "back", max_shard_size="100KB")
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(llama / "hf").values())
    assert len(set(index["weight_map"].values())) > 2
    for key, name in index["weight_map"].items():
        with safe_open(tmp_path / "back" / name, "pt") as file:
            assert key in file.keys()  # noqa: SIM118 (not a dict)
    assert identical(tensors(llama / "hf"), tensors(tmp_path / "back")) == []
    assert state(llama / "sat")["transformer.position_embeddings.inv_freq"].dtype is torch.float32


def test_sharded_sources_are_read(llama, tmp_path):
    sat_to_hf(llama / "sat", tmp_path / "shards", max_shard_size="100KB")
    hf_to_sat(tmp_path / "shards", tmp_path / "sat")
    assert identical(state(llama / "sat"), state(tmp_path / "sat")) == []


def test_tokenizer_files_come_through(hf, tmp_path):
    also = ("tokenizer.spm", "merges.bpe", "additional_chat_templates/tools.jinja")
    (hf / "additional_chat_templates").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "LICENSE", "chat_template.jinja", *also):
        (hf / name).write_text(f"of {name}")
    report = hf_to_sat(hf, tmp_path / "sat")
    sat_to_hf(tmp_path / "sat", tmp_path / "back")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        *also,
    ):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
        assert name in report.files


@pytest.mark.parametrize(
    ("convert", "moment"), [("hf_to_sat", "carry"), ("hf_to_sat", "compare_logits"), ("sat_to_hf", "compare_logits")]
)
def test_a_killed_run_leaves_nothing_loadable(llama, tmp_path, convert, moment):
    source = llama / convert[:3].strip("_")
    script = f"""
import os, signal
from liger_aot.convert import _convert
_convert.{moment} = lambda *unused: os.kill(os.getpid(), signal.SIGKILL)
_convert.{convert}({str(source)!r}, {str(tmp_path / "out")!r}, verify=True)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    assert list(left.rglob("*.pt" if convert == "hf_to_sat" else "*.safetensors"))
    for back, text in ((sat_to_hf, "latest|model_config"), (hf_to_sat, "config.json|safetensors")):
        with pytest.raises(ConvertError, match=rf"there is no.* '?({text})|there is neither"):
            back(left, tmp_path / "again")
    {"hf_to_sat": hf_to_sat, "sat_to_hf": sat_to_hf}[convert](source, tmp_path / "out")  # is not in the way


def test_a_run_killed_with_an_index_leaves_nothing_loadable(llama, tmp_path):
    """Several shards, whose index is written before the check that the run dies in."""
    script = f"""
import os, signal
from liger_aot.convert import _convert
_convert.compare_back = lambda *unused: os.kill(os.getpid(), signal.SIGKILL)
_convert.sat_to_hf({str(llama / "sat")!r}, {str(tmp_path / "out")!r}, verify=True, max_shard_size="100KB")
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left / "model.safetensors.index.json").is_file()
    with pytest.raises(ConvertError, match=r"there is no config\.json"):
        hf_to_sat(left, tmp_path / "again")


def test_what_another_run_left_is_not_in_the_way(hf, tmp_path):
    """Processes have numbers of others before them."""
    (tmp_path / f".sat.partial-{os.getpid()}").mkdir()
    hf_to_sat(hf, tmp_path / "sat")


def test_what_a_killed_run_left_in_a_folder_is_not_in_the_way(hf, tmp_path):
    """What is inside may also be of a run that still goes on: it is left there."""
    (tmp_path / "sat/.sat.partial-0123abcd/1").mkdir(parents=True)
    hf_to_sat(hf, tmp_path / "sat")
    assert (tmp_path / "sat/.sat.partial-0123abcd/1").is_dir()
    assert (tmp_path / "sat/latest").is_file()


@pytest.mark.parametrize("target", ["sat", "a/b/sat"])
def test_a_failed_run_leaves_nothing(hf, target, tmp_path, monkeypatch):
    """Nor the folders that it made."""
    from liger_aot.convert import _convert

    monkeypatch.setattr(_convert, "carry", lambda *unused: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hf_to_sat(hf, tmp_path / target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_target_with_something_in_it_is_left_alone(hf, tmp_path):
    (tmp_path / "sat").mkdir()
    (tmp_path / "sat/notes").write_text("mine")
    with pytest.raises(ConvertError, match="must not exist, or be an empty folder"):
        hf_to_sat(hf, tmp_path / "sat")
    assert (tmp_path / "sat/notes").read_text() == "mine"
    (tmp_path / "sat/notes").unlink()
    hf_to_sat(hf, tmp_path / "sat")


@pytest.mark.parametrize("convert", [hf_to_sat, sat_to_hf])
def test_a_folder_that_is_there_stays_and_is_filled(llama, tmp_path, convert, monkeypatch):
    """It may be a mount point, or where somebody's shell is: nothing can be renamed onto it."""
    (tmp_path / "out").mkdir(mode=0o750)
    before = (tmp_path / "out").stat()
    monkeypatch.chdir(tmp_path / "out")
    convert(llama / convert.__name__[:3].strip("_"), ".")
    after = (tmp_path / "out").stat()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert (tmp_path / "out" / ("latest" if convert is hf_to_sat else "config.json")).is_file()
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    {hf_to_sat: sat_to_hf, sat_to_hf: hf_to_sat}[convert](tmp_path / "out", tmp_path / "again")


def test_what_makes_it_a_checkpoint_moves_last(hf, tmp_path, monkeypatch):
    """Into a folder that is there files move one by one; an error in between leaves it as it was."""
    (tmp_path / "sat").mkdir()
    moved, rename = [], Path.rename

    def note(path, target):
        if target.name == "latest" and len(moved) < 9:
            moved.extend([path.name for path in (tmp_path / "sat").iterdir() if not path.name.startswith(".")] + [""] * 9)
            raise OSError("disk on fire")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", note)
    with pytest.raises(OSError, match="disk on fire"):
        hf_to_sat(hf, tmp_path / "sat")
    assert {"1", "model_config.json", "config.json"} <= set(moved)
    assert list((tmp_path / "sat").iterdir()) == []


def test_a_folder_that_somebody_filled_meanwhile_is_left_alone(hf, tmp_path, monkeypatch):
    from liger_aot.convert import _convert

    (tmp_path / "sat").mkdir()
    monkeypatch.setattr(_convert, "carry", lambda *unused: (tmp_path / "sat/theirs").write_text("") and [])
    with pytest.raises(ConvertError, match="sat: was empty, and no longer is"):
        hf_to_sat(hf, tmp_path / "sat")
    assert [path.name for path in (tmp_path / "sat").iterdir()] == ["theirs"]


@pytest.mark.parametrize(("convert", "last"), [("hf_to_sat", "latest"), ("sat_to_hf", "config.json")])
def test_a_run_killed_while_its_files_move_leaves_nothing_loadable(llama, tmp_path, convert, last):
    """Only into a folder that was there: it then holds some of them, and somebody must empty it who knows what is in it."""
    (tmp_path / "out").mkdir()
    script = f"""
import os, signal
from pathlib import Path
from liger_aot import convert
rename = Path.rename
Path.rename = lambda path, to: os.kill(os.getpid(), signal.SIGKILL) if path.name == {last!r} else rename(path, to)
convert.{convert}({str(llama / convert[:3].strip("_"))!r}, {str(tmp_path / "out")!r})
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(left) > 2
    assert last not in left
    again = {"hf_to_sat": hf_to_sat, "sat_to_hf": sat_to_hf}[convert]
    with pytest.raises(ConvertError):
        {hf_to_sat: sat_to_hf, sat_to_hf: hf_to_sat}[again](tmp_path / "out", tmp_path / "back")
    with pytest.raises(ConvertError, match=r"it holds .*; a run that was killed while it moved its files there may have left"):
        again(llama / convert[:3].strip("_"), tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    again(llama / convert[:3].strip("_"), tmp_path / "out")


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(hf, tmp_path, there):
    (tmp_path / "far").mkdir()
    if there:
        (tmp_path / "far/sat").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far/sat")
    hf_to_sat(hf, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far/sat/latest").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file's blocks cannot be reserved")
def test_room_on_the_disk_is_taken_before_anything_is_copied(hf, sat, tmp_path, monkeypatch):
    """What is copied into a mapped file without blocks ends the process with SIGBUS where the disk is full."""
    from liger_aot.convert._hf import HFWriter
    from liger_aot.convert._sat import SATWriter

    plan = {"a": ((1024, 1024), torch.float32)}
    HFWriter(tmp_path, plan, 10**9)
    SATWriter(tmp_path, [plan])
    for path in (tmp_path / "model.safetensors", tmp_path / FILE):
        assert path.stat().st_blocks * 512 >= path.stat().st_size > 2**22

    def full(*unused):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    for convert, source, name in ((hf_to_sat, hf, FILE), (sat_to_hf, sat, "model.safetensors")):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ConvertError, match=rf"{name}: needs [\d,]+ bytes: No space left on device"):
            convert(source, tmp_path / "out")
        assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_with_too_little_room_is_seen_first(hf, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert re.search(r"out: needs [\d,]{5,} bytes, and .* has 1,000 left", refused(hf_to_sat, hf, "needs"))


@pytest.mark.parametrize(("convert", "side"), [(hf_to_sat, "hf"), (sat_to_hf, "sat")])
def test_what_is_left_behind_is_said(llama, tmp_path, convert, side):
    """Weights of other kinds, states of optimizers, other iterations, whatever else: nothing is dropped without a word."""
    source = copy(llama / side, tmp_path / "in")
    (source / "README.md").write_text("carried")
    assert "left behind" not in str(convert(source, tmp_path / "all"))
    others = ["pytorch_model.bin", "pytorch_model.bin.index.json", "notes.xyz", "2/mp_rank_00_model_states.pt"]
    others += ["1/zero_pp_rank_0_mp_rank_00_optim_states.pt"] if side == "sat" else ["model_config.json"]
    for name in others:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    named = sorted(name.replace("2/mp_rank_00_model_states.pt", "2") for name in others)
    report = convert(source, tmp_path / "out")
    assert f"left behind, of no kind that is read or carried through: {', '.join(named)}" in str(report)
    assert not {path.name for path in (tmp_path / "out").iterdir()} & {"notes.xyz", "pytorch_model.bin", "2"}
