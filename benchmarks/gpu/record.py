"""What a run found, in one JSON file: results, failures, what no time was left for. The file is whole after every part."""

import contextlib
import json
import sys
import time
import traceback

SCHEMA = 1
LISTS = "ceilings", "speed", "host", "first_call", "stack"


class Record:
    """`seconds` is the budget of the whole run; a part that is over early leaves its time to those after it."""

    def __init__(self, path, *, dry, arguments, environment, seconds):
        self.path, self.started, self.seconds = path, time.monotonic(), seconds
        self.budget = {"seconds": seconds, "taken": None, "parts": []}
        self.ends = self.started + seconds
        self.content = {"schema": SCHEMA, "dry": dry, "arguments": arguments, "environment": environment}
        self.content |= {"budget": self.budget, "correctness": {"variants": None, "numerics": [], "checks": []}}
        self.content |= {name: [] for name in LISTS} | {"failures": [], "cut": []}
        self.place = None

    def say(self, text):
        print(f"[{time.monotonic() - self.started:4.0f} s] {text}", file=sys.stderr, flush=True)

    def left(self):
        """Seconds that the part has left."""
        return self.ends - time.monotonic()

    @contextlib.contextmanager
    def part(self, name, share):
        """A part of the run, and how many seconds it may take, as far as the whole has them."""
        began = time.monotonic()
        self.place, self.ends = name, min(began + share, self.started + self.seconds)
        self.say(f"{name}: {max(self.left(), 0):.0f} s at most")
        try:
            with self.trying(name):
                yield
        finally:
            self.budget["parts"].append({"part": name, "share": share, "taken": round(time.monotonic() - began, 2)})
            self.budget["taken"] = round(time.monotonic() - self.started, 2)
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

    def add(self, name, **row):
        self.content[name].append(row)

    def write(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.content, indent=1, allow_nan=False) + "\n")
        unfinished.replace(self.path)
