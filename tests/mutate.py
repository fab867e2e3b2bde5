"""Break the kernels, the operators and the launcher, one fault at a time, and see whether the tests notice.

    python tests/mutate.py              every fault; exit 1 if fewer than 95 % are noticed
    python tests/mutate.py rms_norm     the faults whose file or text holds a word
    python tests/mutate.py --smoke      the faults marked so
The faults are in faults.txt, which says how to write one. Each is tried in a process of its own, forked from this one after
the slow imports, on a copy of the package that imports from elsewhere than the package itself.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import itertools
import os
import pathlib
import shlex
import shutil
import signal
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
FAULTS = HERE / "faults.txt"
ENOUGH = 0.95
PASSED, FAILED = 0, 1  # pytest's exit codes; every other one says that the tests did not run
LIMIT = 120  # seconds, after which a fault counts as noticed: it made something endless
IMPORTS = ("pytest", "numpy", "triton", "torch", "torch._dynamo", "torch.export", "transformers.models.llama.modeling_llama")


@dataclasses.dataclass
class Fault:
    file: str  # inside the package
    tests: list  # arguments for pytest
    smoke: bool
    old: str
    new: str

    def __str__(self):
        pairs = itertools.zip_longest(self.old.splitlines(), self.new.splitlines(), fillvalue="")
        old, new = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
        return f"{self.file}: {old.strip()}  ->  {new.strip()}"

    def apply(self, text):
        if self.old and (count := text.count(self.old)) != 1:
            raise SystemExit(f"a fault must be once in its file, is there {count} times: {self}")
        return text.replace(self.old, self.new, 1)


def read_faults(path=FAULTS):
    """Headings `file | tests [| smoke]`; under each, faults: `- ` lines as they are, then `+ ` lines as they are broken."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    faults, heading, old = [], None, None
    for sign, block in itertools.groupby(lines, lambda line: line[0] if line[0] in "-+" else ""):
        block = list(block)
        text = "\n".join(line[2:] for line in block)
        if sign == "-":
            old = text
        elif sign == "+":
            faults.append(Fault(*heading, old, text))
        else:
            file, tests, *mark = map(str.strip, block[-1].split("|"))
            heading = file, shlex.split(tests), mark == ["smoke"]
    return faults


def package():
    """The folder of the package, which must not be imported in this process."""
    return pathlib.Path(importlib.util.find_spec("liger_aot").submodule_search_locations[0])


def copy_package(source, folder):
    """A copy of the package in a folder; the packs are shared with the original."""
    copy = pathlib.Path(folder, "liger_aot")
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("cubins", "__pycache__"))
    (copy / "cubins").symlink_to((source / "cubins").resolve())
    return copy


class Watch:
    """A pytest plugin that writes down which test is running."""

    def __init__(self, file):
        self.file = file

    def pytest_runtest_logstart(self, nodeid):
        self.file.write_text(nodeid)


def run_tests(source, fault, folder, log):
    """pytest against the broken package, in a forked process, which ends here."""
    broken = copy_package(source, folder) / fault.file
    broken.write_text(fault.apply(broken.read_text()))
    os.environ["PYTHONPATH"], sys.dont_write_bytecode = str(folder), True  # the former for the processes that tests start
    sys.path.insert(0, str(folder))
    os.chdir(HERE.parent)
    for stream in 1, 2:
        os.dup2(log.fileno(), stream)
    signal.alarm(LIMIT + len(fault.tests))
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=line"]
    tests = [f"{HERE.name}/{word}" if word.startswith("test_") else word for word in fault.tests]
    return sys.modules["pytest"].main([*options, *tests], [Watch(folder / "test")])


def attempts(source, faults, jobs):
    """(fault, exit code, the test that ran last, seconds, what pytest wrote) of each, as they end, some at a time."""
    running = {}
    with tempfile.TemporaryDirectory() as root:
        for n, fault in enumerate(faults):
            if len(running) == jobs:
                yield finished(running)
            folder = pathlib.Path(root, str(n))
            folder.mkdir()
            with (folder / "log").open("w+") as log:
                if pid := os.fork():
                    running[pid] = fault, folder, time.monotonic()
                    continue
                code = 99
                try:
                    code = run_tests(source, fault, folder, log)
                except BaseException as error:  # the process must end here, whatever happened
                    print(f"{type(error).__name__}: {error}", file=log, flush=True)
                finally:
                    sys.stdout.flush()
                    os._exit(code)
        while running:
            yield finished(running)


def finished(running):
    pid, status = os.wait()
    fault, folder, started = running.pop(pid)
    code, test, log = os.waitstatus_to_exitcode(status), folder / "test", (folder / "log").read_text()
    last = test.read_text() if test.exists() else ""
    shutil.rmtree(folder)
    # A crash is hard to overlook.
    return fault, FAILED if code < 0 and last else code, last, time.monotonic() - started, log


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--faults", type=pathlib.Path, default=FAULTS)
    given = parser.parse_args()
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in IMPORTS:
        importlib.import_module(name)
    faults = [f for f in read_faults(given.faults) if all(w in str(f) for w in given.words) and f.smoke >= given.smoke]
    if not faults:
        raise SystemExit(f"no fault has {' and '.join(given.words)} in its file or text")
    with tempfile.TemporaryDirectory() as folder:  # a copy, so that the package may change meanwhile
        return judge(copy_package(package(), folder), faults, given.jobs)


def judge(source, faults, jobs):
    """Try the faults, say what came of it; true if too few were noticed."""
    started = time.monotonic()
    unnoticed, noticing = [], set()
    for n, (fault, code, test, seconds, log) in enumerate(attempts(source, faults, jobs), 1):
        verdict = {FAILED: "noticed", PASSED: "NOT NOTICED"}.get(code, f"NOT TRIED, exit code {code}")
        print(f"{n:3}/{len(faults)} {verdict} in {seconds:.0f} s  {fault}", flush=True)
        if code == FAILED:
            noticing.add(test)
        else:
            unnoticed.append(fault)
            print(log[-2000:] if code != PASSED else "", end="")
    # What failed must pass on the package as it is, else its failure said nothing.
    whole = Fault("__init__.py", sorted(noticing), False, "", "")
    for _, code, test, _, log in attempts(source, [whole] if noticing else [], 1):
        if code != PASSED:
            raise SystemExit(f"{test} fails without a fault\n{log[-2000:]}")
    share = 1 - len(unnoticed) / len(faults)
    print(
        f"\n{len(faults) - len(unnoticed)} of {len(faults)} faults noticed ({share:.0%}) in {time.monotonic() - started:.0f} s"
    )
    for fault in unnoticed:
        print(f"not noticed: {fault}")
    return share < ENOUGH


if __name__ == "__main__":
    sys.exit(main())
