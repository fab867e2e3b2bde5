"""One call of every public operator, and modules of such calls, for what holds for all of them."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from liger_aot.functional import moe_route


def tensors(*shapes, dtype):
    return [torch.randn(shape).to(dtype) for shape in shapes]


def logs(*shapes, dtype):
    return [t.log_softmax(-1) for t in tensors(*shapes, dtype=dtype)]


def targets(*shape, classes):
    return torch.randint(classes, shape)


def routing(tokens, k, experts=4):
    """Where the rows of random experts go, and the one of no expert."""
    index = torch.rand(tokens, experts).topk(k).indices
    index[0, 0] = experts
    return moe_route(index, experts)[:2]


# name -> dtype -> (arguments, options)
EXAMPLES = {
    "rms_norm": lambda t: ([*tensors((3, 4, 24), (24,), dtype=t), 1e-6], {"casting": "llama"}),
    "fused_add_rms_norm": lambda t: ([*tensors((3, 4, 24), (3, 4, 24), (24,), dtype=t), 1e-6], {}),
    "layer_norm": lambda t: ([*tensors((3, 4, 24), (24,), (24,), dtype=t), 1e-5], {}),
    "gated_rms_norm": lambda t: ([*tensors((3, 4, 24), (3, 4, 24), (24,), dtype=t), 1e-6], {"groups": 2, "gate_first": True}),
    "modulated_rms_norm": lambda t: (tensors((3, 2, 24), (3, 24), (3, 24), (24,), dtype=t), {}),
    "rope": lambda t: ([*tensors((2, 4, 5, 16), (2, 2, 5, 16), dtype=t), *constant((2, 5, 16), (2, 5, 16), dtype=t)], {}),
    "swiglu": lambda t: (tensors((3, 4, 24), (3, 4, 24), dtype=t), {}),
    "geglu": lambda t: (tensors((3, 4, 24), (3, 4, 24), dtype=t), {}),
    "packed_glu": lambda t: (tensors((3, 4, 32), dtype=t), {"activation": "gelu_tanh"}),
    "moe_permute": lambda t: ([*tensors((6, 24), dtype=t), *routing(6, 8, experts=9)], {}),
    "moe_unpermute": lambda t: ([*tensors((48, 24), (6, 8), dtype=t), *routing(6, 8, experts=9)], {}),
    "relu_squared": lambda t: (tensors((3, 4, 24), dtype=t), {}),
    "dyt": lambda t: (tensors((3, 4, 24), (1,), (24,), (24,), dtype=t), {}),
    "attn_res": lambda t: (tensors((3, 2, 4, 24), (24,), (24,), dtype=t), {}),
    "mhc_coeffs": lambda t: (tensors((3, 2, 4, 8), (32, 24), (24,), (), (), (), dtype=t), {"tmax": 3}),
    "mhc_pre": lambda t: (tensors((3, 2, 4, 24), (3, 2, 4), dtype=t), {}),
    "mhc_post_res": lambda t: (tensors((3, 2, 4, 24), (3, 2, 24), (3, 2, 4), (3, 2, 4, 4), dtype=t), {}),
    "embedding": lambda t: ([*tensors((10, 24), dtype=t), targets(3, 4, classes=10)], {"padding_idx": 1}),
    "poly_norm": lambda t: (tensors((3, 4, 24), (3,), (1,), dtype=t), {}),
    "softmax": lambda t: (tensors((3, 4, 24), dtype=t), {}),
    "sparsemax": lambda t: (tensors((3, 4, 24), dtype=t), {}),
    "multi_token_attention": lambda t: (
        tensors((2, 2, 6, 6), (4, 1, 3, 3), (4,), dtype=t),
        {"padding": [1, 1], "groups": 2},
    ),
    "neighborhood_attention": lambda t: (tensors(*[(2, 2, 6, 16)] * 3, dtype=t), {"kernel_size": 3, "dilation": 2}),
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
    "linear_kl_div": lambda t: (
        [*tensors((6, 16), (50, 16), dtype=t), probabilities((6, 50), dtype=t), targets(6, classes=50)],
        {"temperature": 0.7, "ignore_index": 7},
    ),
    "cross_entropy_tvd": lambda t: (
        [*tensors((6, 50), dtype=t), *constant((6, 50), dtype=t), targets(6, classes=50)],
        {"ignore_index": 7},
    ),
    "linear_logprob": lambda t: ([*tensors((6, 16), (50, 16), dtype=t), targets(6, classes=50)], {"temperature": 0.7}),
}


class Constant(torch.Tensor):
    """A tensor that gets no gradient."""


def constant(*shapes, dtype):
    return [t.as_subclass(Constant) for t in tensors(*shapes, dtype=dtype)]


def probabilities(shape, dtype):
    return tensors(shape, dtype=dtype)[0].softmax(-1).as_subclass(Constant)


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


class Call(torch.nn.Module):
    """One operator as a module of its tensors."""

    def __init__(self, name, arguments, options):
        super().__init__()
        self.name, self.options = name, options
        self.others = [None if isinstance(a, torch.Tensor) else a for a in arguments]

    def forward(self, *tensors):
        rest = iter(tensors)
        return call(self.name, [next(rest) if a is None else a for a in self.others], self.options)


class Everything(torch.nn.Module):
    """A call of each of several operators."""

    def __init__(self, modules):
        super().__init__()
        self.calls = torch.nn.ModuleDict(modules)

    def forward(self, inputs):
        return {name: module(*inputs[name]) for name, module in self.calls.items()}


def example(name, dtype=torch.float32):
    """A public operator's example as (module, its tensors), which want no gradients."""
    arguments, options = EXAMPLES[name.removesuffix("_stats")](dtype)
    tensors = tuple(a.detach().as_subclass(torch.Tensor) for a in arguments if isinstance(a, torch.Tensor))
    return Call(name, arguments, options), tensors


class Body(torch.nn.Module):
    """A call of one of the operators that the public ones are made of."""

    def __init__(self, overload, arguments):
        super().__init__()
        self.overload, self.others = overload, [None if isinstance(a, torch.Tensor) else a for a in arguments]
        self.places = [n for n, a in enumerate(arguments) if isinstance(a, torch.Tensor)]

    def forward(self, *tensors):
        given = dict(zip(self.places, tensors, strict=True))
        return self.overload(*(given.get(n, a) for n, a in enumerate(self.others)))


class Calls(TorchDispatchMode):
    """(operator, arguments) of calls inside, the first with these numbers and words."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "liger":
            self.seen.setdefault((function, str([a for a in args if not isinstance(a, torch.Tensor)])), (function, args))
        return function(*args, **kwargs or {})


def bodies_of(name):
    """The operators that a training step of a public one calls: each with a module and its tensors."""
    arguments, options = EXAMPLES[name](torch.float32)
    arguments = leaves(arguments)
    with Calls() as calls:
        schema = getattr(torch.ops.liger, name).default._schema
        for reduced in ({}, {"reduction": "none"}) if "reduction" in {a.name for a in schema.arguments} else ({},):
            outputs = call(name, arguments, options | reduced)
            wanted = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
            torch.autograd.grad([o.sum() for o in outputs], wanted)
    for overload, given in calls.seen.values():
        tensors = tuple(a.detach().clone() for a in given if isinstance(a, torch.Tensor))
        yield overload, Body(overload, given), tensors
