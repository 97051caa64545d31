"""Metrics of pyiqa: with the package itself where it is installed, and the way from the command line to the report."""

import json
import math
import sys
import types

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import main
import option
from perceptual import build_measures
from program import InputError
from tools import report

CPU = torch.device("cpu")


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# ---- with pyiqa ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pyiqa(torchvision):
    return pytest.importorskip("pyiqa")


def test_a_metric_without_weights_has_the_value_of_its_definition(pyiqa):
    sr, hr = random_images(2, 32, 40, 3)
    measure = build_measures([("psnr", None)], CPU)["psnr"]
    expected = 10 * math.log10(255**2 / np.mean((sr.astype(float) - hr) ** 2))
    assert measure(sr, hr) == pytest.approx(expected, abs=1e-3)
    assert math.isnan(measure(sr, None))
    gray = build_measures([("psnr", None)], CPU)["psnr"](sr[..., :1], hr[..., :1])
    assert gray == pytest.approx(
        10 * math.log10(255**2 / np.mean((sr[..., 0].astype(float) - hr[..., 0]) ** 2)), abs=1e-3
    )


@pytest.fixture
def lpips_weights(pyiqa, torchvision, tmp_path, monkeypatch):
    """Random weights of LPIPS in the file that is returned, and of its backbone in the cache of torch.hub."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(torchvision.models.alexnet().state_dict(), tmp_path / "checkpoints/alexnet-owt-7be5be79.pth")
    widths = (64, 192, 384, 256, 256)
    torch.save({f"lin{k}.model.1.weight": torch.rand(1, n, 1, 1) for k, n in enumerate(widths)}, tmp_path / "lpips.pth")
    return tmp_path / "lpips.pth"


def test_lpips_with_its_weights_from_files(lpips_weights):
    sr, hr = random_images(2, 64, 72, 3)
    measure = build_measures([("lpips", str(lpips_weights))], CPU)["lpips"]
    assert measure(hr, hr) == 0
    near, far = ((hr * (1 - t) + sr * t).astype(np.uint8) for t in (0.1, 0.9))
    assert 0 < measure(near, hr) < measure(far, hr)
    with pytest.raises(InputError, match="lpips cannot take an image of 2x3 pixels") as error:
        measure(sr[:2, :3], hr[:2, :3])
    assert "\n" not in str(error.value)


def no_network(*args, **options):
    raise OSError("no network in tests")


def test_metrics_and_weights_that_do_not_exist_are_refused(pyiqa, lpips_weights, tmp_path, monkeypatch):
    (tmp_path / "code.pth").write_bytes(b"cos\nsystem\n(S'echo gone wrong'\ntR.")
    torch.save({"head.weight": torch.zeros(1)}, tmp_path / "other.pth")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    for metric, message in (
        (("nothing", None), "pyiqa has no metric 'nothing'"),
        (("lpips", str(tmp_path / "absent.pth")), r"absent\.pth: no such weights file"),
        (("lpips", str(tmp_path / "code.pth")), r"code\.pth: cannot be read as weights"),
        (("lpips", str(tmp_path / "other.pth")), r"other\.pth: holds no weights of lpips"),
        (("dists", str(lpips_weights)), "dists cannot be built .* leave =.* out, or use another file"),
    ):
        with pytest.raises(InputError, match=message) as error:
            build_measures([metric], CPU)
        assert error.value.argument == "metrics"


def test_results_depend_on_the_content_of_weights_files(tmp_path, tiny):
    weights, found = tmp_path / "lpips.pth", []
    for content in (b"a", b"b", b"a"):
        weights.write_bytes(content)
        args = option.parse(["--test_only", "--metrics", f"lpips={weights}", "dists"])
        found.append(main.result_settings(args, tiny).measured_with)
    assert found[0] == found[2] != found[1]


# ---- from the command line to the report -----------------------------------------------------------------------------


class Difference(torch.nn.Module):
    """A metric in pyiqa's form: the mean absolute difference, or without an HR image the mean."""

    def __init__(self, metric_mode):
        super().__init__()
        self.metric_mode = metric_mode

    def forward(self, sr, hr=None):
        return (sr - hr).abs().mean() if self.metric_mode == "FR" else sr.mean()


@pytest.fixture
def stand_in(monkeypatch):
    """A package in place of pyiqa, which is large: it has the metrics `difference` and `level`."""
    modes = {"difference": "FR", "level": "NR"}
    package = types.ModuleType("pyiqa")
    package.list_models = lambda: list(modes)
    package.create_metric = lambda name, device: Difference(modes[name]).to(device)
    monkeypatch.setitem(sys.modules, "pyiqa", package)


def run_test(tmp_path, weights, *options):
    torch.save(weights.state_dict(), tmp_path / "w.pt")
    main.main(["--pre_train", str(tmp_path / "w.pt"), "--cpu", "--test_only", "--save", "run", *options])


def test_metrics_reach_the_table_metrics_json_and_the_report(stand_in, make_set, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = make_set(count=2, benchmark=True)
    run_test(
        tmp_path,
        tiny,
        *("--dir_data", str(data), "--data_test", "Tiny", "--metrics", "difference", "level", "--save_results"),
    )
    folder = tmp_path / "experiment/run/results-Tiny-x2"
    metrics = json.loads((folder / "metrics.json").read_text())
    expected = []
    for row in metrics["images"]:
        sr = iio.imread(folder / f"{row['name']}_x2_SR.png").astype(float)[2:-2, 2:-2]
        hr = iio.imread(data / f"benchmark/Tiny/HR/{row['name']}.png").astype(float)[2:-2, 2:-2]
        expected.append(np.abs(sr - hr).mean() / 255)
        assert row["perceptual"] == {"difference": pytest.approx(expected[-1]), "level": pytest.approx(sr.mean() / 255)}
    assert metrics["perceptual"]["difference"] == pytest.approx(np.mean(expected))
    header, *_, mean = [
        line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("Tiny", "mean"))
    ]
    assert header == ["Tiny", "psnr_y", "ssim_y", "difference", "level", "active", "seconds"]
    assert mean[3] == f"{np.mean(expected):.4f}"
    report.main(["experiment/run"])
    text = (tmp_path / "experiment/run/report.md").read_text()
    assert "| image | LR size | PSNR (dB) | SSIM | difference | level |" in text
    assert f" {np.mean(expected):.4f} | " in next(line for line in text.splitlines() if line.startswith("| mean"))
    assert text.count(f"{expected[0]:.4f}") >= 1


def test_images_without_hr_have_the_metrics_that_need_none(stand_in, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    iio.imwrite("photo.png", random_images(16, 20, 3))
    run_test(tmp_path, tiny, "--data_test", "demo", "--dir_demo", "photo.png", "--metrics", "difference", "level")
    metrics = json.loads((tmp_path / "experiment/run/results-demo-x2/metrics.json").read_text())
    assert metrics["perceptual"]["difference"] is None
    assert 0 < metrics["perceptual"]["level"] < 1


def test_without_metrics_nothing_is_needed_or_written(monkeypatch, make_set, tiny, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    data = str(make_set(count=1, benchmark=True))
    run_test(tmp_path, tiny, "--dir_data", data, "--data_test", "Tiny")
    assert "perceptual" not in (tmp_path / "experiment/run/results-Tiny-x2/metrics.json").read_text()
    with pytest.raises(InputError, match=r"needs the pyiqa package \(.*\); pip install pyiqa") as error:
        run_test(tmp_path, tiny, "--dir_data", data, "--data_test", "Tiny", "--metrics", "lpips", "--reset")
    assert error.value.argument == "metrics"


def test_options():
    args = option.parse(["--test_only", "--pre_train", "w.pt", "--metrics", "lpips", "dists=a b/w=1.pth"])
    assert [option.split_metric(text) for text in args.metrics] == [("lpips", None), ("dists", "a b/w=1.pth")]
    for line, message in (
        ("--metrics lpips", "--metrics: is for tests"),
        ("--test_only --metrics lpips dists lpips=a.pth", "--metrics lpips dists lpips=a.pth: names a metric twice"),
        ("--test_only --metrics =w.pt", "'=w.pt' is not a metric; write NAME, or NAME=FILE"),
        ("--test_only --data_test video --dir_demo a.mp4 --metrics lpips", "--metrics: is for images"),
    ):
        with pytest.raises(InputError, match=message):
            option.parse(line.split())
