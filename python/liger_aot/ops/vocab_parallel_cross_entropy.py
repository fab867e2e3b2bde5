"""Vocabulary-parallel cross entropy:  loss = logsumexp(z) - z[target], of logits whose classes are spread over processes.

As Megatron-LM's (Shoeybi et al. 2019, arXiv 1909.08053, section 3). Each process runs our kernel over its own classes; what
they tell each other, in one all_gather, is a logsumexp and a loss for each row. All sum them in the same order, to the same
bits.
"""

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import cdiv
from .._runtime import kernels
from ._check import FLOATS
from ._check import rows_of
from ._loss import check_classes
from ._loss import check_options
from ._loss import check_target_if_asked
from ._loss import result_dtype
from .cross_entropy import capped
from .cross_entropy import cross_entropy_fwd

NAME = "vocab_parallel_cross_entropy"
BLOCK = 2048
IGNORED = -100  # what stands here and in the kernel for the caller's ignore_index, which may be another process's class


def fake_fwd(logits, target, first, classes, ignore_index, label_smoothing, softcap):
    return logits.new_empty(3 if label_smoothing else 2, logits.shape[0], dtype=torch.float32)


@op(cpu=None, fake=fake_fwd)
def vocab_parallel_cross_entropy_fwd(
    logits: Tensor, target: Tensor, first: int, classes: int, ignore_index: int, label_smoothing: float, softcap: float | None
) -> Tensor:
    """(kinds, rows) of logits (rows, C), of all classes the C from first on.

    The kinds are the loss, 0 where the target is another process's and NaN where it is nobody's, logsumexp, and where there is
    label smoothing logsumexp less the mean of the logits.
    """
    check_target_if_asked(NAME, target, ignore_index, classes)
    local, here, valid = placed(target, first, logits.shape[1], ignore_index)
    known = torch.where(valid, local.clamp(min=0), IGNORED)
    nll, lse, _ = cross_entropy_fwd(logits, known, None, IGNORED, 0.0, softcap, 0.0)
    kinds = [torch.where(here, nll, torch.where(valid & ((target < 0) | (target >= classes)), torch.nan, 0.0)), lse]
    if label_smoothing:  # by itself, which reads the logits once more
        kinds.append(cross_entropy_fwd(logits, known, None, IGNORED, 1.0, softcap, 0.0)[0])
    return torch.stack(kinds)


def placed(target, first, n, ignore_index):
    """(each target among this process's n classes, -1 where it is another's, or IGNORED; which are its own; which count)."""
    local, valid = target - first, target != ignore_index
    here = valid & (local >= 0) & (local < n)
    return torch.where(here, local, torch.where(valid, -1, IGNORED)), here, valid


def backward_reference(logits, target, lse, share, picked, spread, softcap):
    z = capped(logits, softcap)
    here = torch.arange(logits.shape[-1]) == target[:, None]
    dz = share[:, None] * (z - lse[:, None]).exp() - torch.where(here, picked[:, None], 0.0) - spread[:, None]
    if softcap is not None:
        dz = dz * (1 - (z / softcap).square())
    return torch.where((target != IGNORED)[:, None], dz, 0.0).to(logits.dtype)


@op(cpu=backward_reference)
def vocab_parallel_cross_entropy_bwd(
    logits: Tensor, target: Tensor, lse: Tensor, share: Tensor, picked: Tensor, spread: Tensor, softcap: float | None
) -> Tensor:
    """share · softmax - picked at the target - spread, for each row of this process's logits, by lse over all classes."""
    logits, stride, rows, n = rows_of(logits)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    kernels.vocab_parallel_cross_entropy_bwd[(rows * cdiv(n, BLOCK),)](
        logits, target, lse, share, picked, spread, dlogits, stride, n, 1.0 if softcap is None else softcap,
        SOFTCAP=softcap is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return dlogits


def gathered(kinds, group, world):
    """The kinds of rows of every process: (world, kinds, rows). Functional collectives can be traced."""
    if world == 1:
        return kinds.unsqueeze(0)
    out = torch.ops._c10d_functional.all_gather_into_tensor(kinds, world, group)
    return torch.ops._c10d_functional.wait_tensor(out).view(world, *kinds.shape)


LOWEST = torch.finfo(torch.float32).min  # whose exp is 0; Inductor's C++ cannot spell an infinity here


def join(nlls, lses, owner):
    """(loss, logsumexp) over all classes, from those over each process's (world, rows), of which `owner` has the target.

    As the owner's loss and what the others' classes add to it: its digits stay where the target is all but certain.
    """
    own = lses.gather(0, owner)
    more = (lses - own).scatter(0, owner, LOWEST)
    most = more.amax(0).clamp(min=0.0)
    others = (more - most).exp().sum(0)
    added = torch.where(most == 0, others.log1p(), most + ((-most).exp() + others).log())
    return nlls.gather(0, owner).squeeze(0) + added, own.squeeze(0) + added


def compute(logits, target, group, rank, world, options):
    """(the losses of the rows, fp32, 0 where ignored; logsumexp over all classes)."""
    ignore_index, label_smoothing, softcap, z_scale, everywhere = options
    n = logits.shape[1]
    valid = (target != ignore_index).float()
    kinds = vocab_parallel_cross_entropy_fwd(logits, target, rank * n, n * world, ignore_index, label_smoothing, softcap)
    nlls, lses, *spreads = gathered(kinds, group, world).unbind(1)
    owner = (target // n).clamp(0, world - 1).unsqueeze(0)
    loss, lse = join(nlls, lses, owner)
    if label_smoothing:
        smooth = spreads[0] + (lse - lses)
        loss = (1 - label_smoothing) * loss + label_smoothing * (smooth.mean(0) if everywhere else smooth.select(0, rank))
    # Every kind is 0 for a row that is ignored. torch.where with a number would name the device in an exported graph.
    return (loss + z_scale * lse.square()) * valid, lse * valid


class VocabParallelCrossEntropyFunction(Function):
    @staticmethod
    def forward(ctx, logits, target, group, rank, world, options):
        loss, lse = compute(logits, target, group, rank, world, options)
        ctx.save_for_backward(logits, target, lse)
        ctx.options, ctx.place = options, (rank, world)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        Function.once(NAME)
        logits, target, lse = ctx.saved_tensors
        (ignore_index, label_smoothing, softcap, z_scale, everywhere), (rank, world) = ctx.options, ctx.place
        n = logits.shape[1]
        local, here, valid = placed(target, rank * n, n, ignore_index)
        upstream = torch.where(valid, dloss, 0.0)
        upstream = torch.where(valid & ((target < 0) | (target >= n * world)), torch.nan, upstream)
        share = upstream * (1 + 2 * z_scale * lse)
        picked = torch.where(here, upstream * (1 - label_smoothing), 0.0)
        spread = upstream * (label_smoothing / (n * world if everywhere else n))
        dlogits = vocab_parallel_cross_entropy_bwd(logits, local, lse, share, picked, spread, softcap)
        return dlogits, None, None, None, None, None


@public
def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    group: str = "",
    rank: int = 0,
    world: int = 1,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    smooth_everywhere: bool = True,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """cross_entropy of input (..., C), where each of world processes holds C classes: rank 0 the first C, and so on.

    target, (...) and int64, counts classes over all processes, which all hold the same targets. group is the name of the
    process group, of which this process is number rank. All get the same loss, and the gradient of their own logits, if they
    all call backward with the same upstream gradient; that takes no communication. Label smoothing reads the logits twice; it
    is over all classes, or, not smooth_everywhere, over each process's own, by which their losses differ, as Megatron-LM has
    it. A process all of whose logits are -inf makes the loss NaN. Dtypes, ignored targets and targets out of range are as in
    cross_entropy. Raises ValueError on wrong shapes, devices, dtypes and options.
    """
    name = NAME
    if input.dtype not in FLOATS:
        raise ValueError(f"{name}: input must be float32, float16 or bfloat16, got {input.dtype}")
    if not input.dim() or not input.shape[-1]:
        raise ValueError(f"{name}: input must have shape (..., C) with at least one class, got {tuple(input.shape)}")
    if not 0 <= rank < world:
        raise ValueError(f"{name}: rank must be at least 0 and below world {world}, got {rank}")
    check_options(NAME, reduction, label_smoothing, softcap, lse_square_scale)
    dtype, shape, n = result_dtype(input, loss_dtype), input.shape[:-1], input.shape[-1]
    target = check_classes(NAME, target, shape, input).reshape(-1)
    options = ignore_index, label_smoothing, softcap, lse_square_scale, smooth_everywhere
    arguments = input.reshape(-1, n), target, group, rank, world, options
    losses = VocabParallelCrossEntropyFunction.apply(*arguments) if needs_grad(NAME, input) else compute(*arguments)[0]
    if reduction == "none":
        return losses.view(shape).to(dtype)
    total = losses.sum()
    return (total / (target != ignore_index).sum() if reduction == "mean" else total).to(dtype)
