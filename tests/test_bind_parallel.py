"""Bound models on two processes: DDP, FSDP2 and tensor parallelism, against one process and no binding.

This file is also what the two processes run: each scenario in a process group of its own, the results of rank 0 into a file.
"""

import contextlib
import datetime
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import PrepareModuleInput
from torch.distributed.tensor.parallel import PrepareModuleOutput
from torch.distributed.tensor.parallel import SequenceParallel
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import liger_aot

from tiny import VOCABULARY
from tiny import build
from tiny import check_as_exact
from tiny import check_equal
from tiny import operators
from tiny import step

RANKS = 2


def whole_batch():
    """As many labels in each rank's half, so that the mean of the ranks' losses is the loss."""
    ids = torch.randint(3, VOCABULARY, (2 * RANKS, 11), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def part():
    rank = dist.get_rank()
    return {name: value[2 * rank : 2 * rank + 2] for name, value in whole_batch().items()}


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(results, prefix=""):
    """The mean of the ranks' losses, and whole gradients."""
    results = {name.removeprefix(prefix): None if value is None else full(value) for name, value in results.items()}
    dist.all_reduce(results["loss"])
    results["loss"] /= RANKS
    return results


def shard(model, own_head, **options):
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if own_head:
        fully_shard(model.lm_head, **options)
    return fully_shard(model, **options)


# --- Scenarios: what to compare with one process's plain step, and what else to know


def ddp(bind_first, **options):
    model, prefix = build(), "module."
    if bind_first:
        report = liger_aot.bind(model)
        wrapped = DistributedDataParallel(model, **options)
    else:
        wrapped = DistributedDataParallel(model, **options)
        report = liger_aot.bind(wrapped)
    results = gathered(step(wrapped, **part()), prefix)
    counts, kinds = dict(report.counts), {type(m).__name__ for m in model.modules()}
    liger_aot.unbind(wrapped)
    after = gathered(step(wrapped, **part()), prefix)
    return {"step": results, "after": after, "counts": counts, "kinds": kinds, "left": [r.path for r in report.left]}


def ddp_accumulates():
    """Three steps of which the first two are not synchronised."""
    model = build()
    liger_aot.bind(model)
    wrapped = DistributedDataParallel(model)
    for turn in range(3):
        with wrapped.no_sync() if turn < 2 else contextlib.nullcontext():
            loss = wrapped(**part()).loss
            (loss / 3).backward()
    results = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}
    return {"step": gathered(results)}


def fsdp(bind_first, own_head, checkpointing=False):
    model = build()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if bind_first:
        report = liger_aot.bind(model)
        shard(model, own_head)
    else:
        shard(model, own_head)
        report = liger_aot.bind(model)
    results = gathered(step(model, **part()))
    counts, kinds = dict(report.counts), {type(m).__name__ for m in model.modules()}
    state = {name: full(value) for name, value in model.state_dict().items()}
    liger_aot.unbind(model)
    after = gathered(step(model, **part()))
    plain = shard(build(), own_head)
    return {
        "step": results,
        "after": after,
        "counts": counts,
        "kinds": kinds,
        "state": state,
        "left": [(r.path, r.why) for r in report.left],
        "classes": [[kind.__name__ for kind in type(m).__mro__] for m in model.modules()],
        "plain classes": [[kind.__name__ for kind in type(m).__mro__] for m in plain.modules()],
    }


def fsdp_in_bfloat16(bind_first):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = build()
    if bind_first:
        liger_aot.bind(model)
        shard(model, True, mp_policy=policy)
    else:
        shard(model, True, mp_policy=policy)
        liger_aot.bind(model)
    return {
        "step": gathered(step(model, **part())),
        "plain": gathered(step(shard(build(), True, mp_policy=policy), **part())),
    }


EVEN = {"vocab_size": VOCABULARY + 1}  # as transformers 5.17 wants a head whose output is gathered


def tensor_parallel():
    """The model's own plan, as from_pretrained applies it; all ranks have the whole batch."""
    from transformers.distributed.configuration_utils import DistributedConfig

    folder = Path(sys.argv[2]) / "checkpoint"
    if dist.get_rank() == 0:
        build(**EVEN).save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(tp_size=RANKS, tp_plan="auto")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, distributed_config=config).train()
    plain = gathered(step(model, **whole_batch()))
    report = liger_aot.bind(model)
    results = gathered(step(model, **whole_batch()))
    return {"step": results, "plain": plain, "rows": [(r.path, r.status, r.operator, r.why) for r in report]}


def sequence_parallel(family):
    """Every norm computes its rank's tokens, from and to whole ones; all ranks have the whole batch."""
    model, mesh = build(family), init_device_mesh("cpu", (RANKS,))
    norms = {path for path, module in model.named_modules() if "Norm" in type(module).__name__}
    for path in norms:
        for style in (
            PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)),
            SequenceParallel(),
            PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate()),
        ):
            parallelize_module(model.get_submodule(path), mesh, style)
    report = liger_aot.bind(model)
    kinds, seen = {type(model.get_submodule(path)).__name__ for path in norms}, []
    for path in norms:
        model.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].to_local().shape)))
    with operators() as ran:
        results = step(model, **whole_batch())
    liger_aot.unbind(model)
    after = gathered(step(model, **whole_batch()))
    left = [(r.path, r.why) for r in report.left if r.path in norms]
    return {"step": gathered(results), "after": after, "kinds": kinds, "left": left, "ran": ran, "shapes": seen}


SCENARIOS = {
    "DDP after bind": lambda: ddp(True),
    "DDP before bind": lambda: ddp(False),
    "DDP that looks for unused parameters": lambda: ddp(True, find_unused_parameters=True),
    "DDP that accumulates": ddp_accumulates,
    "FSDP2 after bind, head in the root": lambda: fsdp(True, False),
    "FSDP2 after bind, head a unit": lambda: fsdp(True, True),
    "FSDP2 before bind, head in the root": lambda: fsdp(False, False),
    "FSDP2 before bind, head a unit": lambda: fsdp(False, True),
    "FSDP2 with checkpointing": lambda: fsdp(True, True, checkpointing=True),
    "FSDP2 in bfloat16, after bind": lambda: fsdp_in_bfloat16(True),
    "FSDP2 in bfloat16, before bind": lambda: fsdp_in_bfloat16(False),
    "tensor parallelism": tensor_parallel,
    "sequence parallelism of llama": lambda: sequence_parallel("llama"),
    "sequence parallelism of gpt2": lambda: sequence_parallel("gpt2"),
}


def main(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    results = {}
    for n, (name, run) in enumerate(SCENARIOS.items()):
        store = dist.FileStore(f"{folder}/store{n}", RANKS)
        store.set_timeout(datetime.timedelta(seconds=60))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=20))
        try:
            results[name] = run()
        except Exception:  # of any kind: the other scenarios are to run, and the test to show it
            results[name] = traceback.format_exc()
        dist.destroy_process_group()
    torch.save(results, f"{folder}/results{rank}")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(process(rank, folder)) for rank in range(RANKS)]
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(outputs)
    found = [torch.load(folder / f"results{rank}", weights_only=False) for rank in range(RANKS)]
    return {name: next((r[name] for r in found if isinstance(r[name], str)), found[0][name]) for name in SCENARIOS}


@contextlib.contextmanager
def process(rank, folder):
    command = [sys.executable, __file__, str(rank), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


@pytest.fixture(scope="module")
def plain():
    return step(build(), **whole_batch())


def of(results, name):
    assert not isinstance(results[name], str), results[name]
    return results[name]


def test_the_two_processes_compute_what_one_does(plain):
    """The comparison itself notices: half of the batch gives other numbers."""
    with pytest.raises(AssertionError):
        check_equal(step(build(), **{name: value[:2] for name, value in whole_batch().items()}), plain)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("DDP")])
def test_ddp_equals_one_plain_process(results, plain, name):
    found = of(results, name)
    check_equal(found["step"], plain)
    if name != "DDP that accumulates":
        assert found["counts"] == {"fused": 1}
        assert {"LigerRMSNorm", "LigerSwiGLUMLP", "LigerLMHead"} <= found["kinds"]
        assert not found["left"]
        check_equal(found["after"], plain)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("FSDP2") and "bfloat16" not in name])
def test_fsdp2_equals_one_plain_process(results, plain, name):
    found = of(results, name)
    check_equal(found["step"], plain)
    assert any("LigerRMSNorm" in kind for kind in found["kinds"])
    assert any("LigerSwiGLUMLP" in kind for kind in found["kinds"])
    assert found["counts"] == {"fused": 1}
    assert not found["left"]
    check_equal(found["state"], build().state_dict())


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("FSDP2") and "bfloat16" not in name])
def test_unbind_under_fsdp2(results, plain, name):
    found = of(results, name)
    check_equal(found["after"], plain)
    assert found["classes"] == found["plain classes"]


@pytest.mark.parametrize("when", ["after", "before"])
def test_fsdp2_in_bfloat16_errs_as_plain_fsdp2_does(results, when):
    found = of(results, f"FSDP2 in bfloat16, {when} bind")
    exact = step(build().double(), **whole_batch())
    check_as_exact(exact, found["plain"], found["step"])


def test_under_tensor_parallelism_the_head_is_left_with_its_reason(results):
    found, plain = of(results, "tensor parallelism"), step(build(**EVEN), **whole_batch())
    check_equal(found["plain"], plain)
    check_equal(found["step"], plain)
    ((_, status, _, why),) = (row for row in found["rows"] if row[0] == "lm_head")
    assert status != "bound"
    assert "tensor-parallel plan" in why
    assert "rms_norm" in {operator for _, status, operator, _ in found["rows"] if status == "bound"}


@pytest.mark.parametrize(("family", "kind"), {"llama": "LigerRMSNorm", "gpt2": "LigerLayerNorm"}.items())
def test_norms_whose_weights_are_dtensors_compute_each_ranks_tokens(results, family, kind):
    found, expected = of(results, f"sequence parallelism of {family}"), step(build(family), **whole_batch())
    check_equal(found["step"], expected)
    check_equal(found["after"], expected)
    assert found["kinds"] == {kind}
    assert not found["left"]
    assert {f"{name}_{way}" for name in ("rms_norm", "layer_norm") for way in ("fwd", "bwd")} & {*found["ran"]} == {
        f"{'rms_norm' if family == 'llama' else 'layer_norm'}_{way}" for way in ("fwd", "bwd")
    }
    assert {tokens for _, tokens, _ in found["shapes"]} == {6}


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
