"""The losses of post-training, each against a plain statement of its formula, which Liger-Kernel is held to as well."""

import functools
import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

from liger_aot import chunked_loss
from liger_aot.chunked_loss import functional
from liger_aot.ops import _linear

from harness import average
from harness import fixed
from harness import run
from losses import BATCH
from losses import CASES
from losses import CLASSES
from losses import CLIPPED
from losses import FORMULAS
from losses import GRPO
from losses import LENGTH
from losses import MODULES
from losses import REFERENCE
from losses import SLACK
from losses import WIDTH
from losses import Case
from losses import by_keywords
from losses import check
from losses import flat
from losses import formula
from losses import importance
from losses import liger
from losses import make
from losses import ours
from losses import parameters
from losses import plain
from losses import policy
from losses import theirs


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_formula(case, dtype):
    inputs = case.inputs(dtype)
    check(ours(case, inputs), case, inputs, SLACK[dtype])


@pytest.mark.parametrize("case", [next(c for c in CASES if c.name == n) for n in ("dpo", "grpo", "jsd")], ids=str)
def test_kernels_match_formula(interpreted, case):
    inputs = case.inputs(torch.float32)
    check(ours(case, inputs), case, inputs, 2.0)
    assert interpreted.launched


# --- Liger-Kernel


@pytest.mark.parametrize("case", [c for c in CASES if not c.differs], ids=str)
def test_liger_computes_the_same(case):
    """Liger is held to the formula, as we are: both right, both alike. It adds up chunks, one rounding more for each."""
    inputs = case.inputs(torch.float32)
    check(liger(case, inputs), case, inputs, 2.0 * BATCH)


DIFFERENT = [(c, torch.float32) for c in CASES if c.differs]
DIFFERENT += [(c, torch.bfloat16) for c in CASES if c.name == "jsd"][:3]  # Liger's softmax is rounded to 16 bits


@pytest.mark.parametrize(("case", "dtype"), DIFFERENT, ids=str)
def test_liger_computes_something_else(case, dtype):
    """Where we differ from Liger on purpose, Liger is not within the allowance: else the purpose is gone."""
    inputs = case.inputs(dtype)
    function = liger(case, inputs)
    with pytest.raises(AssertionError, match=r"error .*, allowed"):
        check(function, case, inputs, SLACK[dtype] * BATCH)


def test_weight_gradient_of_many_sequences_is_rounded_once():
    """Liger adds up the gradients of chunks in the weight's dtype: in bf16, the more chunks the less is left."""
    case, inputs = Case("cpo"), make("cpo", torch.bfloat16)
    repeated = {k: fixed(v.tensor.repeat(32, 1)) if isinstance(v, fixed) else v for k, v in inputs.items()}
    repeated["_input"] = torch.randn(32 * BATCH, LENGTH, WIDTH).bfloat16()
    truth = run(formula(case, repeated), repeated.values(), torch.float64)["gradient 1"]
    own, other = (average(run(f(case, repeated), repeated.values())["gradient 1"], truth) for f in (ours, liger))
    assert own < other / 2
    check(ours(case, repeated), case, repeated, SLACK[torch.bfloat16])


def test_a_sequence_without_tokens_has_no_part():
    """Its mean log-probability is 0, and so is its gradient; Liger divides 0 by 0."""
    inputs = plain(make("cpo", torch.float32))
    inputs["_input"].requires_grad_()
    inputs["target"][3] = -100
    loss, metrics = functional.liger_fused_linear_cpo(**inputs, average_log_prob=True)
    loss.backward()
    assert loss.isfinite()
    assert metrics[1][1] == 0
    assert torch.equal(inputs["_input"].grad[3], torch.zeros(LENGTH, WIDTH))
    assert inputs["_input"].grad[:3].abs().sum(-1).ne(0).any(-1).all()
    assert liger(Case("cpo", {"average_log_prob": True}), inputs)(*inputs.values())[0].isnan()
    inputs["target"][:] = -100
    assert functional.liger_fused_linear_cpo(**inputs)[0] == torch.tensor(2.0).log()


@pytest.mark.parametrize("lacking", [[0], [3], [0, 2]])
def test_a_pair_that_lacks_tokens_has_no_odds(lacking):
    """Of a sequence without tokens, whose log-probability is 0, they are infinite; each loss is that of equal odds."""
    inputs = plain(make("orpo", torch.float32))
    leaves = [inputs[name].requires_grad_() for name in ("_input", "weight", "bias")]
    pair = lacking[0] % 2
    without = {k: v[[1 - pair, 3 - pair]] if k in ("_input", "target") else v for k, v in inputs.items()}
    inputs["target"][lacking] = -100
    both, one = (functional.liger_fused_linear_orpo(**i, compute_nll_loss=False)[0] for i in (inputs, without))
    torch.testing.assert_close(both, (one + 0.1 * torch.tensor(2.0).log()) / 2)
    for got, want in zip(*(torch.autograd.grad(loss, leaves) for loss in (2 * both, one)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["dpo", "cpo", "orpo", "simpo", "kto"])
def test_a_batch_without_sequences(name):
    """The mean over nothing, as torch's, and no gradient of the head."""
    inputs = plain(make(name, torch.float32))
    inputs = {k: v if k.endswith(("weight", "bias")) else v[:0] for k, v in inputs.items()}
    leaves = [inputs[k].requires_grad_() for k in ("_input", "weight", "bias")]
    loss, metrics = getattr(functional, f"liger_fused_linear_{name}")(**inputs)
    assert loss.isnan()
    assert metrics[0].numel() == (name == "kto")
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_a_kl_of_one_number():
    """Python's, a scalar, one of one number, or one for each sequence."""
    inputs = plain(make("kto", torch.float32))
    losses = [
        functional.liger_fused_linear_kto(**inputs, kl=kl)[0]
        for kl in (0.8, torch.tensor(0.8), torch.tensor([0.8]), torch.full((BATCH,), 0.8))
    ]
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    assert not torch.equal(losses[0], functional.liger_fused_linear_kto(**inputs)[0])


@pytest.mark.parametrize("loss_type", GRPO)
def test_what_the_mask_leaves_out_has_no_part(loss_type):
    """Infinite numbers and ids that no class has, which leave none of Liger's clipped losses finite."""
    case = policy(loss_type, extra={"vllm_is_ratio": importance(BATCH, LENGTH)})
    inputs = plain(case.inputs(torch.float32))
    keep = inputs["attention_mask"] != 0
    assert not keep.all()
    want, *_ = ours(case, inputs)(*inputs.values())
    inputs["old_per_token_logps"][~keep] = -torch.inf
    inputs["vllm_is_ratio"][~keep] = torch.inf
    inputs["selected_token_ids"][~keep] = CLASSES + 7
    inputs["_input"][~keep] = 1e6
    inputs["_input"].requires_grad_()
    got, *_ = ours(case, inputs)(*inputs.values())
    got.backward()
    assert torch.equal(got, want)
    assert torch.equal(inputs["_input"].grad[~keep], torch.zeros(int((~keep).sum()), WIDTH))
    inputs["selected_token_ids"][~keep] = 0
    inputs["vllm_is_ratio"][~keep] = 1.0
    assert liger(case, inputs)(*inputs.values())[0].isfinite() == (loss_type not in CLIPPED)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["input", "weight", "bias"])
def test_gradients_are_those_required(name, wanted):
    """One alone is the same as with the others, and the loss multiplied is the gradient multiplied."""
    inputs = plain(make(name, torch.float32))
    given = [
        next(iter(inputs)),
        [*inputs][1],
        next(k for k in inputs if k.endswith("bias") and "ref" not in k and "teacher" not in k),
    ]
    for key in given:
        inputs[key].requires_grad_()
    case = Case(name)
    leaves = [inputs[k] for k in given]
    want = torch.autograd.grad(ours(case, inputs)(*inputs.values())[0], leaves)[wanted]
    for leaf in leaves:
        leaf.requires_grad_(leaf is leaves[wanted])
    loss, *_ = ours(case, inputs)(*inputs.values())
    (got,) = torch.autograd.grad(loss * -4, leaves[wanted])
    assert torch.equal(got, want * -4)
    leaves[wanted].requires_grad_(False)
    assert not ours(case, inputs)(*inputs.values())[0].requires_grad


@pytest.mark.parametrize("name", FORMULAS)
def test_reference_and_metrics_have_no_gradient(name):
    inputs = plain(make(name, torch.float32))
    for v in inputs.values():
        if isinstance(v, torch.Tensor) and v.is_floating_point():
            v.requires_grad_()
    options = {"return_soft_hard_loss": True} if name in ("jsd", "cosine") else {}
    out = getattr(functional, f"liger_fused_linear_{name}")(**inputs, **options)
    loss, more = out[0], out[1:] if options else out[1]
    loss.backward()
    assert not any(m.requires_grad for m in more)
    for key, v in inputs.items():
        fixed_for_good = key.startswith(("ref_", "teacher_", "old_", "advantages"))
        assert v.dtype is torch.int64 or v.dtype is torch.bool or (v.grad is None) == fixed_for_good, key


def test_parts_of_a_distillation_have_no_gradient():
    """Liger's have one, which is zero."""
    case = Case("jsd", {"return_soft_hard_loss": True})
    inputs = plain(make("jsd", torch.float32))
    inputs["student_input"].requires_grad_()
    assert [x.requires_grad for x in functional.liger_fused_linear_jsd(**inputs, **case.options)] == [True, False, False]
    _, soft, _ = by_keywords("jsd")(**inputs, **case.options)
    (gradient,) = torch.autograd.grad(soft, inputs["student_input"])
    assert not gradient.any()


@pytest.mark.parametrize("chunk_size", [1, 5, 24, 1024])
def test_chunks_of_a_distillation_join(chunk_size):
    case = Case("jsd", {"chunk_size": chunk_size})
    inputs = case.inputs(torch.float32)
    check(ours(case, inputs), case, inputs, 2.0)


def test_more_dimensions_of_a_distillation():
    inputs = plain(make("jsd", torch.float32))
    want = functional.liger_fused_linear_jsd(**inputs)
    for name in "student_input", "teacher_input", "true_labels":
        inputs[name] = inputs[name].unflatten(0, (BATCH, LENGTH))
    assert torch.equal(functional.liger_fused_linear_jsd(**inputs), want)


def test_autocast():
    """The head works in the dtype that F.linear would work in; the loss is fp32."""
    for name in FORMULAS:
        inputs = plain(make(name, torch.float32))
        function = getattr(functional, f"liger_fused_linear_{name}")
        cast = {k: v.bfloat16() if torch.is_tensor(v) and v.dim() > 1 and v.is_floating_point() and "logps" not in k else v
                for k, v in inputs.items()}  # fmt: skip
        cast = {k: v.bfloat16() if k.endswith("bias") else v for k, v in cast.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = flat(function(**inputs))[0]
        assert got.dtype is torch.float32
        torch.testing.assert_close(got, flat(function(**cast))[0], rtol=1e-2, atol=0)  # metrics of logits apart, exactly


# --- Names


@pytest.mark.parametrize("name", MODULES)
def test_signatures_are_ligers(name):
    function, module = theirs(name)
    found = importlib.import_module(f"liger_aot.chunked_loss.{MODULES[name][0]}")
    assert parameters(getattr(found, function.__name__).apply) == parameters(function.forward)
    assert parameters(getattr(functional, f"liger_fused_linear_{name}")) == parameters(function.forward)
    own = getattr(chunked_loss, module.__name__)
    assert parameters(own) == parameters(module)
    assert parameters(own.forward) == parameters(module.forward)
    assert {k: v for k, v in vars(module()).items() if not k.startswith("_")}.items() <= vars(own()).items()


def test_all_of_ligers_names_are_there():
    theirs("dpo")
    import liger_kernel.chunked_loss.functional as them

    assert {n for n in vars(them) if n.startswith("liger_fused")} == {*functional.__all__}
    assert {n for n in vars(importlib.import_module("liger_kernel.chunked_loss")) if n.startswith("LigerFused")} == {
        *chunked_loss.__all__
    }


@pytest.mark.parametrize("name", MODULES)
def test_module_is_the_function(name):
    """By Liger's positions, in which some take the weight first; options by their names, which can be set later."""
    inputs = plain(make(name, torch.float32))
    own = getattr(chunked_loss, f"LigerFusedLinear{MODULES[name][1]}Loss")
    options = {"use_ref_model": True} if "ref_input" in inputs else {}
    module = own(**options, beta=0.3)
    positions = [inputs.get({"lin_weight": "weight"}.get(p, p)) for p, _, _ in parameters(module.forward)]
    want = flat(getattr(functional, f"liger_fused_linear_{name}")(**inputs, **{**module.options, "beta": 0.3}))
    for got, expected in zip(flat(module(*positions)), want, strict=True):
        assert torch.equal(got, expected)
    module.beta = 0.9
    assert not torch.equal(flat(module(*positions))[0], want[0])


# --- Compiling, and memory


@pytest.mark.parametrize(("name", "dynamic"), [("dpo", False), ("grpo", False), ("grpo", True), ("jsd", False)])
def test_compiles_whole(name, dynamic):
    inputs = plain(make(name, torch.float32))
    leaves = [[*inputs.values()][n].requires_grad_() for n in (0, 1)]
    function = ours(Case(name), inputs)
    want = function(*inputs.values())
    torch._dynamo.reset()
    got = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*inputs.values())
    for out in got, want:
        for leaf, gradient in zip(leaves, torch.autograd.grad(out[0], leaves), strict=True):
            leaf.seen = [*getattr(leaf, "seen", []), gradient]
    for a, b in [*zip(got, want, strict=True), *(leaf.seen for leaf in leaves)]:
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def memory():
    path = Path(__file__).parent.parent / "benchmarks" / "chunked_loss.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_chunked_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return functools.partial(module.memory, width=16, device="cpu")


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "JSD"])
def test_peak_memory_grows_with_the_chunk_and_not_with_the_tokens(name, memory, monkeypatch):
    """A token more is its hidden state, the gradient of that and some numbers; a row of a chunk more is some rows of logits."""
    classes, more = 4096, 512
    peaks = [memory(name, tokens, classes) for tokens in (512, 512 + more)]
    assert peaks[1] - peaks[0] < more * (3 * 16 * 4 + 128)
    whole = [memory(name, tokens, classes, whole=True) for tokens in (512, 512 + more)]
    assert whole[1] - whole[0] > more * classes * 4
    monkeypatch.setattr(_linear, "TILE", 64)  # rows of a chunk on a CPU, 128 before
    smaller = memory(name, 512, classes, **({"chunk_size": 192} if name == "JSD" else {}))
    assert 64 * classes * 4 < peaks[0] - smaller < 64 * classes * 4 * 10


def in_a_process(rank, file, inputs):
    """The loss of this process' half, gathered."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    half = {k: v if k in ("weight", "bias") or v is None else v[2 * rank : 2 * rank + 2] for k, v in inputs.items()}
    losses = [functional.liger_fused_linear_grpo(**half, **options, use_ref_model=False)[0] for options in NORMALISED]
    gathered = [torch.empty(len(losses)) for _ in range(2)]
    torch.distributed.all_gather(gathered, torch.stack(losses))
    if rank == 0:
        torch.save(torch.stack(gathered), f"{file}.losses")
    torch.distributed.destroy_process_group()


NORMALISED = {"loss_type": "dapo"}, {"loss_type": "cispo", "num_items_in_batch": 31}


def test_a_mean_over_tokens_is_one_over_those_of_all_processes(tmp_path):
    """The mean over processes, whose sequences have different lengths, is the loss of all sequences."""
    made = plain(make("grpo", torch.float32))
    inputs = {k: v for k, v in made.items() if k not in REFERENCE}
    torch.multiprocessing.spawn(in_a_process, (str(tmp_path / "group"), inputs), nprocs=2)
    losses = torch.load(tmp_path / "group.losses")
    for each, options in zip(losses.unbind(1), NORMALISED, strict=True):
        want, _ = functional.liger_fused_linear_grpo(**inputs, **options, use_ref_model=False)
        torch.testing.assert_close(each.mean(), want)
        assert each[0] != each[1]


def test_no_double_backward_and_no_transform():
    inputs = plain(make("jsd", torch.float32))
    inputs["student_input"].requires_grad_()
    loss = functional.liger_fused_linear_jsd(**inputs)
    with pytest.raises(RuntimeError, match="distillation: double backward is not supported"):
        torch.autograd.grad(loss, inputs["student_input"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"liger_fused_linear_jsd: torch\.func transforms are not supported"):
        torch.func.grad(lambda x: functional.liger_fused_linear_jsd(**{**inputs, "student_input": x}))(inputs["student_input"])
