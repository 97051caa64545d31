"""Make a report of test results and training curves: report.html, a single file that works offline, and report.md.

    python main.py --data_test Set5+Set14 ... --test_only --save_results --save_masks --save mine
    python tools/report.py experiment/mine

The report compares the runs, and the published numbers, on every set. For the hardest images it shows a slider between
bicubic, SR and HR (needs --save_results) and the masks (needs --save_masks). It has the curves of runs that were
trained, a table of all images, and the commands of the tests. A click copies a table as Markdown or LaTeX.
"""

import argparse
import base64
import html
import math
import shlex
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
from evaluation import compare, mask_densities
from files import write_whole
from loading import load_json
from option import Parser, count, flag_value, positive_int
from program import InputError, run_program
from summary import EMPTY, Row, comparable, draw_panels, read_history
from tools.tables import Table
from visualize import describe_density, to_svg

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


@dataclass(frozen=True)
class Run:
    """A run that was tested, trained, or both."""

    folder: Path
    results: Sequence[Result]  # sorted by set and scale
    history: Sequence[Row]  # one row per epoch


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="experiment/NAME", help="folders of runs")
    parser.add_argument("--output", type=Path, help="folder to write to (default: the folder of the first run)")
    parser.add_argument("--images", type=count, default=3, help="number of hardest images to show per set")
    parser.add_argument("--crop", type=positive_int, default=256, help="side of the part in the slider, in HR pixels")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    folder = args.output or args.runs[0]
    check_reports(folder)
    problems = []
    runs = [read_run(run, problems) for run in args.runs]
    results = [result for run in runs for result in run.results]
    sections = [
        *headline(results),
        *trainings(runs),
        *comparisons(results, args.images, args.crop, problems),
        *curves(runs),
        *image_tables(results),
        *commands(results),
    ]
    title = ", ".join(run.name for run in args.runs)
    template = string.Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    body = "\n".join([f"<h1>Results: {html.escape(title)}</h1>", *(section.html for section in sections)])
    page = template.substitute(title=html.escape(title), body=body)
    write_whole(folder / "report.html", page.encode(errors="backslashreplace"))  # names may not be UTF-8
    text = "\n\n".join([f"# Results: {title}", *(section.text for section in sections if section.text)])
    write_whole(folder / "report.md", (text + "\n").encode(errors="backslashreplace"))
    print(f"written to {folder / 'report.html'} and report.md")
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return 1 if problems else 0


def check_reports(folder: Path) -> None:
    """Raise InputError if the folder is a file, or the files to write exist in it and are not reports."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, not a folder; choose the folder of a run")
    for path, start in ((folder / "report.html", b"<h1>Results: "), (folder / "report.md", b"# Results: ")):
        if path.exists() and start not in path.read_bytes():
            raise InputError(f"{path}: already exists and is not a report; choose another --output")


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


def read_run(folder: Path, problems: list[str]) -> Run:
    """The results and the training of a run. What is damaged is left out and added to `problems`.

    Raises InputError if nothing is left.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; pass the folder of a run, e.g. experiment/NAME")
    results, history, damaged = [], [], []
    for path in sorted(folder.glob("results-*/metrics.json")):
        try:
            metrics, options = _read(path, METRICS), _read(path.with_name("options.json"), OPTIONS)
            results.append(Result(folder, path.parent, metrics, options))
        except InputError as error:
            damaged.append(str(error))
    if (folder / "log.csv").exists():
        try:
            history = read_history(folder)
        except InputError as error:
            damaged.append(str(error))
    if not results and not history:
        found = f"nothing that can be read ({damaged[0]})" if damaged else "neither results nor a training"
        raise InputError(f"{folder}: contains {found}; create results with main.py --test_only --save {folder.name}")
    problems += damaged
    return Run(folder, results, history)


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


def table(table: Table, kind: str = "") -> Section:
    """A table with buttons that copy it. kind: CSS class"""
    copies = "".join(
        f'<button type="button" data-copy="{html.escape(text)}">{name}</button>'
        for name, text in (("Markdown", table.markdown()), ("LaTeX", table.latex()))
    )
    return Section(
        f'<figure class="table {kind}"><div class="wide">{table.html()}</div>'
        f'<figcaption class="copy">Copy as {copies}</figcaption></figure>',
        table.markdown(),
    )


# ---- tables ----------------------------------------------------------------------------------------------------------

HEADLINE = (
    "set",
    "method",
    "PSNR (dB)",
    "SSIM",
    "active share",
    "multiply-adds (G)",
    "of unmasked",
    "parameters",
    "s per image",
)
HIGHER_IS_BETTER = {"PSNR (dB)": True, "SSIM": True, "multiply-adds (G)": False}


def headline(results: Sequence[Result]) -> Iterator[Section]:
    """One table per scale: on each set the published numbers and a row per run, the best numbers in bold."""
    for scale in sorted({result.metrics["scale"] for result in results}):
        at_scale = [result for result in results if result.metrics["scale"] == scale]
        rows, best = [], set()
        for name in dict.fromkeys(result.metrics["dataset"] for result in at_scale):
            group = [_published_row(scale, name)] if name in PUBLISHED.get(scale, {}) else []
            group += [_run_row(result) for result in at_scale if result.metrics["dataset"] == name]
            best |= {(len(rows) + row, column) for row, column in _best(group)}
            rows += [[name if row == 0 else "", *cells] for row, cells in enumerate(group)]
        yield heading(f"x{scale}")
        yield table(Table(HEADLINE, rows, n_names=2, best=frozenset(best)), kind="headline")
        note = "PSNR and SSIM on the Y channel; multiply-adds for an output of 1280x720, and as a share of the same "
        note += "network without masks." + (" The best number of each set is bold." if best else "")
        yield Section(f'<p class="note">{note}</p>')


def _published_row(scale: int, name: str) -> list[str]:
    paper = PUBLISHED[scale]
    psnr, ssim = paper[name]
    share = f"{paper['gmacs'] / paper['gmacs_dense']:.0%}"
    return ["SMSR (paper)", f"{psnr:.2f}", f"{ssim:.4f}", "-", f"{paper['gmacs']}", share, _thousands(paper), "-"]


def _run_row(result: Result) -> list[str]:
    metrics = result.metrics
    gmacs = metrics["gmacs_at_1280x720"]
    return [
        f"{result.run.name} ({metrics['model']})",
        _format(metrics["psnr_y"], ".2f"),
        _format(metrics["ssim_y"], ".4f"),
        f"{metrics['active_share']:.3f}",
        f"{gmacs:.1f}",
        f"{gmacs / metrics['gmacs_dense_at_1280x720']:.0%}",
        _thousands(metrics),
        f"{metrics['seconds_per_image']:.3f}",
    ]


def _thousands(counts: dict[str, Any]) -> str:
    return f"{counts['parameters'] / 1e3:.0f}K"


def _best(rows: Sequence[Sequence[str]]) -> Iterator[tuple[int, int]]:
    """(row, column of HEADLINE) of the best numbers of a set, as they are printed; none if there is nothing to beat."""
    for name, is_higher_better in HIGHER_IS_BETTER.items():
        column = HEADLINE.index(name)
        numbers = {row: float(cells[column - 1]) for row, cells in enumerate(rows) if cells[column - 1] != "-"}
        if len(numbers) > 1:
            best = (max if is_higher_better else min)(numbers.values())
            yield from ((row, column) for row, number in numbers.items() if number == best)


def image_tables(results: Sequence[Result]) -> Iterator[Section]:
    """The numbers of all images, and which modules have an empty mask on all of them."""
    for result in results:
        yield heading(f"{result.title}, per image")
        yield table(_image_table(result), kind="sortable")
        empty = np.flatnonzero((mask_densities(result.metrics) < EMPTY).all(0)) + 1
        if empty.size:
            modules = f"{'Module' if empty.size == 1 else 'Modules'} {', '.join(map(str, empty))}"
            note = f"{modules}: the mask is empty or nearly so on every image: little but dense channels is computed."
            yield Section(f'<p class="note">{note}</p>', note)


def _image_table(result: Result) -> Table:
    metrics, images = result.metrics, result.metrics["images"]
    densities = mask_densities(metrics).mean(0)
    perceptual = list(metrics.get("perceptual", {}))
    columns = ["image", "LR size", "PSNR (dB)", "SSIM", *perceptual, "active share", "time (s)"]
    columns += [f"density of mask {k + 1}" for k in range(len(densities))]
    rows = [_image_row(image["name"], "{1}x{0}".format(*image["lr_shape"]), image, perceptual) for image in images]
    means = metrics | {"seconds": metrics["seconds_per_image"], "mask_density": densities}
    return Table(columns, rows, footer=_image_row("mean", "", means, perceptual))


def _image_row(name: str, size: str, values: dict[str, Any], perceptual: Sequence[str]) -> list[str]:
    numbers = [_format(values["psnr_y"], ".2f"), _format(values["ssim_y"], ".4f")]
    numbers += [_format(values.get("perceptual", {}).get(metric), ".4f") for metric in perceptual]
    numbers += [f"{values['active_share']:.3f}", f"{values['seconds']:.3f}"]
    return [name, size, *numbers, *(f"{density:.2f}" for density in values["mask_density"])]


def _number(value: float | str | None, default: float) -> float:
    """A number of metrics.json, where null stands for nan and "inf" for infinity."""
    return default if value is None else float(value)


def _format(value: float | str | None, spec: str) -> str:
    return "-" if value is None else format(float(value), spec)


# ---- images, in HTML only --------------------------------------------------------------------------------------------


def trainings(runs: Iterable[Run]) -> Iterator[Section]:
    """A table of the runs that were trained: the best epoch by PSNR on the first validation set."""
    rows = []
    for run in runs:
        column = next((name for name in run.history[-1] if name.startswith("psnr")), None) if run.history else None
        rivals = comparable(run.history) if column else []
        scored = [row for row in rivals if math.isfinite(row.get(column, math.nan))]
        if scored:
            best = max(scored, key=lambda row: row[column])
            _, colors, images = column.split("_", 2)
            measured = [f"{images} ({colors.upper()})", f"{best[column]:.3f}"]
            share = best.get(f"active_share_{images}")
            rows.append(
                [
                    run.folder.name,
                    f"{len(run.history)}",
                    f"{best['epoch']:g}",
                    *measured,
                    f"{share:.3f}" if share else "-",
                ]
            )
    if rows:
        columns = ("run", "epochs", "best epoch", "validation set", "PSNR (dB)", "active share")
        yield heading("Training")
        yield table(Table(columns, rows, n_names=1))


def curves(runs: Iterable[Run]) -> Iterator[Section]:
    """The training curves of the runs that were trained."""
    for run in runs:
        figures = [
            f'<figure><img src="{_data_url("svg+xml", to_svg(figure))}" alt="{html.escape(title)}"></figure>'
            for title, figure in draw_panels(run.history)
        ]
        if figures:
            title = html.escape(f"{run.folder.name}: training")
            yield Section(f'<h2>{title}</h2><div class="pictures">{"".join(figures)}</div>')


def comparisons(results: Iterable[Result], n_images: int, size: int, problems: list[str]) -> Iterator[Section]:
    """Sliders and masks of the hardest images; files that cannot be read are left out and added to `problems`.

    Args:
        n_images: images to show per result
        size: side of the part that is shown, in HR pixels
    """
    for index, result in enumerate(results):
        figures, missing = [], set()
        for rank, row in enumerate(result.hardest(n_images)):
            try:
                figures.append(_figures(result, row, size, key=f"i{index}-{rank}", missing=missing))
            except InputError as error:
                problems.append(str(error))
        body = [f'<div class="pictures">{"".join(figures)}</div>'] if any(figures) else []
        body += [f'<p class="note">{html.escape(note)}</p>' for note in sorted(missing)]
        if body:
            yield Section("\n".join([f"<h2>{html.escape(result.title)}, the hardest images</h2>", *body]))


# The colors are those of visualize.density_map.
MASK_KEY = (
    '<div class="key"><p>Where a mask is dark and gray, its module computes only the dense channels. The mean counts '
    'the modules that compute a pixel in full:</p><p class="scale"><span>none</span><span class="bar"></span>'
    "<span>all</span></p></div>"
)


def _figures(result: Result, row: dict[str, Any], size: int, key: str, missing: set[str]) -> str:
    """The slider and the masks of the part of an image that has the largest error; reasons for gaps go to `missing`.

    key: prefix of the ids of the elements
    """
    images = _read_images(result, row["name"], missing)
    if not images:
        return ""
    scale = result.metrics["scale"]
    size = max(size // scale, 1)
    top, left = (
        offset // scale for offset in _worst_region(images["SR"], images.get("HR", images["bicubic"]), size * scale)
    )

    def part(image, scale):
        rows, columns = (slice(start * scale, (start + size) * scale) for start in (top, left))
        return _png_url(image[rows, columns])

    layers = {name: part(image, scale) for name, image in images.items()}
    masks = {name: part(image, 1) for name, image in _read_masks(result, row, missing).items()}
    height, width = (min(size, side // scale) for side in images["SR"].shape[:2])
    slider = _slider(_caption(row, images, scale), [*layers, *masks], key, aspect=f"{width} / {height}")
    hidden = "".join(_layer(key, name, url, "hidden") for name, url in layers.items())
    figures = "".join(
        f"<figure>{_layer(key, name, url)}<figcaption>{name}</figcaption></figure>" for name, url in masks.items()
    )
    return f"{slider}{hidden}" + (f'<div class="masks">{figures}{MASK_KEY}</div>' if masks else "")


def _layer(key: str, name: str, url: str, attribute: str = "") -> str:
    return f'<img id="{key}-{name.partition(":")[0]}" src="{url}" alt="{name}" {attribute}>'


def _caption(row: dict[str, Any], images: dict[str, np.ndarray], scale: int) -> str:
    """The name of an image with its quality, and that of bicubic upscaling."""
    parts = [f"<b>{html.escape(row['name'])}</b>"]
    if "HR" in images:
        bicubic = compare(images["bicubic"], images["HR"], scale)
        parts += [f"{name} {_quality(values)}" for name, values in (("bicubic", bicubic), ("SR", row))]
    return " · ".join(parts)


def _slider(caption: str, names: Sequence[str], key: str, aspect: str) -> str:
    """A slider between two of the layers `names`, which are elements with ids <key>-<name>."""

    def select(chosen, side):
        options = "".join(
            f'<option value="{key}-{name.partition(":")[0]}"{" selected" * (name == chosen)}>{name}</option>'
            for name in names
        )
        return f"<label>{side} <select>{options}</select></label>"

    return (
        f'<figure class="slider"><figcaption>{caption}</figcaption><div class="stage" style="aspect-ratio: {aspect}">'
        '<img alt="left"><img class="right" alt="right"><span class="tag"></span><span class="tag right"></span>'
        '<input type="range" min="0" max="100" step="0.5" value="50" aria-label="position of the divider">'
        f'<div class="divider"></div></div><div class="sides">{select("bicubic", "left")}{select("SR", "right")}</div>'
        "</figure>"
    )


def _quality(values: dict[str, Any]) -> str:
    return f"{_format(values['psnr_y'], '.2f')} dB / {_format(values['ssim_y'], '.4f')}"


def _read_images(result: Result, name: str, missing: set[str]) -> dict[str, np.ndarray]:
    """{method: uint8 array (sH, sW, 3)} with bicubic, SR and, if it exists, HR; {} if SR or LR is missing.

    Raises InputError if an image cannot be read or has another size.
    """
    scale, options = result.metrics["scale"], result.options["options"]
    sr_path = result.folder / f"{name}_x{scale}_SR.png"
    if not sr_path.is_file():
        missing.add("SR images were not saved; repeat the test with --save_results to see them here.")
        return {}
    try:
        hr_path, lr_path = find_set(result.metrics["dataset"], options["dir_data"], scale, options["dir_demo"]).pairs[
            name
        ]
    except (InputError, KeyError):
        missing.add("The images of the set were not found where the test read them, so there are no pictures.")
        return {}
    lr, sr = read_image(lr_path), read_image(sr_path)
    height, width = (scale * side for side in lr.shape[:2])
    hr = read_image(hr_path)[:height, :width] if hr_path else sr
    if not sr.shape == hr.shape == (height, width, 3):
        raise InputError(f"{sr_path}: not the size of {lr_path} times {scale}; repeat the test")
    return {"bicubic": upscale(lr, scale), "SR": sr} | ({"HR": hr} if hr_path else {})


def _read_masks(result: Result, row: dict[str, Any], missing: set[str]) -> dict[str, np.ndarray]:
    """{name: uint8 array (H, W, 3)} of the image under each mask, and of the mean of the masks, if they were saved."""
    stem = result.folder / f"{row['name']}_x{result.metrics['scale']}"
    paths = {
        f"mask {k + 1}: {describe_density(density)}": f"mask{k + 1}" for k, density in enumerate(row["mask_density"])
    }
    paths = {name: Path(f"{stem}_{part}.png") for name, part in (paths | {"mean of the masks": "density"}).items()}
    if not row["mask_density"] or not all(path.is_file() for path in paths.values()):
        if row["mask_density"]:
            missing.add("Masks were not saved; repeat the test with --save_masks to see them here.")
        return {}
    return {name: read_image(path) for name, path in paths.items()}


def _worst_region(sr: np.ndarray, reference: np.ndarray, size: int) -> tuple[int, int]:
    """(top, left) of the square in which two images (H, W, C) differ most."""
    error = ((sr.astype(np.float32) - reference) ** 2).mean(axis=2)
    window = (min(size, error.shape[1]), min(size, error.shape[0]))
    sums = cv2.boxFilter(error, -1, window, normalize=False, anchor=(0, 0), borderType=cv2.BORDER_CONSTANT)
    sums = sums[: error.shape[0] - window[1] + 1, : error.shape[1] - window[0] + 1]
    top, left = np.unravel_index(sums.argmax(), sums.shape)
    return int(top), int(left)


def _png_url(image: np.ndarray) -> str:
    return _data_url("png", iio.imwrite("<bytes>", image, extension=".png"))


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# ---- commands --------------------------------------------------------------------------------------------------------


def commands(results: Iterable[Result]) -> Iterator[Section]:
    """The command of each test, and the versions that it ran with."""
    tests = {}
    for result in results:
        changed, versions = result.options["changed"], result.options["versions"]
        flags = " ".join(_flag(key, value) for key, value in changed.items())
        facts = ", ".join(f"{key} {value}" for key, value in versions.items())
        tests.setdefault((result.run, flags, facts), []).append(result.metrics["dataset"])
    if tests:
        yield heading("Commands and versions")
    for (run, flags, facts), names in tests.items():
        title, command = f"{run.name}: {', '.join(names)}", f"python main.py {flags}"
        words = "".join(f"<span>{html.escape(word)} </span>" for word in command.replace(" --", "\n--").split("\n"))
        copy = f'<button type="button" data-copy="{html.escape(command)}">Copy</button>'
        yield Section(
            f'<h3>{html.escape(title)}</h3><pre>{words}</pre><p class="note copy">{copy} {html.escape(facts)}</p>',
            f"**{title}** ({facts})\n\n    {command}",
        )


def _flag(key: str, value: Any) -> str:
    value = flag_value(key, value)
    return f"--{key} {shlex.quote(value)}" if value else f"--{key}"


if __name__ == "__main__":
    run_program(main)
