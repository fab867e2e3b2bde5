"""The workflows of CI: they call the Makefile, build every flavour and hold together."""

import pathlib
import re
import shlex
import subprocess

import yaml
from test_runtime import in_a_process

from repository import OLDEST
from repository import ROOT
from repository import tool

flavour = tool("flavour")
WORKFLOWS = {p.name: yaml.safe_load(p.read_text()) for p in sorted((ROOT / ".github/workflows").glob("*.yml"))}
STEPS = [
    (f"{name}: {job}: {step.get('name') or step.get('run') or step.get('uses')}", step)
    for name, workflow in WORKFLOWS.items()
    for job, about in workflow["jobs"].items()
    for step in about.get("steps", [])
]


def test_workflows_call_the_makefile():
    """No step repeats what a target does, and every target that is called is one; all that a release needs is called."""
    made = {name: re.findall(r"^make (\w+)", step.get("run", ""), re.M) for name, step in STEPS}
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split())
    called = {target for found in made.values() for target in found}
    assert called <= targets
    assert called >= {"lint", "test", "floor", "docs", "wheel", "sdist", "smoke", "slow", "index"}
    for name, step in STEPS:
        assert not re.search(r"\b(pip|pytest|ruff|sphinx-build|cmake|tools/)", step.get("run", "")), name
    for target in called:
        done = subprocess.run(["make", "--dry-run", target, "CUDA=13.0"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_what_smoke_runs_after_verify_and_info():
    command = ["make", "--no-print-directory", "--dry-run", "smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    code = shlex.split(done.stdout.splitlines()[-1])[-1]
    assert in_a_process(code).returncode == 0
    assert in_a_process(f"import triton; {code}").stderr.endswith("AssertionError\n")


def test_workflows_build_every_flavour():
    jobs = WORKFLOWS["wheels.yml"]["jobs"]
    assert [job["strategy"]["matrix"]["cuda"] for job in (jobs["wheel"], jobs["smoke"])] == [["", *flavour.FLAVOURS]] * 2
    (oldest,) = re.findall(r'^requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert jobs["smoke"]["strategy"]["matrix"]["python"][0] == oldest == f"3.{OLDEST}"
    tested = WORKFLOWS["ci.yml"]["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert tested[0] == "3.11", "the oldest that the packages pinned for the tests take"


def test_workflows_hold_together():
    """What a job needs and what it downloads is there; nothing but publishing may write."""
    for name, workflow in WORKFLOWS.items():
        assert workflow["permissions"] == {"contents": "read"}, name
        for about in workflow["jobs"].values():
            needs = about.get("needs", [])
            assert set([needs] if isinstance(needs, str) else needs) <= workflow["jobs"].keys()
            assert "permissions" not in about or name == "publish.yml"
            if "uses" in about:
                assert (ROOT / about["uses"]).is_file()
                called = WORKFLOWS[pathlib.PurePath(about["uses"]).name]
                assert "workflow_call" in called[True]
    publish = WORKFLOWS["publish.yml"]
    assert publish[True] == {"push": {"tags": ["v*"]}}, "YAML reads `on` as true"
    assert publish["jobs"]["ci"]["uses"].endswith("/ci.yml")
    assert publish["jobs"]["pypi"]["needs"] == ["ci", "wheels"], "nothing is published that lint and tests refuse"
    assert (publish["jobs"]["release"]["needs"], publish["jobs"]["pages"]["needs"]) == ("pypi", "release")
    assert publish["jobs"]["pypi"]["permissions"] == {"id-token": "write"}, "trusted publishing, without a token"
    uploaded = {step["with"]["name"] for _, step in STEPS if "upload-artifact@" in step.get("uses", "")}
    assert uploaded == {"docs", "wheel-${{ matrix.cuda || 'plain' }}", "sdist"}
