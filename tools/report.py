"""Make a report of what runs and tests left: report.html, one file that needs no network, and report.md.

    python main.py --data_test Set5+Set14 ... --test_only --save_results --save_masks --save mine
    python tools/report.py experiment/mine

It holds a table like the paper's with the published numbers beside ours, all images, training curves where a run has
them, and of the hardest images a slider (bicubic, SR, HR; with --save_results) and the masks (with --save_masks).
"""

import argparse
import base64
import html
import json
import string
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import find_set
from data.image import read_image
from data.resize import upscale
from option import Parser, count, positive_int
from utility import InputError, run_program, write_whole

# The paper's table 2: multiply-adds (G) at an output of 1280x720, PSNR and SSIM on Y.
PUBLISHED = {
    2: {
        "parameters": 985e3, "gmacs": 131.6, "gmacs_dense": 224.1,
        "Set5": (38.00, 0.9601), "Set14": (33.64, 0.9179), "B100": (32.17, 0.8990), "Urban100": (32.19, 0.9284),
        "Manga109": (38.76, 0.9771),
    },
    3: {
        "parameters": 993e3, "gmacs": 67.8, "gmacs_dense": 100.5,
        "Set5": (34.40, 0.9270), "Set14": (30.33, 0.8412), "B100": (29.10, 0.8050), "Urban100": (28.25, 0.8536),
        "Manga109": (33.68, 0.9445),
    },
    4: {
        "parameters": 1006e3, "gmacs": 41.6, "gmacs_dense": 57.2,
        "Set5": (32.12, 0.8932), "Set14": (28.55, 0.7808), "B100": (27.55, 0.7351), "Urban100": (26.11, 0.7868),
        "Manga109": (30.54, 0.9085),
    },
}  # fmt: skip


@dataclass
class Result:
    """A test of a run on one set: the folder results-<set>-x<scale>. Runs are told apart by their folders."""

    run: Path
    folder: Path
    metrics: dict
    options: dict

    @property
    def title(self):
        return f"{self.run.name}: {self.metrics['dataset']} x{self.metrics['scale']}"

    def hardest(self, n):
        """The n images of lowest PSNR; of those that have none, the first."""
        images = self.metrics["images"]
        return sorted(images, key=lambda row: _number(row["psnr_y"], -1.0))[:n]


def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="experiment/NAME")
    parser.add_argument("--output", type=Path, help="folder to write to (default: that of the first run)")
    parser.add_argument("--images", type=count, default=3, help="hardest images to show of each set")
    parser.add_argument("--crop", type=positive_int, default=256, help="HR pixels of a side that the slider shows")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    results = [result for run in args.runs for result in read_results(run)]
    folder = args.output or args.runs[0]
    sections = [*tables(results), *curves(args.runs), *looks(results, args.images, args.crop), *settings(results)]
    title = ", ".join(run.name for run in args.runs)
    template = string.Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    body = "\n".join([f"<h1>Results: {html.escape(title)}</h1>", *(section.html for section in sections)])
    write_whole(folder / "report.html", template.substitute(title=html.escape(title), body=body).encode())
    text = "\n\n".join([f"# Results: {title}", *(section.text for section in sections if section.text)])
    write_whole(folder / "report.md", (text + "\n").encode())
    print(f"written to {folder / 'report.html'} and report.md")


def read_results(run):
    """The `Result`s of a run, by set and scale. Raises InputError."""
    if not run.is_dir():
        raise InputError(f"{run}: no such folder; give that of a run, experiment/NAME")
    results = []
    for path in sorted(run.glob("results-*/metrics.json")):
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
            options = json.loads((path.parent / "options.json").read_text(encoding="utf-8"))
            result = Result(run, path.parent, metrics, options)
            list(tables([result]))  # all that is needed is there
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: is broken, or not of this version ({error!r}); test anew") from None
        results.append(result)
    if not results:
        raise InputError(f"{run}: holds no results; make some with main.py --test_only --save {run.name}")
    return results


# ---- sections: the same in HTML and in Markdown ----------------------------------------------------------------------


@dataclass
class Section:
    html: str
    text: str = ""


def heading(title):
    return Section(f"<h2>{html.escape(title)}</h2>", f"## {title}")


def table(columns, rows, classes=None, kind=""):
    """Rows of strings; in HTML with `classes` of the rows and the class `kind`: "sortable" or "options"."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f'<tr class="{name}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row, name in zip(rows, classes or [""] * len(rows), strict=True)
    )
    lines = [columns, ["---"] * len(columns), *rows]
    return Section(
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>',
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines),
    )


def tables(results):
    """A table of all sets for each scale, with the published rows, then all images of each set."""
    for scale in sorted({result.metrics["scale"] for result in results}):
        mine = [result for result in results if result.metrics["scale"] == scale]
        sets = list(dict.fromkeys(result.metrics["dataset"] for result in mine))
        yield heading(f"x{scale}")
        columns = ["method", "parameters", "multiply-adds at 1280x720", "of dense", "active share", "s / image"]
        rows, classes = [], []
        if scale in PUBLISHED:
            paper = PUBLISHED[scale]
            costs = [f"{paper['parameters'] / 1e3:.0f}K", f"{paper['gmacs']} G"]
            costs += [f"{paper['gmacs'] / paper['gmacs_dense']:.0%}", "", ""]
            rows.append(["SMSR, the paper", *costs, *(_pair(*paper.get(name, (None, None))) for name in sets)])
            classes.append("published")
        for run in dict.fromkeys(result.run for result in mine):
            own = {result.metrics["dataset"]: result for result in mine if result.run == run}
            summaries = [_summary(result) for result in own.values()]
            gmacs, dense, active, seconds = (float(np.mean(values)) for values in zip(*summaries, strict=True))
            first = next(iter(own.values())).metrics
            costs = [f"{first['parameters'] / 1e3:.0f}K", f"{gmacs:.1f} G", f"{gmacs / dense:.0%}"]
            costs += [f"{active:.3f}", f"{seconds:.3f}"]
            quality = [own[name].metrics if name in own else {} for name in sets]
            quality = [_pair(metrics.get("psnr_y"), metrics.get("ssim_y")) for metrics in quality]
            rows.append([f"{run.name} ({first['model']})", *costs, *quality])
            classes.append("")
        yield table([*columns, *sets], rows, classes)
    for result in results:
        yield heading(f"{result.title}, image by image")
        modules = range(len(result.metrics["images"][0]["mask_density"]))
        columns = ["image", "LR size", "PSNR", "SSIM", "active share", "s", *(f"mask {k + 1}" for k in modules)]
        yield table(columns, [_row(image) for image in result.metrics["images"]], kind="sortable")


def _summary(result):
    keys = ("gmacs_at_1280x720", "gmacs_dense_at_1280x720", "active_share", "seconds_per_image")
    return [float(result.metrics[key]) for key in keys]


def _row(image):
    height, width = image["lr_shape"]
    numbers = [_text(image["psnr_y"], ".2f"), _text(image["ssim_y"], ".4f"), f"{image['active_share']:.3f}"]
    densities = [f"{density:.2f}" for density in image["mask_density"]]
    return [image["name"], f"{height}x{width}", *numbers, f"{image['seconds']:.3f}", *densities]


def _number(value, absent):
    """metrics.json says null for no number and "inf" for infinity."""
    return absent if value is None else float(value)


def _text(value, form):
    return "" if value is None else format(float(value), form)


def _pair(psnr, ssim):
    return " / ".join(text for text in (_text(psnr, ".2f"), _text(ssim, ".4f")) if text)


def curves(runs):
    """The curves of those runs that were trained, in HTML alone."""
    for run in runs:
        files = [run / name for name in ("psnr.png", "active_share.png", "loss.png", "masks.png")]
        files = [path for path in files if path.is_file()]
        if files:
            figures = "".join(_figure(f"data:image/png;base64,{_base64(path.read_bytes())}", "") for path in files)
            title = html.escape(f"{run.name}: training")
            yield Section(f'<h2>{title}</h2><div class="pictures curves">{figures}</div>')


def looks(results, n_images, size):
    """Sliders and masks of the hardest images, in HTML alone."""
    for index, result in enumerate(results):
        shown = []
        for rank, row in enumerate(result.hardest(n_images)):
            shown.append(_slider(result, row, size, f"i{index}-{rank}"))
            shown.append(_masks(result, row))
        if any(shown):
            yield Section(
                "\n".join([f"<h2>{html.escape(result.title)}: the hardest images</h2>", *filter(None, shown)])
            )


def _slider(result, row, size, key):
    """Bicubic, SR and HR of the part of an image that is farthest off; nothing where one of them is not there."""
    scale, name = result.metrics["scale"], row["name"]
    sr_path = result.folder / f"{name}_x{scale}_SR.png"
    try:
        asked = result.options["options"]
        images = find_set(result.metrics["dataset"], asked["dir_data"], scale, asked["dir_demo"])
        hr_path, lr_path = images.pairs[name]
        lr, sr = read_image(lr_path), read_image(sr_path)
        pictures = {"bicubic": upscale(lr, scale), "SR": sr}
        if hr_path:
            pictures["HR"] = read_image(hr_path)[: sr.shape[0], : sr.shape[1]]
    except (InputError, KeyError):
        return ""
    top, left = _farthest(sr, pictures.get("HR", pictures["bicubic"]), size)
    parts = {method: image[top : top + size, left : left + size] for method, image in pictures.items()}
    hidden = "".join(f'<img id="{key}-{m}" src="{_data(part)}" alt="" hidden>' for m, part in parts.items())
    ids = html.escape(json.dumps({method: f"{key}-{method}" for method in parts}))

    def select(chosen):
        options = "".join(f"<option{' selected' * (method == chosen)}>{method}</option>" for method in parts)
        return f'<select aria-label="image">{options}</select>'

    caption = html.escape(f"{name} {_pair(row['psnr_y'], row['ssim_y'])}")
    return (
        f"<figure>{hidden}<figcaption>{caption}: {select('bicubic')} left, {select('SR')} right</figcaption>"
        f"<div class=\"slider\" data-images='{ids}'>"
        '<img alt="left"><img class="right" alt="right">'
        f'<input type="range" min="0" max="100" value="50" aria-label="position"></div></figure>'
    )


def _farthest(sr, reference, size):
    """(top, left) of the square in which two images differ most."""
    error = ((sr.astype(np.float32) - reference) ** 2).mean(axis=2)
    window = (min(size, error.shape[1]), min(size, error.shape[0]))
    sums = cv2.boxFilter(error, -1, window, normalize=False, anchor=(0, 0), borderType=cv2.BORDER_CONSTANT)
    sums = sums[: error.shape[0] - window[1] + 1, : error.shape[1] - window[0] + 1]
    return np.unravel_index(sums.argmax(), sums.shape)


def _masks(result, row):
    name = f"{row['name']}_x{result.metrics['scale']}"
    figures = []
    for k, density in enumerate(row["mask_density"]):
        path = result.folder / f"{name}_mask{k + 1}.png"
        if path.is_file():
            figures.append(_figure(_data(read_image(path)), f"module {k + 1}: density {density:.2f}"))
    return f'<div class="pictures masks">{"".join(figures)}</div>' if figures else ""


def _figure(source, caption):
    return f'<figure><img src="{source}" alt=""><figcaption>{html.escape(caption)}</figcaption></figure>'


def _data(image):
    return f"data:image/png;base64,{_base64(iio.imwrite('<bytes>', image, extension='.png'))}"


def _base64(content):
    return base64.b64encode(content).decode()


def settings(results):
    """What each test was started with that differs from the defaults, and the versions it ran on."""
    yield heading("Options and versions")
    rows = []
    for result in results:
        changed, versions = result.options.get("changed", {}), result.options.get("versions", {})
        asked = " ".join(f"--{key} {_value(key, value)}" for key, value in changed.items())
        rows.append([result.title, asked, ", ".join(f"{key} {value}" for key, value in versions.items())])
    yield table(["test", "options", "versions"], rows, kind="options")


def _value(key, value):
    """As it is written on the command line."""
    if key == "data_range":
        return "/".join("-".join(map(str, span)) for span in value)
    if isinstance(value, list):
        return {"decay": "-", "betas": " "}.get(key, "+").join(map(str, value))
    return "" if value is True else str(value)


if __name__ == "__main__":
    run_program(main)
