"""Export a network to one ONNX file. An SMSR skips the masked work there too, wherever ONNX Runtime runs.

    python tools/export_onnx.py --pre_train experiment/released/SMSR_X2/model/model_best.pt --output smsr_x2.onnx

This needs pip install -r requirements-deploy.txt. The graph takes `image` (N, H, W, 3) in 0...255, of any height and
width. It returns `sr` (N, scale H, scale W, 3) in the same range and, with --masks, `masks`, uint8 (N, K, H, W), which
are 1 where a pixel is important. A sparse graph takes one image at a time (N = 1), a dense one any number.

The graph uses only operators of ONNX's standard set, opset 18. Its metadata: smsr_scale, smsr_model, smsr_n_feats,
smsr_mode, smsr_pixels, smsr_precision, smsr_version, smsr_weights_sha256.
"""

import argparse
import hashlib
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files import write_whole
from model import load_model
from model.edsr import EDSR
from model.network import Network
from model.onnx import GRAPH_MODES, OPSET, PIXELS, export
from option import Parser, file_to_write
from program import InputError, run_program
from utility import PRECISIONS


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--pre_train", metavar="FILE", type=Path, required=True, help="weights of an SMSR or an EDSR")
    parser.add_argument(
        "--output", type=file_to_write(".onnx"), required=True, metavar="FILE.onnx", help="file to write"
    )
    parser.add_argument(
        "--mode",
        choices=GRAPH_MODES,
        help="sparse: skip the masked work; dense: compute everything, then apply the masks "
        "(default: sparse for an SMSR, dense for an EDSR)",
    )
    parser.add_argument(
        "--precision",
        choices=("single", "half"),
        default="single",
        help="floating-point precision of weights and features",
    )
    parser.add_argument(
        "--pixels",
        choices=PIXELS,
        default="uint8",
        help="data type of input and output images; float: the type that --precision names, values not clamped",
    )
    parser.add_argument(
        "--res_scale",
        type=float,
        help="residual scale of an EDSR, for weights files that do not record it (default: 1)",
    )
    parser.add_argument("--masks", action="store_true", help="return the masks as a second output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    model = load_model(args.pre_train, res_scale=args.res_scale)
    mode = choose_mode(args, model)
    facts = metadata(args, model, mode)
    if args.output.exists() and facts["weights_sha256"].encode() not in args.output.read_bytes():
        raise InputError(f"--output {args.output}: already exists, not made from these weights; choose another name")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output.parent).close()  # before the export, which takes a minute
    except OSError as error:
        raise InputError(f"--output {args.output}: cannot be written: {error.strerror}; choose another") from None
    print(f"exporting {args.pre_train}, which takes a minute", file=sys.stderr, flush=True)
    graph = export(model.to(PRECISIONS[args.precision]), mode, args.pixels, args.masks)
    for key, value in facts.items():
        graph.metadata_props.add(key=f"smsr_{key}", value=str(value))
    content = graph.SerializeToString()
    write_whole(args.output, content)
    size = len(content) / 2**20
    print(f"{args.output}: {type(model).__name__} x{model.scale}, {mode}, {size:.1f} MiB, opset {OPSET}")


def choose_mode(args: argparse.Namespace, model: Network) -> str:
    """The mode of the graph. Raises InputError if the network has no such mode or no masks."""
    if not isinstance(model, EDSR):
        return args.mode or "sparse"
    if args.mode == "sparse":
        raise InputError(f"--mode sparse: {args.pre_train} holds an EDSR, which has no masks; use --mode dense")
    if args.masks:
        raise InputError(f"--masks: {args.pre_train} holds an EDSR, which has no masks; remove the flag")
    return "dense"


def metadata(args: argparse.Namespace, model: Network, mode: str) -> dict[str, str | int]:
    return {
        "scale": model.scale,
        "model": type(model).__name__,
        "n_feats": model.n_feats,
        "mode": mode,
        "pixels": args.pixels,
        "precision": args.precision,
        "version": project_version(),
        "weights_sha256": hashlib.sha256(args.pre_train.read_bytes()).hexdigest(),
    }


def project_version() -> str:
    project = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "(.*)"', project, re.MULTILINE)[1]


if __name__ == "__main__":
    run_program(main)
