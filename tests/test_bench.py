"""What `make bench` times runs, and its baselines allocate what the operators allocate."""

import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
import cases
import host

from stub import stubbed


@pytest.mark.parametrize("name", cases.CASES)
def test_host_costs(name):
    with stubbed(record=False):
        case, (public, overload) = cases.CASES[name](), cases.operator(name)
        for call in (host.ours(case, public, overload) | host.baselines(name, case)).values():
            call()
        assert case.forward is None or host.difference(case, public) is None
