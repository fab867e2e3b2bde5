"""What a fresh process pays: the import, and the first call of an operator. Run as a program, it is that process."""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
TESTS = HERE.parent / "tests"
FIRST_CALL, IMPORT = 30.0, 40.0  # ms


def measure(processes, progress):
    """{"import": (wall, CPU), "first call": {operator: (wall, CPU)}}, in ms: medians over fresh processes."""
    import cases

    progress("import in fresh processes")
    child("import")  # which leaves bytecode behind, as an installation does
    imports = [child("import") for _ in range(2 * processes + 1)]
    calls = {}
    for name in cases.CASES:
        progress(f"first call of {name} in fresh processes")
        calls[name] = [child(name) for _ in range(processes)]
    return {
        "import": median(imports),
        "first call": {name: median(times) for name, times in calls.items() if None not in times},
    }


def median(times):
    return [statistics.median(column) for column in zip(*times, strict=True)]


def child(what):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"startup.py {what}: {done.stderr}")
    return json.loads(done.stdout)


def clocks():
    return 1000 * time.perf_counter(), 1000 * time.process_time()


def since(start):
    return [now - then for now, then in zip(clocks(), start, strict=True)]


def import_time():
    import torch  # noqa: F401

    start = clocks()
    import liger_aot  # noqa: F401

    return since(start)


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
        start = clocks()
        case.ours(overload, *plain)
        return since(start)


if __name__ == "__main__":
    print(json.dumps(import_time() if sys.argv[1] == "import" else first_call(sys.argv[1])))
