"""Draw the channel masks of an SMSR network: which channels of each layer of each SMM are dense.

python tools/plot_masks.py --pre_train experiment/released/SMSR_X2/model/model_best.pt --output channels.png
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files import check_outputs, check_replaced, write_whole
from model import load_model
from model.smsr import SMSR
from option import Parser, file_to_write
from program import InputError, run_program
from visualize import FIGURE_MARK, channel_sheet


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--pre_train", metavar="FILE", type=Path, required=True, help="SMSR weights")
    parser.add_argument("--output", type=file_to_write(".png"), required=True, metavar="FILE.png", help="file to write")
    args = parser.parse_args(argv)
    check_outputs([args.output], [args.pre_train], argument="output")
    check_replaced(args.output, FIGURE_MARK, argument="output")
    model = load_model(args.pre_train)
    if not isinstance(model, SMSR):
        raise InputError(f"--pre_train {args.pre_train}: {type(model).__name__} has no masks; pass SMSR weights")
    masks = [block.hard_channel_mask().numpy() for block in model.blocks]
    write_whole(args.output, channel_sheet(masks))
    for k, mask in enumerate(masks):
        counts = " ".join(str(count) for count in mask.sum(axis=0))
        print(f"SMM {k + 1}: dense channels per layer: {counts} (of {len(mask)})")
    print(f"written to {args.output}")


if __name__ == "__main__":
    run_program(main)
