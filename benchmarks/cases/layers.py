"""The cases of what stands between norms and losses: rotary embeddings, gates, experts, attention, streams, embeddings."""

import torch
from torch import Tensor

from ._case import CONTIGUOUS
from ._case import FP32
from ._case import ROWS
from ._case import Case
from ._case import Cases
from ._case import N
from ._case import leaf

CASES = Cases()


@CASES.add
def rope():
    q, k = (torch.randn(2, 8, heads, 32).transpose(1, 2).requires_grad_() for heads in (4, 2))  # as models have them
    cos, sin = torch.randn(1, 8, 32), torch.randn(1, 8, 32)

    def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q), torch.empty_like(k)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, q, k, cos, sin):
                ctx.save_for_backward(cos, sin)
                return fwd(q, k, cos, sin)

            @staticmethod
            def backward(ctx, dq_out, dk_out):
                cos, sin = ctx.saved_tensors
                dq, dk = bwd(dq_out, dk_out, cos, sin)
                return dq, dk, None, None

        return Empty.apply

    def ours(op, q, k, cos, sin):
        return op(q, k, cos, sin)

    return Case([q, k, cos, sin], ours, lambda liger, *inputs: liger.liger_rope(*inputs), forward, forward, function)


def gated(name):
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return torch.empty_like(gate, memory_format=CONTIGUOUS)

    def backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(gate, memory_format=CONTIGUOUS), torch.empty_like(up, memory_format=CONTIGUOUS)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, gate, up, option):
                ctx.save_for_backward(gate, up)
                return fwd(gate, up)

            @staticmethod
            def backward(ctx, dy):
                gate, up = ctx.saved_tensors
                dgate, dup = bwd(dy, gate, up)
                return dgate, dup, None

        return lambda gate, up: Empty.apply(gate, up, 1.0)

    return Case(
        [leaf(ROWS, N), leaf(ROWS, N)],
        lambda op, gate, up: op(gate, up),
        lambda liger, gate, up: getattr(liger, f"liger_{name}")(gate, up),
        forward,
        backward,
        function,
    )


CASES |= {name: lambda name=name: gated(name) for name in ("swiglu", "geglu")}


def pointwise(name, arguments, saved):
    """An operator of one tensor and options; `saved` is what backward reads: the input or the output."""

    def forward(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=CONTIGUOUS)

    def backward(dy: Tensor, kept: Tensor) -> Tensor:
        return torch.empty_like(kept, memory_format=CONTIGUOUS)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                y = fwd(x)
                ctx.save_for_backward(x if saved == "input" else y)
                return y

            @staticmethod
            def backward(ctx, dy):
                return bwd(dy, *ctx.saved_tensors)

        return Empty.apply

    return Case(
        [leaf(ROWS, N)],
        lambda op, x: op(x, *arguments),
        lambda liger, x: getattr(liger, f"liger_{name}")(x),
        forward,
        backward,
        function,
    )


def packed_glu():
    def forward(x: Tensor) -> Tensor:
        return x.new_empty(ROWS, N)

    def backward(dy: Tensor, x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=CONTIGUOUS)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, activation):
                ctx.save_for_backward(x)
                return fwd(x)

            @staticmethod
            def backward(ctx, dy):
                return bwd(dy, *ctx.saved_tensors), None

        return lambda x: Empty.apply(x, "silu")

    return Case([leaf(ROWS, 2 * N)], lambda op, x: op(x), None, forward, backward, function)


CASES["packed_glu"] = packed_glu


def moe(weighted):
    """Each token's two slots one after the other."""
    order = torch.arange(2 * ROWS)
    position = order.view(ROWS, 2)

    def permute(x: Tensor, order: Tensor, position: Tensor) -> Tensor:
        return x.new_empty(2 * ROWS, N)

    def permute_back(dy: Tensor, position: Tensor) -> Tensor:
        return dy.new_empty(ROWS, N)

    def unpermute(x: Tensor, weight: Tensor, order: Tensor, position: Tensor) -> Tensor:
        return x.new_empty(ROWS, N)

    def unpermute_back(dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x, memory_format=CONTIGUOUS), torch.empty_like(weight, memory_format=CONTIGUOUS)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *given):
                ctx.save_for_backward(*(given if weighted else given[2:]))
                return fwd(*given)

            @staticmethod
            def backward(ctx, dy):
                back = bwd(dy, *ctx.saved_tensors)
                return *(back if weighted else [back]), None, None

        return Empty.apply

    inputs = [leaf(2 * ROWS, N), leaf(ROWS, 2)] if weighted else [leaf(ROWS, N)]
    bodies = (unpermute, unpermute_back) if weighted else (permute, permute_back)
    return Case([*inputs, order, position], lambda op, *given: op(*given), None, *bodies, function)


CASES |= {"moe_permute": lambda: moe(False), "moe_unpermute": lambda: moe(True)}
CASES["relu_squared"] = lambda: pointwise("relu_squared", (), "input")
CASES["softmax"] = lambda: pointwise("softmax", (-1,), "output")


@CASES.add
def neighborhood_attention():
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q, memory_format=CONTIGUOUS), q.new_empty(q.shape[:3], dtype=FP32)

    def backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(t, memory_format=CONTIGUOUS) for t in (q, k, v))
        torch.empty_like(lse)
        return dq, dk, dv

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, q, k, v, kernel_size, dilation, scale):
                y, lse = fwd(q, k, v)
                ctx.save_for_backward(q, k, v, lse)
                return y

            @staticmethod
            def backward(ctx, dy):
                return *bwd(dy, *ctx.saved_tensors), None, None, None

        return lambda q, k, v: Empty.apply(q, k, v, 7, 1, 0.25)

    return Case(
        [leaf(1, 2, ROWS, 16) for _ in range(3)],
        lambda op, q, k, v: op(q, k, v),
        lambda liger, q, k, v: liger.liger_fused_neighborhood_attention(q, k, v),
        forward,
        backward,
        function,
    )


# Of which torch's convolution is the most: there is no telling what of it is host cost.
CASES["multi_token_attention"] = lambda: Case(
    [leaf(1, 1, 16, 16), leaf(1, 1, 3, 3)],
    lambda op, scores, weight: op(scores, weight),
    lambda liger, scores, weight: liger.liger_multi_token_attention(scores, weight),
)
# Of which torch's matmuls are the most, likewise.
CASES["mhc_coeffs"] = lambda: Case(
    [leaf(ROWS, 4, N), leaf(4 * N, 24), leaf(24), *(leaf() for _ in range(3))],
    lambda op, *inputs: op(*inputs),
    lambda liger, *inputs: liger.liger_mhc_coeffs(*inputs, allow_fp32=True),
)
CASES["sparsemax"] = lambda: pointwise("sparsemax", (-1,), "output")


@CASES.add
def attn_res():
    depth, tokens = 4, ROWS // 4

    def forward(v: Tensor, query: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        numbers = [v.new_empty(size, dtype=FP32) for size in ((depth, tokens), (depth, tokens), tokens)]
        return v.new_empty(tokens, N), *numbers

    def backward(dy: Tensor, v: Tensor, query: Tensor, score: Tensor, rstd: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        v.new_empty(tokens * N, dtype=FP32)
        return torch.empty_like(v, memory_format=CONTIGUOUS), torch.empty_like(query)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, v, query):
                y, *rest = fwd(v, query)
                ctx.save_for_backward(v, query, *rest)
                return y

            @staticmethod
            def backward(ctx, dy):
                return bwd(dy, *ctx.saved_tensors)

        return lambda v, query, weight: Empty.apply(v, query * weight)

    return Case(
        [leaf(depth, tokens, N), leaf(N), leaf(N)],
        lambda op, *inputs: op(*inputs),
        lambda liger, *inputs: liger.liger_attn_res(*inputs),
        forward,
        backward,
        function,
    )


def keeps_its_inputs(fwd, bwd):
    class Empty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return fwd(*inputs)

        @staticmethod
        def backward(ctx, dy):
            return bwd(dy, *ctx.saved_tensors)

    return Empty.apply


@CASES.add
def mhc_pre():
    def forward(x: Tensor, h_pre: Tensor) -> Tensor:
        return x.new_empty(ROWS, N)

    def backward(dy: Tensor, x: Tensor, h_pre: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x, memory_format=CONTIGUOUS), torch.empty_like(h_pre, memory_format=CONTIGUOUS)

    return Case(
        [leaf(ROWS, 4, N), leaf(ROWS, 4)],
        lambda op, *inputs: op(*inputs),
        lambda liger, *inputs: liger.liger_mhc_pre(*inputs),
        forward,
        backward,
        keeps_its_inputs,
    )


@CASES.add
def mhc_post_res():
    def forward(x: Tensor, f_out: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=CONTIGUOUS)

    def backward(dy: Tensor, x: Tensor, f_out: Tensor, h_post: Tensor, h_res: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return tuple(torch.empty_like(t, memory_format=CONTIGUOUS) for t in (x, f_out, h_post, h_res))

    return Case(
        [leaf(ROWS, 4, N), leaf(ROWS, N), leaf(ROWS, 4), leaf(ROWS, 4, 4)],
        lambda op, *inputs: op(*inputs),
        lambda liger, *inputs: liger.liger_mhc_post_res(*inputs),
        forward,
        backward,
        keeps_its_inputs,
    )


@CASES.add
def embedding():
    classes, indices = 64, torch.randint(64, (ROWS,))

    def forward(weight: Tensor, indices: Tensor) -> Tensor:
        return weight.new_empty(ROWS, N)

    def backward(dy: Tensor, indices: Tensor) -> Tensor:
        indices.sort(stable=True)
        dy.new_empty(N, dtype=FP32)
        return dy.new_zeros(classes, N)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, weight, indices):
                ctx.save_for_backward(indices)
                return fwd(weight, indices)

            @staticmethod
            def backward(ctx, dy):
                return bwd(dy, *ctx.saved_tensors), None

        return Empty.apply

    # Liger's functions, among which it looks for its own, have no embedding.
    return Case([leaf(classes, N), indices], lambda op, w, i: op(w, i), None, forward, backward, function)
