"""Multi-token attention:  y = mask(conv2d(softmax(mask(scores)))),  mask leaving row i its first i + 1 columns.

Golovneva et al., Multi-Token Attention, 2025 (arXiv 2504.00927). The first mask and the softmax are one kernel, the convolution
is torch's.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import kernels
from ._check import FLOATS
from ._check import check_same
from ._check import rows_of
from ._check import wide
from ._linear import autocast
from .softmax import softmax_bwd
from .sparsemax import sparsemax_bwd
from .sparsemax import sparsemax_fwd

NAME = "multi_token_attention"
BLOCK = 1024


def causal(x):
    """x (…, tokens, n), with -inf where a column is later than the token of the row: the tokens are the last of n."""
    later = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1 + x.shape[-1] - x.shape[-2])
    return x.masked_fill(later, -torch.inf)


def forward_reference(x):
    return causal(wide(x)).softmax(-1).to(x.dtype)


@op(cpu=forward_reference)
def causal_softmax_fwd(x: Tensor) -> Tensor:
    """The softmax over the last dimension of (…, tokens, n): of all columns in the last row, of one less in each before."""
    tokens = x.shape[-2]
    x, stride, rows, n = rows_of(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels.causal_softmax_fwd[(rows if n else 0,)](
        x, y, stride, tokens, n, BLOCK=BLOCK, LOOP=not (type(n) is int and n <= BLOCK)
    )
    return y


def convolved(probabilities, weight, bias, stride, padding, dilation, groups):
    return conv2d(probabilities, weight, bias, stride, padding, dilation, groups).tril().contiguous()


def fake_fwd(scores, weight, bias, stride, padding, dilation, groups, sparse):
    probabilities = torch.empty_like(scores, memory_format=torch.contiguous_format)
    return convolved(probabilities, weight, bias, stride, padding, dilation, groups), probabilities


@op(cpu=None, fake=fake_fwd)
def multi_token_attention_fwd(
    scores: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    sparse: bool,
) -> tuple[Tensor, Tensor]:
    """(y, the probabilities). For sparsemax, whose kernel knows no mask, the scores are copied once."""
    probabilities = sparsemax_fwd(causal(scores)) if sparse else causal_softmax_fwd(scores)
    return convolved(probabilities, weight, bias, stride, padding, dilation, groups), probabilities


def fake_bwd(dy, probabilities, weight, stride, padding, dilation, groups, sparse, *needs):
    needed = zip((probabilities, weight, weight[:, 0, 0, 0]), needs, strict=True)
    return tuple(torch.empty_like(t if need else t.new_empty(0), memory_format=torch.contiguous_format) for t, need in needed)


@op(cpu=None, fake=fake_bwd)
def multi_token_attention_bwd(
    dy: Tensor,
    probabilities: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    sparse: bool,
    need_dscores: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of scores, weight and bias, of which some are needed."""
    needs = [need_dscores, need_dweight, need_dbias]
    options = weight.shape[:1], stride, padding, dilation, False, [0, 0], groups, needs
    dprobabilities, *gradients = torch.ops.aten.convolution_backward(dy.tril(), probabilities, weight, *options)
    if need_dscores:  # by the operators without a mask: where the mask is, the probabilities are 0, and the gradient with them
        dprobabilities = (sparsemax_bwd if sparse else softmax_bwd)(dprobabilities, probabilities)
    found = zip((dprobabilities, *gradients), needs, strict=True)
    return tuple(g.contiguous() if need else weight.new_empty(0) for g, need in found)


class MultiTokenAttentionFunction(Function):
    @staticmethod
    def forward(ctx, scores, weight, bias, *options):
        y, probabilities = multi_token_attention_fwd(scores, weight, bias, *options)
        ctx.save_for_backward(probabilities, weight)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, dy):
        Function.once(NAME)
        needs, constants = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:]
        found = multi_token_attention_bwd(dy, *ctx.saved_tensors, *ctx.options, *needs)
        return *(g if need else None for g, need in zip(found, needs, strict=True)), *(None for _ in constants)


@public
def multi_token_attention(
    scores: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: list[int] | None = None,
    padding: list[int] | None = None,
    dilation: list[int] | None = None,
    groups: int = 1,
    sparse: bool = False,
) -> Tensor:
    """The causal softmax of scores (batch, C, L, L), or sparsemax where sparse, convolved over queries and keys, and masked.

    weight (C', C / groups, height, width), bias (C') and the others are conv2d's; where the result is not L x L, its row i
    keeps its first i + 1 columns all the same. All are of one dtype, fp32, fp16 or bf16, which the result has; probabilities
    are computed in fp32 and rounded to it once. Under autocast all are cast to its dtype, as conv2d's are. The same bits every
    time where torch's convolution gives them, as it does under torch.use_deterministic_algorithms(True). Raises ValueError on
    other shapes, dtypes and devices.
    """
    scores, weight, bias = autocast(scores, weight, bias)
    check(scores, weight, bias, groups)
    options = stride or [1, 1], padding or [0, 0], dilation or [1, 1], groups, sparse
    if needs_grad(NAME, scores, weight, bias):
        return MultiTokenAttentionFunction.apply(scores, weight, bias, *options)
    return multi_token_attention_fwd(scores, weight, bias, *options)[0]


def check(scores, weight, bias, groups):
    name = NAME
    if scores.dtype not in FLOATS:
        raise ValueError(f"{name}: scores must be float32, float16 or bfloat16, got {scores.dtype}")
    if scores.dim() != 4 or scores.shape[-1] != scores.shape[-2]:
        raise ValueError(f"{name}: scores must have shape (batch, C, L, L), got {tuple(scores.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"{name}: weight must have shape (C', C / groups, height, width), got {tuple(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups or weight.shape[1] * groups != scores.shape[1]:
        raise ValueError(
            f"{name}: weight must have shape (C', C / groups, height, width) with C' divisible by groups, got "
            f"{tuple(weight.shape)} and {groups} groups for scores of shape {tuple(scores.shape)}"
        )
    check_same(NAME, "weight", weight, weight.shape, scores)
    if bias is not None:
        check_same(NAME, "bias", bias, weight.shape[:1], scores)
    for which, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype is not scores.dtype:
            raise ValueError(f"{name}: {which} must be {scores.dtype} like scores, got {parameter.dtype}; cast it with .to()")
