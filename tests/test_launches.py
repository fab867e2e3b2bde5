"""Every launch in ops/ is of a variant that was built, with the arguments that it declares; and nothing is built in vain."""

import pytest
import torch

from liger_aot import _op
from liger_aot import _runtime

from calls import CALLS
from calls import few
from stub import Launcher
from stub import Stub

ARCH = "90"  # all packs have the same variants, as test_build.py sees


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
        for arguments, options in CALLS[name](few):
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
