"""Everything that needs a GPU: what is right, how fast, into one JSON file. README.md beside this says what is in it.

python benchmarks/gpu/run.py [--only correctness|speed] [--out out/gpu.json] [--seconds 520] [--match TEXT] [--dry-run]
"""

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this folder's modules are the package gpu: some have names that are taken one folder up
    sys.path[0] = str(BENCHMARKS)
    sys.path.append(str(BENCHMARKS.parent / "tests"))

LOST = 3  # a child's exit status where the device no longer answers
# part -> (the half that it is of, its share of the time); each runs in processes of its own, the fresh parts one for each job.
PARTS = {
    "numerics": ("correctness", 90),
    "behaviour": ("correctness", 60),
    "programs": ("correctness", 90),
    "speed": ("speed", 270),
    "stack": ("speed", 200),
    "first call": ("speed", 50),
}
LANES = {"numerics": 6, "programs": 6}  # processes at once, of parts that measure no time, at most one to two processors
FRESH = {"stack": slice(1, 2), "first call": slice(1)}  # and which a dry run tries
HOST, TUNE = "host time", "tune"
CANDIDATES = "LIGER_AOT_CANDIDATES"  # the folder of the kernels that benchmarks/candidates.py compiled
SECONDS, ENDLESS = 520.0, 86400.0  # with what comes before and after, less than ten minutes
GROUPS, EXAMPLES, WIDTH = 10, 2, 240  # of the failures that are printed: with the table they fit where 12,000 characters do
FASTER = 10  # lines of what is faster than what is shipped
GRACE = 20  # seconds that a child may take longer than its part, before it is ended
STUCK = 45  # seconds after which a call of numerics, which takes less than one, does not end


def main(arguments=None):
    from gpu.record import Record

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["correctness", "speed"])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/gpu.json"))
    parser.add_argument("--seconds", type=float, help=f"that the whole may take: {SECONDS:.0f}, or without end in a dry run")
    parser.add_argument("--match", type=expression, default="", help="only jobs whose name holds what this matches")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, over the stub driver; nothing is measured")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        return child(json.loads(given.child), given.out)
    seconds = given.seconds if given.seconds is not None else ENDLESS if given.dry_run else SECONDS
    record = Record(given.out, dry=given.dry_run, arguments=arguments or sys.argv[1:], environment=None, seconds=seconds)
    if not given.dry_run:
        expect_device()
    record.content["environment"] = environment()  # like the device, it takes seconds of the time there is
    parts = asked(record, [name for name, (half, _) in PARTS.items() if given.only in (None, half)], given.match)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        for place, (name, jobs) in enumerate(parts.items()):
            shares = [PARTS[part][1] for part in parts][place:]
            with record.part(name, shares[0] / sum(shares)):  # what one part leaves, those after it have
                if given.dry_run:
                    jobs, left_out = tried_dry(name, jobs)
                    for job in left_out:
                        record.cut(words(job), "a dry run tries fewer of its kind")
                elif name == "first call":
                    jobs = jobs * 3  # the second of each when all have had their first
                run_part(record, name, jobs, given.dry_run, pathlib.Path(caches))
    record.content["first_call"] = together(record.content["first_call"])
    count_variants(record, complete=not given.match.pattern)
    record.budget["taken"] = round(time.monotonic() - record.started, 1)
    record.write()
    return summary(record)


def expression(text):
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, such as '^few', got {text!r}: {error}") from None


def expect_device():
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu: no CUDA device is there; --dry-run goes through the same program without one")


def environment():
    import run  # the CPU benchmarks', one folder up

    found = run.environment() | {name: version(name) for name in ("transformers", "quack-kernels")}
    if found["commit"] is None:  # the tree came without its history; the wheels say what they are of
        carried, dirty, _ = os.environ.get("LIGER_AOT_COMMIT", "").partition("-dirty")
        found |= {"commit": carried or None, "changed since": bool(dirty) if carried else None}
    return found


def version(package):
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def asked(record, parts, match):
    """The jobs whose name matches, of each part that has some."""
    found = {}
    for record.place in parts:
        with record.trying("its jobs"):
            found[record.place] = [job for job in listed(record.place) if match.search(words(job))]
    if not any(found.values()) and not record.content["failures"]:
        raise SystemExit(
            f"benchmarks/gpu: --match {match.pattern!r} matches no job's name; they are such as 'few rms_norm', 'preload: all'"
        )
    return {part: jobs for part, jobs in found.items() if jobs}


def listed(part):
    """The jobs of a part, in the order of their importance."""
    if part == "numerics":
        from gpu import numerics

        return list(map(list, numerics.JOBS))
    if part in ("behaviour", "programs"):
        from gpu import behaviour

        return [behaviour.named(*c) for c in (behaviour.CHECKS if part == "behaviour" else behaviour.PROGRAMS)]
    from gpu import cases

    if part == "speed":
        from gpu import tune

        names = [operator for operator, _ in cases.FIRST if operator != "linear_logprob"]
        first, others = cases.plan()[: len(cases.FIRST)], cases.plan()[len(cases.FIRST) :]
        return [*map(list, first), *([TUNE, job] for job in tune.JOBS), *([HOST, name] for name in names), *map(list, others)]
    if part == "stack":
        from gpu import stack

        return [list(job) for job in stack.JOBS]
    from gpu import fresh

    return [[provider, name] for name in fresh.OPERATORS for provider in (cases.OURS, cases.LIGER)]


def tried_dry(part, jobs):
    """What a dry run tries, and what it does without: processes like those before them, other subjects of costly checks."""
    if part in FRESH:
        tried = jobs[FRESH[part]]
    elif part == "numerics":
        tried = [job for job in jobs if job[0] == "few"]
    elif part in ("behaviour", "programs"):
        from gpu import behaviour

        costly = [[n for n in jobs if n.startswith(f"{check.__name__}: ")] for check in behaviour.COSTLY]
        tried = [job for job in jobs if not any(job in names[1:] for names in costly)]
    else:
        tried = jobs
    return tried, [job for job in jobs if job not in tried]


def run_part(record, part, jobs, dry, caches):
    """Run the jobs, side by side where that spoils no time."""
    lanes, lock = max(1, min(LANES.get(part, 1), (os.cpu_count() or 1) // 2)), threading.Lock()
    with ThreadPoolExecutor(lanes) as pool:
        for done in [pool.submit(run_lane, record, part, jobs[n::lanes], dry, caches, n, lock) for n in range(lanes)]:
            done.result()


def run_lane(record, part, jobs, dry, caches, lane, lock):
    """Run the jobs in children; what one of them kills, it kills alone, and those after it are run by the next."""
    while jobs:
        some = jobs[:1] if part in FRESH else jobs
        if record.left() <= 0:
            for job in jobs:
                record.cut(words(job))
            return
        content, status, errors = run_child(record, part, some, dry, caches, lane)
        finished = content["finished"]
        with lock:
            merge(record, content)
            record.write()
        jobs = jobs[len(finished) :]
        if status != LOST and len(finished) < len(some):
            if status is None:
                record.cut(words(some[len(finished)]), "its time was over")
            else:
                stuck = " (a call did not end)" if status == -signal.SIGALRM else ""
                record.fail(words(some[len(finished)]), f"its process ended with status {status}{stuck}: {errors[-1500:]}")
            jobs = jobs[1:]


def run_child(record, part, jobs, dry, caches, lane):
    """(what the child wrote, its exit status or None if it was too late, what it said).

    It writes beside the whole, where it is kept should the whole be killed.
    """
    out = record.path.with_name(f"{record.path.stem}-{part.replace(' ', '-')}-{lane}.json")
    out.unlink(missing_ok=True)
    task = {"part": part, "jobs": jobs, "dry": dry, "seconds": record.left(), "started": time.time()}
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--child", json.dumps(task), "--out", str(out)]
    running = subprocess.Popen(
        command,
        env=child_environment(part, jobs, caches),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = running.communicate(timeout=max(record.left(), 1) + GRACE)
        status = running.returncode
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)  # with its own children, which would run beside what is measured next
        status, errors = None, running.communicate()[1]
    content = json.loads(out.read_text()) if out.exists() else {"finished": []}
    out.unlink(missing_ok=True)
    for line in errors.splitlines():
        if line.startswith("["):
            print("  " + line, file=sys.stderr, flush=True)
    return content, status, errors


def child_environment(part, jobs, caches):
    """Every fresh process compiles anew what is compiled at run time, unless its job wants the caches of one before it."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found |= {"PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TRANSFORMERS_VERBOSITY": "error"}
    folder = caches / "-".join(str(w) for w in [part, *(jobs[0][:2] if part in FRESH else [])])
    if part in FRESH and jobs[0][-1] not in ("warm", "longest"):
        while folder.exists():
            folder = folder.with_name(folder.name + "-again")
    return found | {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}


def merge(record, content):
    """What a child found, into the whole."""
    from gpu.record import LISTS

    if content.get("gpu"):
        record.content["environment"]["gpu"] = content["gpu"]
    for name in (*LISTS, "failures"):
        record.content[name] += content.get(name, [])
    # what a part always does without, each of its processes says
    record.content["cut"] += [row for row in content.get("cut", []) if row not in record.content["cut"]]
    for name in ("numerics", "checks"):
        record.content["correctness"][name] += content.get("correctness", {}).get(name, [])
    variants = content.get("variants")
    if variants:
        before = record.content["correctness"]["variants"]
        if before:
            for cubin, number in before["launches"].items():
                variants["launches"][cubin] = variants["launches"].get(cubin, 0) + number
        record.content["correctness"]["variants"] = variants


def together(rows):
    """First calls, the processes of one operator and provider in one row."""
    from gpu.timing import spread

    found = {}
    for row in rows:
        found.setdefault((row["operator"], row["provider"]), []).append(row)
    gathered = []
    for (operator, provider), some in found.items():
        times = spread([row["ms"] for row in some])
        imports = spread([row["import_ms"] for row in some])["median"]
        gathered.append({"operator": operator, "provider": provider, "ms": times.pop("median"), **times, "import_ms": imports})
    return gathered


def count_variants(record, complete):
    """Which built variants no call reached: a failure, where every call was made."""
    variants = record.content["correctness"]["variants"]
    if not variants:
        return
    launched = variants["launches"]
    variants["not_reached"] = [cubin for cubin in variants.pop("names") if cubin not in launched]
    variants["reached"] = variants["built"] - len(variants["not_reached"])
    complete = complete and not any(cut["case"].startswith("few ") for cut in record.content["cut"])
    if complete and variants["not_reached"]:
        record.place = "numerics"
        record.fail("variants", f"{len(variants['not_reached'])} of {variants['built']} built variants were not reached")


def summary(record):
    """Say how it went; the exit status."""
    from gpu import table

    content = record.content
    variants = content["correctness"]["variants"]
    for line in in_words(content["failures"]):
        print(line)
    for part, number in Counter(cut["part"] for cut in content["cut"]).items():
        print(f"cut of {part}: {number}")
    if content["speed"] and not content["dry"]:
        print(table.part(record.path.name, content | {"speed": table.first(content["speed"])}))
    if content["tune"] and not content["dry"]:
        faster = table.faster(content["tune"])
        print(
            "\n".join(
                ["Faster than what is shipped:", *faster[:FASTER], f"{len(faster[FASTER:])} more" if faster else "nothing"]
            )
        )
    if variants:
        print(f"variants reached: {variants['reached']} of {variants['built']}, sm_{variants['arch']}")
    what = "a dry run: no figure is from a GPU" if content["dry"] else f"{len(content['speed'])} times"
    print(
        f"{record.path}: {what}; {len(content['failures'])} failures, {len(content['cut'])} cut; "
        f"{content['budget']['taken']:.0f} of {content['budget']['seconds']:.0f} s"
    )
    return 1 if content["failures"] else 0


def in_words(failures):
    """A few lines for each operator or check that failed, so that one of which all fails leaves room for the others."""
    groups = {}
    for failure in failures:
        groups.setdefault((failure["part"], failure["case"].partition(":")[0]), []).append(failure)
    for (part, what), some in [*groups.items()][:GROUPS]:
        for failure in some[:EXAMPLES]:
            yield " ".join(f"FAILED {part}: {failure['case']}: {failure['message']}".split())[:WIDTH]
        if len(some) > EXAMPLES:
            yield f"FAILED {part}: {what}: {len(some) - EXAMPLES} more"
    if others := [f"{part}: {what} ({len(some)})" for (part, what), some in [*groups.items()][GROUPS:]]:
        yield f"FAILED as well: {', '.join(others)}"


def words(job):
    return job if isinstance(job, str) else " ".join(str(part) for part in job)


def child(task, out):
    """One process of one part: its jobs in order, the file whole after each."""
    from gpu.record import Record

    part, jobs, dry = task["part"], task["jobs"], task["dry"]
    record = Record(out, dry=dry, arguments=[], environment=None, seconds=task["seconds"])
    record.place = part
    record.content["finished"] = finished = []
    if part in FRESH:
        record.say(f"{part}: {words(jobs[0])}")
        with record.trying(words(jobs[0])):
            {"stack": stack, "first call": first_call}[part](record, jobs[0], task)
        finished.append(jobs[0])
        record.write()
        return 0
    from gpu.machine import Dry
    from gpu.machine import Gpu

    machine = Dry() if dry else Gpu()
    record.content["gpu"] = machine.found()
    work = {"numerics": numerics, "behaviour": behaviour, "programs": behaviour, "speed": speed}[part](machine, record)
    for job in jobs:
        if record.left() <= 0:
            record.cut(words(job))
        else:
            record.say(f"{part}: {words(job)}")
            with record.trying(words(job)):
                work(job)
        finished.append(job)
        record.write()
        if not machine.alive():
            record.say("the device no longer answers; the rest is for another process")
            return LOST
        machine.free()
    return 0


def numerics(machine, record):
    import torch

    from gpu import machine as machines
    from gpu import numerics

    torch.manual_seed(0)
    record.content["variants"] = variants = numerics.built(machine)

    def work(job):
        launcher = machine.launcher()
        try:
            numerics.numerics(machine, *job, record, launcher, STUCK)
        finally:
            signal.alarm(0)
            for cubin, number in machines.reached(launcher).items():
                variants["launches"][cubin] = variants["launches"].get(cubin, 0) + number

    return work


def behaviour(machine, record):
    import torch

    from gpu import behaviour

    torch.manual_seed(0)
    checks = {behaviour.named(*c): c for c in (*behaviour.CHECKS, *behaviour.PROGRAMS)}

    def work(name):
        check, subject = checks[name]
        with record.trying(name) as outcome:
            outcome["note"] = check(machine, subject) or ""
        if machine.dry:
            outcome["seconds"] = None
        record.content["correctness"]["checks"].append({"check": check.__name__, "subject": subject, **outcome})

    return work


def speed(machine, record):
    from gpu import timing
    from gpu import tune

    with machine.serving():
        reached = timing.ceilings(machine, record)
    functional = timing.available(machine)
    for what, why in timing.left_out(functional):
        record.cut(what, why)

    def work(job):
        what, of = job
        if what == HOST:
            timing.host_time(machine, record, of, functional)
        elif what == TUNE:
            tune.tune(machine, record, of, os.environ.get(CANDIDATES))
        else:
            timing.speed(machine, record, what, of, functional, reached)

    return work


def stack(record, job, task):
    from gpu import stack
    from gpu import timing

    provider, compiled, what = job
    row = {}

    def note(found):
        row.update(found)
        record.content["longest" if what == stack.SEARCH else "stack"] = [row]
        record.write()

    started = None if task["dry"] else task["started"]
    try:
        if what == stack.SEARCH:
            stack.search(provider, task["dry"], record.ends, note)
        else:
            stack.train(provider, compiled, started, timing.spread, lambda found: note(found | {"cache": what}))
    except Exception as error:  # whatever other people's code raises; of ours it is a failure
        if provider == stack.OURS:
            raise
        record.cut(stack.text(*job), f"{type(error).__name__}: {error}"[:500])


def first_call(record, job, task):
    from gpu import cases
    from gpu import fresh

    provider, operator = job
    try:
        found = fresh.measure(provider, operator, task["dry"])
    except Exception as error:  # whatever other people's code raises; of ours it is a failure
        if provider == cases.OURS:
            raise
        record.cut(f"first call: {words(job)}", f"{type(error).__name__}: {error}"[:500])
        return
    record.add("first_call", operator=operator, provider=provider, **found)


if __name__ == "__main__":
    sys.exit(main())
