import errno
import json
import math
import os
import sys
import time

import numpy as np
import pytest
import torch
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio

from utility import (
    Experiment,
    InputError,
    free_in_cgroup,
    free_memory,
    in_parallel,
    logger,
    luma,
    pick_device,
    psnr,
    quantize,
    remove_unfinished,
    save_torch,
    shave,
    ssim,
    write_json,
    write_options,
    write_whole,
)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return image, np.clip(image + rng.normal(0, 9, image.shape), 0, 255).astype(np.uint8)


def test_luma_and_psnr_agree_with_scikit_image(images):
    for image in images:
        assert np.abs(luma(image) - rgb2ycbcr(image)[..., 0]).max() < 1e-2
    assert psnr(*images) == pytest.approx(peak_signal_noise_ratio(*images, data_range=255))


def test_identical_and_tiny_images():
    image = np.full((12, 12), 7.0)
    assert psnr(image, image) == math.inf
    assert ssim(image, image) == pytest.approx(1)
    assert math.isnan(ssim(image[:10], image[:10]))
    assert math.isnan(psnr(shave(image, 6), shave(image, 6)))


def ssim_written_out(a, b):
    """Wang et al. 2004: 11x11 Gaussian window, sigma 1.5, only where the window lies inside the image."""
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def local(values):
        return np.einsum("hwij,ij", np.lib.stride_tricks.sliding_window_view(values, (11, 11)), window)

    mean_a, mean_b = local(a), local(b)
    variance_a, variance_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    covariance = local(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return np.mean(
        (2 * mean_a * mean_b + c1)
        * (2 * covariance + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
    )


def test_ssim_equals_the_formula(images):
    a, b = (luma(image) for image in images)
    assert ssim(a, b) == pytest.approx(ssim_written_out(a, b), abs=1e-9)


def test_shave_cuts_every_side():
    assert np.array_equal(shave(np.arange(30).reshape(5, 6), 2), [[14, 15]])
    assert shave(np.zeros((4, 4)), 0).shape == (4, 4)


@pytest.mark.parametrize("rgb_range", [1, 255])
def test_quantize_clamps_and_rounds(rgb_range):
    values = torch.tensor([-3.0, 0.4, 0.6, 254.6, 300.0]).view(1, 1, 5) * rgb_range / 255
    assert quantize(values, rgb_range).ravel().tolist() == [0, 0, 1, 255, 255]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", b"old")

    def fail(_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"disk full: .*file"):
        write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_json_is_strict(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.inf, math.nan, 1.5]})

    def refuse(name):
        raise AssertionError(name)

    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse) == {"a": ["inf", None, 1.5]}


def test_options_round_trip_and_mark_what_differs(tmp_path):
    run = Experiment("run", tmp_path)
    run.start()
    path = run.folder / "options.json"
    with pytest.raises(InputError, match=r"options\.json is not there"):
        run.load_options()
    write_options(path, {"lr": 2e-4, "decay": [100]}, {"lr": 2e-4, "decay": [200]})
    assert json.loads(path.read_text())["changed"] == {"decay": [100]}
    assert run.load_options() == {"lr": 2e-4, "decay": [100]}
    path.write_text("[")
    with pytest.raises(InputError, match=r"options\.json is not there or broken"):
        run.load_options()


def test_grey_and_rgb_images_have_the_same_luma():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    np.testing.assert_allclose(luma(grey), luma(grey.repeat(3, 2)))


def test_a_log_ends_with_its_run(tmp_path, caplog):
    run = Experiment("run", tmp_path)
    run.start()
    caplog.set_level("INFO")
    with run.logging():
        logger.info("within")
    logger.info("after")
    text = (run.folder / "log.txt").read_text()
    assert "within" in text
    assert "after" not in text


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "a\\b", "/root", "~"])
def test_a_run_has_a_plain_name(name, tmp_path):
    with pytest.raises(InputError, match="names no run"):
        Experiment(name, tmp_path)


def test_a_run_is_not_overwritten_and_reset_deletes_it_alone(tmp_path):
    other = Experiment("other", tmp_path)
    other.start()
    run = Experiment("run", tmp_path)
    run.start()
    run.start()  # empty: nothing to lose
    (run.folder / "notes").write_text("")
    with pytest.raises(InputError, match="already; --reset"):
        run.start()
    run.save_checkpoint({})
    with pytest.raises(InputError, match="--load run goes on"):
        run.start()
    assert (run.folder / "notes").exists()
    with pytest.raises(InputError, match="--reset would delete"):
        run.check_start(reset=True, keep=str(run.folder / "notes"))
    run.start(reset=True)
    assert list(run.folder.iterdir()) == []
    assert other.folder.is_dir()


def test_a_broken_checkpoint_is_named(tmp_path):
    run = Experiment("run", tmp_path)
    with pytest.raises(InputError, match="no run to continue"):
        run.load_checkpoint()
    state = {"epoch": 3, "model": {}, "optimizer": {}}
    save_torch(run.folder / "checkpoint.pt", state)
    assert run.load_checkpoint() == state
    save_torch(run.folder / "checkpoint.pt", {"head.0.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="no checkpoint of a run"):
        run.load_checkpoint()
    (run.folder / "checkpoint.pt").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"--pre_train .*model_latest"):
        run.load_checkpoint()


def test_history_is_written_as_a_table_and_as_curves(tmp_path):
    run = Experiment("run", tmp_path)
    history = [{"epoch": 1, "loss": 2.0, "active": 0.9}, {"epoch": 2, "loss": 1.0, "active": 0.8, "psnr_y_Set5": 30.0}]
    run.write_history(history)
    lines = (run.folder / "log.csv").read_text().splitlines()
    assert lines == ["epoch,loss,active,psnr_y_Set5", "1,2,0.9,", "2,1,0.8,30"]
    assert all((run.folder / f"{name}.png").stat().st_size > 1000 for name in ("loss", "psnr", "active_share"))


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "nonsense"):
        with pytest.raises(InputError, match=f"--device {name}"):
            pick_device(name)


def test_work_in_parallel_keeps_its_order_and_the_first_error_ends_it():
    assert in_parallel(lambda value: value**2, [3, 1, 2], 3, "squares") == [9, 1, 4]
    assert in_parallel(str, [], 2, "nothing") == []
    done = []

    def work(value):
        if value == 1:
            raise InputError("bad")
        time.sleep(0.01)
        done.append(value)

    with pytest.raises(InputError, match="bad"):
        in_parallel(work, [1, *range(2, 100)], 2, "numbers")
    assert len(done) < 50


def test_a_run_that_goes_on_removes_what_killed_ones_left(tmp_path):
    experiment = Experiment("run", tmp_path)
    left = [experiment.folder / ".checkpoint.pt.1.tmp", experiment.folder / "model/.model_best.pt.1.tmp"]
    kept = [experiment.folder / "checkpoint.pt", experiment.folder / "results-Set5-x2/.img_x2_SR.png.2.tmp"]
    for path in left + kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with experiment.alone():
        assert [path.exists() for path in left + kept] == [False, False, True, True]


@pytest.mark.skipif(sys.platform != "linux", reason="nobody tells")
def test_free_memory_is_some_of_what_the_machine_has():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


def test_free_memory_heeds_the_limits_of_all_groups(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("1:name=systemd:/\n0::/job/step\n")
    job, step = tmp_path / "job", tmp_path / "job/step"
    step.mkdir(parents=True)
    for folder, limit in ((job, "1000"), (step, "max")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("700\n")
        (folder / "memory.stat").write_text("anon 600\ninactive_file 100\n")
    assert free_in_cgroup(tmp_path, own) == 400
    (job / "memory.max").write_text("max")
    assert free_in_cgroup(tmp_path, own) == math.inf
    assert free_in_cgroup(tmp_path, tmp_path / "absent") == math.inf


def test_an_unfinished_file_may_vanish(tmp_path):
    (tmp_path / ".a.tmp").symlink_to("absent")
    (tmp_path / ".b.tmp").touch()
    remove_unfinished(tmp_path)
    assert not (tmp_path / ".b.tmp").exists()
