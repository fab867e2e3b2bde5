"""The repository as its tests use it: where it is, its tools, what its wheels are to be, and pip outside the tests."""

import importlib
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
OLDEST = 10  # of Python 3
FLAVOURS = {  # version 1.2's name, what builds it, its architectures, the oldest driver that takes them
    "12.6": ("1.2+cu126", "nvidia-cuda-nvcc-cu12==12.6.85", "80 90", 12000),
    "12.9": ("1.2+cu129", "nvidia-cuda-nvcc-cu12==12.9.86", "80 90 100f 120f", 12090),
    "13.0": ("1.2+cu130", "nvidia-cuda-nvcc==13.0.88", "80 90 100f 110f 120f", 13000),
}


def tool(name):
    """A module of tools/, which the build runs and the wheel does not have."""
    if str(ROOT / "tools") not in sys.path:
        sys.path.append(str(ROOT / "tools"))
    return importlib.import_module(name)


def outside():
    """The environment outside the tests, in which Triton compiles."""
    return {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}


def pip(*args, python=sys.executable, **environment):
    command = [python, "-m", "pip", *args]
    return subprocess.run(command, env=outside() | environment, capture_output=True, text=True, cwd=ROOT.parent)
