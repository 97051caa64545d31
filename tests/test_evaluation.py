import math

import numpy as np
import pytest

from data import build_test_sets
from evaluation import compare, evaluate, table
from metrics import psnr


def test_benchmark_sets_are_measured_on_luma_and_others_on_rgb_too():
    rng = np.random.default_rng(0)
    sr, hr = rng.integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    y = [image @ np.array([65.738, 129.057, 25.064]) / 256 + 16 for image in (sr, hr)]
    assert compare(sr, hr, 2)["psnr_y"] == pytest.approx(psnr(y[0][2:-2, 2:-2], y[1][2:-2, 2:-2]))
    assert "psnr_rgb" not in compare(sr, hr, 2)
    assert compare(sr, hr, 2, rgb=True)["psnr_rgb"] == pytest.approx(psnr(sr[8:-8, 8:-8], hr[8:-8, 8:-8]))
    assert compare(hr, hr, 2)["psnr_y"] == math.inf


def test_evaluate_reports_as_documented(make_set, tiny):
    (images,) = build_test_sets(["Tiny"], make_set(benchmark=True), 2)
    saved = {}
    metrics = evaluate(tiny, images, save=lambda name, *pictures: saved.update({name: pictures}))
    assert list(metrics) == [
        "dataset", "scale", "model", "parameters", "psnr_y", "ssim_y", "n_images", "seconds_per_image",
        "gmacs", "gmacs_dense", "gmacs_run", "gmacs_at_1280x720", "gmacs_dense_at_1280x720", "active_share", "images",
    ]  # fmt: skip
    assert (metrics["dataset"], metrics["scale"], metrics["model"], metrics["n_images"]) == ("Tiny", 2, "SMSR", 3)
    row = metrics["images"][1]
    assert {"name", "lr_shape", "psnr_y", "ssim_y", "seconds", "mask_density"} <= row.keys()
    assert row["lr_shape"] == [20, 24]
    assert len(row["mask_density"]) == 2
    assert metrics["psnr_y"] == pytest.approx(np.mean([row["psnr_y"] for row in metrics["images"]]))
    assert metrics["gmacs_dense"] == pytest.approx(tiny.inference(images[0][1][None].float())[1].macs_dense / 1e9)
    assert metrics["gmacs_at_1280x720"] == pytest.approx(metrics["gmacs"] / (20 * 24) * (1280 * 720 / 4))
    _, lr, hr = images[1]
    sr = tiny(lr[None].float())[0].clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
    saved_lr, saved_sr, masks = saved["img1"]
    assert np.array_equal(saved_lr, lr.permute(1, 2, 0))
    assert np.array_equal(saved_sr, sr)
    assert masks.shape == (2, 20, 24)
    assert masks.mean(axis=(1, 2)) == pytest.approx(row["mask_density"])
    assert row["psnr_y"] == pytest.approx(compare(sr, hr, 2)["psnr_y"])
    lines = table(metrics)
    assert len(lines) == 5
    assert lines[-1].split()[:2] == ["mean", f"{metrics['psnr_y']:.2f}"]


def test_images_without_hr_are_run_and_not_measured(make_set, tiny):
    folder = make_set() / "Tiny/LR_bicubic/X2"
    (images,) = build_test_sets(["demo"], "", 2, dir_demo=str(folder))
    metrics = evaluate(tiny, images)
    assert "nan" not in " ".join(table(metrics))
    assert math.isnan(metrics["psnr_y"])
    assert metrics["n_images"] == 3
