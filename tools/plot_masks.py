"""Draw the channel masks of a network: which channels are dense, module by module and layer by layer.

python tools/plot_masks.py --pre_train experiment/SMSR_X2/model/model_best.pt --output channels.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pictures
from model import load_model
from model.smsr import SMSR
from option import Parser, png
from utility import InputError, run_program, write_whole


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pre_train", type=Path, required=True, help="weights of SMSR")
    parser.add_argument("--output", type=png, required=True, metavar="FILE.png")
    args = parser.parse_args(argv)
    model = load_model(args.pre_train)
    if not isinstance(model, SMSR):
        raise InputError(f"--pre_train {args.pre_train}: {type(model).__name__} has no masks; give weights of SMSR")
    masks = [block.hard_channel_mask().numpy() for block in model.blocks]
    write_whole(args.output, pictures.channel_sheet(masks))
    for k, mask in enumerate(masks):
        counts = " ".join(str(count) for count in mask.sum(axis=0))
        print(f"module {k + 1}: {counts} of {len(mask)} channels are dense, layer by layer")
    print(f"written to {args.output}")


if __name__ == "__main__":
    run_program(main)
