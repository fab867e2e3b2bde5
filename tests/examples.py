"""One call of every public operator, for the tests that hold for all of them."""

import torch


def tensors(*shapes, dtype):
    return [torch.randn(shape).to(dtype) for shape in shapes]


def logs(*shapes, dtype):
    return [t.log_softmax(-1) for t in tensors(*shapes, dtype=dtype)]


def targets(*shape, classes):
    return torch.randint(classes, shape)


# name -> dtype -> (arguments, options)
EXAMPLES = {
    "rms_norm": lambda t: ([*tensors((3, 4, 24), (24,), dtype=t), 1e-6], {"casting": "llama"}),
    "fused_add_rms_norm": lambda t: ([*tensors((3, 4, 24), (3, 4, 24), (24,), dtype=t), 1e-6], {}),
    "layer_norm": lambda t: ([*tensors((3, 4, 24), (24,), (24,), dtype=t), 1e-5], {}),
    "gated_rms_norm": lambda t: ([*tensors((3, 4, 24), (3, 4, 24), (24,), dtype=t), 1e-6], {"groups": 2, "gate_first": True}),
    "rope": lambda t: ([*tensors((2, 4, 5, 16), (2, 2, 5, 16), dtype=t), *constant((2, 5, 16), (2, 5, 16), dtype=t)], {}),
    "swiglu": lambda t: (tensors((3, 4, 24), (3, 4, 24), dtype=t), {}),
    "geglu": lambda t: (tensors((3, 4, 24), (3, 4, 24), dtype=t), {}),
    "relu_squared": lambda t: (tensors((3, 4, 24), dtype=t), {}),
    "dyt": lambda t: (tensors((3, 4, 24), (1,), (24,), (24,), dtype=t), {}),
    "softmax": lambda t: (tensors((3, 4, 24), dtype=t), {}),
    "sparsemax": lambda t: (tensors((3, 4, 24), dtype=t), {}),
    "group_norm": lambda t: ([*tensors((3, 4, 24), dtype=t), 2, *tensors((4,), (4,), dtype=t)], {}),
    "cross_entropy": lambda t: ([*tensors((6, 50), dtype=t), targets(6, classes=50)], {"label_smoothing": 0.1}),
    "linear_cross_entropy": lambda t: ([*tensors((6, 16), (50, 16), dtype=t), targets(6, classes=50)], {}),
    "vocab_parallel_cross_entropy": lambda t: (
        [*tensors((6, 50), dtype=t), targets(6, classes=50)],
        {"label_smoothing": 0.1},
    ),
    "kl_div": lambda t: ([*logs((6, 50), dtype=t), tensors((6, 50), dtype=t)[0].softmax(-1)], {"reduction": "batchmean"}),
    "jsd": lambda t: ([*logs((6, 50), (6, 50), dtype=t), targets(6, classes=50)], {"beta": 0.3, "ignore_index": 7}),
    "tvd": lambda t: ([x.exp() for x in logs((6, 50), (6, 50), dtype=t)], {}),
    "linear_jsd": lambda t: (
        [*tensors((6, 16), (50, 16), (6, 8), (50, 8), dtype=t), targets(6, classes=50)],
        {"temperature": 0.7, "ignore_index": 7},
    ),
    "linear_logprob": lambda t: ([*tensors((6, 16), (50, 16), dtype=t), targets(6, classes=50)], {"temperature": 0.7}),
}


class Constant(torch.Tensor):
    """A tensor that gets no gradient."""


def constant(*shapes, dtype):
    return [t.as_subclass(Constant) for t in tensors(*shapes, dtype=dtype)]


def leaves(arguments):
    """The arguments, new, with gradients wanted of every floating tensor that is no constant."""
    return [leaf(a) for a in arguments]


def leaf(a):
    if isinstance(a, Constant):
        return a.as_subclass(torch.Tensor)
    return a.detach().clone().requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a


def call(name, arguments, options):
    """The outputs that are differentiable, as a list."""
    out = getattr(torch.ops.liger, name).default(*arguments, **options)
    return list(out) if isinstance(out, (tuple, list)) else [out]
