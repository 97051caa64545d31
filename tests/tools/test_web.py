import base64
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


@pytest.fixture
def page(tiny, exported, browser):
    """The browser with the page open; the page serves the network `tiny`."""
    tiny.load_state_dict(torch.load(exported / "w.pt"))
    server = build_server(exported / "w.onnx", port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser.get(f"http://localhost:{server.server_port}")
    yield browser
    server.shutdown()
    server.server_close()


def status(page):
    return page.find_element("id", "status").text


def wait_for(page, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, 60).until(lambda page: condition(status(page)), f"the status is {status(page)!r}")


@needs_runtime
def test_an_image_is_upscaled_in_the_browser(page, tmp_path, tiny):
    image = np.random.default_rng(0).integers(0, 256, (23, 36, 3), dtype=np.uint8)
    write_png(tmp_path / "photo.png", image)
    wait_for(page, lambda text: text.startswith("Ready"))
    assert page.execute_script("return crossOriginIsolated")  # otherwise there is only one thread
    page.find_element("id", "file").send_keys(str(tmp_path / "photo.png"))
    wait_for(page, lambda text: "36x23 to 72x46 in" in text)
    link = page.find_element("id", "save")
    assert link.get_attribute("download") == "photo_x2_SR.png"
    sr = iio.imread(base64.b64decode(link.get_attribute("href").split(",")[1]))[..., :3]
    expected, _ = tiny.eval().inference(torch.tensor(image).permute(2, 0, 1)[None].float(), "sparse")
    expected = expected[0].permute(1, 2, 0).clamp(0, 255).round().numpy()
    assert np.abs(sr - expected).max() <= 1
    page.execute_script(
        "const p = document.getElementById('position'); p.value = 20; p.dispatchEvent(new Event('input'))"
    )
    assert "20%" in page.find_element("id", "sr").value_of_css_property("clip-path")
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


DROP_TWICE = """
const [name, base64] = arguments;
const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
for (const which of ["first", "second"]) {
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], `${which} ${name}`, { type: "image/png" }));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
}
"""


@needs_runtime
def test_a_second_image_dropped_during_upscaling_is_ignored(page, tmp_path):
    write_png(tmp_path / "photo.png", np.zeros((8, 6, 3), np.uint8))
    wait_for(page, lambda text: text.startswith("Ready"))
    page.execute_script(DROP_TWICE, "photo.png", base64.b64encode((tmp_path / "photo.png").read_bytes()).decode())
    wait_for(page, lambda text: "6x8 to 12x16 in" in text)
    assert status(page).startswith("first photo.png")
    assert page.find_element("id", "file").is_enabled()


@needs_runtime
def test_a_file_that_is_not_an_image_is_reported(page, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    wait_for(page, lambda text: text.startswith("Ready"))
    page.find_element("id", "file").send_keys(str(tmp_path / "text.png"))
    wait_for(page, lambda text: "text.png: this browser cannot read it as an image" in text)
    assert page.find_element("id", "file").is_enabled()


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
