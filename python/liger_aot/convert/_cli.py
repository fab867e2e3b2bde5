"""python -m liger_aot convert hf2sat|sat2hf SRC DST, and convert map [FAMILY]."""

import sys

from ._convert import NARROW
from ._convert import hf_to_sat
from ._convert import sat_to_hf
from ._error import ConvertError
from ._map import document
from ._map import table
from .families import FAMILIES

WAYS = {"hf2sat": "Hugging Face to SwissArmyTransformer", "sat2hf": "SwissArmyTransformer to Hugging Face"}


def add_arguments(parser):
    ways = parser.add_subparsers(dest="way", required=True, metavar="hf2sat|sat2hf|map")
    for way, text in WAYS.items():
        one = ways.add_parser(way, help=text, description=text)
        one.add_argument("source", metavar="SRC", help="the folder to read")
        one.add_argument("target", metavar="DST", help="the folder to make; must not exist, or be empty")
        one.add_argument("--family", default="auto", choices=["auto", *FAMILIES], help="by default what the configuration says")
        one.add_argument("--dtype", choices=list(NARROW), help="cast to it; by default every tensor keeps its own")
        one.add_argument(
            "--allow-rope-theta", action="store_true", help="convert a rotary base that SAT's class loses in 16 bits"
        )
        one.add_argument(
            "--verify", action="store_true", help="compute everything back and compare, and run both frameworks if installed"
        )
        one.add_argument("--text", metavar="FILE", help="what --verify reads; by default random tokens")
        one.add_argument("--image", metavar="FILE", help="what --verify sees; by default a random picture")
        if way == "hf2sat":
            one.add_argument("--mp", type=int, default=1, help="ranks of model parallelism")
        else:
            one.add_argument("--max-shard-size", default="5GB", help="of a safetensors file (default %(default)s)")
            one.add_argument("--merge-lora", action="store_true", help="add LoRA adapters to their weights")
            one.add_argument("--lora-alpha", type=float, help="what they were trained with; no file records it")
    one = ways.add_parser("map", help="print which name goes where", description="Which name goes where, and how.")
    one.add_argument("family", nargs="?", choices=list(FAMILIES), help="by default each of them")


def main(args):
    options = {name: value for name, value in vars(args).items() if name not in ("command", "way", "source", "target")}
    convert = {"hf2sat": hf_to_sat, "sat2hf": sat_to_hf}
    try:
        if args.way == "map":
            print(table(FAMILIES[args.family]) if args.family else document(FAMILIES.values()))
        else:
            print(convert[args.way](args.source, args.target, progress=sys.stderr, **options))
    except ConvertError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    return 0
