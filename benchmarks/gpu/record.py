"""What a run found, in one JSON file: results, failures, what no time was left for. The file is whole after every part."""

import contextlib
import json
import math
import signal
import sys
import time
import traceback

SCHEMA = 1
LISTS = "ceilings", "speed", "tune", "host", "first_call", "stack", "longest"


class Record:
    """`seconds` is the budget of the whole run."""

    def __init__(self, path, *, dry, arguments, environment, seconds):
        self.path, self.started, self.seconds = path, time.monotonic(), seconds
        self.budget = {"seconds": seconds, "taken": 0.0, "parts": []}
        self.ends = self.started + seconds
        self.content = {"schema": SCHEMA, "dry": dry, "arguments": arguments, "environment": environment}
        self.content |= {"budget": self.budget, "correctness": {"variants": None, "numerics": [], "checks": []}}
        self.content |= {name: [] for name in LISTS} | {"failures": [], "cut": []}
        self.place, self.written = None, self.started

    def say(self, text):
        print(f"[{time.monotonic() - self.started:4.0f} s] {text}", file=sys.stderr, flush=True)

    def left(self):
        """Seconds that the part has left."""
        return self.ends - time.monotonic()

    @contextlib.contextmanager
    def part(self, name, share):
        """A part of the run, and how much of the time that is left it may take."""
        began = time.monotonic()
        allowed = max(self.started + self.seconds - began, 0.0) * share
        self.place, self.ends = name, began + allowed
        self.say(f"{name}: {allowed:.0f} s at most")
        try:
            with self.trying(name):
                yield
        finally:
            self.budget["parts"].append({"part": name, "share": round(allowed, 1), "taken": round(time.monotonic() - began, 1)})
            self.budget["taken"] = round(time.monotonic() - self.started, 1)
            self.place = None
            self.write()

    @contextlib.contextmanager
    def trying(self, case):
        """A case whose failure, of whatever kind, is noted: those after it are run all the same. Yields its outcome."""
        outcome = {"ok": True, "note": ""}
        began = time.monotonic()
        try:
            yield outcome
        except Exception as error:  # whatever a case raises is a result of the run
            outcome |= {"ok": False, "note": self.fail(case, error)}
        outcome["seconds"] = round(time.monotonic() - began, 3)

    def fail(self, case, error):
        if isinstance(error, BaseException):
            where = traceback.extract_tb(error.__traceback__)[-1:]
            at = "".join(f" ({frame.filename.rpartition('/')[2]}:{frame.lineno})" for frame in where)
            error = f"{type(error).__name__}: {str(error).strip()[:2000]}{at}"
        self.content["failures"].append({"part": self.place, "case": case, "message": error})
        self.say(f"FAILED {self.place}: {case}: {error[:300]}")
        return error

    def cut(self, case, why="no time was left"):
        self.content["cut"].append({"part": self.place, "case": case, "why": why})

    def watch(self, seconds):
        """Write what was found so far, if that was not done within a second; unless called again in time, end the process."""
        if time.monotonic() > self.written + 1:
            self.write()
        if seconds is not None:
            signal.alarm(seconds)

    def add(self, name, **row):
        self.content[name].append(row)

    def write(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(finite(self.content), indent=1, allow_nan=False) + "\n")
        unfinished.replace(self.path)
        self.written = time.monotonic()


def finite(content):
    """content with words for what JSON has no numbers for, such as the error of a result that is infinite."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content
