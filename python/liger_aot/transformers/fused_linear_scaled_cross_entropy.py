"""Liger's cross entropy of each token by a linear head at a temperature, with its entropy; also of a head in shards of classes.

All is made of linear_logprob: the logits exist a chunk of rows at a time. Of shards each process knows the logsumexp, entropy
and target's loss over its own classes; these three numbers a token, in one all_gather, give those over all classes.
"""

import torch

from .._op import Function
from ..functional import embedding
from ..functional import linear_logprob
from ..ops._check import check_indices
from ..ops._check import looks_at
from ..ops._linear import autocast
from ..ops._loss import check_classes
from ..ops._loss import check_target_if_asked
from ..ops.vocab_parallel_cross_entropy import IGNORED
from ..ops.vocab_parallel_cross_entropy import gathered
from ..ops.vocab_parallel_cross_entropy import join
from ..ops.vocab_parallel_cross_entropy import placed
from ._names import one_of
from ._names import positive


class Gathered(Function):
    """The kinds of every process (world, kinds, ...). All compute the same of them: each keeps its own part of the gradient."""

    @staticmethod
    def forward(ctx, kinds, group, rank, world):
        ctx.rank = rank
        return gathered(kinds, group, world)

    @staticmethod
    def backward(ctx, dall):
        return dall[ctx.rank], None, None, None


class Shared(Function):
    """The input of every process, whose gradient is the sum of what each process' classes make of it."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        dx = torch.ops._c10d_functional.all_reduce(dx.contiguous(), "sum", ctx.group)
        return torch.ops._c10d_functional.wait_tensor(dx), None


def place_of(tp_group):
    """(name, rank, world) of a group; None is torch.distributed's own, or this process alone where that is not set up."""
    if tp_group is None and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return "", 0, 1
    group = torch.distributed.group.WORLD if tp_group is None else tp_group
    return group.group_name, group.rank(), group.size()


def selected_logps(x, weight, ids, lse, valid, temperature):
    """(..., K): log softmax of the classes ids, from logits of these alone, in fp32."""
    x, rows = autocast(x, embedding(ids, weight))
    with torch.autocast(x.device.type, enabled=False):
        z = x.float() @ rows.float().t() / temperature
    return torch.where(valid[..., None], z - lse[..., None], 0.0)


def scaled_cross_entropy(
    _input,
    weight,
    target,
    temperature=1.0,
    ignore_index=-100,
    m_tiles_per_cluster=1,
    return_entropy=False,
    selected_token_ids=None,
):
    """The loss of each token, fp32; also its entropy, if asked; also the log-probabilities (..., K) of the classes given.

    All have a gradient, 0 where the target is ignore_index. m_tiles_per_cluster has no effect.
    """
    op = "LigerFusedLinearScaledCrossEntropyFunction"
    positive(op, "m_tiles_per_cluster", m_tiles_per_cluster)
    one_of(op, "return_entropy", return_entropy, (True, False))
    ids = selected_token_ids
    if ids is not None:
        if not torch.is_tensor(ids) or ids.dtype is not torch.int64 or ids.dim() != 1:
            got = f"{ids.dtype} {tuple(ids.shape)}" if torch.is_tensor(ids) else repr(ids)
            raise ValueError(f"{op}: selected_token_ids must be int64 (K,), got {got}")
        if not torch.compiler.is_compiling() and looks_at(ids):
            check_indices(op, "selected_token_ids", ids, weight.shape[0])
    logp, entropy, lse = linear_logprob(_input, weight, target, temperature=temperature, ignore_index=ignore_index)
    outputs = [-logp, entropy] if return_entropy else [-logp]
    if ids is not None:
        outputs.append(selected_logps(_input, weight, ids, lse, target != ignore_index, temperature))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def scaled_cross_entropy_tp(
    _input,
    weight,
    target,
    tp_group,
    temperature=1.0,
    ignore_index=-100,
    tiles_per_reduce=1,
    return_entropy=False,
):
    """The loss of each token, fp32, or (loss, entropy), of classes of which process 0 holds the first V, and so on.

    weight is this process' (V, H). _input, target, which counts classes over all processes, and the upstream gradient are the
    same everywhere; so are the results, and the gradient of _input, for which backward adds up the processes' parts.
    tiles_per_reduce has no effect.
    """
    op = "LigerFusedLinearScaledCrossEntropyTPFunction"
    one_of(op, "tiles_per_reduce", tiles_per_reduce, (1, 2, 4))
    one_of(op, "return_entropy", return_entropy, (True, False))
    target = check_classes(op, target, _input.shape[:-1], _input)
    group, rank, world = place_of(tp_group)
    n = weight.shape[0]
    if not torch.compiler.is_compiling():
        check_target_if_asked(op, target, ignore_index, n * world)
    local, _, valid = placed(target, rank * n, n, ignore_index)
    x = Shared.apply(_input, group) if world > 1 else _input
    mine = torch.where(valid, local.clamp(min=0), IGNORED)
    kinds = torch.stack(linear_logprob(x, weight, mine, temperature=temperature, ignore_index=IGNORED))
    everyone = Gathered.apply(kinds, group, rank, world) if world > 1 else kinds[None]
    logps, entropies, lses = everyone.unbind(1)
    nll, lse = join(-logps, lses, (target // n).clamp(0, world - 1).unsqueeze(0))
    # For a target that no process has the loss and the gradient are NaN, where an error would wait for the device.
    nll = torch.where(valid, nll, 0.0) * torch.where(valid & ((target < 0) | (target >= n * world)), torch.nan, 1.0)
    if not return_entropy:
        return nll
    entropy = ((lses - lse).exp() * (entropies + (lse - lses))).sum(0)
    return nll, torch.where(valid, entropy, 0.0)
