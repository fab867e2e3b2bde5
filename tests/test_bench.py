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
        for call in (host.ours(case, public, overload) | host.baselines(name, case) | host.launching(case, public)).values():
            call()
        assert case.forward is None or host.difference(case, public) is None


@pytest.mark.parametrize("name", ["rms_norm", "cross_entropy", "rope"])
def test_the_baseline_with_launches_launches_what_the_operator_does(name):
    with stubbed() as stub:
        case, (public, overload) = cases.CASES[name](), cases.operator(name)
        calls = host.ours(case, public, overload) | host.launching(case, public)
        made = []
        for what in "both", "both, empty and launches":
            stub.launches.clear()
            calls[what]()
            made.append([(launch.kernel, launch.grid) for launch in stub.launches])
        assert made[0] == made[1] != []
