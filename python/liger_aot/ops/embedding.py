"""Embedding:  y[i] = weight[indices[i]].  The gradient of a row of weight is the sum of dy at all places that name it.

torch.nn.functional.embedding, but for max_norm, scale_grad_by_freq and sparse.
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
from ._check import check_indices
from ._check import looks_at
from ._check import rows_of
from ._check import wide

BLOCK = 1024
CHUNK = 32  # rows that a program of the backward sums one after another
SHARES_BLOCK, BACKWARD = 128, {"CHUNK": CHUNK, "SHARES": 4, "BLOCK": 512}


def check(indices, classes):
    check_indices("embedding", "indices", indices, classes, ", the rows of weight")


def forward_reference(weight, indices):
    check(indices, len(weight))
    return torch.nn.functional.embedding(indices, weight)


def backward_reference(dy, indices, classes, padding):
    n = dy.shape[-1]
    dys = torch.where((indices == padding)[..., None], 0, wide(dy)).reshape(indices.numel(), n)
    return dys.new_zeros(classes, n).index_add_(0, indices.reshape(-1), dys).to(dy.dtype)


@op(cpu=forward_reference)
def embedding_fwd(weight: Tensor, indices: Tensor) -> Tensor:
    weight, stride, classes, n = rows_of(weight)
    if looks_at(indices):
        check(indices, classes)
    y = weight.new_empty((*indices.shape, n))
    kernels.embedding_fwd[(indices.numel(), cdiv(n, BLOCK))](weight, indices.contiguous(), y, stride, classes, n, BLOCK=BLOCK)
    return y


@op(cpu=backward_reference)
def embedding_bwd(dy: Tensor, indices: Tensor, classes: int, padding: int) -> Tensor:
    """The gradient (classes, n) of weight; that of row `padding` is zero."""
    key, order = indices.reshape(-1).sort(stable=True)
    rows, n = key.shape[0], dy.shape[-1]
    chunks, dy = cdiv(rows, CHUNK), dy.contiguous()
    # Two programs never write one row: a run of equal indices is summed in shares, one for each chunk that it goes on in.
    share, dweight = dy.new_empty(chunks * n, dtype=torch.float32), dy.new_zeros((classes, n))
    kernels.embedding_shares[(chunks, cdiv(n, SHARES_BLOCK))](dy, key, order, share, rows, n, CHUNK=CHUNK, BLOCK=SHARES_BLOCK)
    kernels.embedding_bwd[(chunks, cdiv(n, BACKWARD["BLOCK"]))](
        dy, key, order, share, dweight, rows, classes, padding, n, **BACKWARD
    )
    return dweight


class EmbeddingFunction(Function):
    @staticmethod
    def forward(ctx, weight, indices, padding):
        ctx.save_for_backward(indices)
        ctx.options = weight.shape[0], padding
        return embedding_fwd(weight, indices)

    @staticmethod
    def backward(ctx, dy):
        Function.once("embedding")
        return embedding_bwd(dy, *ctx.saved_tensors, *ctx.options), None, None


@public
def embedding(weight: Tensor, indices: Tensor, padding_idx: int | None = None) -> Tensor:
    """weight[indices] for weight (classes, n) and indices of any shape; row padding_idx of weight gets no gradient.

    A gradient is summed in fp32 in the order of the indices, and rounded once: the same bits every time. The backward sorts the
    indices and sums runs of equal ones, long ones in shares. indices are int64, or int32, which are copied. One that is no row
    of weight is an error on CPU; on CUDA its result is NaN and it adds to no gradient, unless LIGER_AOT_CHECK=1. Raises
    ValueError on other dtypes, devices and shapes, and on a padding_idx that is no row.
    """
    if weight.dtype not in FLOATS:
        raise ValueError(f"embedding: weight must be float32, float16 or bfloat16, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight must have shape (classes, n), got {tuple(weight.shape)}")
    if indices.dtype is not torch.int64 and indices.dtype is not torch.int32:
        raise ValueError(f"embedding: indices must be int64 or int32, got {indices.dtype}; convert them with .long()")
    if indices.device != weight.device:
        raise ValueError(
            f"embedding: indices must be on {weight.device} like weight, got {indices.device}; move them with .to()"
        )
    classes, padding = weight.shape[0], -1
    if padding_idx is not None:
        if not -classes <= padding_idx < classes:
            raise ValueError(f"embedding: padding_idx must be one of the {classes} rows of weight, got {padding_idx}")
        padding = padding_idx + classes if padding_idx < 0 else padding_idx
    indices = indices.long()
    if needs_grad("embedding", weight):
        return EmbeddingFunction.apply(weight, indices, padding)
    return embedding_fwd(weight, indices)
