"""The cases of losses."""

import importlib

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
@CASES.add
def linear_cross_entropy():
    return Case(
        [leaf(ROWS, 16), leaf(N, 16), torch.randint(N, (ROWS,))],
        lambda op, hidden, weight, target: op(hidden, weight, target),
        lambda liger, hidden, weight, target: liger.liger_fused_linear_cross_entropy(hidden, weight, target),
    )


@CASES.add
def linear_jsd():
    return Case(
        [leaf(ROWS, 16), leaf(N, 16), torch.randn(ROWS, 8), torch.randn(N, 8)],
        lambda op, *heads: op(*heads),
        lambda liger, *heads: liger.liger_fused_linear_jsd(*heads),
    )


@CASES.add
def linear_kl_div():
    return Case(
        [leaf(ROWS, 16), leaf(N, 16), torch.randn(ROWS, N).softmax(-1)],
        lambda op, *inputs: op(*inputs),
        lambda liger, *inputs: liger.liger_fused_linear_kl_div(*inputs),
    )


@CASES.add
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


@CASES.add
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
