"""Fixtures: small networks, small sets of images on disk, and the reference data if it is available."""

import os

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # test processes share the cores, and idle threads of PyTorch busy-wait
    cores = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))  # before torch is loaded

import re
import shutil
import signal
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from hypothesis import settings

from data.resize import downscale
from model.smsr import SMSR

SHARED = Path(os.environ.get("SMSR_REFERENCE", Path(__file__).resolve().parents[2] / "shared"))

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seed():
    """Every test starts with the same random numbers of PyTorch."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def curves(request, monkeypatch):
    """Trainings draw their curves, which takes a second, only in tests that are marked with `curves`."""
    if "trainer" in sys.modules and not request.node.get_closest_marker("curves"):
        monkeypatch.setattr("trainer.write_curves", lambda folder, history: None)


@pytest.fixture
def shared():
    """The folder with Set5, training images and the published x2 weights; skips the test if it is missing."""
    if not (SHARED / "reference").is_dir():
        pytest.skip(f"needs the reference data in {SHARED}")
    return SHARED


@pytest.fixture
def tiny():
    """An SMSR small enough to train in a test."""
    return SMSR(scale=2, n_feats=8, n_blocks=2, n_layers=2)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A folder with the weights of such an SMSR, w.pt, and its graph, w.onnx. Shared, because exporting is slow."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from tools.export_onnx import main

    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    torch.save(SMSR(scale=2, n_feats=8, n_blocks=2, n_layers=2).state_dict(), folder / "w.pt")
    main(["--pre_train", str(folder / "w.pt"), "--output", str(folder / "w.onnx")])
    return folder


@pytest.fixture
def make_set(tmp_path):
    """A function that writes a paired set of blocky random images and returns the folder to use as --dir_data."""

    def make(name="Tiny", count=3, size=(40, 48), scale=2, lr_suffix="", benchmark=False):
        rng = np.random.default_rng(0)
        root = tmp_path / "data" / ("benchmark" if benchmark else ".") / name
        (root / "HR").mkdir(parents=True)
        (root / f"LR_bicubic/X{scale}").mkdir(parents=True)
        for index in range(count):
            coarse = rng.integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3), dtype=np.uint8)
            hr = np.kron(coarse, np.ones((8, 8, 1), np.uint8))[: size[0], : size[1]]
            iio.imwrite(root / f"HR/img{index}.png", hr)
            iio.imwrite(root / f"LR_bicubic/X{scale}/img{index}{lr_suffix}.png", downscale(hr, scale))
        return tmp_path / "data"

    return make


@pytest.fixture(scope="session")
def torchvision():
    """torchvision; operators that its build lacks for this PyTorch are declared, so that it can be imported."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    while True:
        try:
            import torchvision

            torchvision.declared = library  # keep it: the operators disappear with the library
            return torchvision
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if not missing:
                raise
            library.define(f"{missing[1]}() -> ()")
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt as at a terminal, even if the tests run in the background with it ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture
def browser():
    """A headless Chromium that logs its console and its network requests; skips the test without one."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield browser
    browser.quit()
