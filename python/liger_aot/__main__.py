"""python -m liger_aot COMMAND."""

import argparse
import importlib
import sys

# The module of a command has add_arguments(parser) and main(args), which returns the status (None is 0).
COMMANDS = {
    "demo": ("_demo", "train a small Llama plain and with the operators bound, and compare"),
    "info": ("_info", "versions, devices and packs, and which pack serves which device"),
    "verify": ("_verify", "read all of every pack, and hold every cubin to what the launcher passes it"),
    "explain": ("_explain", "which kernels a call of an operator would launch, or what bind would do to a model, and why"),
    "convert": ("convert._cli", "checkpoints of transformers to SwissArmyTransformer and back, and which tensor goes where"),
}

STATUS = "Exit status: 0 where all is well, 1 where something is not, 2 for a command that is not understood."


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    about = {"description": "Fused training kernels, compiled ahead of time.", "epilog": STATUS}
    parser = argparse.ArgumentParser(prog="python -m liger_aot", **about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, epilog=STATUS)
        if argv[:1] == [name]:
            module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
            module.add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return module.main(args) or 0
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
