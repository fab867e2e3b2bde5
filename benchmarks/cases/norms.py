"""The cases of norms, and of DyT in a norm's place."""

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


@CASES.add
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


@CASES.add
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


@CASES.add
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


@CASES.add
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


@CASES.add
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


@CASES.add
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


@CASES.add
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
