"""Write the weights of any checkpoint as a plain weights file of this project, for PyTorch or as safetensors.

    python tools/convert_weights.py --pre_train model_best.pt --output smsr_x2.safetensors

The file has the names of this project, and the settings that the network needs (rgb_range, res_scale).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import load_model
from model.weights import write_weights
from option import Parser, file_to_write, positive_float
from program import InputError, run_program


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--pre_train", metavar="FILE", type=Path, required=True, help="weights of an SMSR or an EDSR")
    parser.add_argument(
        "--output",
        type=file_to_write(".pt", ".pth", ".safetensors"),
        required=True,
        metavar="FILE",
        help="file to write: .pt or .safetensors",
    )
    parser.add_argument("--rgb_range", type=positive_float, help="value range, if the weights do not record it (255)")
    parser.add_argument("--res_scale", type=positive_float, help="of an EDSR, if the weights do not record it (1)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    model = load_model(args.pre_train, rgb_range=args.rgb_range, res_scale=args.res_scale)
    if args.output.exists():
        raise InputError(f"--output {args.output}: already exists; choose another name")
    write_weights(args.output, model.state_dict())
    print(f"{args.output}: {type(model).__name__} x{model.scale}, {model.n_parameters:,} parameters")


if __name__ == "__main__":
    run_program(main)
