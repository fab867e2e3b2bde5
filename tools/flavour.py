"""The flavours of the wheel: for which CUDA it is built, hence its version's suffix, its assembler and its architectures.

    LIGER_AOT_CUDA=13.0 pip wheel .         one of FLAVOURS; unset: the flavour without a suffix
    LIGER_AOT_ARCHS=75,110f pip wheel .     these architectures instead of those that the flavour ships
scikit-build-core asks for the version and for the assembler's package (pyproject.toml), CMake for the architectures:
    python tools/flavour.py architectures "Triton 3.7.1, ptxas 12.9.86"
"""

import os
import re
import sys
from typing import NamedTuple


class Flavour(NamedTuple):
    package: str
    ptxas: str  # the package's version, which is the assembler's
    ships: str
    knows: str  # what this ptxas assembles for, as far as Triton has it

    @property
    def requirement(self):
        return f"{self.package}=={self.ptxas}"


UP_TO_HOPPER = "75 80 86 87 89 90 90a"
BLACKWELL = "100 100a 100f 103 103a 103f 120 120a 120f 121 121a 121f"
FLAVOURS = {
    "12.6": Flavour("nvidia-cuda-nvcc-cu12", "12.6.85", "80 90", UP_TO_HOPPER),
    "12.9": Flavour("nvidia-cuda-nvcc-cu12", "12.9.86", "80 90 100f 120f", f"{UP_TO_HOPPER} {BLACKWELL}"),
    "13.0": Flavour("nvidia-cuda-nvcc", "13.0.88", "80 90 100f 110f 120f", f"{UP_TO_HOPPER} {BLACKWELL} 110 110a 110f"),
}
PLAIN = "12.9"  # of the wheel without a suffix


def suffix(cuda):
    """The local part of the version: cu130 for CUDA 13.0."""
    return f"cu{cuda.replace('.', '')}"


def chosen():
    """(flavour, what its version ends with) that the environment asks for."""
    cuda = os.environ.get("LIGER_AOT_CUDA", "")
    if cuda not in ("", *FLAVOURS):
        raise SystemExit(f"LIGER_AOT_CUDA must be one of {', '.join(FLAVOURS)}, or unset for the plain wheel, got {cuda!r}")
    return FLAVOURS[cuda or PLAIN], f"+{suffix(cuda)}" if cuda else ""


def architectures(toolchain):
    """What to compile for, with that toolchain, which has to be the flavour's own."""
    flavour, _ = chosen()
    found = re.search(r"ptxas (\S+)", toolchain)[1]
    if found != flavour.ptxas:
        raise SystemExit(
            f"this flavour is assembled by ptxas {flavour.ptxas}, found is {found}; install {flavour.requirement} (and name "
            "its ptxas in LIGER_AOT_PTXAS where another is installed), or set LIGER_AOT_CUDA to another flavour"
        )
    asked = re.findall(r"[^\s,;]+", os.environ.get("LIGER_AOT_ARCHS", "")) or flavour.ships.split()
    for arch in asked:
        if arch not in flavour.knows.split():
            others = [cuda for cuda, other in FLAVOURS.items() if arch in other.knows.split()]
            remedy = f"LIGER_AOT_CUDA={others[0]} knows it (make: CUDA={others[0]})" if others else "no flavour knows it"
            raise SystemExit(f"LIGER_AOT_ARCHS: ptxas {found} knows {flavour.knows}, got {arch!r}; {remedy}")
    return list(dict.fromkeys(asked))


class Provider:
    """What scikit-build-core asks."""

    def build_state(self, state):
        self.state = state

    def dynamic_metadata(self, settings, project):
        """The version; the source distribution is the same for all flavours."""
        return {"version": settings["version"] + ("" if self.state == "sdist" else chosen()[1])}

    def get_requires_for_dynamic_metadata(self, settings):
        return [chosen()[0].requirement]


if __name__ == "__main__":
    (command, toolchain) = sys.argv[1:]
    if command != "architectures":
        raise SystemExit(f"flavour.py: the command must be architectures, got {command}")
    print(";".join(architectures(toolchain)))
