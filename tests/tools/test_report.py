import json
import re
import shutil

import numpy as np
import pytest
import torch

import main
from data.image import write_png
from option import flag_value
from program import InputError
from tools.report import _worst_region
from tools.report import main as report


@pytest.fixture
def tested(tmp_path, monkeypatch, make_set, tiny):
    """A run tested on two sets, with weights whose file name must be escaped in HTML."""
    monkeypatch.chdir(tmp_path)
    make_set("Set5", count=4, benchmark=True)
    make_set("Tiny", count=2, benchmark=True)
    torch.save(tiny.state_dict(), "w<b>.pt")
    line = "--dir_data data --data_test Set5+Tiny --pre_train w<b>.pt --test_only --save_results --save_masks --save"
    assert main.main([*line.split(), "mine"]) == 0
    for name in ("psnr.png", "density.png"):
        shutil.copy("experiment/mine/results-Set5-x2/img0_x2_SR.png", f"experiment/mine/{name}")
    return tmp_path / "experiment/mine"


def test_markdown_has_our_rows_next_to_the_published_ones(tested):
    report([str(tested)])
    lines = (tested / "report.md").read_text().splitlines()
    metrics = json.loads((tested / "results-Set5-x2/metrics.json").read_text())
    assert lines[0] == "# Results: mine"
    assert "| SMSR (paper) | 985K | 131.6 G | 59% |  |  | 38.00 / 0.9601 |  |" in lines
    (ours,) = (line for line in lines if line.startswith("| mine (SMSR)"))
    assert f"{metrics['psnr_y']:.2f} / {metrics['ssim_y']:.4f}" in ours
    for image in metrics["images"]:
        assert any(line.startswith(f"| {image['name']} | 20x24 | {image['psnr_y']:.2f} |") for line in lines)
    (mean, _) = (line for line in lines if line.startswith("| mean |"))
    densities = np.mean([image["mask_density"] for image in metrics["images"]], axis=0)
    assert mean.startswith(f"| mean |  | {metrics['psnr_y']:.2f} | {metrics['ssim_y']:.4f} |")
    assert mean.endswith(" | ".join(["", *(f"{density:.2f}" for density in densities)]) + " |")
    assert any("--save_masks" in line and f"torch {torch.__version__}" in line for line in lines)


def test_html_is_self_contained_and_escaped(tested):
    report([str(tested), "--output", "new"])
    page = (tested.parents[1] / "new/report.html").read_text()
    assert "w&lt;b&gt;.pt" in page
    assert "<b>" not in page
    assert page.count('class="slider"') == 3 + 2
    assert page.count("SMM 2: density") == 3 + 2
    (curves,) = re.findall('<div class="pictures curves">(.*?)</div>', page)
    assert curves.count("<img ") == 2
    assert "http://" not in page
    assert "https://" not in page


def test_missing_images_of_one_run_are_skipped(tested):
    shutil.copytree(tested, tested.with_name("bare"))
    for path in tested.with_name("bare").rglob("*.png"):
        path.unlink()
    report([str(tested.with_name("bare")), str(tested)])
    text = (tested.with_name("bare") / "report.md").read_text()
    assert "| bare (SMSR)" in text
    assert "| mine (SMSR)" in text
    page = (tested.with_name("bare") / "report.html").read_text()
    assert page.count('class="slider"') == 3 + 2  # of the other run


def test_runs_with_the_same_name_get_a_row_each(tested):
    other = tested.parent.parent / "other/mine"
    shutil.copytree(tested, other)
    path = other / "results-Set5-x2/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"psnr_y": 12.34, "ssim_y": 0.5}))
    report([str(tested), str(other)])
    text = (tested / "report.md").read_text()
    assert text.count("| mine (SMSR)") == 2
    assert "12.34 / 0.5000" in text


def test_options_are_shown_as_the_command_line_takes_them():
    assert flag_value("data_range", [[1, 3], [4, 4]]) == "1-3/4-4"
    assert flag_value("decay", [5, 8]) == "5-8"
    assert flag_value("data_test", ["Set5", "Set14"]) == "Set5+Set14"
    assert flag_value("reset", True) == ""


def test_slider_shows_the_region_with_the_largest_error():
    reference = np.zeros((50, 60, 3), np.uint8)
    sr = reference.copy()
    sr[30:34, 41:45] = 200
    top, left = _worst_region(sr, reference, 8)
    assert 26 <= top <= 30
    assert 37 <= left <= 41
    assert _worst_region(sr[:5, :6], reference[:5, :6], 8) == (0, 0)


def test_errors_name_the_file(tested):
    with pytest.raises(InputError, match="absent: no such folder"):
        report(["absent"])
    (tested.parent / "empty").mkdir()
    with pytest.raises(InputError, match="empty: contains no results"):
        report(["experiment/empty"])
    for path in tested.glob("results-*/metrics.json"):
        path.write_text("[")
    with pytest.raises(
        InputError, match=r"mine: contains no results that can be read .*Set5-x2/metrics\.json: not JSON"
    ):
        report([str(tested)])
    assert not (tested / "report.html").exists()


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_a_file_that_is_not_a_report_is_not_overwritten(tested, tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name}: already exists and is not a report; choose another --output"):
        report.main([str(tested), "--output", str(tmp_path / "mine")])
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["mine"]
    for _ in range(2):  # a report is replaced by a report
        report.main([str(tested)])


@pytest.mark.parametrize(
    ("file", "changed", "problem"),
    [
        ("metrics.json", {"parameters": "many"}, "parameters is 'many', not an integer >= 1"),
        ("metrics.json", {"psnr_y": [1]}, r"psnr_y is \[1\], not a number"),
        ("metrics.json", {"gmacs_dense_at_1280x720": 0}, "gmacs_dense_at_1280x720 is 0, not a finite number"),
        ("metrics.json", {"scale": -1}, "scale is -1"),
        ("metrics.json", {"images": []}, "images has 0 entries, not at least 1"),
        ("metrics.json", {"images": [{"name": "img0"}]}, "images.0.lr_shape is missing"),
        ("metrics.json", "[" * 100_000, "not JSON, or broken"),
        ("options.json", {"options": 1}, "options is 1, not a mapping"),
        ("options.json", {"versions": {"torch": 2}}, "versions.torch is 2, not text"),
        ("options.json", None, "No such file"),
    ],
    ids=str,
)
def test_results_that_cannot_be_read_are_named_and_left_out(tested, capsys, file, changed, problem):
    path = tested / "results-Tiny-x2" / file
    if changed is None:
        path.unlink()
    else:
        path.write_text(changed if isinstance(changed, str) else json.dumps(json.loads(path.read_text()) | changed))
    assert report([str(tested)]) == 1
    assert re.match(f"left out: {path}: {problem}.*; repeat the test\n$", capsys.readouterr().err)
    text = (tested / "report.md").read_text()
    assert "mine: Set5 x2" in text
    assert "mine: Tiny x2" not in text


def test_images_that_cannot_be_read_are_named_and_left_out(tested, capsys):
    folder = tested / "results-Set5-x2"
    hardest = min(json.loads((folder / "metrics.json").read_text())["images"], key=lambda row: row["psnr_y"])["name"]
    (folder / f"{hardest}_x2_mask1.png").write_bytes(b"broken")
    write_png(folder / f"{hardest}_x2_SR.png", np.zeros((9, 9, 3), np.uint8))
    assert report([str(tested)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert f"{hardest}_x2_SR.png: not the size of" in lines[0]
    assert f"{hardest}_x2_mask1.png: not an image, or broken" in lines[1]
    assert (tested / "report.html").read_text().count('class="slider"') == 2 + 2


def test_works_offline_in_a_browser(tested, browser):
    report([str(tested)])
    address = (tested / "report.html").as_uri()
    browser.set_window_size(400, 800)
    browser.get(address)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")  # on a phone

    slider = "document.querySelector('.slider')"
    clip = f"return {slider}.querySelector('.right').style.clipPath"
    assert "50%" in browser.execute_script(clip)
    browser.execute_script(
        f"const range = {slider}.querySelector('input'); range.value = 20; range.dispatchEvent(new Event('input'))"
    )
    assert "20%" in browser.execute_script(clip)
    shown = f"return {slider}.querySelector('.right').src"
    before = browser.execute_script(shown)
    browser.execute_script(
        f"const select = {slider}.parentElement.querySelectorAll('select')[1];"
        "select.value = 'HR'; select.dispatchEvent(new Event('change'))"
    )
    assert browser.execute_script(shown) != before
    assert browser.execute_script("return [...document.images].every(image => image.hidden || image.naturalWidth > 0)")

    column = (
        "return [...document.querySelectorAll('.sortable')[0].tBodies[0].rows].map(row => +row.cells[2].textContent)"
    )
    for order in (sorted, lambda values: sorted(values, reverse=True)):
        browser.execute_script("document.querySelectorAll('.sortable th')[2].click()")
        values = browser.execute_script(column)
        assert values == order(values)
    assert len(set(values)) > 1

    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} <= {address}
