"""Compare trainings: PSNR against hours, and PSNR against the active share.

    python tools/plot_runs.py experiment/lambda_0.03 experiment/lambda_0.1 --set DIV2K --output runs.png

Each run is one line with a dot at its last epoch. With --ema, the line shows the averaged weights. Hours count training
steps only, not evaluation.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files import check_outputs, check_replaced, write_whole
from option import Parser, file_to_write
from program import InputError, run_program
from summary import Row, read_history
from visualize import FIGURE_MARK, compare_runs, to_png

MEASURES = {"psnr_y": "PSNR (dB), Y", "psnr_rgb": "PSNR (dB), RGB"}  # benchmark sets have the first, others both


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", metavar="FOLDER", type=Path, nargs="+", help="folders of trainings, experiment/NAME")
    parser.add_argument("--set", metavar="NAME", required=True, help="set of --data_test on which PSNR was measured")
    parser.add_argument("--output", type=file_to_write(".png"), required=True, metavar="FILE.png", help="file to write")
    args = parser.parse_args(argv)
    check_outputs([args.output], [folder / "log.csv" for folder in args.runs], argument="output")
    check_replaced(args.output, FIGURE_MARK, argument="output")
    histories = {folder: read_history(folder) for folder in args.runs}
    measure = find_measure(histories, args.set)
    lines = {str(folder): read_curve(history, measure, args.set) for folder, history in histories.items()}
    write_whole(args.output, to_png(compare_runs(lines, MEASURES[measure])))
    for name, ((*_, hours), (*_, share), (*_, psnr)) in lines.items():
        print(f"{name}: {psnr:.2f} dB on {args.set} after {hours:.2f} hours, active share {share:.2f}")
    print(f"written to {args.output}")


def find_measure(histories: dict[Path, Sequence[Row]], name: str) -> str:
    """The entry of MEASURES that all runs have of a set. Raises InputError, naming a run, if there is none."""
    lacking = {
        measure: [folder for folder, history in histories.items() if f"{measure}_{name}" not in history[-1]]
        for measure in MEASURES
    }
    for measure, folders in lacking.items():
        if not folders:
            return measure
    folder = min(lacking.values(), key=len)[0]
    raise InputError(
        f"{folder / 'log.csv'}: has no PSNR of {name}; pass a set that all runs validate on", argument="set"
    )


def read_curve(history: Sequence[Row], measure: str, name: str) -> tuple[list[float], list[float], list[float]]:
    """The hours, the active share and the PSNR of each epoch of a run; epochs that did not measure it have nan."""
    suffix = f"{name}_ema" if f"{measure}_{name}_ema" in history[-1] else name
    hours = [seconds / 3600 for seconds in itertools.accumulate(row.get("seconds", math.nan) for row in history)]
    shares = [row.get(f"active_share_{suffix}", math.nan) for row in history]
    return hours, shares, [row.get(f"{measure}_{suffix}", math.nan) for row in history]


if __name__ == "__main__":
    run_program(main)
