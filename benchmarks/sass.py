"""The machine code of a pack: its instructions by class, the widths of its loads and stores, its loops."""

import collections
import dataclasses
import io
import pathlib
import re
import subprocess
import sys
import tempfile

from elftools.elf.elffile import ELFFile

sys.path.append(str(pathlib.Path(__file__).parent.parent / "tests"))
from stub import machinery

gate = machinery("_gate")
SIZE = 16  # bytes of an instruction, from Volta on
CLASSES = {
    "global memory": "LDG STG ATOM ATOMG RED LDGSTS LDGDEPBAR CCTL",
    "shared memory": "LDS STS LDSM STSM ATOMS",
    "local memory": "LDL STL",
    "constants": "LDC LDCU ULDC",
    "float": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 HADD2 HMUL2 HFMA2 FHADD FHFMA UFADD UFMUL UFFMA",
    "float, compare": "FSETP FSEL FMNMX FMNMX3 FCHK HMNMX2 HSETP2 UFSETP UFSEL UFMNMX",
    "MUFU": "MUFU",
    "MMA": "HMMA IMMA QMMA OMMA HGMMA QGMMA IGMMA WARPGROUP UTCHMMA UTCQMMA UTCIMMA",
    "convert": "F2FP F2F F2I I2F I2FP UF2FP UF2I UI2F UI2FP",
    "integer": "IADD IADD3 IMAD LEA LOP3 SHF ISETP SEL PRMT IABS IMNMX SGXT VIADD VIMNMX VIMNMX3 VIADDMNMX BMSK POPC FLO LOP "
    "PLOP3 UIADD3 UIMAD ULEA ULOP3 USHF UISETP USEL UPRMT USGXT UPLOP3 UVIMNMX UFLO UIADD UIABS UVIADD UBMSK UPOPC",
    "move": "MOV UMOV CS2R S2R S2UR R2UR P2R R2P CS2UR UP2UR R2B B2R UR2UP",
    "between threads": "SHFL REDUX CREDUX VOTE VOTEU MATCH",
    "control": "BRA EXIT CALL RET BSSY BSYNC WARPSYNC BREAK BRX JMP NOP YIELD NANOSLEEP BMOV ELECT",
    "barrier": "BAR DEPBAR MEMBAR ERRBAR SYNCS UCGABAR_ARV UCGABAR_WAIT ACQBULK FENCE",
}
CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes.split()}
# Comparisons and logic, which have 64 lanes of a multiprocessor where multiply-adds have 128 (CUDA C++ Programming Guide,
# "Throughput of Native Arithmetic Instructions"). IMAD and moves are multiply-adds to the hardware.
HALF_RATE = {
    *("FSETP", "FSEL", "FMNMX", "FMNMX3", "FCHK", "ISETP", "LOP3", "SHF", "SEL", "PRMT", "IADD3", "IADD", "LEA"),
    *("IMNMX", "VIMNMX", "VIMNMX3", "VIADD", "PLOP3", "P2R"),
}
LINE = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)((?:\.\w+)*)\s*([^;]*);")


@dataclasses.dataclass
class Instruction:
    address: int
    opcode: str
    modifiers: str
    operands: str


@dataclasses.dataclass
class Code:
    """Of one variant. A loop is (from, to), indices of its first and last instruction, in the order of their ends."""

    instructions: list
    loops: list

    @property
    def classes(self):
        return count(self.instructions)

    def widths(self, opcode):
        """{bits: how many}."""
        found = collections.Counter()
        for i in self.instructions:
            if i.opcode == opcode:
                found[width(i.modifiers)] += 1
        return dict(found)

    def executed(self, trips):
        """How often each instruction runs, where `trips` says how often each loop's body does."""
        if len(trips) != len(self.loops):
            raise ValueError(f"SASS: {len(self.loops)} loops, got trips of {len(trips)}; say in KERNELS how often each runs")
        times = [1.0] * len(self.instructions)
        for (start, end), trip in zip(self.loops, trips, strict=True):
            for at in range(start, end + 1):
                times[at] *= trip
        return times


def width(modifiers):
    """Bits that a thread moves in one instruction."""
    return next((int(b) for b in re.findall(r"\b(?:U|S)?(8|16|64|128|256)\b", modifiers.replace(".", " "))), 32)


def count(instructions):
    """{class: how many}, padding left out."""
    found = collections.Counter()
    for i in instructions:
        if i.opcode not in CLASS_OF:
            raise ValueError(f"SASS: {i.opcode} is in no class; sort it into CLASSES of benchmarks/sass.py")
        if i.opcode != "NOP":
            found[CLASS_OF[i.opcode]] += 1
    return dict(found)


def text(cubin, kernel):
    """The bytes of a kernel's instructions."""
    return ELFFile(io.BytesIO(cubin)).get_section_by_name(f".text.{kernel}").data()


def disassemble(pack, variants):
    """{cubin: Code} of [(kernel, Variant)]: all in one run of nvdisasm, which takes half a second to start."""
    bodies = [text(pack.read(v.cubin), kernel) for kernel, v in variants]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(bodies))
        file.flush()
        command = [gate._nvdisasm(), "--no-dataflow", "--binary", f"SM{pack.arch}", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    instructions = [Instruction(int(m[1], 16), m[2], m[3], m[4].strip()) for m in LINE.finditer(listing)]
    if len(instructions) != sum(map(len, bodies)) // SIZE:
        raise RuntimeError(f"nvdisasm: {len(instructions)} instructions read of {sum(map(len, bodies)) // SIZE}")
    codes, start = {}, 0
    for (_, variant), body in zip(variants, bodies, strict=True):
        end = start + len(body) // SIZE
        codes[variant.cubin] = code(instructions[start:end])
        start = end
    return codes


def code(instructions):
    first, loops = instructions[0].address, []
    for at, i in enumerate(instructions):
        target = re.search(r"0x[0-9a-f]+", i.operands) if i.opcode == "BRA" else None
        if target and first <= int(target[0], 16) < i.address:  # the trap at the end is a branch to itself
            loops.append(((int(target[0], 16) - first) // SIZE, at))
    return Code(instructions, loops)
