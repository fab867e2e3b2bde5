"""Package indexes (PEP 503) of the wheels in a folder, one for each flavour, which pip reads from a web server or a disk.

    python tools/index.py dist
    pip install liger-aot --extra-index-url https://where.dist.is.served/whl/cu130/
The pages link to the wheels beside them, so that the folder is served as it is.
"""

import argparse
import email
import hashlib
import html
import pathlib
import re
import shutil
import urllib.parse
import zipfile

from flavour import FLAVOURS
from flavour import PLAIN
from flavour import suffix

PROJECT = "liger-aot"
PAGE = '<!DOCTYPE html>\n<html><head><meta name="pypi:repository-version" content="1.0"><title>{title}</title></head><body>\n'
SHIPS = {suffix(cuda): flavour.ships for cuda, flavour in FLAVOURS.items()} | {"plain": FLAVOURS[PLAIN].ships}


def page(title, links):
    return PAGE.format(title=title) + "".join(f"{link}<br>\n" for link in links) + "</body></html>\n"


def read(wheel):
    """(flavour, version, which Pythons, architectures) of a wheel; refused if it is damaged, or not what its name says."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            damaged = archive.testzip()
            names = archive.namelist()
            metadata = email.message_from_bytes(archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))))
    except (zipfile.BadZipFile, StopIteration) as error:
        raise SystemExit(f"{wheel} is damaged ({error or 'no metadata'}); build it again") from error
    if damaged:
        raise SystemExit(f"{wheel} is damaged: {damaged}; build it again")
    version = wheel.name.split("-")[1]
    if metadata["Version"] != version:
        raise SystemExit(f"{wheel} is version {metadata['Version']}; build it again, its name says {version}")
    flavour = version.partition("+")[2] or "plain"
    if flavour not in SHIPS:
        raise SystemExit(f"{wheel}: its version must end with nothing or one of {', '.join(SHIPS)}, got +{flavour}")
    built = {m[1] for n in names if (m := re.fullmatch(r"liger_aot/cubins/sm_(\w+)\.zip", n))}
    return flavour, [int(n) for n in re.findall(r"\d+", version.partition("+")[0])], metadata["Requires-Python"], built


def check_architectures(wheel, flavour, built):
    if built != set(SHIPS[flavour].split()):
        raise SystemExit(f"{wheel} holds {sorted(built)}, its flavour ships {SHIPS[flavour]}; build it without LIGER_AOT_ARCHS")


def link(wheel, python):
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    address = f"../../../{urllib.parse.quote(wheel.name)}#sha256={digest}"
    return f'<a href="{address}" data-requires-python="{html.escape(python)}">{wheel.name}</a>'


def write(folder):
    """folder/whl/FLAVOUR/liger-aot/index.html for every flavour that has a wheel in the folder; nothing if one is refused."""
    found, newest = {}, {}
    for wheel in sorted(folder.glob("liger_aot-*.whl")):
        flavour, version, python, built = read(wheel)
        found.setdefault(flavour, []).append(link(wheel, python))
        newest[flavour] = max(newest.get(flavour, ([],)), (version, wheel, built), key=lambda item: item[0])
    for flavour, (_, wheel, built) in newest.items():  # those before it hold what their flavour shipped then
        check_architectures(wheel, flavour, built)
    if not found:
        raise SystemExit(f"{folder} has no wheels of {PROJECT}; make some: make wheel CUDA=13.0")
    shutil.rmtree(folder / "whl", ignore_errors=True)
    for flavour, links in found.items():
        place = folder / "whl" / flavour / PROJECT
        place.mkdir(parents=True)
        (place / "index.html").write_text(page(f"Links for {PROJECT}", links))
        (place.parent / "index.html").write_text(page(flavour, [f'<a href="{PROJECT}/">{PROJECT}</a>']))
        print(f"{place.parent}: {len(links)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    write(parser.parse_args().folder)
