"""Write a folder for Hugging Face: config.json, model.safetensors and README.md, the model card.

    python tools/export_hub.py --pre_train model_best.pt --output smsr_x2 --license mit --results metrics.json

`SMSR.from_pretrained("smsr_x2")` reads it, and so does a class that inherits from huggingface_hub.PyTorchModelHubMixin.
`hf upload owner/smsr_x2 smsr_x2` publishes it.
"""

import argparse
import json
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import schema
from files import write_whole
from loading import load_json
from model import load_model
from model.hub import write_hub_folder
from model.network import Network
from option import Parser, positive_float
from program import InputError, run_program

PAPERS = {"SMSR": "https://arxiv.org/abs/2006.09603", "EDSR": "https://arxiv.org/abs/1707.02921"}
RESULTS = {  # of metrics.json
    "dataset": schema.text,
    "scale": schema.integer(1),
    "model": schema.text,
    "psnr_y": schema.number(0),
    "ssim_y": schema.number(-1),
}
CARD = string.Template("""\
---
$header
---

# $name x$scale

Single-image super-resolution: this network upscales images by $scale. It has $parameters parameters. [The
paper]($paper) describes the method.

```python
from model import $name  # of the SMSR framework

model = $name.from_pretrained("path/to/this/folder")
upscaled = model.upscale(image)  # uint8 (H, W, $n_colors), a Pillow image, or a tensor (N, $n_colors, H, W) in 0...1
```
$table
""")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--pre_train", metavar="FILE", type=Path, required=True, help="weights of an SMSR or an EDSR")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--license", default="", metavar="ID", help="license of the weights, e.g. mit or cc-by-4.0")
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[], metavar="FILE", help="metrics.json of tests, for the model card"
    )
    parser.add_argument("--rgb_range", type=positive_float, help="value range, if the weights do not record it (255)")
    parser.add_argument("--res_scale", type=positive_float, help="of an EDSR, if the weights do not record it (1)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.output.exists() and not (args.output.is_dir() and not any(args.output.iterdir())):
        raise InputError(f"--output {args.output}: already exists; choose another name")
    model = load_model(args.pre_train, rgb_range=args.rgb_range, res_scale=args.res_scale)
    results = [read_results(path, model) for path in args.results]
    write_hub_folder(args.output, model)
    write_whole(args.output / "README.md", model_card(model, args.license, results).encode())
    print(f"written to {args.output}: {type(model).__name__} x{model.scale}, {model.n_parameters:,} parameters")


def read_results(path: Path, model: Network) -> dict[str, Any]:
    """The content of a metrics.json. Raises InputError if it is not one of this kind of network and scale."""
    advice = "give the metrics.json of a test of these weights"
    content = load_json(path, advice, argument="results")
    schema.check(content, schema.mapping(RESULTS, rest=schema.anything), path, advice)
    found, wanted = (content["model"], content["scale"]), (type(model).__name__, model.scale)
    if found != wanted:
        raise InputError(f"{path}: measures {found[0]} x{found[1]}, not {wanted[0]} x{wanted[1]}; {advice}")
    return content


def model_card(model: Network, license_id: str, results: Sequence[dict[str, Any]]) -> str:
    """The model card: metadata as Hugging Face expects it, then Markdown."""
    name = type(model).__name__
    metadata = {
        **({"license": license_id} if license_id else {}),
        "pipeline_tag": "image-to-image",
        "tags": ["super-resolution", name.lower(), "pytorch_model_hub_mixin", "model_hub_mixin"],
        **({"model-index": [{"name": f"{name} x{model.scale}", "results": _index(results)}]} if results else {}),
    }
    return CARD.substitute(
        # JSON is YAML, and quotes what YAML would misread.
        header="\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in metadata.items()),
        name=name,
        scale=model.scale,
        parameters=f"{model.n_parameters:,}",
        paper=PAPERS[name],
        n_colors=model.n_colors,
        table=_table(results),
    )


def _index(results):
    """The entries of model-index, one per test set."""
    return [
        {
            "task": {"type": "image-to-image", "name": f"x{metrics['scale']} super-resolution"},
            "dataset": {"name": metrics["dataset"], "type": metrics["dataset"]},
            "metrics": [
                {"type": kind, "name": f"{kind.upper()} (Y)", "value": round(metrics[f"{kind}_y"], digits)}
                for kind, digits in (("psnr", 2), ("ssim", 4))
            ],
        }
        for metrics in results
    ]


def _table(results):
    if not results:
        return ""
    rows = [f"| {row['dataset']} | {row['psnr_y']:.2f} | {row['ssim_y']:.4f} |" for row in results]
    lines = ["| set | PSNR (dB) | SSIM |", "|---|---|---|", *rows]
    return "\n".join(["", "Measured on the Y channel, with as many border pixels shaved as the scale:", "", *lines])


if __name__ == "__main__":
    run_program(main)
