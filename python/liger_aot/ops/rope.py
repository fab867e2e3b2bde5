"""Rotary position embedding:  (y1, y2) = (x1 · cos - x2 · sin, x2 · cos + x1 · sin)  of each pair of columns of x.

Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021 (arXiv 2104.09864). Which columns are a pair is
the `order`: "half", transformers' own, pairs column n with column n + r / 2; "interleaved", the paper's, 2n with 2n + 1;
"interleaved_to_half", DeepSeek's, reads the one and writes the other.

What the models of transformers have, beside Llama's form: order "interleaved" (Cohere, GLM, ERNIE), of one angle a pair
with rotary_dim (GPT-J, Helium; GPT-OSS by halves), complex angles (Llama 4, DeepSeek-V2), "interleaved_to_half" (DeepSeek-V3),
last (DeepSeek-V4), reverse (nanochat), parts (Gemma 4's images), sections (Qwen2-VL).
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
HALVES, FEW_HALVES = (32, 64, 128), (32, 64)
ORDERS = {"half": (False, False), "interleaved": (True, True), "interleaved_to_half": (True, False)}  # pairs side by side
AXES = 3  # of multimodal positions: time, height and width


def unit_stride(x):
    """x, or a copy where neighbouring columns are not neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_numbers(cos):
    """Complex cos + i sin as real numbers, cos and sin by turns."""
    return torch.view_as_real(cos.resolve_conj()).flatten(-2)


def pairs(x, beside):
    """The first and the second columns of x's pairs."""
    half = x.shape[-1] // 2
    return (x[..., ::2], x[..., 1::2]) if beside else (x[..., :half], x[..., half:])


def of_pairs(cos, sin, beside, full, sections, parts):
    """The cosines of the first and of the second columns, and their sines: (batch or 1, 1, tokens, parts, pairs)."""
    if sin is None:
        cos, sin = pairs(as_numbers(cos), True)
    found = []
    for angles in cos, sin:
        if sections is not None:
            sizes = [2 * n for n in sections] if full and beside else [*sections] * (2 if full else 1)
            angles = torch.cat([axes[n % AXES] for n, axes in enumerate(angles.split(sizes, -1))], -1)
        if angles.dim() == 3:
            angles = angles[:, None]
        angles = wide(angles).unflatten(-1, (parts, angles.shape[-1] // parts))
        found += pairs(angles, beside) if full else (angles, angles)
    return found


def turned(x, cos, sin, rotary_dim, order, sections, parts, last, reverse, backward):
    """x rotated, or the gradient of x from that of the result, laid out as x where x is dense."""
    x, (beside_in, beside_out) = unit_stride(x), ORDERS[order]
    full = sin is not None and rotary_dim in (None, cos.shape[-1])
    c1, c2, s1, s2 = of_pairs(cos, sin, beside_in and beside_out, full, sections, parts)
    if reverse:
        s1, s2 = -s1, -s2
    if backward:
        s1, s2, beside_in, beside_out = -s2, -s1, beside_out, beside_in
    out, width = torch.empty_like(x), 2 * parts * c1.shape[-1]
    begin = x.shape[-1] - width if last else 0
    x1, x2 = pairs(wide(x.narrow(-1, begin, width)).unflatten(-1, (parts, width // parts)), beside_in)
    y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    ys = torch.stack((y1, y2), -1).flatten(-2) if beside_out else torch.cat((y1, y2), -1)
    out[..., begin : begin + width] = ys.flatten(-2)
    rest = slice(None, begin) if last else slice(width, None)
    out[..., rest] = x[..., rest]
    return out


def forward_reference(
    q, k, cos, sin, rotary_dim=None, order="half", sections=None, parts=1, last=False, reverse=False, backward=False
):
    options = rotary_dim, order, sections, parts, last, reverse, backward
    return turned(q, cos, sin, *options), turned(k, cos, sin, *options)


def backward_reference(dq_out, dk_out, cos, sin, *options):
    return forward_reference(dq_out, dk_out, cos, sin, *options, backward=True)


@functools.cache
def tile(half, plain):
    """HALF and LOOP of the kernel for halves of that width."""
    return (fit(half, HALVES), half > HALVES[-1]) if plain else (fit(half, FEW_HALVES), half > FEW_HALVES[0])


def turn(q, k, cos, sin, rotary_dim, order, sections, parts, last, reverse, backward):
    full = 1 if sin is not None and (rotary_dim is None or rotary_dim == cos.shape[-1]) else 0
    plain = full == 1 and order == "half" and sections is None and parts == 1 and not last
    step, imaginary = 1, 0
    if sin is None:
        cos = sin = as_numbers(cos)
        step, imaginary = 2, 1
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
    height = width = axis = 0
    if sections is not None:
        height, width, axis = sections[0], sections[0] + sections[1], angle_strides[0]
        angle_shape, angle_strides = angle_shape[1:], angle_strides[1:]
    turns = angle_shape[-1] if rotary_dim is None else rotary_dim
    half = turns // (2 * parts)
    HALF, LOOP = tile(half if type(half) is int else 1, plain)  # under tracing any will do
    pairs_in, pairs_out = ORDERS[order][::-1] if backward else ORDERS[order]
    kernels.rope[(batch * tokens * parts * (-(-q_heads // HEADS) - (-k_heads // HEADS)),)](
        q, k, cos, sin, q_out, k_out, q_batch, q_head, q_token, k_batch, k_head, k_token,
        q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token,
        0 if len(angle_shape) == 2 or angle_shape[0] == 1 else angle_strides[0], angle_strides[-2],
        tokens, q_heads, k_heads, half, n, half if backward else 0, -1.0 if backward is not reverse else 1.0,
        full, step, height, width, axis, 2 * axis, imaginary, n - turns if last else 0, parts,
        HEADS=HEADS, HALF=HALF, LOOP=LOOP, PAIRS_IN=pairs_in, PAIRS_OUT=pairs_out, PLAIN=plain,
    )  # fmt: skip
    return q_out, k_out


@op(cpu=forward_reference, strided=True)
def rope_fwd(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor | None,
    rotary_dim: int | None = None,
    order: str = "half",
    sections: list[int] | None = None,
    parts: int = 1,
    last: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    return turn(q, k, cos, sin, rotary_dim, order, sections, parts, last, reverse, False)


@op(cpu=backward_reference, strided=True)
def rope_bwd(
    dq_out: Tensor,
    dk_out: Tensor,
    cos: Tensor,
    sin: Tensor | None,
    rotary_dim: int | None = None,
    order: str = "half",
    sections: list[int] | None = None,
    parts: int = 1,
    last: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    return turn(dq_out, dk_out, cos, sin, rotary_dim, order, sections, parts, last, reverse, True)


class RopeFunction(Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, *options):
        ctx.save_for_backward(cos, sin)
        ctx.options = options
        q_out, k_out = rope_fwd(q, k, cos, sin, *options)
        need_dq, need_dk, *_ = ctx.needs_input_grad
        if not (need_dq and need_dk):
            ctx.mark_non_differentiable(k_out if need_dq else q_out)
        return q_out, k_out

    @staticmethod
    def backward(ctx, dq_out, dk_out):
        Function.once("rope")
        need_dq, need_dk, *constants = ctx.needs_input_grad
        if not (need_dq and need_dk):  # of what is frozen, no head
            dq_out, dk_out = dq_out if need_dq else dq_out[:, :0], dk_out if need_dk else dk_out[:, :0]
        dq, dk = rope_bwd(dq_out, dk_out, *ctx.saved_tensors, *ctx.options)
        return dq if need_dq else None, dk if need_dk else None, *(None for _ in constants)


@public
def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor | None = None,
    *,
    rotary_dim: int | None = None,
    order: str = "half",
    sections: list[int] | None = None,
    parts: int = 1,
    last: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """q (b, hq, s, d) and k (b, hk, s, d) rotated by the angles of cos and sin, (b or 1, s, r) or (s, r) with r <= d even.

    Columns from r on stay as they are. Arithmetic in fp32, rounded once. Any strides, such as those of a transposed
    (b, s, h, d), are read where they lie, and the results have them too. Where cos and sin have one number for each pair of
    columns, rotary_dim is twice their width; where sin is None, cos is complex, cos + i sin of each pair. Otherwise they have
    the order of the result. With `sections`, three numbers of pairs, cos and sin are (3, b or 1, s, r), of which a pair has
    those of its section: multimodal positions. `parts` are rotated each for itself, as if they were that many narrower heads
    with angles of their own. `last` rotates the last columns instead of the first, `reverse` by -sin. Raises ValueError on
    shapes, devices or dtypes that do not fit together, and where cos or sin require a gradient, of which there is none.
    """
    if parts != 1:
        parts = int(parts)  # the model's number, no size: a graph is for one
    check(q, k, cos, sin, rotary_dim, order, sections, parts)
    if needs_grad("rope", q, k, cos, sin):
        if cos.requires_grad or (sin is not None and sin.requires_grad):
            raise ValueError(
                "rope: cos and sin must not require gradients, which are not computed; got one that does; detach() it"
            )
        return RopeFunction.apply(q, k, cos, sin, rotary_dim, order, sections, parts, last, reverse)
    return rope_fwd(q, k, cos, sin, rotary_dim, order, sections, parts, last, reverse)


def check(q, k, cos, sin, rotary_dim, order, sections, parts):
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
    divisor, most, axes = 2, n, ""
    if order != "half" or sin is None or rotary_dim is not None or sections is not None or parts != 1:
        each = check_form(cos, sin, rotary_dim, order, sections, parts)
        divisor, most = each * parts, n if each == 2 else n // 2
        if sections is not None:
            shape, axes = shape[1:], f"{AXES}, "
    dims = len(shape)
    if (
        not (dims == 2 or (dims == 3 and (shape[0] == 1 or shape[0] == batch)))
        or shape[-2] != tokens
        or shape[-1] > most
        or shape[-1] % divisor
    ):
        fits = {1: "", 2: "even, "}.get(divisor, f"divisible by {divisor}, ")
        raise ValueError(
            f"rope: cos must have shape ({axes}{tokens}, r), ({axes}1, {tokens}, r) or ({axes}{batch}, {tokens}, r) with r "
            f"{fits}at most {most}, got {tuple(cos.shape)}"
        )
    if sin is None:
        sin = cos
    elif sin.shape != cos.shape:
        raise ValueError(f"rope: sin must have shape {tuple(cos.shape)} like cos, got {tuple(sin.shape)}")
    elif sin.dtype is not angle_dtype or (angle_dtype is not dtype and angle_dtype is not torch.float32):
        raise ValueError(
            f"rope: cos and sin must both be {dtype}{'' if dtype is torch.float32 else ' or torch.float32'}, "
            f"got {angle_dtype} and {sin.dtype}; cast with .to()"
        )
    if k.device != device or cos.device != device or sin.device != device:
        name, tensor = next(item for item in (("k", k), ("cos", cos), ("sin", sin)) if item[1].device != device)
        raise ValueError(f"rope: {name} must be on {device} like q, got {tensor.device}; move it with .to()")


def check_form(cos, sin, rotary_dim, order, sections, parts):
    """How many numbers of cos a pair of columns has."""
    if order not in ORDERS:
        raise ValueError(f"rope: order must be one of {', '.join(ORDERS)}, got {order!r}")
    if parts < 1:
        raise ValueError(f"rope: parts must be at least 1, got {parts}")
    if sin is None and cos.dtype is not torch.complex64:
        raise ValueError(f"rope: cos must be complex64 where there is no sin, got {cos.dtype}; pass sin too")
    width = cos.shape[-1] if cos.dim() else 0
    widths = (2 * width,) if sin is None else (width, 2 * width)
    if rotary_dim is not None and rotary_dim not in widths:
        raise ValueError(f"rope: rotary_dim must be {' or '.join(map(str, widths))}, as cos is {width} wide, got {rotary_dim}")
    each = 2 if sin is not None and rotary_dim in (None, width) else 1
    if sections is not None:
        if parts != 1:
            raise ValueError(f"rope: parts must be 1 where there are sections, got {parts}")
        if len(sections) != AXES or min(sections) < 0 or each * sum(sections) != width:
            raise ValueError(
                f"rope: sections must be {AXES} numbers of pairs of columns, {width // each} in all, got {list(sections)}"
            )
        if cos.dim() < 3 or cos.shape[0] != AXES:
            raise ValueError(f"rope: cos must have {AXES} axes in front where there are sections, got {tuple(cos.shape)}")
    return each
