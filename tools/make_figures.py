"""Make the pictures of README.md and of the model card, and the curves of the released runs.

    python tools/make_figures.py

It runs the commands that README.md gives, and writes docs/masks.png, channels.png, comparison.png, limits.png and
report.png, and the curves in experiment/released/. The picture of the report needs selenium, chromium and
chromedriver; without them it is left as it is, and the exit code is 1. docs/density.png is a measurement, which
tools/benchmark.py --plot makes.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from option import Parser
from program import InputError, run_program
from summary import read_history, write_curves

ROOT = Path(__file__).resolve().parent.parent
RELEASED = ROOT / "experiment/released"
SAMPLE = ROOT / "testsets/benchmark/Sample"
LIMITS_WIDTH = 640  # pixels; keeps the file below 300 KB
REPORT_SIZE = (1280, 1110)  # CSS pixels: the table and the first image


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the pictures (default: docs)")
    parser.add_argument(
        "--released",
        type=Path,
        default=RELEASED,
        help="folder of the runs whose curves are drawn (default: experiment/released)",
    )
    args = parser.parse_args(argv)
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    for log in sorted(args.released.glob("*/log.csv")):
        write_curves(log.parent, read_history(log.parent))
    with tempfile.TemporaryDirectory() as folder:
        return draw(Path(folder), output)


def draw(folder: Path, output: Path) -> int:
    """Run the commands in an empty folder and write the pictures to `output`; returns the exit code."""
    weights = RELEASED / "SMSR_X2/model/model_best.pt"
    test = ["--dir_data", SAMPLE.parents[1], "--data_test", "Sample", "--scale", 2, "--save", "masks_X2"]
    run(folder, "main.py", *test, "--pre_train", weights, "--test_only", "--save_results", "--save_masks")
    results = folder / "experiment/masks_X2/results-Sample-x2"
    shutil.copyfile(results / "astronaut_x2_masks.png", output / "masks.png")
    run(folder, "tools/plot_masks.py", "--pre_train", weights, "--output", output / "channels.png")
    methods = ["--methods", "bicubic", weights, "hr"]
    for name, image, crop, target in (
        ("comparison.png", "astronaut", "190,296,96,84", output),
        ("limits.png", "chelsea", "150,170,72,48", folder),
    ):
        where = ["--image", SAMPLE / f"HR/{image}.png", "--crop", crop]
        run(folder, "tools/compare.py", *where, *methods, "--output", target / name)
    shrink(folder / "limits.png", output / "limits.png", LIMITS_WIDTH)
    run(folder, "tools/report.py", "experiment/masks_X2")
    try:
        photograph(folder / "experiment/masks_X2/report.html", output / "report.png")
    except InputError as error:
        print(f"left out: {error}", file=sys.stderr)
        return 1
    print(f"written to {output}")
    return 0


def run(folder: Path, program: str, *arguments: object) -> None:
    """Run a program of this project in a folder. Raises InputError if it fails."""
    done = subprocess.run([sys.executable, ROOT / program, *map(str, arguments)], cwd=folder, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise InputError(f"{program}: failed with exit code {done.returncode}; see its message above")


def shrink(source: Path, target: Path, width: int) -> None:
    """Write the picture `source` to `target`, `width` pixels wide."""
    with Image.open(source) as image:
        height = round(image.height * width / image.width)
        reduced = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    reduced.save(target, optimize=True)


def photograph(page: Path, target: Path) -> None:
    """Write a picture of the top of a page. Raises InputError if there is no browser."""
    try:
        from selenium import webdriver  # an optional package
    except ImportError:
        raise InputError(f"{target}: selenium is not installed; pip install selenium") from None
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        raise InputError(f"{target}: needs chromium and chromedriver; install them")
    options = webdriver.ChromeOptions()
    for flag in ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    width, height = REPORT_SIZE
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(page.as_uri())
        browser.save_screenshot(str(target))


if __name__ == "__main__":
    run_program(main)
