"""The command, its options and those of the functions, and what it imports."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import liger_aot.convert
from liger_aot.__main__ import main
from liger_aot.convert import ConvertError
from liger_aot.convert import hf_to_sat

from checkpoints import copy
from checkpoints import edit
from checkpoints import identical
from checkpoints import put
from checkpoints import put_hf
from checkpoints import save
from checkpoints import tensors

pytest_plugins = ["converted"]


def test_command(llama, tmp_path, capsys):
    assert main(["convert", "hf2sat", str(llama / "hf"), str(tmp_path / "sat"), "--verify", "--dtype", "bfloat16"]) == 0
    captured = capsys.readouterr()
    assert "verified" in captured.out
    assert "100%" in captured.err
    assert main(["convert", "sat2hf", str(tmp_path / "sat"), str(tmp_path / "hf"), "--max-shard-size", "1MB"]) == 0
    assert main(["convert", "map", "llama"]) == 0
    assert "transformer.word_embeddings.weight" in capsys.readouterr().out


def test_progress_is_a_bar_on_a_terminal(llama, tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    hf_to_sat(llama / "hf", tmp_path / "sat", progress=terminal)
    frames = terminal.getvalue().split("\r\x1b[K")
    assert re.match(r"#{20} 100%  \S+ of \S+ MB, \S+ MB/s, 0 s left", frames[-2]), frames[-2]
    assert frames[-1] == ""
    assert len(frames) > 10


@pytest.mark.parametrize("arguments", [["--mp", "0"], ["--mp", "3"], ["--dtype", "float16", "--mp", "100"]], ids=" ".join)
def test_command_says_why_and_returns_2(llama, tmp_path, capsys, arguments):
    assert main(["convert", "hf2sat", str(llama / "hf"), str(tmp_path / "sat"), *arguments]) == 2
    assert capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["big", "9" * 5000], ids=["big", "long"])
def test_command_checks_its_arguments(llama, tmp_path, capsys, size):
    assert main(["convert", "sat2hf", str(llama / "sat"), str(tmp_path / "hf"), "--max-shard-size", size]) == 2
    assert "must be like 5GB" in capsys.readouterr().err


def test_python_arguments_are_checked(llama, tmp_path):
    with pytest.raises(ConvertError, match="dtype must be one of float32, float16, bfloat16, got 'int8'"):
        hf_to_sat(llama / "hf", tmp_path / "sat", dtype="int8")
    with pytest.raises(ConvertError, match=r"family must be auto or one of .*llama.*, got 'lama'"):
        hf_to_sat(llama / "hf", tmp_path / "sat", family="lama")
    with pytest.raises(ConvertError, match="mp must be a whole number from 1 to 99, got True"):
        hf_to_sat(llama / "hf", tmp_path / "sat", mp=True)


def test_without_safetensors_it_says_what_to_install(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConvertError, match=r"needs safetensors: pip install 'liger-aot\[convert\]'"):
        hf_to_sat(llama / "hf", tmp_path / "sat")


def test_neither_sat_nor_transformers_is_imported(llama, tmp_path):
    script = f"""
import sys
from liger_aot.convert import hf_to_sat, sat_to_hf
hf_to_sat({str(llama / "hf")!r}, {str(tmp_path / "sat")!r})
sat_to_hf({str(tmp_path / "sat")!r}, {str(tmp_path / "hf")!r})
assert not sys.modules.keys() & {{"sat", "transformers"}}, sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "liger_aot", "convert", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_a_bad_checkpoint_is_one_message_and_2(llama, tmp_path, capsys):
    """With the file, the key and both numbers, and a target that is as it was."""
    (tmp_path / "out").mkdir()
    texts = {
        "hf2sat": "mis-shaped: model.norm.weight is [65] in model.safetensors; config.json says [64]: hidden 64",
        "sat2hf": "mis-shaped: transformer.final_layernorm.weight is [65] in mp_rank_00_model_states.pt; "
        "model_config.json says [64]: hidden 64",
    }
    put_hf(copy(llama / "hf", tmp_path / "hf2sat"), {"model.norm.weight": torch.zeros(65)})
    put(copy(llama / "sat", tmp_path / "sat2hf"), **{"transformer.final_layernorm.weight": torch.zeros(65)})
    for way, text in texts.items():
        assert main(["convert", way, str(tmp_path / way), str(tmp_path / "out")]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err == f"{tmp_path / way}, as llama: 1 problem, nothing was written\n  {text}\n"
        assert list((tmp_path / "out").iterdir()) == []


def test_what_the_system_has_against_it_is_said(llama, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["convert", "hf2sat", str(llama / "hf"), str(tmp_path / "file/sat")]) == 2
    assert re.fullmatch(r"convert: .*Not a directory: .*file.*\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["cogvlm", "cogvlm2"])
def test_a_tower_of_another_width_than_sats_is_refused(name, tmp_path):
    """As shipped, which the small models of these tests are not held to."""
    save(tmp_path / "hf", name)
    done = run("hf2sat", tmp_path / "hf", tmp_path / "sat")
    text = f"config.json, vision_config: hidden_size is 48; SAT's CogVLM{name[6:]}Model has 1792 in its code"
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr
    assert not (tmp_path / "sat").exists()


def test_a_new_family_is_one_file(llama, tmp_path):
    """Whatever lies in families/ is known to the command, the map and both conversions."""
    package = Path(liger_aot.convert.__file__).parent.parent
    shutil.copytree(package, tmp_path / "liger_aot", ignore=shutil.ignore_patterns("cubins", "__pycache__"))
    (tmp_path / "liger_aot/convert/families/mini.py").write_text("""
from .llama import Llama

class Mini(Llama):
    name = "mini"
    model_types = ("mini",)
    model_classes = ("MiniModel",)

FAMILIES = (Mini(),)
""")
    copy(llama / "hf", tmp_path / "hf")
    edit(tmp_path / "hf/config.json", model_type="mini")
    for arguments in (["map", "mini"], ["hf2sat", "hf", "sat"], ["sat2hf", "sat", "back", "--family", "mini"]):
        done = subprocess.run(
            [sys.executable, "-m", "liger_aot", "convert", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "sat/model_config.json").read_text())["model_class"] == "MiniModel"
    assert identical(tensors(tmp_path / "hf"), tensors(tmp_path / "back")) == []
