"""The build gate: a cubin that is not what the launcher expects, or that is needlessly slow, fails the build."""

import functools
import io
import pathlib
import re
import struct
import subprocess
import tempfile

from elftools.elf.elffile import ELFFile

SIZES = {"i32": 4, "i64": 8, "fp32": 4}
EIATTR_KPARAM_INFO = 0x17
LONG_FORM = 4  # an attribute whose value has a length of its own; every other form holds two bytes


def expected_parameters(types):
    """[(offset, size)] of what the launcher packs: each value at its own alignment, then two scratch pointers."""
    table, offset = [], 0
    for type_ in [*types, "*", "*"]:
        size = 8 if type_.startswith("*") else SIZES[type_.removesuffix(":16")]
        offset = -(-offset // size) * size
        table.append((offset, size))
        offset += size
    return table


def parameter_table(cubin, symbol):
    """[(offset, size)] of a kernel's parameters, as the cubin's own .nv.info says."""
    info = ELFFile(io.BytesIO(cubin)).get_section_by_name(f".nv.info.{symbol}").data()
    found, at = {}, 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        if attribute == EIATTR_KPARAM_INFO:
            _, ordinal, offset, flags = struct.unpack_from("<IHHI", info, at + 4)
            found[ordinal] = offset, flags >> 18
        at += 4 + (size if form == LONG_FORM else 0)
    return [found[ordinal] for ordinal in sorted(found)]


@functools.cache
def _nvdisasm():
    import triton

    return pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"


def global_widths(cubin):
    """({bits: count} of global loads, the same of global stores) in the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([_nvdisasm(), file.name], check=True, capture_output=True, text=True).stdout
    widths = {"LDG": {}, "STG": {}}
    for kind, modifiers in re.findall(r"\b(LDG|STG)\.E((?:\.\w+)*)", text):
        bits = next((int(b) for b in re.findall(r"\b(?:U|S)?(8|16|64|128|256)\b", modifiers.replace(".", " "))), 32)
        widths[kind][bits] = widths[kind].get(bits, 0) + 1
    return widths["LDG"], widths["STG"]


def check(name, cubin, metadata, report, kernel, types, constants, aligned):
    """Raise SystemExit with the variant's name unless it passes; the number of registers a thread uses."""

    def require(holds, what):
        if not holds:
            raise SystemExit(f"build gate: {name}: {what}")

    got, expected = parameter_table(cubin, kernel.__name__), expected_parameters(types.values())
    require(got == expected, f"its parameters (offset, size) are {got}, the launcher packs {expected}")
    require(metadata.name == kernel.__name__, f"its symbol is {metadata.name}")
    for scratch in ("global_scratch_size", "profile_scratch_size"):
        require(getattr(metadata, scratch) == 0, f"{scratch} is {getattr(metadata, scratch)}, must be 0")
    require(metadata.num_ctas == 1 and not metadata.tensordesc_meta, "clusters and tensor descriptors are not launched")
    if aligned:
        stack = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)]
        local = [int(n) for n in re.findall(r"(\d+) bytes lmem", report)]
        require(len(stack) == 3 and not any(stack + local), f"it spills or uses local memory:\n{report}")
        loads, stores = global_widths(cubin)
        for what, widths in (("loads", loads), ("stores", stores)):
            require(what in kernel.scalar or 128 in widths, f"no 128-bit global {what}, only {widths}")
    return int(re.search(r"Used (\d+) registers", report)[1])
