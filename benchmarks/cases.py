"""What is timed of each operator: a call of ours, the same call of Liger's, and the same allocations with nothing else.

Tensors are small and in fp32, for which Liger casts least, so that what ATen computes on the CPU takes next to no time.
"""

import dataclasses
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

FP32 = torch.float32
ROWS, N = 32, 64
CONTIGUOUS = torch.contiguous_format
CASES = {}


@dataclasses.dataclass
class Case:
    inputs: list  # tensors; those that require a gradient get one
    ours: Callable  # (operator, *inputs)
    liger: Callable | None  # (liger_kernel.transformers.functional, *inputs)
    forward: Callable | None = None  # the allocations of a forward and of a backward
    backward: Callable | None = None
    function: Callable | None = None  # (forward, backward) -> a call(*inputs) with an autograd.Function that does only that


def case(build):
    CASES[build.__name__] = build
    return build


def operator(name):
    """(what liger_aot exports, torch.ops.liger's)."""
    module = importlib.import_module(f"liger_aot.ops.{name}")
    return getattr(module, name), getattr(torch.ops.liger, name).default


def leaf(*shape):
    return torch.randn(shape).requires_grad_()


@case
def rms_norm():
    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x, dtype=FP32, memory_format=CONTIGUOUS), x.new_empty(ROWS, dtype=FP32)

    def backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        dx = torch.empty_like(x, memory_format=CONTIGUOUS)
        x.new_empty(2 * N, dtype=FP32)
        return dx, torch.empty_like(weight)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight, eps, offset, cast):
                y, rstd = fwd(x, weight)
                ctx.save_for_backward(x, weight, rstd)
                return y

            @staticmethod
            def backward(ctx, dy):
                x, weight, rstd = ctx.saved_tensors
                dx, dw = bwd(dy, x, weight, rstd)
                return dx, dw, None, None, None

        return lambda x, w: Empty.apply(x, w, 1e-6, 0.0, False)

    return Case(
        [leaf(ROWS, N), leaf(N)],
        lambda op, x, w: op(x, w, 1e-6),
        lambda liger, x, w: liger.liger_rms_norm(x, w, 1e-6),
        forward,
        backward,
        function,
    )


@case
def fused_add_rms_norm():
    def forward(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = torch.empty_like(x, memory_format=CONTIGUOUS)
        y = torch.empty_like(x, dtype=FP32, memory_format=CONTIGUOUS)
        return y, s, x.new_empty(ROWS, dtype=FP32)

    def backward(dy: Tensor, ds: Tensor, s: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        dx = torch.empty_like(s, memory_format=CONTIGUOUS)
        s.new_empty(2 * N, dtype=FP32)
        return dx, torch.empty_like(weight)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, residual, weight, eps, offset, cast):
                y, s, rstd = fwd(x, residual, weight)
                ctx.save_for_backward(s, weight, rstd)
                return y, s

            @staticmethod
            def backward(ctx, dy, ds):
                s, weight, rstd = ctx.saved_tensors
                dx, dw = bwd(dy, ds, s, weight, rstd)
                return dx, dx, dw, None, None, None

        return lambda x, r, w: Empty.apply(x, r, w, 1e-6, 0.0, False)

    return Case(
        [leaf(ROWS, N), leaf(ROWS, N), leaf(N)],
        lambda op, x, r, w: op(x, r, w, 1e-6),
        lambda liger, x, r, w: liger.liger_fused_add_rms_norm(x, r, w, 1e-6),
        forward,
        backward,
        function,
    )


@case
def gated_rms_norm():
    def forward(x: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x, memory_format=CONTIGUOUS), x.new_empty((ROWS, 1), dtype=FP32)

    def backward(dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dx, dgate = (torch.empty_like(x, memory_format=CONTIGUOUS) for _ in range(2))
        x.new_empty(2 * N, dtype=FP32)
        return dx, dgate, torch.empty_like(weight)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, gate, weight):
                y, rstd = fwd(x, gate, weight)
                ctx.save_for_backward(x, gate, weight, rstd)
                return y

            @staticmethod
            def backward(ctx, dy):
                return bwd(dy, *ctx.saved_tensors)

        return Empty.apply

    ours = lambda op, x, gate, weight: op(x, gate, weight, 1e-6)  # noqa: E731
    return Case([leaf(ROWS, N), leaf(ROWS, N), leaf(N)], ours, None, forward, backward, function)


@case
def layer_norm():
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.empty_like(x, memory_format=CONTIGUOUS)
        return y, x.new_empty(ROWS, dtype=FP32), x.new_empty(ROWS, dtype=FP32)

    def backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        dx = torch.empty_like(x, memory_format=CONTIGUOUS)
        x.new_empty(32 * N, dtype=FP32)
        return dx, weight.new_empty(2, N)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight, bias, eps):
                y, mean, rstd = fwd(x, weight, bias)
                ctx.save_for_backward(x, weight, mean, rstd)
                return y

            @staticmethod
            def backward(ctx, dy):
                x, weight, mean, rstd = ctx.saved_tensors
                dx, sums = bwd(dy, x, weight, mean, rstd)
                return dx, sums[0], sums[1], None

        return lambda x, w, b: Empty.apply(x, w, b, 1e-5)

    return Case(
        [leaf(ROWS, N), leaf(N), leaf(N)],
        lambda op, x, w, b: op(x, w, b, 1e-5),
        lambda liger, x, w, b: liger.liger_layer_norm(x, w, b, 1e-5),
        forward,
        backward,
        function,
    )


@case
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


@case
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


@case
def dyt():
    def forward(x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=CONTIGUOUS)

    def backward(dy: Tensor, x: Tensor, alpha: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        dx = torch.empty_like(x, memory_format=CONTIGUOUS)
        x.new_empty(6 * N, dtype=FP32)
        return dx, x.new_empty(3, N, dtype=FP32)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, alpha, gamma, beta):
                y = fwd(x, alpha, gamma, beta)
                ctx.save_for_backward(x, alpha, gamma)
                return y

            @staticmethod
            def backward(ctx, dy):
                dx, (dgamma, dbeta, dalpha) = bwd(dy, *ctx.saved_tensors)
                return dx, dalpha.sum().view(1), dgamma, dbeta

        return Empty.apply

    return Case(
        [leaf(ROWS, N), leaf(1), leaf(N), leaf(N)],
        lambda op, x, alpha, gamma, beta: op(x, alpha, gamma, beta),
        None,  # Liger's tunes itself, on a GPU
        forward,
        backward,
        function,
    )


@case
def poly_norm():
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x, memory_format=CONTIGUOUS), x.new_empty(ROWS, 3, dtype=FP32)

    def backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        dx = torch.empty_like(x, memory_format=CONTIGUOUS)
        x.new_empty(4 * ROWS, dtype=FP32)
        return dx, x.new_empty(4, dtype=FP32)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight, bias):
                y, rstd = fwd(x, weight, bias)
                ctx.save_for_backward(x, weight, rstd)
                return y

            @staticmethod
            def backward(ctx, dy):
                dx, sums = bwd(dy, *ctx.saved_tensors)
                return dx, sums[:3], sums[3].view(1)

        return Empty.apply

    return Case(
        [leaf(ROWS, N), leaf(3), leaf(1)],
        lambda op, x, w, b: op(x, w, b),
        lambda liger, x, w, b: liger.liger_poly_norm(x, w, b),
        forward,
        backward,
        function,
    )


@case
def modulated_rms_norm():
    batch = 4

    def forward(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x, memory_format=CONTIGUOUS), x.new_empty((batch, ROWS // batch), dtype=FP32)

    def backward(dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dx = torch.empty_like(x, memory_format=CONTIGUOUS)
        for size in (ROWS, ROWS, ROWS):
            x.new_empty(size * N, dtype=FP32)
        return dx, torch.empty_like(weight), scale.new_empty(scale.shape), scale.new_empty(scale.shape)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, scale, shift, weight):
                y, rstd = fwd(x, scale, shift, weight)
                ctx.save_for_backward(x, scale, weight, rstd)
                return y

            @staticmethod
            def backward(ctx, dy):
                dx, dw, dscale, dshift = bwd(dy, *ctx.saved_tensors)
                return dx, dscale, dshift, dw

        return Empty.apply

    return Case(
        [leaf(batch, ROWS // batch, N), leaf(batch, N), leaf(batch, N), leaf(N)],
        lambda op, *inputs: op(*inputs),
        lambda liger, x, scale, shift, weight: liger.liger_modulated_rms_norm(x, weight, scale, shift),
        forward,
        backward,
        function,
    )


@case
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


@case
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


@case
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


@case
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


@case
def group_norm():
    samples, channels, groups, size = 2, 64, 32, N  # as many groups as benchmarks/gpu has

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.empty_like(x, memory_format=CONTIGUOUS)
        return y, x.new_empty(samples * groups, dtype=FP32), x.new_empty(samples * groups, dtype=FP32)

    def backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        dx = torch.empty_like(x)
        x.new_empty(samples * 2 * channels, dtype=FP32)
        return dx, x.new_empty(2, channels, dtype=FP32)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, groups, weight, bias, eps):
                y, mean, rstd = fwd(x, weight, bias)
                ctx.save_for_backward(x, weight, mean, rstd)
                return y

            @staticmethod
            def backward(ctx, dy):
                dx, (dw, db) = bwd(dy, *ctx.saved_tensors)
                return dx, None, dw, db, None

        return lambda x, w, b: Empty.apply(x, groups, w, b, 1e-5)

    return Case(
        [leaf(samples, channels, size), leaf(channels), leaf(channels)],
        lambda op, x, w, b: op(x, groups, w, b, 1e-5),
        None,  # Liger's does not compile for so few numbers
        forward,
        backward,
        function,
    )


@case
def cross_entropy():
    def forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits.new_empty(ROWS, dtype=FP32)
        lse = logits.new_empty(ROWS, dtype=FP32)
        return logits.new_empty(()), lse, logits.new_empty(4, dtype=FP32)

    def backward(dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, totals: Tensor) -> Tensor:
        return torch.empty_like(logits, memory_format=CONTIGUOUS)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, logits, target, weight, options, mean, dtype, stats):
                loss, lse, totals = fwd(logits, target)
                ctx.save_for_backward(logits, target, lse, totals)
                return loss

            @staticmethod
            def backward(ctx, dloss):
                logits, target, lse, totals = ctx.saved_tensors
                return bwd(dloss, logits, target, lse, totals), None, None, None, None, None, None

        return lambda logits, target: Empty.apply(logits, target, None, None, True, FP32, False)

    return Case(
        [leaf(ROWS, 128), torch.randint(128, (ROWS,))],
        lambda op, logits, target: op(logits, target),
        lambda liger, logits, target: liger.liger_cross_entropy(logits, target),
        forward,
        backward,
        function,
    )


def divergence(name, prepare, options):
    """Of two tensors of which the first gets a gradient, as Liger's do."""

    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x.new_empty(ROWS, dtype=FP32)
        return x.new_empty(()), x.new_empty(())

    def backward(dloss: Tensor, x: Tensor, y: Tensor, factor: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=CONTIGUOUS)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, y, labels, options, over, dtype):
                loss, factor = fwd(x, y)
                ctx.save_for_backward(x, y, factor)
                return loss

            @staticmethod
            def backward(ctx, dloss):
                x, y, factor = ctx.saved_tensors
                return bwd(dloss, x, y, factor), None, None, None, None, None

        return lambda x, y: Empty.apply(x, y, None, None, (0, 1), FP32)

    return Case(
        [prepare(torch.randn(ROWS, 128)).requires_grad_(), prepare(torch.randn(ROWS, 128))],
        lambda op, x, y: op(x, y, **options),
        lambda liger, x, y: getattr(liger, f"liger_{name}")(x, y, **options),
        forward,
        backward,
        function,
    )


CASES |= {
    "kl_div": lambda: divergence("kl_div", lambda x: x.log_softmax(-1), {"reduction": "batchmean", "log_target": True}),
    "jsd": lambda: divergence("jsd", lambda x: x.log_softmax(-1), {}),
    "tvd": lambda: divergence("tvd", lambda x: x.softmax(-1), {"reduction": "batchmean"}),
}


# Of the linear losses, matmuls on the CPU and sums of gradients are the most: there is no telling what of it is host cost.
@case
def linear_cross_entropy():
    return Case(
        [leaf(ROWS, 16), leaf(N, 16), torch.randint(N, (ROWS,))],
        lambda op, hidden, weight, target: op(hidden, weight, target),
        lambda liger, hidden, weight, target: liger.liger_fused_linear_cross_entropy(hidden, weight, target),
    )


@case
def linear_jsd():
    return Case(
        [leaf(ROWS, 16), leaf(N, 16), torch.randn(ROWS, 8), torch.randn(N, 8)],
        lambda op, *heads: op(*heads),
        lambda liger, *heads: liger.liger_fused_linear_jsd(*heads),
    )


@case
def linear_kl_div():
    return Case(
        [leaf(ROWS, 16), leaf(N, 16), torch.randn(ROWS, N).softmax(-1)],
        lambda op, *inputs: op(*inputs),
        lambda liger, *inputs: liger.liger_fused_linear_kl_div(*inputs),
    )


@case
def cross_entropy_tvd():
    def forward(logits: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        loss, distance = logits.new_empty(ROWS, dtype=FP32), logits.new_empty(ROWS, dtype=FP32)
        lse, teacher_lse = logits.new_empty(ROWS, dtype=FP32), logits.new_empty(ROWS, dtype=FP32)
        return loss, distance, lse, teacher_lse, logits.new_empty(ROWS, dtype=FP32)

    def backward(
        dloss: Tensor,
        ddistance: Tensor,
        logits: Tensor,
        teacher: Tensor,
        target: Tensor,
        lse: Tensor,
        teacher_lse: Tensor,
        share: Tensor,
    ) -> Tensor:
        return torch.empty_like(logits, memory_format=CONTIGUOUS)

    def function(fwd, bwd):
        class Empty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, logits, teacher, target, ignore_index):
                loss, distance, *rows = fwd(logits, teacher, target)
                ctx.save_for_backward(logits, teacher, target, *rows)
                return loss, distance

            @staticmethod
            def backward(ctx, dloss, ddistance):
                return bwd(dloss, ddistance, *ctx.saved_tensors), None, None, None

        return lambda logits, teacher, target: Empty.apply(logits, teacher, target, -100)

    return Case(
        [leaf(ROWS, 128), torch.randn(ROWS, 128), torch.randint(128, (ROWS,))],
        lambda op, *inputs: op(*inputs),
        lambda liger, *inputs: importlib.import_module("liger_kernel.ops").LigerFusedCETVDFunction.apply(*inputs),
        forward,
        backward,
        function,
    )


@case
def vocab_parallel_cross_entropy():
    return Case(
        [leaf(ROWS, 128), torch.randint(128, (ROWS,))],
        lambda op, logits, target: op(logits, target),
        lambda liger, logits, target: liger_vocab_parallel_cross_entropy(logits, target),
    )


def liger_vocab_parallel_cross_entropy(logits, target):
    """Liger-Kernel's for one process, which no function of its functional module calls."""
    function = importlib.import_module("liger_kernel.ops").LigerVocabParallelCEFunction
    return function.apply(logits[None], target[None], None, -100, 0.0, "pytorch", "global").mean()
