"""The machine code of a pack: its instructions by class, the widths of its loads and stores, its loops."""

import collections
import dataclasses
import pathlib
import re
import sys

sys.path.append(str(pathlib.Path(__file__).parent.parent / "tests"))
from stub import machinery

gate = machinery("_gate")
CLASSES = {
    "global memory": "LDG STG ATOM ATOMG RED LDGSTS LDGDEPBAR CCTL",
    "shared memory": "LDS STS LDSM STSM ATOMS",
    "local memory": "LDL STL",
    "constants": "LDC LDCU ULDC",
    "float": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 HADD2 HMUL2 HFMA2 FHADD FHFMA UFADD UFMUL UFFMA",
    "float, compare": "FSET FSETP FSEL FMNMX FMNMX3 FCHK HMNMX2 HSETP2 UFSETP UFSEL UFMNMX",
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
    *("FSET", "FSETP", "FSEL", "FMNMX", "FMNMX3", "FCHK", "ISETP", "LOP3", "SHF", "SEL", "PRMT", "IADD3", "IADD", "LEA"),
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


def disassemble(pack, variants):
    """{cubin: Code} of [(kernel, Variant)]."""
    listings = gate.listings([(kernel, pack.read(v.cubin)) for kernel, v in variants], pack.arch)
    return {v.cubin: code([instruction(line) for line in lines]) for (_, v), lines in zip(variants, listings, strict=True)}


def instruction(line):
    m = LINE.match(line)
    return Instruction(int(m[1], 16), m[2], m[3], m[4].strip())


def code(instructions):
    first, loops = instructions[0].address, []
    for at, i in enumerate(instructions):
        target = re.search(r"0x[0-9a-f]+", i.operands) if i.opcode == "BRA" else None
        if target and first <= int(target[0], 16) < i.address:  # the trap at the end is a branch to itself
            loops.append(((int(target[0], 16) - first) // gate.INSTRUCTION, at))
    return Code(instructions, loops)
