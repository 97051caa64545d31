"""Make a report of test results and training curves: report.html, a single file that works offline, and report.md.

    python main.py --data_test Set5+Set14 ... --test_only --save_results --save_masks --save mine
    python tools/report.py experiment/mine

The report has a table like the paper's with the published numbers next to ours, a table of all images, the training
curves of runs that were trained and, for the hardest images, a slider between bicubic, SR and HR (needs --save_results)
and the masks (needs --save_masks).
"""

import argparse
import base64
import functools
import html
import json
import string
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import imageio.v3 as iio
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import schema
from data import find_set
from data.image import read_image
from data.resize import upscale
from evaluation import mask_densities
from loading import load_json
from option import Parser, count, flag_value, positive_int
from utility import InputError, run_program, write_whole

# Table 2 of the paper: multiply-adds (G) for an output of 1280x720, PSNR (dB) and SSIM on Y.
PUBLISHED = {
    2: {
        "parameters": 985e3,
        "gmacs": 131.6,
        "gmacs_dense": 224.1,
        "Set5": (38.00, 0.9601),
        "Set14": (33.64, 0.9179),
        "B100": (32.17, 0.8990),
        "Urban100": (32.19, 0.9284),
        "Manga109": (38.76, 0.9771),
    },
    3: {
        "parameters": 993e3,
        "gmacs": 67.8,
        "gmacs_dense": 100.5,
        "Set5": (34.40, 0.9270),
        "Set14": (30.33, 0.8412),
        "B100": (29.10, 0.8050),
        "Urban100": (28.25, 0.8536),
        "Manga109": (33.68, 0.9445),
    },
    4: {
        "parameters": 1006e3,
        "gmacs": 41.6,
        "gmacs_dense": 57.2,
        "Set5": (32.12, 0.8932),
        "Set14": (28.55, 0.7808),
        "B100": (27.55, 0.7351),
        "Urban100": (26.11, 0.7868),
        "Manga109": (30.54, 0.9085),
    },
}


@dataclass(frozen=True)
class Result:
    """A test of a run on one set."""

    run: Path  # folder of the run; two runs may have the same name
    folder: Path  # results-<set>-x<scale>
    metrics: dict[str, Any]  # metrics.json
    options: dict[str, Any]  # options.json

    @property
    def title(self) -> str:
        return f"{self.run.name}: {self.metrics['dataset']} x{self.metrics['scale']}"

    def hardest(self, n: int) -> list[dict[str, Any]]:
        """The n images with the lowest PSNR; images without a PSNR come first."""
        images = self.metrics["images"]
        return sorted(images, key=lambda row: _number(row["psnr_y"], -1.0))[:n]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="experiment/NAME", help="folders of runs")
    parser.add_argument("--output", type=Path, help="folder to write to (default: the folder of the first run)")
    parser.add_argument("--images", type=count, default=3, help="number of hardest images to show per set")
    parser.add_argument("--crop", type=positive_int, default=256, help="side of the part in the slider, in HR pixels")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    results, problems = [], []
    for run in args.runs:
        results += read_results(run, problems)
    folder = args.output or args.runs[0]
    compared = comparisons(results, args.images, args.crop, problems)
    sections = [*tables(results), *curves(args.runs), *compared, *settings(results)]
    title = ", ".join(run.name for run in args.runs)
    template = string.Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    body = "\n".join([f"<h1>Results: {html.escape(title)}</h1>", *(section.html for section in sections)])
    write_whole(folder / "report.html", template.substitute(title=html.escape(title), body=body).encode())
    text = "\n\n".join([f"# Results: {title}", *(section.text for section in sections if section.text)])
    write_whole(folder / "report.md", (text + "\n").encode())
    print(f"written to {folder / 'report.html'} and report.md")
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return 1 if problems else 0


# What main.py writes. A number that JSON cannot hold is null or "inf".
QUALITY = schema.optional(schema.any_of(schema.number(), schema.exactly("inf"), schema.exactly("-inf")))
PERCEPTUAL = {"perceptual": schema.mapping(rest=QUALITY)}  # with --metrics
ROW = {
    "name": schema.text,
    "lr_shape": schema.sequence(schema.integer(1), schema.integer(1)),
    "psnr_y": QUALITY,
    "ssim_y": QUALITY,
    "seconds": schema.number(0),
    "mask_density": schema.list_of(schema.number(0)),
    "active_share": schema.number(0),
}
METRICS = {
    "dataset": schema.text,
    "scale": schema.integer(1),
    "model": schema.text,
    "parameters": schema.integer(1),
    "psnr_y": QUALITY,
    "ssim_y": QUALITY,
    "seconds_per_image": schema.number(0),
    "gmacs_at_1280x720": schema.number(0),
    "gmacs_dense_at_1280x720": schema.number(1e-9),
    "active_share": schema.number(0),
    "images": schema.list_of(schema.mapping(ROW, PERCEPTUAL, rest=schema.anything), 1),
}
OPTIONS = {
    "changed": schema.mapping(rest=schema.anything),
    "options": schema.mapping({"dir_data": schema.text, "dir_demo": schema.text}, rest=schema.anything),
    "versions": schema.mapping(rest=schema.text),
}


def read_results(run: Path, problems: list[str]) -> list[Result]:
    """The results of a run, sorted by set and scale. Those that are damaged are left out and added to `problems`.

    Raises InputError if there are none.
    """
    if not run.is_dir():
        raise InputError(f"{run}: no such folder; pass the folder of a run, e.g. experiment/NAME")
    results, damaged = [], []
    for path in sorted(run.glob("results-*/metrics.json")):
        try:
            metrics, options = _read(path, METRICS), _read(path.with_name("options.json"), OPTIONS)
            results.append(Result(run, path.parent, metrics, options))
        except InputError as error:
            damaged.append(str(error))
    if not results:
        found = f"no results that can be read ({damaged[0]})" if damaged else "no results"
        raise InputError(f"{run}: contains {found}; create them with main.py --test_only --save {run.name}")
    problems += damaged
    return results


def _read(path, entries):
    content = load_json(path, "repeat the test")
    schema.check(content, schema.mapping(entries, PERCEPTUAL, rest=schema.anything), path, "repeat the test")
    return content


# ---- sections --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    html: str
    text: str = ""  # the same in Markdown; "" if it is for HTML only


def heading(title: str) -> Section:
    return Section(f"<h2>{html.escape(title)}</h2>", f"## {title}")


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    classes: Sequence[str] | None = None,
    kind: str = "",
    footer: Sequence[str] = (),
) -> Section:
    """A table.

    Args:
        columns: headings
        rows: one string per column
        classes: CSS class of each row
        kind: CSS class of the table: "sortable" or "options"
        footer: a last row that stays in place when the table is sorted; empty: none
    """
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(_row(row, name) for row, name in zip(rows, classes or [""] * len(rows), strict=True))
    foot = _row(footer) if footer else ""
    lines = [columns, ["---"] * len(columns), *rows, *([footer] if footer else [])]
    return Section(
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        f"<tfoot>{foot}</tfoot></table></div>",
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines),
    )


def _row(cells: Sequence[str], name: str = "") -> str:
    return f'<tr class="{name}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(results: Sequence[Result]) -> Iterator[Section]:
    """One table of all sets per scale, with the published numbers, then one table of all images per result."""
    for scale in sorted({result.metrics["scale"] for result in results}):
        yield heading(f"x{scale}")
        yield _scale_table(scale, [result for result in results if result.metrics["scale"] == scale])
    for result in results:
        yield heading(f"{result.title}, per image")
        yield _image_table(result)


def _scale_table(scale: int, results: Sequence[Result]) -> Section:
    """The results at one scale, one row per run."""
    sets = list(dict.fromkeys(result.metrics["dataset"] for result in results))
    columns = ["method", "parameters", "multiply-adds at 1280x720", "of unmasked", "active share", "s / image"]
    rows, classes = [], []
    if scale in PUBLISHED:
        rows.append(_published_row(scale, sets))
        classes.append("published")
    for run in dict.fromkeys(result.run for result in results):
        rows.append(_run_row([result for result in results if result.run == run], sets))
        classes.append("")
    return table([*columns, *sets], rows, classes)


def _published_row(scale: int, sets: Iterable[str]) -> list[str]:
    paper = PUBLISHED[scale]
    costs = [f"{paper['parameters'] / 1e3:.0f}K", f"{paper['gmacs']} G"]
    costs += [f"{paper['gmacs'] / paper['gmacs_dense']:.0%}", "", ""]
    return ["SMSR (paper)", *costs, *(_quality(*paper.get(name, (None, None))) for name in sets)]


def _run_row(results: Sequence[Result], sets: Iterable[str]) -> list[str]:
    """The row of one run: its costs are means over the sets that it was tested on."""
    metrics_of = {result.metrics["dataset"]: result.metrics for result in results}
    keys = ("gmacs_at_1280x720", "gmacs_dense_at_1280x720", "active_share", "seconds_per_image")
    means = [float(np.mean([float(metrics[key]) for metrics in metrics_of.values()])) for key in keys]
    gmacs, gmacs_dense, active_share, seconds = means
    first = results[0].metrics
    costs = [f"{first['parameters'] / 1e3:.0f}K", f"{gmacs:.1f} G", f"{gmacs / gmacs_dense:.0%}"]
    costs += [f"{active_share:.3f}", f"{seconds:.3f}"]
    quality = [_set_quality(metrics_of.get(name, {})) for name in sets]
    return [f"{results[0].run.name} ({first['model']})", *costs, *quality]


def _set_quality(metrics: dict[str, Any]) -> str:
    """PSNR, SSIM and the other metrics of a set."""
    perceptual = [f"{name} {_format(value, '.4f')}" for name, value in metrics.get("perceptual", {}).items()]
    return ", ".join(filter(None, [_quality(metrics.get("psnr_y"), metrics.get("ssim_y")), *perceptual]))


def _image_table(result: Result) -> Section:
    metrics, images = result.metrics, result.metrics["images"]
    densities = mask_densities(metrics).mean(0)
    perceptual = list(metrics.get("perceptual", {}))
    columns = ["image", "LR size", "PSNR", "SSIM", *perceptual, "active share", "s"]
    columns += [f"density {k + 1}" for k in range(len(densities))]
    rows = [_image_row(image["name"], "{}x{}".format(*image["lr_shape"]), image, perceptual) for image in images]
    means = metrics | {"seconds": metrics["seconds_per_image"], "mask_density": densities}
    return table(columns, rows, kind="sortable", footer=_image_row("mean", "", means, perceptual))


def _image_row(name: str, size: str, values: dict[str, Any], perceptual: Sequence[str]) -> list[str]:
    numbers = [_format(values["psnr_y"], ".2f"), _format(values["ssim_y"], ".4f")]
    numbers += [_format(values.get("perceptual", {}).get(metric), ".4f") for metric in perceptual]
    numbers += [f"{values['active_share']:.3f}", f"{values['seconds']:.3f}"]
    return [name, size, *numbers, *(f"{density:.2f}" for density in values["mask_density"])]


def _number(value: float | str | None, default: float) -> float:
    """A number of metrics.json, where null stands for nan and "inf" for infinity."""
    return default if value is None else float(value)


def _format(value: float | str | None, spec: str) -> str:
    return "" if value is None else format(float(value), spec)


def _quality(psnr: float | str | None, ssim: float | str | None) -> str:
    return " / ".join(text for text in (_format(psnr, ".2f"), _format(ssim, ".4f")) if text)


# ---- images, in HTML only --------------------------------------------------------------------------------------------


def curves(runs: Iterable[Path]) -> Iterator[Section]:
    """The training curves of the runs that have any."""
    for run in runs:
        files = [run / name for name in ("psnr.png", "active_share.png", "density.png", "loss.png", "masks.png")]
        files = [path for path in files if path.is_file()]
        if files:
            figures = "".join(_figure(f"data:image/png;base64,{_base64(path.read_bytes())}", "") for path in files)
            title = html.escape(f"{run.name}: training")
            yield Section(f'<h2>{title}</h2><div class="pictures curves">{figures}</div>')


def comparisons(results: Iterable[Result], n_images: int, size: int, problems: list[str]) -> Iterator[Section]:
    """Sliders and masks of the hardest images; files that cannot be read are left out and added to `problems`.

    Args:
        n_images: images to show per result
        size: side of the part in the slider, in HR pixels
    """
    for index, result in enumerate(results):
        figures = []
        for rank, row in enumerate(result.hardest(n_images)):
            for figure in (functools.partial(_slider, size=size, key=f"i{index}-{rank}"), _masks):
                try:
                    figures.append(figure(result, row))
                except InputError as error:
                    problems.append(str(error))
        if any(figures):
            title = html.escape(f"{result.title}: the hardest images")
            yield Section("\n".join([f"<h2>{title}</h2>", *filter(None, figures)]))


def _slider(result: Result, row: dict[str, Any], size: int, key: str) -> str:
    """A slider between the methods, of the part of an image with the largest error; "" if an image is missing.

    key: prefix of the ids of its elements
    """
    images = _read_images(result, row["name"])
    if not images:
        return ""
    top, left = _worst_region(images["SR"], images.get("HR", images["bicubic"]), size)
    parts = {method: image[top : top + size, left : left + size] for method, image in images.items()}
    hidden = "".join(f'<img id="{key}-{m}" src="{_data_url(part)}" alt="" hidden>' for m, part in parts.items())
    ids = html.escape(json.dumps({method: f"{key}-{method}" for method in parts}))

    def select(chosen):
        options = "".join(f"<option{' selected' * (method == chosen)}>{method}</option>" for method in parts)
        return f'<select aria-label="image">{options}</select>'

    caption = html.escape(f"{row['name']} {_quality(row['psnr_y'], row['ssim_y'])}")
    return (
        f"<figure>{hidden}<figcaption>{caption}: {select('bicubic')} left, {select('SR')} right</figcaption>"
        f"<div class=\"slider\" data-images='{ids}'>"
        '<img alt="left"><img class="right" alt="right">'
        f'<input type="range" min="0" max="100" value="50" aria-label="position"></div></figure>'
    )


def _read_images(result: Result, name: str) -> dict[str, np.ndarray]:
    """{method: uint8 array (sH, sW, 3)} with bicubic, SR and, if it exists, HR; {} if SR or LR is missing.

    Raises InputError if an image cannot be read or has another size.
    """
    scale, options = result.metrics["scale"], result.options["options"]
    sr_path = result.folder / f"{name}_x{scale}_SR.png"
    try:
        found = find_set(result.metrics["dataset"], options["dir_data"], scale, options["dir_demo"])
    except InputError:
        return {}
    if name not in found.pairs or not sr_path.is_file():
        return {}
    hr_path, lr_path = found.pairs[name]
    lr, sr = read_image(lr_path), read_image(sr_path)
    height, width = (scale * side for side in lr.shape[:2])
    hr = read_image(hr_path)[:height, :width] if hr_path else sr
    if not sr.shape == hr.shape == (height, width, 3):
        raise InputError(f"{sr_path}: not the size of {lr_path} times {scale}; repeat the test")
    return {"bicubic": upscale(lr, scale), "SR": sr} | ({"HR": hr} if hr_path else {})


def _worst_region(sr: np.ndarray, reference: np.ndarray, size: int) -> tuple[int, int]:
    """(top, left) of the square in which two images (H, W, C) differ most."""
    error = ((sr.astype(np.float32) - reference) ** 2).mean(axis=2)
    window = (min(size, error.shape[1]), min(size, error.shape[0]))
    sums = cv2.boxFilter(error, -1, window, normalize=False, anchor=(0, 0), borderType=cv2.BORDER_CONSTANT)
    sums = sums[: error.shape[0] - window[1] + 1, : error.shape[1] - window[0] + 1]
    top, left = np.unravel_index(sums.argmax(), sums.shape)
    return int(top), int(left)


def _masks(result: Result, row: dict[str, Any]) -> str:
    """The masks of an image; "" if they were not saved."""
    name = f"{row['name']}_x{result.metrics['scale']}"
    figures = []
    for k, density in enumerate(row["mask_density"]):
        path = result.folder / f"{name}_mask{k + 1}.png"
        if path.is_file():
            figures.append(_figure(_data_url(read_image(path)), f"SMM {k + 1}: density {density:.2f}"))
    return f'<div class="pictures masks">{"".join(figures)}</div>' if figures else ""


def _figure(source: str, caption: str) -> str:
    return f'<figure><img src="{source}" alt=""><figcaption>{html.escape(caption)}</figcaption></figure>'


def _data_url(image: np.ndarray) -> str:
    return f"data:image/png;base64,{_base64(iio.imwrite('<bytes>', image, extension='.png'))}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


# ---- options ---------------------------------------------------------------------------------------------------------


def settings(results: Iterable[Result]) -> Iterator[Section]:
    """The options that differ from the defaults, and the versions, of each test."""
    yield heading("Options and versions")
    rows = []
    for result in results:
        changed, versions = result.options["changed"], result.options["versions"]
        flags = " ".join(f"--{key} {flag_value(key, value)}" for key, value in changed.items())
        rows.append([result.title, flags, ", ".join(f"{key} {value}" for key, value in versions.items())])
    yield table(["test", "options", "versions"], rows, kind="options")


if __name__ == "__main__":
    run_program(main)
