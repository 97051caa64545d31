import base64
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree

import numpy as np
import pytest
import torch

import main
from data.image import write_png
from option import flag_value
from program import InputError
from summary import write_history
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
    write_history(
        tmp_path / "experiment/mine", [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0, "density_1": 0.5}]
    )
    return tmp_path / "experiment/mine"


def test_markdown_has_our_rows_next_to_the_published_ones(tested):
    report([str(tested)])
    lines = (tested / "report.md").read_text().splitlines()
    metrics = json.loads((tested / "results-Set5-x2/metrics.json").read_text())
    assert lines[0] == "# Results: mine"
    (paper,) = (index for index, line in enumerate(lines) if line.startswith("| Set5 | SMSR (paper)"))
    assert lines[paper] == "| Set5 | SMSR (paper) | **38.00** | **0.9601** | - | 131.6 | 59% | 985K | - |"
    numbers = [f"{metrics['psnr_y']:.2f}", f"{metrics['ssim_y']:.4f}", f"{metrics['active_share']:.3f}"]
    numbers.append(f"**{metrics['gmacs_at_1280x720']:.1f}**")
    assert lines[paper + 1].startswith(f"|  | mine (SMSR) | {' | '.join(numbers)} | ")
    for image in metrics["images"]:
        assert any(line.startswith(f"| {image['name']} | 24x20 | {image['psnr_y']:.2f} |") for line in lines)
    (mean, _) = (line for line in lines if line.startswith("| mean |"))
    densities = np.mean([image["mask_density"] for image in metrics["images"]], axis=0)
    assert mean.startswith(f"| mean |  | {metrics['psnr_y']:.2f} | {metrics['ssim_y']:.4f} |")
    assert mean.endswith(" | ".join(["", *(f"{density:.2f}" for density in densities)]) + " |")


def test_the_command_of_a_test_can_be_run_again(tested):
    report([str(tested)])
    text = (tested / "report.md").read_text()
    (command,) = re.findall("^    python (.*)$", text, re.MULTILINE)  # both sets were tested by one
    assert f"torch {torch.__version__}" in text
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    _, *words = words.stdout.splitlines()
    before = json.loads((tested / "results-Tiny-x2/metrics.json").read_text())
    assert main.main([*words, "--reset"]) == 0
    assert json.loads((tested / "results-Tiny-x2/metrics.json").read_text())["psnr_y"] == before["psnr_y"]


def test_html_is_self_contained_and_escaped(tested):
    report([str(tested), "--output", "new"])
    page = (tested.parents[1] / "new/report.html").read_text()
    assert "w&lt;b&gt;.pt" in page
    assert "w<b>" not in page
    assert page.count('class="slider"') == 3 + 2
    assert len(re.findall("<figcaption>mask 2: ", page)) == 3 + 2
    assert page.count("<figcaption>mean of the masks") == 3 + 2
    curves = re.findall('data:image/svg.xml;base64,([^"]+)', page)
    assert len(curves) == 2  # loss, mask density
    for curve in curves:
        xml.etree.ElementTree.fromstring(base64.b64decode(curve))
    assert "http://" not in page
    assert "https://" not in page


def test_names_that_are_not_utf_8_are_escaped(tested):
    path = tested / "results-Tiny-x2/metrics.json"
    path.write_text(path.read_text().replace("img0", "caf\\udce9"))
    report([str(tested)])
    for name in ("report.html", "report.md"):
        assert "caf\\udce9" in (tested / name).read_text()


def test_a_run_that_was_only_trained_shows_its_curves(tested):
    trained = tested.with_name("trained")
    write_history(trained, [{"epoch": epoch, "loss": 1 / epoch, "psnr_y_Set5": 30.0} for epoch in (1, 2)])
    report([str(trained), str(tested)])
    page = (trained / "report.html").read_text()
    assert "trained: training" in page
    assert page.count('alt="PSNR, Set5, Y"') == 1
    assert page.count('class="slider"') == 3 + 2
    report([str(trained)])
    assert (trained / "report.md").read_text().endswith("| trained | 2 | 1 | Set5 (Y) | 30.000 | - |\n")


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
    assert page.count("SR images were not saved; repeat the test with --save_results") == 2  # one per set


def test_missing_masks_and_sets_are_explained(tested):
    for path in tested.glob("results-Set5-x2/*_mask1.png"):
        path.unlink()
    shutil.rmtree("data/benchmark/Tiny")
    report([str(tested)])
    page = (tested / "report.html").read_text()
    assert page.count('class="slider"') == 3
    assert page.count("Masks were not saved; repeat the test with --save_masks") == 1
    assert page.count("The images of the set were not found") == 1


def test_runs_with_the_same_name_get_a_row_each(tested):
    other = tested.parent.parent / "other/mine"
    shutil.copytree(tested, other)
    path = other / "results-Set5-x2/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"psnr_y": 12.34, "ssim_y": 0.5}))
    report([str(tested), str(other)])
    text = (tested / "report.md").read_text()
    assert text.count("| mine (SMSR)") == 2 * 2  # sets
    assert "| 12.34 | 0.5000 |" in text


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
    with pytest.raises(InputError, match="empty: contains neither results nor a training"):
        report(["experiment/empty"])
    for path in tested.glob("results-*/metrics.json"):
        path.write_text("[")
    (tested / "log.csv").write_text("epoch\none")
    with pytest.raises(InputError, match=r"mine: contains nothing that can be read .*Set5-x2/metrics\.json: not JSON"):
        report([str(tested)])
    assert not (tested / "report.html").exists()


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_a_file_that_is_not_a_report_is_not_overwritten(tested, tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name}: already exists and is not a report; choose another --output"):
        report([str(tested), "--output", str(tmp_path / "mine")])
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["mine"]
    for _ in range(2):  # a report is replaced by a report
        report([str(tested)])


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
    assert "Tiny" not in text.replace("Set5+Tiny", "")


@pytest.mark.parametrize(
    "content",
    [b"", b"epoch\n", b"epoch\n1,2", b"loss\n1", b"epoch,loss\n1", b"epoch\n\0", b"epoch\nnan", b"\xff", b'epoch\n"1'],
)
def test_a_log_that_cannot_be_read_is_named_and_left_out(tested, capsys, content):
    (tested / "log.csv").write_bytes(content)
    assert report([str(tested)]) == 1
    assert re.fullmatch("left out: .*log.csv: is not the log of a training, or damaged; .*\n", capsys.readouterr().err)


def test_images_that_cannot_be_read_are_named_and_left_out(tested, capsys):
    folder = tested / "results-Set5-x2"
    images = sorted(json.loads((folder / "metrics.json").read_text())["images"], key=lambda row: row["psnr_y"])
    hardest = [row["name"] for row in images]
    write_png(folder / f"{hardest[0]}_x2_SR.png", np.zeros((9, 9, 3), np.uint8))
    (folder / f"{hardest[1]}_x2_mask1.png").write_bytes(b"broken")
    assert report([str(tested)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert f"{hardest[0]}_x2_SR.png: not the size of" in lines[0]
    assert f"{hardest[1]}_x2_mask1.png: not an image, or broken" in lines[1]
    assert (tested / "report.html").read_text().count('class="slider"') == 1 + 2


@pytest.fixture
def opened(tested, browser):
    """The browser with the report, on a phone in dark mode; requests and errors are checked at the end."""
    report([str(tested)])
    address = (tested / "report.html").as_uri()
    browser.set_window_size(500, 800)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    browser.get(address)
    yield browser
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} <= {address}


@pytest.mark.parametrize("width", [390, 1280])
def test_fits_the_screen(opened, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert opened.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    scrolls = "const box = document.querySelector('.headline .wide'); return box.scrollWidth > box.clientWidth"
    assert opened.execute_script(scrolls) == (width < 1280)
    rows = "return new Set([...document.querySelectorAll('.stage')].slice(0, 3).map(e => e.getBoundingClientRect().x))"
    assert opened.execute_script(f"{rows}.size") == 1  # with masks beside or below them
    images = "return [...document.images].every(image => image.hidden || image.naturalWidth > 0)"
    assert opened.execute_script(images)


def test_is_dark_in_dark_mode(opened):
    script = """
        const image = document.querySelector('img[alt="loss"]'), canvas = document.createElement('canvas');
        canvas.width = canvas.height = 200;
        const context = canvas.getContext('2d');
        context.drawImage(image, 0, 0, 200, 200);
        const {data} = context.getImageData(0, 0, 200, 200);
        let lightest = 0;
        for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 128) lightest = Math.max(lightest, data[i]);
        return [getComputedStyle(document.body).backgroundColor, data[3], lightest];
    """
    background, opacity, lightest = opened.execute_script(script)
    assert all(int(level) < 50 for level in re.findall(r"\d+", background))
    assert opacity == 0  # the curves have no card of their own
    assert lightest > 200  # their text is light


def test_the_divider_follows_the_pointer_and_the_keyboard(opened):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    stage = opened.find_element("css selector", ".stage")
    divider, range_ = (stage.find_element("css selector", selector) for selector in (".divider", "input"))

    def position():
        return (divider.rect["x"] + divider.rect["width"] / 2 - stage.rect["x"]) / stage.rect["width"]

    assert position() == pytest.approx(0.5, abs=0.01)
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", stage)
    drag = ActionChains(opened).move_to_element(stage).click_and_hold()
    drag.move_by_offset(round(-0.3 * stage.rect["width"]), 0).release().perform()
    assert position() == pytest.approx(0.2, abs=0.01)
    range_.send_keys(Keys.ARROW_RIGHT)
    assert position() > 0.2
    range_.send_keys(Keys.END)
    assert position() == pytest.approx(1, abs=0.01)
    assert "100%" in stage.find_element("css selector", "img.right").value_of_css_property("clip-path")


def test_both_sides_show_the_layer_that_is_chosen(opened):
    slider = opened.find_element("css selector", ".slider")
    right, select = slider.find_element("css selector", "img.right"), slider.find_elements("css selector", "select")[1]
    shown = {}
    for option in select.find_elements("css selector", "option"):
        option.click()
        shown[option.text] = right.get_attribute("src")
        assert slider.find_elements("css selector", ".tag")[1].text == option.text
    names = [name.partition(":")[0] for name in shown]
    assert names == ["bicubic", "SR", "HR", "mask 1", "mask 2", "mean of the masks"]
    assert len({shown[name] for name in ("bicubic", "SR", "HR")}) == 3


def test_tables_are_sorted_by_a_click(opened):
    column = (
        "return [...document.querySelector('.sortable table').tBodies[0].rows].map(row => +row.cells[2].textContent)"
    )
    for order in (sorted, lambda values: sorted(values, reverse=True)):
        opened.execute_script("document.querySelectorAll('.sortable th')[2].click()")
        values = opened.execute_script(column)
        assert values == order(values)
    assert len(set(values)) > 1


@pytest.mark.parametrize("clipboard", ["modern", "missing"])
def test_a_click_copies_a_table(opened, clipboard):
    """Browsers without navigator.clipboard: on a page of a plain http server."""
    if clipboard == "missing":
        opened.execute_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    else:
        opened.execute_script("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    opened.execute_script("document.addEventListener('copy', () => { window.copied = String(getSelection()) })")
    for index, start in ((0, "| set | method | PSNR (dB) |"), (1, r"\begin{tabular}{llrrrrrrr}")):
        button = opened.find_elements("css selector", ".headline button")[index]
        opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()
        assert opened.execute_script("return window.copied").startswith(start)
        assert button.text == "Copied"
