"""What a fresh process pays: the import, and the first call of an operator. Run as a program, it is that process."""

import json
import pathlib
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
TESTS = HERE.parent / "tests"
FIRST_CALL, IMPORT = 30.0, 40.0  # ms


def measure(processes, progress):
    """{"import": ms, "first call": {operator: ms}}: medians over fresh processes, wall clock."""
    import cases

    progress("import in fresh processes")
    imports = [child("import") for _ in range(2 * processes + 1)]
    calls = {}
    for name in cases.CASES:
        progress(f"first call of {name} in fresh processes")
        calls[name] = [child(name) for _ in range(processes)]
    return {
        "import": statistics.median(imports),
        "first call": {name: statistics.median(times) for name, times in calls.items() if None not in times},
    }


def child(what):
    done = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"startup.py {what}: {done.stderr}")
    return json.loads(done.stdout)


def import_time():
    import torch  # noqa: F401

    start = time.perf_counter()
    import liger_aot  # noqa: F401

    return time.perf_counter() - start


def first_call(name):
    sys.path.append(str(TESTS))
    import cases

    from stub import stubbed

    try:
        case, (_, overload) = cases.CASES[name](), cases.operator(name)
    except (ImportError, AttributeError):
        return None
    plain = [i.detach() for i in case.inputs]
    with stubbed(record=False):
        start = time.perf_counter()
        case.ours(overload, *plain)
        return time.perf_counter() - start


if __name__ == "__main__":
    seconds = import_time() if sys.argv[1] == "import" else first_call(sys.argv[1])
    print(json.dumps(seconds and 1000 * seconds))
