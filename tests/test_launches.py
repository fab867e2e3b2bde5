"""Every launch in ops/ is of a variant that was built, with the arguments that it declares; and nothing is built in vain."""

import itertools

import pytest
import torch

from liger_aot import _op
from liger_aot import _runtime

from harness import DTYPES
from stub import Launcher
from stub import Stub

ARCH = "90"  # all packs have the same variants, as test_build.py sees
# Rows of every block size of the norms and the loop, each with a width that is divisible by 16 and one that is not.
WIDTHS = [96, 97, 1008, 1009, 2032, 2033, 4080, 4081, 8176, 8177, 9008, 9009]


def randn(*shape, dtype, grad=True):
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def weights(n, dtype):
    """None, and one of each dtype."""
    return [None, *(randn(n, dtype=t) for t in dict.fromkeys([dtype, torch.float32]))]


def rms_norm():
    for dtype, n, casting in itertools.product(DTYPES, WIDTHS, ("none", "llama")):
        for weight in weights(n, dtype):
            yield (randn(3, n, dtype=dtype), weight, 1e-6), {"casting": casting}
    yield (randn(3, 64, dtype=torch.float32)[:, 3:40], None), {}


def fused_add_rms_norm():
    for (x, weight, *eps), options in rms_norm():
        yield (x, randn(*x.shape, dtype=x.dtype), weight, *eps), options


def layer_norm():
    for dtype, n in itertools.product(DTYPES, WIDTHS):
        for weight, bias in itertools.product(weights(n, dtype), repeat=2):
            yield (randn(3, n, dtype=dtype), weight, bias), {}


def rope():
    widths = [(64, 64), (62, 62), (128, 64), (126, 126), (128, 128), (130, 130), (256, 256), (512, 512), (514, 514)]
    for dtype, (n, rotated) in itertools.product(DTYPES, widths):
        for t in dict.fromkeys([dtype, torch.float32]):
            q, k = randn(2, 5, 9, n, dtype=dtype), randn(2, 5, 3, n, dtype=dtype)
            yield (q.transpose(1, 2), k.transpose(1, 2), *(randn(2, 5, rotated, dtype=t, grad=False) for _ in "cs")), {}


def gated(**options):
    for dtype, n, *values in itertools.product(DTYPES, (64, 63), *options.values()):
        both = randn(3, 2 * n, dtype=dtype)
        for gate, up in [(randn(3, n, dtype=dtype), randn(3, n, dtype=dtype)), both.chunk(2, dim=-1)]:
            yield (gate, up), dict(zip(options, values, strict=True))


def swiglu():
    yield from gated(gate_multiplier=(1.0, 0.5))


def geglu():
    yield from gated(approximate=("tanh", "none"))


def losses(linear):
    """Options of the three losses, for few classes and for many, divisible by 16 and not."""
    options = {"softcap": (None, 30.0), "reduction": ("mean", "none"), "weight": (False, True)}
    for dtype, n, *values in itertools.product(DTYPES, (1008, 1009, 4112, 4113), *options.values()):
        given = dict(zip(options, values, strict=True)) | {"label_smoothing": 0.1, "lse_square_scale": 1e-4}
        given["weight"] = torch.rand(n) if given["weight"] else None
        target = torch.randint(n, (6,))[n % 2 :][:5]
        if linear:
            yield (randn(5, 16, dtype=dtype), randn(n, 16, dtype=dtype), target), given
        else:
            yield (randn(5, n, dtype=dtype), target), given


def cross_entropy():
    yield from losses(linear=False)


def cross_entropy_stats():
    yield from losses(linear=False)


def linear_cross_entropy():
    yield from losses(linear=True)


def linear_cross_entropy_stats():
    yield from losses(linear=True)


def linear_logprob():
    for arguments, _ in losses(linear=True):
        yield arguments, {"temperature": 0.7}


CALLS = {f.__name__: f for f in (rms_norm, fused_add_rms_norm, layer_norm, rope, swiglu, geglu, cross_entropy)}
CALLS |= {f.__name__: f for f in (cross_entropy_stats, linear_cross_entropy, linear_cross_entropy_stats, linear_logprob)}


class Binding:
    """A launcher that holds every argument to the kernel's declaration before it launches with another."""

    def __init__(self, launcher):
        self.launcher, self.multiprocessors = launcher, launcher.multiprocessors

    def launch(self, kernel, grid, *args, **constants):
        pack = self.launcher.at(0).pack
        declared = pack.parameters(kernel)
        assert len(args) == len(declared), f"{kernel} takes {[name for name, _ in declared]}"
        for (name, type_), value in zip(declared, args, strict=True):
            allowed = torch.Tensor if type_.startswith("*") else (int, float) if type_ == "fp32" else int
            assert isinstance(value, allowed), f"{kernel}: {name} is {type_}, not {type(value)}"
        names = {tuple(v.constants) for v in pack.table(kernel).values()}
        assert names == {tuple(constants)}, f"{kernel}: constants are passed in the order in which they are declared"
        assert all(type(n) is int for n in grid)
        assert len(grid) <= 2
        self.launcher.prepare(kernel, args[0])(grid, *args, **constants)


def run(name):
    """The launches of an operator's calls, alone and with their backward."""
    stub = Stub()
    stub.thread.context = 0  # so that the thread's context is found as well
    function = getattr(torch.ops.liger, name).default
    with _runtime.kernels.launched_by(Binding(Launcher(stub))), _op.on_cpu():
        for arguments, options in CALLS[name]():
            with torch.no_grad():
                function(*arguments, **options)
            outputs = function(*arguments, **options)
            outputs = [o for o in (outputs if isinstance(outputs, tuple) else [outputs]) if o.requires_grad]
            torch.autograd.backward([o.sum() for o in outputs])
    return stub.launches


@pytest.fixture(scope="module")
def launched():
    """{operator: its launches}."""
    torch.use_deterministic_algorithms(False)  # nobody reads what is computed here
    return {name: run(name) for name in _op.PUBLIC}


@pytest.mark.parametrize("name", sorted(_op.PUBLIC))
def test_every_call_is_served(launched, name):
    assert launched[name]
    for launch in launched[name]:
        values = launch.values  # which the kernel's own parameter table cuts out of the buffer
        assumed = [p for p, type_ in launch.pack.parameters(launch.kernel) if type_.startswith("*") or type_.endswith(":16")]
        aligned = all(values[p] % 16 == 0 for p in assumed)
        assert launch.pack.arch == ARCH
        assert launch.cubin.endswith("-aligned.cubin" if aligned else "-any.cubin")


def test_nothing_is_built_in_vain(launched):
    pack = _runtime.open_pack(_runtime.pack_paths()[ARCH])
    used = {launch.cubin for launches in launched.values() for launch in launches}
    built = {v.cubin for kernel in pack.manifest["kernels"] for v in pack.table(kernel).values()}
    assert sorted(built - used) == []
