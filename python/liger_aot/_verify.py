"""Read all of every pack, and hold it to what was installed, and every cubin to what the launcher passes it."""

import hashlib
import json
import struct

from ._info import missing
from ._info import recorded
from ._info import wrong_folder
from ._runtime import FOLDER
from ._runtime import code
from ._runtime import open_pack
from ._runtime import pack_paths

PARAMETER = 0x17  # EIATTR_KPARAM_INFO, an attribute in a cubin's .nv.info section
GOOD = "good: contract, hashes, CRCs, and every cubin's parameter table"
LONG_FORM = 4  # an attribute whose value has a length of its own; every other form holds two bytes


def sections(elf):
    """{name: bytes} of a 64-bit ELF file."""
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + n * size) for n in range(count)]
    table = headers[names][4]
    return {elf[table + h[0] : elf.index(0, table + h[0])].decode(): elf[h[4] : h[4] + h[5]] for h in headers}


def parameters(cubin, symbol):
    """[(offset, size)] of the kernel's parameters, as the cubin says; None where it is no cubin of that kernel."""
    found, at = {}, 0
    try:
        info = sections(cubin)[f".nv.info.{symbol}"]
        while at < len(info):
            form, attribute, size = struct.unpack_from("<BBH", info, at)
            if attribute == PARAMETER:
                _, ordinal, offset, flags = struct.unpack_from("<IHHI", info, at + 4)
                found[ordinal] = offset, flags >> 18
            at += 4 + (size if form == LONG_FORM else 0)
    except (struct.error, KeyError, ValueError, IndexError):
        return None
    return [found[ordinal] for ordinal in sorted(found)]


def passed(types):
    """[(offset, size)] of what the launcher packs for arguments of these types."""
    codes = [*map(code, types), "P", "P"]
    return [(struct.calcsize("".join(codes[:n]) + "0" + c), struct.calcsize(c)) for n, c in enumerate(codes)]


def problems(path):
    """What is wrong with a pack: sentences."""
    found = inside(path)
    expected = recorded().get(path.resolve())
    if expected and path.is_file() and hashlib.sha256(path.read_bytes()).digest() != expected:
        found.append(f"{path}: is not the file that was installed; install liger-aot again")
    return found


def inside(path):
    try:
        pack = open_pack(path)
    except RuntimeError as error:
        return [str(error)]
    entries = {}
    for name in sorted(set(pack.archive.namelist()) - {"manifest.json"}):
        try:
            entries[name] = pack.read(name)  # which checks its CRC
        except RuntimeError as error:
            return [str(error)]
    if hashlib.sha256(b"".join(entries.values())).hexdigest() != pack.manifest["sha256"]:
        return [f"{path}: its entries are not those that its manifest was written for"]
    found = []
    for kernel in pack.manifest["kernels"]:
        try:
            declared, table = pack.entry(kernel)
        except RuntimeError as error:
            return [str(error)]
        expected = passed(type_ for _, type_ in declared)
        for variant in table.values():
            got = parameters(entries.get(variant.cubin, b""), kernel)
            if got != expected:
                found.append(f"{path}: {variant.cubin} takes (offset, size) {got}, the launcher passes {expected}")
    return found


def add_arguments(parser):
    parser.add_argument("--json", action="store_true", help="for programs; errors go to stderr all the same")


def main(args):
    paths = {f"sm_{arch}": path for arch, path in pack_paths().items()}
    # For which LIGER_AOT_PACKS has another.
    paths |= {str(path): path for path in sorted(FOLDER.glob("sm_*.zip")) if path not in paths.values()}
    results = {name: problems(path) for name, path in paths.items()}
    results |= {name: [about["error"]] for name, about in (wrong_folder() | missing()).items()}
    if args.json:
        print(json.dumps(results, indent=1))
    elif not results:
        print("no packs: liger-aot was installed without kernels; only CPU tensors are served")
    else:
        for arch, found in results.items():
            print(f"{arch}: {'bad' if found else GOOD}", *found, sep="\n  ")
    return 0 if results and not any(results.values()) else 1
