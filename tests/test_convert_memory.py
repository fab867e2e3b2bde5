"""How much memory a conversion takes beyond the process' own: less than 300 MB for 2 GB of weights."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import shutil, sys, threading, time
from pathlib import Path
import torch
from liger_aot.convert import hf_to_sat, sat_to_hf
from liger_aot.convert._hf import HFWriter

def anonymous():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def measured(convert, *arguments, **options):
    before, peak, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    report = convert(*arguments, **options)
    done.set()
    watcher.join()
    print(convert.__name__, options, report.bytes, max(0, peak[0] - before))

folder, layers, vocabulary = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
hidden, inner = 2048, 5504
plan = {"model.norm.weight": (hidden,)} | dict.fromkeys(["model.embed_tokens.weight", "lm_head.weight"], (vocabulary, hidden))
for i in range(layers):
    name = f"model.layers.{i}."
    plan |= {name + f"{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    plan |= {name + f"self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
    plan |= {name + f"mlp.{x}_proj.weight": (inner, hidden) for x in ("gate", "up")}
    plan[name + "mlp.down_proj.weight"] = (hidden, inner)
(folder / "hf").mkdir()
writer = HFWriter(folder / "hf", {key: (shape, torch.bfloat16) for key, shape in plan.items()}, 10**9)
for number, tensor in enumerate(writer.tensors.values()):
    tensor.fill_(number)  # each another, or the head would be tied to the embedding
writer.close()
writer.seal({"model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
              "num_attention_heads": 16, "vocab_size": vocabulary, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5})
measured(hf_to_sat, folder / "hf", folder / "sat")
measured(sat_to_hf, folder / "sat", folder / "back", max_shard_size="300MB")
measured(hf_to_sat, folder / "hf", folder / "cast", dtype="float16")
for name in ("back", "cast"):
    shutil.rmtree(folder / name)
measured(hf_to_sat, folder / "hf", folder / "ranks", mp=2)
measured(sat_to_hf, folder / "ranks", folder / "merged")
file, name = folder / "sat/1/mp_rank_00_model_states.pt", "transformer.layers.0.mlp.dense_h_to_4h"
module = torch.load(file, weights_only=True, mmap=True)["module"]
module[name + ".original.weight"] = module.pop(name + ".weight")
module |= {name + ".matrix_A.0": torch.randn(8, hidden), name + ".matrix_B.0": torch.randn(inner, 8)}
torch.save({"module": module}, folder / "new")
del module
(folder / "new").rename(file)
measured(sat_to_hf, folder / "sat", folder / "lora", merge_lora=True, lora_alpha=8)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which this system does not have")
@pytest.mark.parametrize(("layers", "vocabulary"), [(1, 96000), pytest.param(18, 32000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_model(layers, vocabulary, tmp_path):
    """One layer is 0.88 GB, eighteen are 2.08 GB; embedding and head of the one are 393 MB each, more than is allowed."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(layers), str(vocabulary)],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        written, extra = map(int, line.split()[-2:])
        assert written > 3e8
        assert extra < 300e6, line
