"""Measure the speed of inference, training, data loading and exported networks.

    python tools/benchmark.py inference --pre_train WEIGHTS --images DIR --json out.json --plot out.png
    python tools/benchmark.py train --baseline
    python tools/benchmark.py data
    python tools/benchmark.py onnx --pre_train WEIGHTS --images DIR
    python tools/benchmark.py gpu --json gpu.json
    python tools/benchmark.py COMMAND --help

Without a command, the options are those of `inference`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files import check_replaced
from option import Parser
from program import run_program
from tools.benchmarks import data, gpu, inference, onnx, train
from visualize import FIGURE_MARK

COMMANDS = {
    "inference": inference,
    "train": train,
    "data": data,
    "onnx": onnx,
    "gpu": gpu,
}
DEFAULT_COMMAND = "inference"


def build_parser() -> Parser:
    """One subparser per command. Its description is the docstring of the module of that command."""
    parser = Parser(prog="benchmark.py", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=module.__doc__.splitlines()[0],
            description=module.__doc__,
        )
        module.add_arguments(subparser)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of a command; without a command, options are those of `inference`. Raises InputError."""
    has_command = argv and (not argv[0].startswith("-") or argv[0] in ("-h", "--help"))
    return build_parser().parse_args(argv if has_command else [DEFAULT_COMMAND, *argv])


def main(argv: list[str] | None = None) -> int | None:
    args = parse(sys.argv[1:] if argv is None else argv)
    for name, mark in (("json", b'"torch": '), ("plot", FIGURE_MARK)):
        if path := getattr(args, name, None):
            check_replaced(path, mark, argument=name)
    return COMMANDS[args.command].run(args)


if __name__ == "__main__":
    run_program(main)
