import math

import numpy as np
import pytest
import torch

from data import DataSettings, build_test_sets
from data.image import write_png
from evaluation import compare, evaluate, headline, macs_at_1280x720, mask_densities, masks_of, table
from metrics import psnr
from model.inference import build_predictor
from model.network import Cost
from program import InputError


class Kept:
    """Results in memory: those of earlier calls, and what this one saves."""

    def __init__(self, done=()):
        self.done, self.saved, self.failed = dict(done), {}, {}

    def find(self, name):
        return self.done.get(name)

    def save(self, row, cost, **pictures):
        self.done[row["name"]] = row, cost
        self.saved[row["name"]] = {"row": row, **pictures}


def test_benchmark_sets_are_measured_on_y_and_others_on_rgb_too():
    rng = np.random.default_rng(0)
    sr, hr = rng.integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    y = [image @ np.array([65.738, 129.057, 25.064]) / 256 + 16 for image in (sr, hr)]
    assert compare(sr, hr, 2)["psnr_y"] == pytest.approx(psnr(y[0][2:-2, 2:-2], y[1][2:-2, 2:-2]))
    assert "psnr_rgb" not in compare(sr, hr, 2)
    assert compare(sr, hr, 2, rgb=True)["psnr_rgb"] == pytest.approx(psnr(sr[8:-8, 8:-8], hr[8:-8, 8:-8]))
    assert compare(hr, hr, 2)["psnr_y"] == math.inf


def test_evaluate_reports_as_documented(make_set, tiny):
    (images,) = build_test_sets(["Tiny"], DataSettings(make_set(benchmark=True)))
    results = Kept()
    metrics = evaluate(tiny, images, results=results)
    assert list(metrics) == [
        *("dataset", "scale", "model", "parameters", "psnr_y", "ssim_y", "n_images", "seconds_per_image"),
        *("gmacs", "gmacs_dense", "gmacs_run", "gmacs_at_1280x720", "gmacs_dense_at_1280x720"),
        *("active_share", "images"),
    ]
    assert (metrics["dataset"], metrics["scale"], metrics["model"], metrics["n_images"]) == ("Tiny", 2, "SMSR", 3)
    assert metrics["parameters"] == sum(parameter.numel() for parameter in tiny.parameters())
    row = metrics["images"][1]
    assert set(row) == {"name", "lr_shape", "psnr_y", "ssim_y", "seconds", "mask_density", "active_share"}
    assert row["lr_shape"] == [20, 24]
    assert len(row["mask_density"]) == 2
    assert mask_densities(metrics).tolist() == [row["mask_density"] for row in metrics["images"]]
    assert metrics["psnr_y"] == pytest.approx(np.mean([row["psnr_y"] for row in metrics["images"]]))
    _, lr, hr = images[1]
    x = torch.from_numpy(lr).permute(2, 0, 1)[None].float()
    assert metrics["gmacs_dense"] == pytest.approx(tiny.inference(x)[1].macs_dense / 1e9)
    assert metrics["gmacs_at_1280x720"] == pytest.approx(metrics["gmacs"] / (20 * 24) * (1280 * 720 / 4))
    sr = tiny(x)[0].clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
    saved = results.saved["img1"]
    masks = saved["masks"]
    assert np.array_equal(saved["lr"], lr)
    assert np.array_equal(saved["sr"], sr)
    assert saved["row"] == row
    assert masks.shape == (2, 20, 24)
    assert masks.mean(axis=(1, 2)) == pytest.approx(row["mask_density"])
    assert row["psnr_y"] == pytest.approx(compare(sr, hr, 2)["psnr_y"])
    lines = table(metrics)
    assert len(lines) == 5
    assert lines[-1].split()[:2] == ["mean", f"{metrics['psnr_y']:.2f}"]


def test_images_without_hr_are_upscaled_but_not_measured(make_set, tiny):
    folder = make_set() / "Tiny/LR_bicubic/X2"
    (images,) = build_test_sets(["demo"], DataSettings("", dir_demo=str(folder)))
    metrics = evaluate(tiny, images)
    assert "nan" not in " ".join(table(metrics))
    assert math.isnan(metrics["psnr_y"])
    assert metrics["n_images"] == 3


def test_the_headline_is_measured_on_rgb_unless_the_set_is_a_benchmark(make_set, tiny):
    make_set("Bench", count=1, benchmark=True)
    images, benchmark = build_test_sets(["Tiny", "Bench"], DataSettings(make_set(count=1)))
    metrics = evaluate(tiny, images)
    assert headline(metrics) == ("psnr_rgb", metrics["psnr_rgb"])
    assert table(metrics)[0].split() == ["Tiny", "psnr_rgb", "ssim_y", "active", "seconds"]
    metrics = evaluate(tiny, benchmark)
    assert headline(metrics) == ("psnr_y", metrics["psnr_y"])
    assert "psnr_rgb" not in metrics


def test_evaluate_runs_the_given_predictor_and_warms_up_once(make_set, tiny):
    (images,) = build_test_sets(["Tiny"], DataSettings(make_set()))
    calls = []

    def predict(x):
        calls.append(x.shape)
        return tiny.inference(x, "dense")

    dense = evaluate(tiny, images, predict)
    assert calls == [(1, 3, 20, 24)] * 4
    assert dense["gmacs_run"] == pytest.approx(predict(torch.zeros(1, 3, 20, 24))[1].macs_run / 1e9)
    calls.clear()
    evaluate(tiny, images, predict, warm_up=False)
    assert len(calls) == 3
    ensemble = evaluate(tiny, images, build_predictor(tiny, mode="dense", ensemble=True))
    assert ensemble["gmacs_run"] == pytest.approx(8 * dense["gmacs_run"])
    assert ensemble["gmacs_dense_at_1280x720"] == pytest.approx(dense["gmacs_dense_at_1280x720"])


def test_the_value_range_comes_from_the_network(make_set, tiny):
    (images,) = build_test_sets(["Tiny"], DataSettings(make_set()))
    expected = evaluate(tiny, images)["psnr_rgb"]
    predict = tiny.inference  # sees images in 0...1 below and returns them in that range

    def scaled(x):
        assert x.max() <= 1
        sr, cost = predict(x * 255)
        return sr / 255, cost

    tiny.rgb_range.fill_(1)
    assert evaluate(tiny, images, scaled)["psnr_rgb"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_an_image_that_does_not_fit_in_memory_is_named(make_set, tiny, error):
    (images,) = build_test_sets(["Tiny"], DataSettings(make_set()))

    def predict(x):
        raise error

    with pytest.raises(InputError) as raised:
        evaluate(tiny, images, predict)
    line = raised.value.for_command_line()
    assert line.startswith("--chop: img0: not enough memory for an image of 20x24 pixels; process it in tiles (chop)")
    assert "\n" not in line


def test_other_errors_pass_through(make_set, tiny):
    (images,) = build_test_sets(["Tiny"], DataSettings(make_set()))

    def predict(x):
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        evaluate(tiny, images, predict)


def test_multiply_adds_are_scaled_to_an_output_of_1280x720():
    costs = [Cost(pixels=10, macs=5, macs_dense=20, macs_run=6), Cost(pixels=30, macs=15, macs_dense=60, macs_run=16)]
    assert macs_at_1280x720(costs, "macs", 2) == pytest.approx(0.5 * 640 * 360)
    assert macs_at_1280x720(costs, "macs_dense", 4) == pytest.approx(2 * 320 * 180)


def test_masks_of_a_network_without_masks():
    assert mask_densities({"images": [{"mask_density": []}] * 3}).shape == (3, 0)
    assert len(masks_of(Cost(pixels=1, macs=1, macs_dense=1, macs_run=1))) == 0


def test_one_image_spoils_no_mean(make_set, tiny, monkeypatch, caplog):
    (images,) = build_test_sets(["Tiny"], DataSettings(make_set(benchmark=True)))
    qualities = iter([(30.0, 0.9), (math.inf, 1.0), (32.0, math.nan)])
    monkeypatch.setattr(
        "evaluation.compare", lambda *_, **__: dict(zip(("psnr_y", "ssim_y"), next(qualities), strict=True))
    )
    metrics = evaluate(tiny, images)
    assert metrics["psnr_y"] == 31
    assert metrics["ssim_y"] == pytest.approx(0.95)
    assert [row["psnr_y"] for row in metrics["images"]] == [30, math.inf, 32]
    (line,) = caplog.messages
    assert line.startswith("Tiny: the means leave out")
    assert line.endswith("for img1, img2")


def test_the_mean_of_images_without_error_is_infinite(make_set, tiny, monkeypatch, caplog):
    (images,) = build_test_sets(["Tiny"], DataSettings(make_set(benchmark=True)))
    monkeypatch.setattr("evaluation.compare", lambda *_, **__: {"psnr_y": math.inf, "ssim_y": 1.0})
    assert evaluate(tiny, images)["psnr_y"] == math.inf
    assert not caplog.messages


def test_a_test_goes_on_without_the_images_that_fail(make_set, tiny):
    folder = make_set(benchmark=True, count=4)
    whole, broken = folder / "benchmark/Tiny/HR/img1.png", folder / "benchmark/Tiny/LR_bicubic/X2/img2.png"
    whole.write_bytes(whole.read_bytes()[:-40])
    broken.write_bytes(b"")

    def predict(x):
        if (x == x.flatten()[0]).all():
            raise MemoryError
        return tiny.inference(x)

    (images,) = build_test_sets(["Tiny"], DataSettings(folder))
    write_png(folder / "benchmark/Tiny/LR_bicubic/X2/img3.png", np.zeros((20, 24, 3), np.uint8))
    results = Kept()
    metrics = evaluate(tiny, images, predict, results)
    assert list(results.failed) == ["img1", "img2", "img3"]
    assert "img1.png: not an image, or broken" in results.failed["img1"]
    assert "img2.png: not an image, or broken" in results.failed["img2"]
    assert results.failed["img3"].startswith("--chop: img3: not enough memory")
    assert [row["name"] for row in metrics["images"]] == ["img0"]
    assert metrics["psnr_y"] == metrics["images"][0]["psnr_y"]
    with pytest.raises(InputError, match=r"img1\.png"):
        evaluate(tiny, images, predict)


def test_without_any_image_there_are_no_means(make_set, tiny):
    folder = make_set(count=1)
    (folder / "Tiny/HR/img0.png").write_bytes(b"")
    (images,) = build_test_sets(["Tiny"], DataSettings(folder))
    metrics = evaluate(tiny, images, results=Kept())
    assert (metrics["n_images"], metrics["images"]) == (0, [])
    assert "psnr_y" not in metrics


def test_what_is_done_is_not_done_again(make_set, tiny):
    (images,) = build_test_sets(["Tiny"], DataSettings(make_set()))
    first = Kept()
    expected = evaluate(tiny, images, results=first)
    calls = []

    def predict(x):
        calls.append(x)
        return tiny.inference(x)

    second = Kept({name: first.done[name] for name in ("img0", "img2")})
    metrics = evaluate(tiny, images, predict, second)
    assert len(calls) == 2  # of img1, with its warm-up
    assert list(second.saved) == ["img1"]
    for key in ("psnr_y", "gmacs", "gmacs_run", "active_share"):
        assert metrics[key] == pytest.approx(expected[key])
    assert [row["name"] for row in metrics["images"]] == ["img0", "img1", "img2"]
