"""DTensors: each process computes its part, and the parts together are what one process computes."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard
from torch.distributed.tensor import distribute_tensor

import liger_aot  # noqa: F401 (registers the operators)
from liger_aot import _op
from liger_aot import _sharding

from examples import EXAMPLES
from examples import call
from examples import leaf

WORLD = 2
WHOLE = Replicate()
# operator -> the placements of its tensors.
PLACED = {
    "rms_norm": [[Shard(d), WHOLE] for d in (0, 1)],
    "fused_add_rms_norm": [[Shard(d), Shard(d), WHOLE] for d in (0, 1)],
    "gated_rms_norm": [[Shard(d), Shard(d), WHOLE] for d in (0, 1)],
    "layer_norm": [[Shard(d), WHOLE, WHOLE] for d in (0, 1)],
    "dyt": [[Shard(d), WHOLE, WHOLE, WHOLE] for d in (0, 1)],
    "modulated_rms_norm": [[Shard(0), Shard(0), Shard(0), WHOLE], [Shard(1), WHOLE, WHOLE, WHOLE]],
    "poly_norm": [[Shard(d), WHOLE, WHOLE] for d in (0, 1)],
    "attn_res": [[Shard(d), WHOLE, WHOLE] for d in (1, 2)],
    "mhc_coeffs": [[Shard(d), *[WHOLE] * 5] for d in (0, 1)],
    "mhc_pre": [[Shard(d)] * 2 for d in (0, 1)],
    "mhc_post_res": [[Shard(d)] * 4 for d in (0, 1)],
    "embedding": [[WHOLE, Shard(0)]],
    "softmax": [[Shard(d)] for d in (0, 1)],
    "sparsemax": [[Shard(d)] for d in (0, 1)],
    "swiglu": [[Shard(d), Shard(d)] for d in (0, 1, 2)],
    "geglu": [[Shard(d), Shard(d)] for d in (0, 1, 2)],
    "packed_glu": [[Shard(d)] for d in (0, 1)],
    "relu_squared": [[Shard(d)] for d in (0, 1, 2)],
    "rope": [
        [Shard(0), Shard(0), Shard(0), Shard(0)],
        [Shard(1), Shard(1), WHOLE, WHOLE],
        [Shard(2), Shard(2), Shard(1), Shard(1)],
    ],
    "cross_entropy": [[Shard(0), Shard(0)]],
    "cross_entropy_tvd": [[Shard(0), Shard(0), Shard(0)]],
}
CASES = [(name, placed) for name, all_placed in PLACED.items() for placed in all_placed]
# Sharded where a row is: right as well, if not without gathering.
COLUMNS = [
    ("rms_norm", [Shard(2), WHOLE]),
    ("softmax", [Shard(2)]),
    ("cross_entropy", [Shard(1), WHOLE]),
    ("attn_res", [Shard(3), WHOLE, WHOLE]),
]
REFUSED = {"linear_cross_entropy": "linear_cross_entropy_fwd", "group_norm": "group_norm_fwd"}


def made(name):
    torch.manual_seed(0)
    arguments, options = EXAMPLES[name](torch.float32)
    return [leaf(a) for a in arguments], options


def results(name, arguments, options):
    """The outputs and the gradients of all tensors that want one."""
    outputs = call(name, arguments, options)
    wanted = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    return outputs, torch.autograd.grad(sum(o.square().sum() for o in outputs), wanted)


def work(rank, store, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    mesh, found = init_device_mesh("cpu", (WORLD,)), []
    for name, placed in CASES + COLUMNS:
        arguments, options = made(name)
        places = iter(placed)
        spread = [
            distribute_tensor(a.detach(), mesh, [next(places)]).requires_grad_(a.requires_grad)
            if isinstance(a, torch.Tensor)
            else a
            for a in arguments
        ]
        outputs, gradients = results(name, spread, options)
        placements = outputs[0].placements + gradients[0].placements
        found.append(([o.full_tensor().detach() for o in outputs], [g.full_tensor() for g in gradients], placements))
    refused = {}
    for name in REFUSED:
        arguments, options = made(name)
        spread = [distribute_tensor(a.detach(), mesh, [WHOLE]) if isinstance(a, torch.Tensor) else a for a in arguments]
        try:
            call(name, spread, options)
        except Exception as error:  # what torch raises, whatever its class
            refused[name] = str(error)
    if rank == 0:
        torch.save((found, refused), f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (str(folder / "store"), str(folder)), nprocs=WORLD)
    return torch.load(folder / "found.pt", weights_only=False)


IDS = [f"{name}-{next(p.dim for p in placed if p != WHOLE)}" for name, placed in CASES + COLUMNS]


@pytest.mark.parametrize("n", range(len(CASES + COLUMNS)), ids=IDS)
def test_parts_are_the_whole(found, n):
    name, placed = (CASES + COLUMNS)[n]
    outputs, gradients, placements = found[0][n]
    want_outputs, want_gradients = results(name, *made(name))
    torch.testing.assert_close(outputs, [o.detach() for o in want_outputs])
    torch.testing.assert_close(gradients, list(want_gradients))
    if n < len(CASES):  # what was sharded stays so
        assert placements == expected(name, placed[0])


def expected(name, first):
    """The placements of the first result and of the first gradient, where the first tensor's is this."""
    if name == "embedding":  # whose first tensor is the table
        return Shard(0), Partial()
    if name == "attn_res":  # whose first has a dimension more in front
        return Shard(first.dim - 1), first
    return (WHOLE if name == "cross_entropy" else first), first


def test_what_has_no_rule_is_refused_by_name(found):
    for name, operator in REFUSED.items():
        assert f"liger.{operator}" in found[1][name]


def test_rules_fit_the_operators():
    """A letter for each result and each tensor among the arguments; and each operator that has rules is tried above."""
    for name, (outputs, arguments, _) in _sharding.RULES.items():
        schema = getattr(torch.ops.liger, name).default._schema
        tensors = ["Tensor" in str(a.type) for a in schema.arguments]
        assert len(outputs) == len(schema.returns)
        for has, role in itertools.zip_longest(tensors, arguments, fillvalue="."):
            assert has == (role != "."), name
    ruled = {name.removesuffix("_fwd") for name in _sharding.RULES if name.endswith("_fwd")}
    assert ruled == set(PLACED) <= set(_op.PUBLIC)
