"""What the GPUs can do, from public sources, and how many programs share a multiprocessor."""

import dataclasses

WARP = 32
REGISTERS = 65536  # of a multiprocessor, and a thread's come by eights: cuda_occupancy.h of the CUDA toolkit
REGISTER_UNIT, SUBPARTITIONS, SHARED_UNIT = 256, 4, 128


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """CUDA C++ Programming Guide, Compute Capabilities, "Technical Specifications per Compute Capability"."""

    warps: int
    blocks: int
    shared: int  # bytes
    reserved: int = 1024  # bytes of it that each block takes for the system


MULTIPROCESSORS = {
    "75": Multiprocessor(32, 16, 64 * 1024, 0),
    "80": Multiprocessor(64, 32, 164 * 1024),
    "90": Multiprocessor(64, 32, 228 * 1024),
    "100f": Multiprocessor(64, 32, 228 * 1024),
    "110f": Multiprocessor(48, 24, 228 * 1024),
    "120f": Multiprocessor(48, 24, 100 * 1024),
}


def occupancy(arch, threads, registers, shared):
    """(programs on a multiprocessor, what allows no more), as cuda_occupancy.h counts."""
    if arch not in MULTIPROCESSORS:
        raise ValueError(f"occupancy: sm_{arch} is none of {', '.join(MULTIPROCESSORS)}; add its limits to devices.py")
    limits, warps = MULTIPROCESSORS[arch], -(-threads // WARP)
    of_a_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    of_a_part = REGISTERS // SUBPARTITIONS // of_a_warp  # registers are a quarter's own
    of_a_block = -(-(shared + limits.reserved) // SHARED_UNIT) * SHARED_UNIT
    bounds = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": of_a_part * SUBPARTITIONS // warps,
        "shared memory": limits.shared // of_a_block if of_a_block else limits.blocks,
    }
    lowest = min(bounds, key=bounds.get)
    return bounds[lowest], lowest


@dataclasses.dataclass(frozen=True)
class Device:
    """Vendor's figures: rates in 1/s of multiply-adds counted as two, bytes a second; dense, not sparse."""

    arch: str
    multiprocessors: int
    clock: float
    bandwidth: float
    l2: float  # bytes
    l2_bandwidth: float
    latency: float  # s, of a load that misses the L2
    matmul: dict  # {dtype: dense rate}
    sources: str


def device(arch, multiprocessors, mhz, terabytes, l2, l2_per_clock, cycles, tensor, fp32, sources):
    clock = mhz * 1e6
    return Device(
        arch,
        multiprocessors,
        clock,
        terabytes * 1e12,
        l2 * 2**20,
        l2_per_clock * clock,
        cycles / clock,
        {"bfloat16": tensor * 1e12, "float16": tensor * 1e12, "float32": fp32 * 1e12},
        sources,
    )


# The clock of Hopper and Blackwell is the one that the datasheet's fp32 rate takes: two for each of 128 lanes.
DATASHEET, LATENCY = "NVIDIA's datasheet (SXM)", "latency: arXiv 2402.13499"
HOPPER = f"{DATASHEET}; L2 bandwidth: A100's a clock, assumed; {LATENCY}, of an H100"
DEVICES = {
    "A100": device("80", 108, 1410, 2.039, 40, 5120, 466.3, 312, 19.5,
        f"{DATASHEET}, 80 GB; L2: NVIDIA's A100 whitepaper, 5120 B a clock; {LATENCY}"),
    "H100": device("90", 132, 1980, 3.35, 50, 5120, 478.8, 989.4, 66.9, HOPPER),
    "H200": device("90", 132, 1980, 4.8, 60, 5120, 478.8, 989.4, 66.9, f"{HOPPER}; L2: as torch reports it"),
    "B200": device("100f", 148, 1980, 8.0, 126, 2 * 5120, 478.8, 2250, 75,
        "NVIDIA's HGX datasheet; multiprocessors, L2: Chips and Cheese, Nvidia's B200; L2 bandwidth, of two such dies, and "
        "latency: Hopper's, assumed"),
}  # fmt: skip
