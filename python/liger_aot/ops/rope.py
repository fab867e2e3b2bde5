"""Rotary position embedding:  out = x · cos + rotate_half(x) · sin,  rotate_half(x) = (-x2, x1) of the halves (x1, x2) of x.

Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021 (arXiv 2104.09864), in the order of columns
that transformers has.
"""

import functools

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import fit
from .._runtime import kernels
from ._check import FLOATS
from ._check import wide

HEADS = 8
HALVES = 32, 64, 128


def unit_stride(x):
    """x, or a copy where neighbouring columns are not neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def turned(x, cos, sin, sign):
    """x rotated, or for sign -1 the gradient of x from that of the result, laid out as x where x is dense."""
    x = unit_stride(x)
    out, half, r = torch.empty_like(x), cos.shape[-1] // 2, cos.shape[-1]
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    c1, c2, s1, s2 = (wide(t) for angles in (cos, sin) for t in (angles[..., :half], angles[..., half:]))
    if sign < 0:
        s1, s2 = -s2, -s1
    x1, x2 = wide(x[..., :half]), wide(x[..., half:r])
    out[..., :half] = x1 * c1 - x2 * s1
    out[..., half:r] = x2 * c2 + x1 * s2
    out[..., r:] = x[..., r:]
    return out


def forward_reference(q, k, cos, sin):
    return turned(q, cos, sin, 1), turned(k, cos, sin, 1)


def backward_reference(dq_out, dk_out, cos, sin):
    return turned(dq_out, cos, sin, -1), turned(dk_out, cos, sin, -1)


@functools.cache
def tile(half):
    """HALF and LOOP of the kernel for halves of that width."""
    return fit(half, HALVES), half > HALVES[-1]


def turn(q, k, cos, sin, backward):
    q_batch, q_head, q_token, q_column = q.stride()
    k_batch, k_head, k_token, k_column = k.stride()
    angle_strides = cos.stride()
    if q_column != 1 or k_column != 1 or angle_strides[-1] != 1 or angle_strides != sin.stride():
        q, k, cos, sin = unit_stride(q), unit_stride(k), cos.contiguous(), sin.contiguous()
        (q_batch, q_head, q_token, _), (k_batch, k_head, k_token, _), angle_strides = q.stride(), k.stride(), cos.stride()
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    q_out_batch, q_out_head, q_out_token, _ = q_out.stride()
    k_out_batch, k_out_head, k_out_token, _ = k_out.stride()
    (batch, q_heads, tokens, n), k_heads, angle_shape = q.shape, k.shape[1], cos.shape
    half = angle_shape[-1] // 2
    HALF, LOOP = tile(half if type(half) is int else 1)  # under tracing any will do
    kernels.rope[(batch * tokens * (-(-q_heads // HEADS) - (-k_heads // HEADS)),)](
        q, k, cos, sin, q_out, k_out, q_batch, q_head, q_token, k_batch, k_head, k_token,
        q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token,
        0 if len(angle_shape) == 2 or angle_shape[0] == 1 else angle_strides[0], angle_strides[-2],
        tokens, q_heads, k_heads, half, n, half if backward else 0, -1.0 if backward else 1.0,
        HEADS=HEADS, HALF=HALF, LOOP=LOOP,
    )  # fmt: skip
    return q_out, k_out


@op(cpu=forward_reference, strided=True)
def rope_fwd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return turn(q, k, cos, sin, False)


@op(cpu=backward_reference, strided=True)
def rope_bwd(dq_out: Tensor, dk_out: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return turn(dq_out, dk_out, cos, sin, True)


class RopeFunction(Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rope_fwd(q, k, cos, sin)

    @staticmethod
    def backward(ctx, dq_out, dk_out):
        Function.once("rope")
        need_dq, need_dk, _, _ = ctx.needs_input_grad
        if not (need_dq and need_dk):  # of what is frozen, no head
            dq_out, dk_out = dq_out if need_dq else dq_out[:, :0], dk_out if need_dk else dk_out[:, :0]
        dq, dk = rope_bwd(dq_out, dk_out, *ctx.saved_tensors)
        return dq if need_dq else None, dk if need_dk else None, None, None


@public
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (b, hq, s, d) and k (b, hk, s, d) rotated by the angles of cos and sin, (b or 1, s, r) or (s, r) with r <= d even.

    Columns from r on stay as they are. Arithmetic in fp32, rounded once. Any strides, such as those of a transposed
    (b, s, h, d), are read where they lie, and the results have them too. Raises ValueError on shapes, devices or dtypes
    that do not fit together, and where cos or sin require a gradient, of which there is none.
    """
    check(q, k, cos, sin)
    if needs_grad("rope", q, k, cos, sin):
        if cos.requires_grad or sin.requires_grad:
            raise ValueError(
                "rope: cos and sin must not require gradients, which are not computed; got one that does; detach() it"
            )
        return RopeFunction.apply(q, k, cos, sin)
    return rope_fwd(q, k, cos, sin)


def check(q, k, cos, sin):
    q_shape, k_shape, shape = q.shape, k.shape, cos.shape
    if len(q_shape) != 4:
        raise ValueError(f"rope: q must have shape (batch, heads, tokens, head width), got {tuple(q_shape)}")
    batch, _, tokens, n = q_shape
    if len(k_shape) != 4 or k_shape[0] != batch or k_shape[2] != tokens or k_shape[3] != n:
        raise ValueError(f"rope: k must have shape ({batch}, any heads, {tokens}, {n}) like q, got {tuple(k_shape)}")
    dtype, angle_dtype, device = q.dtype, cos.dtype, q.device
    if dtype not in FLOATS or k.dtype is not dtype:
        raise ValueError(
            f"rope: q and k must have one dtype of float32, float16 and bfloat16, got {dtype} and {k.dtype}; cast with .to()"
        )
    dims = len(shape)
    if (
        not (dims == 2 or (dims == 3 and (shape[0] == 1 or shape[0] == batch)))
        or shape[-2] != tokens
        or shape[-1] > n
        or shape[-1] % 2
    ):
        raise ValueError(
            f"rope: cos must have shape ({tokens}, r), (1, {tokens}, r) or ({batch}, {tokens}, r) with r even, at most {n}, "
            f"got {tuple(shape)}"
        )
    if sin.shape != shape:
        raise ValueError(f"rope: sin must have shape {tuple(shape)} like cos, got {tuple(sin.shape)}")
    if sin.dtype is not angle_dtype or (angle_dtype is not dtype and angle_dtype is not torch.float32):
        raise ValueError(
            f"rope: cos and sin must both be {dtype}{'' if dtype is torch.float32 else ' or torch.float32'}, "
            f"got {angle_dtype} and {sin.dtype}; cast with .to()"
        )
    if k.device != device or cos.device != device or sin.device != device:
        name, tensor = next(item for item in (("k", k), ("cos", cos), ("sin", sin)) if item[1].device != device)
        raise ValueError(f"rope: {name} must be on {device} like q, got {tensor.device}; move it with .to()")
