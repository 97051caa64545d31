import base64
import re
import threading

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from data.image import write_png
from program import InputError
from tools.serve_web import FOLDER, build_server

needs_runtime = pytest.mark.skipif(
    not (FOLDER / "node_modules/onnxruntime-web").is_dir(), reason="needs npm install --prefix tools/web"
)


@pytest.fixture(scope="module")
def with_masks(exported):
    """The graph of the network `exported`, with masks as a second output."""
    from tools.export_onnx import main

    main(["--pre_train", str(exported / "w.pt"), "--masks", "--output", str(exported / "masks.onnx")])
    return exported / "masks.onnx"


@pytest.fixture
def open_page(browser):
    """A function that opens the page, which serves a network, and waits until it is ready."""
    servers = []

    def open_page(network):
        servers.append(build_server(network, port=0))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        browser.get(f"http://localhost:{servers[-1].server_port}")
        wait_for(browser, lambda text: text == "Ready")
        return browser

    yield open_page
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def page(tiny, exported, with_masks, open_page):
    """The browser with the page open; the page serves the network `tiny` with masks."""
    tiny.load_state_dict(torch.load(exported / "w.pt"))
    return open_page(with_masks)


def status(page):
    return page.find_element("id", "status").text.replace("\N{MULTIPLICATION SIGN}", "x")


def wait_for(page, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, 60).until(lambda page: condition(status(page)), f"the status is {status(page)!r}")


def upscale(page, path, image):
    """Upscale an image, uint8 (H, W, 3 or 4), under a file name."""
    write_png(path, image)
    page.find_element("id", "file").send_keys(str(path))
    sizes = "{1}x{0} to {3}x{2} pixels in".format(*image.shape[:2], *(2 * side for side in image.shape[:2]))
    wait_for(page, lambda text: sizes in text)


def pixels(page, canvas):
    """The pixels of a canvas, uint8 (H, W, 4)."""
    script = "return document.getElementById(arguments[0]).toDataURL().split(',')[1]"
    return iio.imread(base64.b64decode(page.execute_script(script, canvas)), mode="RGBA")


def random_image(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@needs_runtime
def test_an_image_is_upscaled_in_the_browser(page, tmp_path, tiny):
    from selenium.webdriver.support.ui import WebDriverWait

    assert page.execute_script("return crossOriginIsolated")  # otherwise there is only one thread
    image = random_image(23, 36)
    upscale(page, tmp_path / "photo.png", image)
    link = page.find_element("id", "save")
    WebDriverWait(page, 60).until(lambda _: link.get_attribute("download") == "photo_x2_SR.png")
    fetch = "const f = new FileReader(); f.onload = () => arguments[1](f.result.split(',')[1]);"
    fetch += "fetch(arguments[0]).then((r) => r.blob()).then((blob) => f.readAsDataURL(blob));"
    sr = iio.imread(base64.b64decode(page.execute_async_script(fetch, link.get_attribute("href"))))[..., :3]
    expected = tiny.eval().upscale(image)
    assert np.abs(sr.astype(int) - expected).max() <= 1
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


@needs_runtime
def test_the_opponent_is_smooth_and_alpha_is_kept(page, tmp_path):
    image = np.zeros((8, 8, 4), np.uint8)
    image[:, 4:] = 255
    image[:, :, 3] = np.array([255, 128])[np.arange(8) // 4 % 2][:, None]
    upscale(page, tmp_path / "photo.png", image)
    assert len(set(pixels(page, "browser")[2, :, 0])) > 2  # not the two levels of nearest neighbors
    alpha = pixels(page, "sr")[..., 3]
    assert (alpha[0] == 255).all()
    assert (abs(alpha[-1].astype(int) - 128) <= 1).all()


@needs_runtime
def test_masks_are_shown_if_the_network_returns_them(page, tmp_path, tiny):
    image = random_image(20, 30)
    upscale(page, tmp_path / "photo.png", image)
    _, cost = tiny.eval().inference(tiny.to_input(image[None]))
    page.find_element("css selector", "label:has([value=masks])").click()
    for module, mask in enumerate(cost.masks):
        page.find_elements("css selector", "#module option")[1 + module].click()
        assert ((pixels(page, "mask")[..., 3] == 0) == mask[0, 0].numpy()).all()
        assert page.find_element("id", "rightTag").text == f"{100 * mask.float().mean():.0f} % computed in full"


@needs_runtime
def test_a_network_without_masks_has_no_view_of_them(open_page, exported, tmp_path):
    page = open_page(exported / "w.onnx")
    upscale(page, tmp_path / "photo.png", random_image(8, 8))
    assert not page.find_element("id", "views").is_displayed()


@needs_runtime
def test_the_divider_follows_the_pointer_and_the_keyboard(page, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    upscale(page, tmp_path / "photo.png", random_image(20, 30))
    stage, position = page.find_element("id", "stage"), page.find_element("id", "position")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", stage)
    drag = ActionChains(page).move_to_element(stage).click_and_hold()
    drag.move_by_offset(round(-0.3 * stage.rect["width"]), 0).release().perform()
    assert float(position.get_attribute("value")) == pytest.approx(20, abs=1)
    left = float(page.find_element("id", "sr").value_of_css_property("clip-path").rpartition(" ")[2].rstrip("px)"))
    assert left == pytest.approx(0.2 * stage.rect["width"], abs=2)
    position.send_keys(Keys.END)
    assert float(position.get_attribute("value")) == 100


@needs_runtime
def test_the_divider_stays_in_place_when_a_zoomed_picture_scrolls(page, tmp_path):
    upscale(page, tmp_path / "photo.png", random_image(40, 300))
    page.find_element("css selector", "label:has([name=zoom][value='4'])").click()
    script = """
        const stage = document.getElementById('stage');
        stage.scrollLeft = 100;
        stage.dispatchEvent(new Event('scroll'));
        const divider = document.getElementById('divider').getBoundingClientRect();
        const clip = parseFloat(document.getElementById('sr').style.clipPath.split(' ').pop());
        return [divider.x + divider.width / 2, clip + document.getElementById('sr').getBoundingClientRect().x];
    """
    divider, edge = page.execute_script(script)
    assert divider == pytest.approx(edge, abs=1)


@needs_runtime
@pytest.mark.parametrize("width", [390, 1280])
def test_fits_the_screen_and_follows_dark_mode(page, tmp_path, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    levels = {}
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        for key in ("backgroundColor", "color"):
            color = page.execute_script(f"return getComputedStyle(document.body).{key}")
            levels[scheme, key] = sum(map(int, re.findall(r"\d+", color)[:3]))
    assert levels["light", "backgroundColor"] > levels["light", "color"] + 400
    assert levels["dark", "color"] > levels["dark", "backgroundColor"] + 400
    upscale(page, tmp_path / "photo.png", random_image(20, 700))
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")


DROP_TWICE = """
const [name, base64] = arguments;
const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
for (const which of ["first", "second"]) {
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], `${which} ${name}`, { type: "image/png" }));
  document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true, bubbles: true }));
}
"""


@needs_runtime
def test_a_second_image_dropped_during_upscaling_is_ignored(page, tmp_path):
    write_png(tmp_path / "photo.png", np.zeros((8, 6, 3), np.uint8))
    page.execute_script(DROP_TWICE, "photo.png", base64.b64encode((tmp_path / "photo.png").read_bytes()).decode())
    wait_for(page, lambda text: "6x8 to 12x16 pixels in" in text)
    assert status(page).startswith("first photo.png")
    assert page.find_element("id", "file").is_enabled()


@needs_runtime
def test_the_sample_is_upscaled(page):
    page.find_element("id", "sample").click()
    wait_for(page, lambda text: text.startswith("sample.png: ") and "pixels in" in text)


@needs_runtime
def test_an_error_clears_the_former_result(page, tmp_path):
    upscale(page, tmp_path / "photo.png", random_image(8, 8))
    assert page.find_element("id", "result").is_displayed()
    (tmp_path / "text.png").write_text("no image")
    page.find_element("id", "file").send_keys(str(tmp_path / "text.png"))
    wait_for(page, lambda text: "text.png: this browser cannot read it as an image" in text)
    assert not page.find_element("id", "result").is_displayed()
    assert page.find_element("id", "save").get_attribute("href") is None
    assert page.find_element("id", "file").is_enabled()
    upscale(page, tmp_path / "photo.png", random_image(8, 8))  # the same file again


@needs_runtime
def test_a_run_can_be_cancelled(page, tmp_path):
    write_png(tmp_path / "large.png", random_image(1200, 1200))
    page.find_element("id", "file").send_keys(str(tmp_path / "large.png"))
    wait_for(page, lambda text: "1200x1200: " in text and "s of about" in text)
    assert float(page.find_element("id", "progress").get_attribute("value")) < 1
    page.find_element("id", "cancel").click()
    wait_for(page, lambda text: text == "Cancelled")
    assert not page.find_element("id", "result").is_displayed()
    upscale(page, tmp_path / "photo.png", random_image(8, 8))


def test_mistakes_are_reported(tmp_path, exported, monkeypatch):
    with pytest.raises(InputError, match=r"absent\.onnx: no such file"):
        build_server(tmp_path / "absent.onnx")
    (tmp_path / "m.onnx").touch()
    with pytest.raises(InputError, match=r"m\.onnx: has no metadata smsr_scale; .*tools/export_onnx\.py"):
        build_server(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes((exported / "w.onnx").read_bytes())
    monkeypatch.setattr("tools.serve_web.FOLDER", tmp_path)
    with pytest.raises(InputError, match="npm install --prefix tools/web"):
        build_server(tmp_path / "m.onnx")
