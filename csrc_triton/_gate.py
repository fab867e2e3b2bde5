"""The build gate: a cubin that is not what the launcher expects, or that is needlessly slow, fails the build."""

import functools
import io
import itertools
import pathlib
import re
import struct
import subprocess
import tempfile

from elftools.elf.elffile import ELFFile

SIZES = {"i32": 4, "i64": 8, "fp32": 4}
EIATTR_KPARAM_INFO = 0x17
LONG_FORM = 4  # an attribute whose value has a length of its own; every other form holds two bytes
INSTRUCTION = 16  # bytes, from Volta on
WIDE = 128  # bits: what a thread moves best at once


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


def listings(cubins, arch):
    """[lines of machine code] for each (symbol, cubin): all in one run of nvdisasm, which takes 0.3 s to start."""
    codes = [ELFFile(io.BytesIO(cubin)).get_section_by_name(f".text.{symbol}").data() for symbol, cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = [_nvdisasm(), "--no-dataflow", "--binary", f"SM{arch}", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines, counts = re.findall(r"/\*[0-9a-f]+\*/.*;", text), [len(code) // INSTRUCTION for code in codes]
    if len(lines) != sum(counts):
        raise RuntimeError(f"nvdisasm: {len(lines)} instructions read of {sum(counts)}")
    rest = iter(lines)
    return [list(itertools.islice(rest, count)) for count in counts]


def global_widths(lines):
    """({bits: count} of global loads, the same of global stores) in machine code."""
    widths = {"LDG": {}, "STG": {}}
    for kind, modifiers in re.findall(r"\b(LDG|STG)\.E((?:\.\w+)*)", "\n".join(lines)):
        bits = next((int(b) for b in re.findall(r"\b(?:U|S)?(8|16|64|128|256)\b", modifiers.replace(".", " "))), 32)
        widths[kind][bits] = widths[kind].get(bits, 0) + 1
    return widths["LDG"], widths["STG"]


def require(holds, name, what):
    if not holds:
        raise SystemExit(f"build gate: {name}: {what}")


def check_widths(cubins, arch):
    """Raise SystemExit with the name of the first of [(name, kernel, cubin)], aligned variants, whose accesses are narrow."""
    codes = listings([(kernel.__name__, cubin) for _, kernel, cubin in cubins], arch)
    for (name, kernel, _), lines in zip(cubins, codes, strict=True):
        for what, widths in zip(("loads", "stores"), global_widths(lines), strict=True):
            narrow, wide = (sum(b * n for b, n in widths.items() if (b >= WIDE) is w) for w in (False, True))
            enough = wide > 0 and (what in kernel.mixed or wide >= narrow)
            require(
                what in kernel.scalar or enough,
                name,
                f"too few 128-bit global {what}, the instructions of each width are {widths}",
            )


def check(name, cubin, metadata, report, kernel, types, aligned):
    """Raise SystemExit with the variant's name unless it passes; the number of registers a thread uses."""
    got, expected = parameter_table(cubin, kernel.__name__), expected_parameters(types.values())
    require(got == expected, name, f"its parameters (offset, size) are {got}, the launcher packs {expected}")
    require(metadata.name == kernel.__name__, name, f"its symbol is {metadata.name}")
    for scratch in ("global_scratch_size", "profile_scratch_size"):
        require(getattr(metadata, scratch) == 0, name, f"{scratch} is {getattr(metadata, scratch)}, must be 0")
    single = metadata.num_ctas == 1 and not metadata.tensordesc_meta
    require(single, name, "clusters and tensor descriptors are not launched")
    if aligned:
        stack = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)]
        local = [int(n) for n in re.findall(r"(\d+) bytes lmem", report)]
        require(len(stack) == 3 and not any(stack + local), name, f"it spills or uses local memory:\n{report}")
    return int(re.search(r"Used (\d+) registers", report)[1])
