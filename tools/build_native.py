"""Build the native engine for CPUs ahead of its first use, for example when a container image is made.

    python tools/build_native.py
    python tools/build_native.py --pre_train WEIGHTS ...

It is built for networks of the sizes of these weights, for this processor, into $XDG_CACHE_HOME/smsr or ~/.cache/smsr.
Where the result runs, no compiler is needed.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import load_model
from model.engines.build import BuildError, cache_folder
from model.engines.native import NativePlan
from model.smsr import SMSR
from model.sparse import Plan
from option import Parser
from program import InputError, run_program


def build_parser() -> Parser:
    parser = Parser(prog="build_native.py", description=__doc__)
    parser.add_argument(
        "--pre_train",
        metavar="FILE",
        nargs="+",
        default=[],
        help="weights of SMSR networks (default: the sizes of the paper)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
    models = {path: load_model(path, "SMSR") for path in args.pre_train} or {"the network of the paper": SMSR(2)}
    for name, model in models.items():
        try:
            library = NativePlan(Plan(model)).library
        except BuildError as error:
            raise InputError(f"{name}: the native engine {error}; plain operators run it") from None
        if not Path(library._name).exists():
            raise InputError(f"{cache_folder()}: cannot be written; set XDG_CACHE_HOME to a folder that can")
    print(f"the native engine is in {cache_folder()}")


if __name__ == "__main__":
    run_program(main)
