import csv
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from checkpoint import Experiment
from data.device import DeviceLoader
from data.image import write_png
from data.resize import downscale
from data.srdata import PatchLoader
from evaluation import compare
from main import build_loader, main
from model import EDSR, SMSR, load_model
from model.inference import self_ensemble
from option import parse
from picture import Picture, read_picture, to_colors
from program import CLOSED_PIPE, InputError, run_program
from tests import icc
from tools import compare as compare_tool
from tools import export_onnx
from trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
MAIN = [sys.executable, str(ROOT / "main.py")]


@pytest.fixture
def folder(tmp_path, monkeypatch, make_set, tiny):
    """The working directory of a test: data/Tiny, data/benchmark/Tiny2 and weights.pt."""
    monkeypatch.chdir(tmp_path)
    make_set("Tiny", count=4)
    make_set("Tiny2", count=2, benchmark=True)
    torch.save(tiny.state_dict(), tmp_path / "weights.pt")
    return tmp_path


TRAIN = (
    "--dir_data data --data_train Tiny --data_test Tiny+Tiny2 --data_range 1-3/4-4 --n_feats 8 --n_blocks 2 "
    "--n_layers 2 --patch_size 8 --batch_size 2 --test_every 2 --n_threads 0 --save run"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TEST = "--dir_data data --data_test Tiny2 --pre_train weights.pt --test_only --save check"


def run(line):
    return main(line.split())


def mistake(line):
    """The line that the command line prints for a mistake."""
    with pytest.raises(InputError) as error:
        run(line)
    message = error.value.for_command_line()
    assert "\n" not in message
    return message


def read_options(name):
    return json.loads(Path(f"experiment/{name}/options.json").read_text())


def read_metrics(name, results="results-Tiny2-x2"):
    return json.loads(Path(f"experiment/{name}/{results}/metrics.json").read_text())


def read_sr(name, image="img0", results="results-Tiny2-x2"):
    return iio.imread(f"experiment/{name}/{results}/{image}_x2_SR.png")


def read_history(name):
    return list(csv.DictReader(Path(f"experiment/{name}/log.csv").read_text().splitlines()))


def load(path):
    return torch.load(path, weights_only=True)


def test_train_resume_and_test(folder):
    assert run(f"{TRAIN} --epochs 2") == 0
    options = read_options("run")
    assert options["changed"]["n_feats"] == 8
    assert "lr" not in options["changed"]
    assert len(read_history("run")) == 2

    assert mistake(f"{TRAIN} --epochs 2") == (
        "--save run: experiment/run already contains a run; choose another --save, resume with --load run, "
        "or overwrite it with --reset"
    )
    assert run("--load run --epochs 3") == 0
    assert len(read_history("run")) == 3

    for resume, which in ((0, "best"), (-1, "latest")):
        assert run(f"--load run --test_only --data_test Tiny2 --resume {resume}") == 0
        assert run(f"{TEST} --pre_train experiment/run/model/model_{which}.pt") == 0
        assert read_metrics("run")["psnr_y"] == read_metrics("check")["psnr_y"]
    path = Path("experiment/run/model/model_7.pt")
    assert mistake("--load run --test_only --resume 7") == (
        f"--resume 7: {path} does not exist; use 0 for the best weights or -1 for the latest "
        "(a training with --save_models keeps those of every epoch)"
    )


def test_the_weights_of_every_epoch_can_be_kept_and_tested(folder):
    run(f"{TRAIN} --epochs 2 --save_models")
    run("--load run --test_only --data_test Tiny2 --resume 1")
    assert read_metrics("run")["psnr_y"] == pytest.approx(float(read_history("run")[0]["psnr_y_Tiny2"]), rel=1e-5)


def test_a_command_that_fails_leaves_the_run_unchanged(folder):
    run(f"{TRAIN} --epochs 1")
    before = content(Path("experiment/run"))
    for line, message in (
        ("--load run --epochs 2 --optimizer SGD", "--optimizer: the run uses Adam"),
        ("--load run --epochs 2 --loss L1+GAN", "--loss: GAN needs HR patches of at least 32 pixels"),
        ("--load run --epochs 2 --loss L1+GAN --patch_size 16", "--loss: the run has no discriminator for 'GAN'"),
        ("--load run --epochs 2 --scale 3", "--scale 3: the run has 2"),
        ("--load run --epochs 2 --rgb_range 1", "--rgb_range 1.0: the run has its network's own value"),
    ):
        assert mistake(line).startswith(message)
    assert before == content(Path("experiment/run"))


def test_resuming_a_finished_run_changes_nothing_and_succeeds(folder, capsys):
    run(f"{TRAIN} --epochs 1")
    before = content(folder / "experiment/run")
    assert run("--load run") == 0
    assert capsys.readouterr().out.endswith("--load run: all 1 epochs are done; add more with --epochs\n")
    assert content(folder / "experiment/run") == before


LEFT = {"options.json": '{\n "changed": {}', "log.txt": "2026-01-31 12:00:00 SMSR x2", ".0123.tmp": "cut off"}
LEFT["tensorboard/events.out.tfevents.1"] = "cut off"


@pytest.mark.parametrize("left", [["options.json"], ["options.json", "log.txt"], list(LEFT)])
def test_a_run_that_died_before_its_first_checkpoint_is_started_again_by_the_same_command(folder, left):
    for name in left:
        path = Path("experiment/run", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(LEFT[name])
    message = "--load run: experiment/run holds no checkpoint yet; start the run with --save run and its options"
    assert mistake("--load run") == message
    assert run(f"{TRAIN} --epochs 1") == 0
    assert run("--load run --epochs 2") == 0


@pytest.mark.parametrize("kept", ["model/model_latest.pt", "checkpoint.pt", "log.csv", "log.txt", "options.json"])
def test_a_folder_that_holds_anything_else_of_that_name_is_not_written_to(folder, kept):
    path = Path("experiment/run", kept)
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert "experiment/run already contains a run" in mistake(f"{TRAIN} --epochs 1")
    assert content(folder / "experiment/run") == {path.resolve(): b"mine"}


def test_without_a_name_each_run_gets_a_folder_of_its_own(folder, capsys):
    line = f"{TRAIN.replace('--save run', '')} --epochs 1"
    for _ in range(3):
        run(line)
    assert {path.name for path in Path("experiment").iterdir()} == {"test", "test-2", "test-3"}
    assert "writing to experiment/test-3\n" in capsys.readouterr().out
    run(f"{line} --reset")
    assert len(list(Path("experiment").iterdir())) == 3


def test_options_that_are_missing_or_without_effect_are_named(folder, capsys):
    run(f"{TRAIN} --epochs 1 --lr 1e-3")
    stored = read_options("run")
    del stored["options"]["lr"], stored["options"]["gclip"]
    Path("experiment/run/options.json").write_text(json.dumps(stored))
    run("--load run --epochs 2 --gclip 5")
    line = "experiment/run/options.json: lacks options of this version, or was edited; using gclip 5.0, lr 0.0002\n"
    assert line in capsys.readouterr().out
    run("--load run --test_only --data_test Tiny2 --lr 1 --batch_size 3")
    assert "--batch_size, --lr: without effect in a test\n" in capsys.readouterr().out


def test_what_does_not_fit_into_memory_is_refused_before_it_is_built(folder, monkeypatch):
    monkeypatch.setattr("main.free_memory", lambda device: 1000)
    message = "--batch_size 2: a step needs more than 0 GiB of memory, more than is free; use a smaller --batch_size"
    assert mistake(f"{TRAIN} --epochs 1").startswith(message)
    monkeypatch.setattr("model.building.free_memory", lambda device: 1000)
    assert mistake(f"{TRAIN} --epochs 1").startswith("--n_feats: the weights of this")
    assert not Path("experiment").exists()


def test_the_engine_of_a_test_is_logged(folder, capsys):
    run(f"{TEST} --engine plain")
    assert "engine: plain\n" in capsys.readouterr().out
    assert mistake(f"{TEST} --engine fused").startswith("--engine: fused cannot run here (")


def test_help_is_printed_without_importing_what_takes_seconds():
    done = subprocess.run([sys.executable, "-X", "importtime", MAIN[1], "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--batch_size" in done.stdout
    assert not re.search(r"\| +(torch|numpy|matplotlib|cv2)\b", done.stderr)


def test_log_lines_fit_80_columns(folder):
    run(f"{TRAIN} --epochs 2")
    lines = Path("experiment/run/log.txt").read_text().splitlines()
    printed = [line.partition(" ")[2].partition(" ")[2] for line in lines]  # without the time
    assert sum(line.startswith("epoch ") for line in printed) == 2
    assert all(len(line) <= 80 for line in printed if line.startswith(("epoch ", "  ")))


def content(folder):
    """{path: bytes} of all files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_resumed_run_keeps_the_origin_of_its_weights(folder):
    run(f"{TRAIN} --epochs 1 --pre_train weights.pt")
    run("--load run --epochs 2")
    assert read_options("run")["changed"]["pre_train"] == "weights.pt"


def test_resuming_from_the_command_line_is_exact(folder):
    run(f"{TRAIN} --epochs 2")
    shutil.move("experiment/run", "experiment/uninterrupted")
    run(f"{TRAIN} --epochs 1")
    run(f"{TRAIN.replace('--save', '--load')} --epochs 2 --ext device")
    ours, theirs = (load(f"experiment/{name}/model/model_latest.pt") for name in ("run", "uninterrupted"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_that_begins_without_masks(folder):
    line = f"{TRAIN} --pre_train weights.pt --unmasked_epochs 1 --save_models"
    run(f"{line} --epochs 1")
    without_masks = load("experiment/run/model/model_1.pt")
    name = "blocks.0.spatial_mask.5.bias"
    assert torch.equal(without_masks[name], load("weights.pt")[name])
    assert mistake("--load run --epochs 3 --unmasked_epochs 2").startswith("--unmasked_epochs 2: the run has 1; ")
    run("--load run --epochs 3")
    with_masks = load("experiment/run/model/model_2.pt")
    assert not torch.equal(with_masks["blocks.0.channel_logits"], without_masks["blocks.0.channel_logits"])
    with open("experiment/run/log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["active"]) == 1 for row in rows] == [True, False, False]


@pytest.mark.parametrize("which", ["channels", "all"])
def test_masks_that_are_frozen_stay_as_they_are(folder, tiny, which):
    line = f"{TRAIN} --pre_train weights.pt --revive_masks --freeze_masks {which} --unmasked_epochs 1 --ema 0.9"
    run(f"{line} --epochs 2")
    shutil.move("experiment/run", "experiment/uninterrupted")
    run(f"{line} --epochs 1")
    run("--load run --epochs 2")
    for file in ("model_latest_ema.pt", "model_latest.pt"):
        ours, theirs = (load(f"experiment/{name}/model/{file}") for name in ("run", "uninterrupted"))
        for name in theirs:
            assert torch.equal(ours[name], theirs[name])
    for k, block in enumerate(tiny.blocks):
        trained, before = theirs[f"blocks.{k}.channel_logits"], block.channel_logits
        assert torch.equal(trained.sort(1).values, before.sort(1).values)  # in another order
        is_same = torch.equal(theirs[f"blocks.{k}.spatial_mask.5.bias"], block.spatial_mask.logits.bias)
        assert is_same == (which == "all")
        assert not torch.equal(theirs[f"blocks.{k}.collect.bias"], block.collect.bias)


def test_masks_are_frozen_from_the_start_or_not_at_all(folder):
    line = f"{TRAIN} --freeze_masks all"
    assert mistake(line).startswith("--freeze_masks: needs the masks of trained weights; ")
    run(f"{TRAIN} --epochs 1")
    assert mistake("--load run --freeze_masks all").startswith("--freeze_masks all: the run trains all masks; ")
    run(f"{line} --epochs 1 --save frozen --pre_train weights.pt")
    assert mistake("--load frozen --freeze_masks channels").startswith("--freeze_masks channels: the run freezes all; ")


def collapse_masks(path, modules):
    """Let some modules of a weights file find no pixel important."""
    weights = load(path)
    for module in modules:
        weights[f"blocks.{module}.spatial_mask.5.weight"].zero_()
        weights[f"blocks.{module}.spatial_mask.5.bias"] = torch.tensor([1.0, 0.0])
    torch.save(weights, path)


def test_masks_that_have_collapsed_are_revived(folder, capsys):
    collapse_masks("weights.pt", [1])
    run(f"{TRAIN} --pre_train weights.pt --revive_masks --epochs 1 --unmasked_epochs 1")
    assert "--revive_masks: module 2 starts with the mask of module 1\n" in capsys.readouterr().out
    assert "--revive_masks: module 2 starts" in Path("experiment/run/log.txt").read_text()
    weights = load("experiment/run/model/model_latest.pt")
    for name in ("0.weight", "3.bias", "5.weight"):
        first, second = (weights[f"blocks.{k}.spatial_mask.{name}"] for k in (0, 1))
        assert torch.equal(first, second)
    assert read_options("run")["changed"]["revive_masks"]
    assert mistake("--load run --revive_masks").startswith("--revive_masks: --load brings its own weights; ")
    line = mistake(f"{TRAIN} --revive_masks")
    assert line == "--revive_masks: needs the masks of trained weights; add --pre_train FILE"
    collapse_masks("weights.pt", [0, 1])
    line = mistake(f"{TRAIN} --save other --pre_train weights.pt --revive_masks")
    assert line.startswith("--revive_masks: weights.pt: all masks are empty or full; ")


def test_a_test_writes_images_metrics_and_a_table(folder, capsys):
    assert run(f"{TEST} --save_results") == 0
    results = folder / "experiment/check/results-Tiny2-x2"
    assert {path.name for path in results.iterdir()} == {
        *("img0_x2_SR.png", "img1_x2_SR.png"),
        *("metrics.json", "options.json", ".finished"),
    }
    metrics = read_metrics("check")
    assert metrics["n_images"] == 2
    assert read_sr("check").shape == (40, 48, 3)
    printed = capsys.readouterr().out
    assert "img1" in printed
    assert f"{metrics['psnr_y']:.2f}" in printed


def test_mask_pictures_are_written(folder):
    odd_image = iio.imread("data/benchmark/Tiny2/LR_bicubic/X2/img0.png")[:19, :23]
    iio.imwrite("odd.png", odd_image)
    demo = "--data_test demo --dir_demo odd.png --scale 2 --pre_train weights.pt --test_only --save_masks --save demo"
    assert run(demo) == 0
    pictures = {path.name: iio.imread(path) for path in Path("experiment/demo/results-demo-x2").glob("*.png")}
    assert set(pictures) == {f"odd_x2_{kind}.png" for kind in ("SR", "mask1", "mask2", "density", "masks")}
    for kind in ("mask1", "mask2", "density"):
        assert pictures[f"odd_x2_{kind}.png"].shape == (19, 23, 3)
    assert "--self_ensemble makes eight" in mistake(f"{demo} --self_ensemble")
    assert mistake(f"{demo} --model EDSR").startswith("--save_masks: EDSR has no masks")


def test_an_image_too_large_for_memory_is_processed_in_tiles(folder, monkeypatch, capsys):
    run(f"{TEST} --save_results")
    untiled = read_sr("check")
    assert "in tiles" not in capsys.readouterr().out
    monkeypatch.setattr("model.inference.free_memory", lambda device: 1000)
    run(f"{TEST} --save_results --reset")
    message = "20x24 pixels need about 0.0 GiB, more than is free: processing the image in tiles"
    assert capsys.readouterr().out.count(message) == 1
    assert np.array_equal(read_sr("check"), untiled)


def test_self_ensemble_and_precision(folder, tiny):
    run(f"{TEST} --save_results")
    plain = read_sr("check").astype(int)
    others = []
    for flags in ("--self_ensemble", "--precision bf16"):
        run(f"{TEST} --save_results --reset {flags}")
        others.append(read_sr("check"))
        assert np.abs(plain - others[-1]).mean() < 8
    lr = torch.from_numpy(iio.imread("data/benchmark/Tiny2/LR_bicubic/X2/img0.png")).permute(2, 0, 1)[None].float()
    expected, _ = self_ensemble(tiny.eval().inference, lr)
    assert np.array_equal(others[0], to_uint8(expected))
    expected = tiny.bfloat16()(lr.bfloat16())
    assert np.array_equal(others[1], to_uint8(expected))


def to_uint8(sr, rgb_range=255):
    """(1, C, H, W) in 0...rgb_range -> uint8 (H, W, C)."""
    return (sr.detach().float() * (255 / rgb_range)).clamp(0, 255).round().byte()[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("model", [SMSR(2, n_blocks=2), EDSR(2, n_resblocks=2)], ids=["SMSR", "EDSR"])
def test_tiles_and_modes_give_the_same_image(folder, model):
    torch.save(model.state_dict(), "weights.pt")
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    iio.imwrite(
        "photos/own.png", np.kron(rng.integers(0, 256, (80, 30, 3), dtype=np.uint8), np.ones((4, 6, 1), np.uint8))
    )
    demo = f"--data_test demo --dir_demo photos --pre_train weights.pt --test_only --model {type(model).__name__}"
    images = []
    for flags in ("", "--chop --chop_size 150", "--inference dense", "--inference auto --chop --chop_size 1"):
        run(f"{demo} --save check --reset {flags}")
        images.append(read_sr("check", "own", "results-demo-x2").astype(int))
    for image, share in zip(images[1:], (1e-5, 1e-3, 1e-5), strict=True):
        assert np.abs(images[0] - image).max() <= 1  # sums are rounded in another order
        assert (images[0] != image).mean() < share


def limit_memory():
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
def test_an_image_that_does_not_fit_in_memory_is_named_with_what_to_do(folder):
    torch.save(SMSR(2).state_dict(), "weights.pt")
    (folder / "photos").mkdir()
    iio.imwrite("photos/huge.png", np.zeros((4000, 5000, 3), np.uint8))
    line = "--data_test demo --dir_demo photos --pre_train weights.pt --test_only --save check --cpu"
    done = subprocess.run([*MAIN, *line.split()], capture_output=True, text=True, preexec_fn=limit_memory)
    assert done.returncode == 2, done.stderr
    message = "error: --chop: huge: not enough memory for an image of 4000x5000 pixels; process it in tiles (chop)"
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_demo_writes_images_and_logs_that_nothing_is_measured(folder, capsys):
    (folder / "photos").mkdir()
    shutil.copy("data/Tiny/LR_bicubic/X2/img0.png", "photos/own.png")
    run("--data_test demo --dir_demo photos --pre_train weights.pt --test_only --save_results --save check")
    assert read_sr("check", "own", "results-demo-x2").shape == (40, 48, 3)
    assert "no HR images" in capsys.readouterr().out
    assert read_metrics("check", "results-demo-x2")["psnr_y"] is None


def test_results_of_demo_keep_depth_alpha_and_profile(folder, tiny):
    rng = np.random.default_rng(0)
    name = "写" * 79  # 241 bytes with .png
    pictures = {
        name: Picture(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8), profile=icc.rgb_profile()),
        "deep": Picture(rng.integers(0, 2**16, (8, 10, 3), dtype=np.uint16), rng.integers(0, 9, (8, 10), np.uint16)),
        "gray": Picture(rng.integers(0, 256, (7, 6, 1), dtype=np.uint8), rng.integers(0, 256, (7, 6), np.uint8)),
    }
    for stem, picture in pictures.items():
        write_png(folder / f"photos/{stem}.png", picture)
    run("--data_test demo --dir_demo photos --pre_train weights.pt --test_only --save_masks --save check")
    for stem, picture in pictures.items():
        sr = read_picture(folder / f"experiment/check/results-demo-x2/{stem}_x2_SR.png")
        expected = picture.with_upscaled(tiny.eval().upscale(to_colors(picture.pixels, 3)))
        assert sr.pixels.dtype == picture.pixels.dtype
        assert np.abs(sr.pixels.astype(int) - expected.pixels).max() <= 1
        assert np.array_equal(sr.alpha, expected.alpha)
        assert sr.profile == picture.profile


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf_8_are_kept(folder):
    name = os.fsdecode(b"caf\xe9")
    (folder / "photos").mkdir()
    shutil.copy("data/Tiny/LR_bicubic/X2/img0.png", f"photos/{name}.png")
    line = "--data_test demo --dir_demo photos --pre_train weights.pt --test_only --save_masks --save check"
    with pytest.raises(SystemExit) as exited:
        run_program(lambda: run(line))
    assert exited.value.code == 0
    assert read_sr("check", name, "results-demo-x2").shape == (40, 48, 3)
    assert Path(f"experiment/check/results-demo-x2/{name}_x2_masks.png").is_file()
    assert read_metrics("check", "results-demo-x2")["images"][0]["name"] == name


def test_other_files_in_the_folder_of_demo_are_named_and_skipped(folder, capsys):
    shutil.copytree("data/Tiny/LR_bicubic/X2", "photos")
    Path("photos/Thumbs.db").write_bytes(b"")
    Path("photos/phone.heic").write_bytes(b"")
    run("--data_test demo --dir_demo photos --pre_train weights.pt --test_only --save check")
    lines = capsys.readouterr().out.splitlines()
    assert "photos: skipped Thumbs.db: not images" in lines
    assert "photos: skipped phone.heic: HEIC images cannot be read here; convert them to PNG or JPEG" in lines
    assert len(list(Path("experiment/check/results-demo-x2").glob("*.png"))) == 4


@pytest.mark.parametrize("flags", ["--n_colors 1", "--rgb_range 1"])
def test_gray_images_and_another_value_range(folder, flags):
    run(f"{TRAIN} --epochs 2 --lr 1e-3 {flags}")
    run("--load run --test_only --data_test Tiny2 --resume -1 --save_results")
    assert read_sr("run").shape == ((40, 48) if "colors" in flags else (40, 48, 3))
    assert read_metrics("run")["psnr_y"] > 15


def test_weights_survive_a_reset_of_results(folder):
    run(f"{TRAIN} --epochs 1")
    weights = "experiment/run/model/model_best.pt"
    run(f"{TEST} --save run --pre_train {weights} --reset")
    assert Path(weights).exists()
    message = f"--reset: would delete --pre_train {weights}; choose another --save"
    assert mistake(f"{TRAIN} --pre_train {weights} --reset") == message
    assert Path(weights).exists()
    run(f"{TRAIN} --epochs 1 --pre_train weights.pt --reset")
    assert len(read_history("run")) == 1


def test_training_starts_from_given_weights(folder, tiny):
    run(f"{TRAIN} --epochs 1 --pre_train weights.pt --lr 1e-12 --lambda_warmup 9")
    trained = load("experiment/run/model/model_latest.pt")
    assert all((trained[key] - value).abs().max() < 1e-6 for key, value in tiny.state_dict().items())


@pytest.mark.curves
def test_edsr_trains_too(folder):
    run(TRAIN.replace("--n_blocks 2 --n_layers 2", "--model EDSR --n_resblocks 1") + " --epochs 1")
    (row,) = read_history("run")
    assert row["active"] == row["active_share_Tiny"] == "1"
    assert not any("density" in column for column in row)
    assert not Path("experiment/run/density.png").exists()


# Mistakes, and the beginning of the line that is printed for each: it names a flag or a file.
MISTAKES = [
    (f"{TRAIN} --model RCAN", "--model: no such network 'RCAN'; there are SMSR, EDSR"),
    (f"{TRAIN} --loss L3", "--loss: .* there are L1, MSE"),
    (f"{TRAIN} --optimizer LION", "--optimizer: no such optimizer 'LION'; there are ADAM, SGD, RMSprop"),
    (f"{TRAIN} --data_train Set9", "data: contains no set 'Set9'; available sets: Tiny, Tiny2"),
    (f"{TRAIN} --dir_data nowhere", "--dir_data: no such folder 'nowhere'"),
    (f"{TRAIN} --scale 3", r"data.Tiny.LR_bicubic.X3: the LR images at x3 are missing; .*prepare_data\.py"),
    (f"{TRAIN} --patch_size 30", r"--patch_size: patches of 30x30 pixels do not fit into .*img0\.png \(20x24\); use"),
    (f"{TRAIN} --data_range 1-3/4-9", "--data_range: range 4-9 is out of bounds: Tiny holds 4 images"),
    (f"{TRAIN} --device cuda:9", "--device: no such device 'cuda:9' on this machine"),
    (f"{TRAIN} --loss VGG54 --patch_size 4", "--loss: VGG54 needs HR patches of at least 16 pixels"),
    (f"{TRAIN} --n_resblocks 3", "--n_resblocks: SMSR has no parameter 'n_resblocks'"),
    (f"{TRAIN} --model EDSR --n_blocks 3", "--n_(blocks|layers): EDSR has no parameter"),
    (f"{TRAIN} --pre_train absent.pt", r"absent\.pt: no such weights file"),
    (
        f"{TRAIN} --pre_train weights.pt --n_feats 16",
        r"--n_feats: weights\.pt holds SMSR weights for n_feats 8, not 16",
    ),
    ("--load absent", "--load: experiment.absent does not exist; check the name of the run"),
    ("--load absent --test_only", "--load: experiment.absent does not exist; check the name of the run"),
    (f"{TEST} --data_test Set5", "data: contains no set 'Set5'"),
    (f"{TEST} --scale 4", r"--scale: weights\.pt holds SMSR weights for scale 2, not 4"),
    (f"{TEST} --pre_train absent.pt", r"absent\.pt: no such weights file"),
    (f"{TEST} --pre_train data/Tiny/HR/img0.png", r"data/Tiny/HR/img0\.png: cannot be read as weights"),
    (f"{TEST} --model EDSR", r"weights\.pt: holds SMSR weights, not EDSR weights; use model SMSR, or another file"),
    (f"{TEST} --n_feats 16", r"--n_feats: weights\.pt holds SMSR weights for n_feats 8, not 16"),
    (f"{TEST} --rgb_range 1", r"--rgb_range: weights\.pt holds SMSR weights for rgb_range 255, not 1"),
    (f"{TEST} --n_resblocks 3", "--n_resblocks: SMSR has no parameter 'n_resblocks'"),
    ("--test_only", "--test_only: needs weights"),
    (f"{TEST} --data_test demo --dir_demo absent", "--dir_demo: no such file or folder 'absent'; check the path"),
    (f"{TEST} --data_test demo", "--dir_demo: missing"),
    (f"{TEST} --save ../up", "--save: '../up' is not a valid run name"),
    ("--load ../up", "--load: '../up' is not a valid run name"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES)
def test_mistakes_are_named_and_leave_nothing_behind(folder, line, message):
    before = sorted(folder.rglob("*.pt"))
    assert re.match(message, mistake(line))
    assert sorted(folder.rglob("*.pt")) == before
    assert not (folder / "experiment").exists()


def test_a_broken_image_is_named_and_the_others_are_measured(folder, capsys):
    path = Path("data/benchmark/Tiny2/HR/img1.png")
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    assert run(f"{TEST} --save_results") == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-2] == "error: 1 of 2 images failed, the others are done"
    assert re.match(f"error: {path}: not an image, or broken", printed.err.splitlines()[-1])
    assert "mean" in printed.out
    metrics = read_metrics("check")
    assert [row["name"] for row in metrics["images"]] == ["img0"]
    assert list(metrics["failed"]) == ["img1"]
    path.write_bytes(content)
    assert run(f"{TEST} --save_results") == 0
    assert "1 of 2 images were done already" in capsys.readouterr().out
    repaired = read_metrics("check")
    assert repaired["images"][0] == metrics["images"][0]
    assert "failed" not in repaired
    run(f"{TEST} --save new")
    assert read_metrics("new")["psnr_y"] == repaired["psnr_y"]


def test_a_training_does_not_start_with_a_broken_validation_image(folder):
    path = Path("data/benchmark/Tiny2/HR/img1.png")
    path.write_bytes(b"broken")
    assert mistake(f"{TRAIN} --epochs 1").startswith(f"{path}: not an image, or broken")
    assert not Path("experiment").exists()


# ---- nothing is lost, nothing is done twice --------------------------------------------------------------------------

DEMO = "--data_test demo --dir_demo photos --pre_train weights.pt --test_only --save demo"
RESULTS = Path("experiment/demo/results-demo-x2")


def write_photo(path, seed):
    write_png(Path(path), np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8))


@pytest.fixture
def photos(folder):
    """The folder photos: a.png, b.png (broken) and c.png."""
    for seed, name in enumerate("abc"):
        write_photo(f"photos/{name}.png", seed)
    Path("photos/b.png").write_bytes(b"broken")
    return Path("photos")


def snapshot(folder):
    """{path: (content, when it was written)} of all files."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(folder).rglob("*") if path.is_file()}


def pictures():
    return snapshot(RESULTS) and {
        path.name: found for path, found in snapshot(RESULTS).items() if path.suffix == ".png"
    }


def test_a_broken_photo_does_not_end_a_demo_and_nothing_is_done_twice(photos, capsys):
    assert run(DEMO) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: photos/b.png: not an image, or broken")
    before = pictures()
    assert set(before) == {"a_x2_SR.png", "c_x2_SR.png"}
    write_photo("photos/b.png", 5)
    assert run(f"{DEMO} --chop --cpu") == 0  # the result is the same
    after = pictures()
    assert set(after) == {"a_x2_SR.png", "b_x2_SR.png", "c_x2_SR.png"}
    assert after.items() > before.items()
    (RESULTS / "a_x2_SR.png").unlink()
    assert run(DEMO) == 0
    assert {name: content for name, (content, _) in pictures().items()} == {
        name: content for name, (content, _) in after.items()
    }
    assert pictures()["c_x2_SR.png"] == after["c_x2_SR.png"]


def test_a_photo_behind_a_broken_link_is_named(photos, capsys):
    Path("photos/b.png").unlink()
    Path("photos/b.png").symlink_to("/unplugged/b.png")
    assert run(DEMO) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: photos/b.png: no such file")


def test_without_any_readable_photo_a_demo_fails(photos, capsys):
    for name in "ac":
        (photos / f"{name}.png").write_bytes(b"")
    assert mistake(DEMO).startswith("photos/c.png: not an image, or broken")
    assert [line.split(":")[1] for line in capsys.readouterr().err.splitlines() if "error" in line] == [
        " photos/a.png",
        " photos/b.png",
    ]


def test_an_interrupted_demo_goes_on_where_it_stopped(photos, monkeypatch):
    write_photo("photos/b.png", 5)
    written = []

    def killed(path, picture):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path)
        write_png(path, picture)

    with monkeypatch.context() as patch:
        patch.setattr("results.write_png", killed)
        with pytest.raises(KeyboardInterrupt):
            run(DEMO)
    before = pictures()
    assert set(before) == {"a_x2_SR.png"}
    assert run(DEMO) == 0
    assert pictures()["a_x2_SR.png"] == before["a_x2_SR.png"]
    assert len(pictures()) == 3


@pytest.mark.parametrize("what", ["photo", "weights", "options", "unknown"])
def test_results_of_something_else_are_only_replaced_on_request(folder, what):
    write_photo("photos/a.png", 1)
    write_photo("others/b.png", 2)
    if what == "unknown":
        write_photo(RESULTS / "a_x2_SR.png", 9)
    else:
        run(DEMO)
    assert run(DEMO.replace("photos", "others")) == 0
    line = DEMO
    if what == "photo":
        write_photo("photos/a.png", 3)
    elif what == "weights":
        torch.save(SMSR(scale=2, n_feats=8, n_blocks=1, n_layers=2).state_dict(), "weights.pt")
    elif what == "options":
        line += " --self_ensemble"
    (RESULTS / "notes.txt").write_text("mine")
    before = snapshot("experiment")
    assert mistake(line) == (
        f"{RESULTS / 'a_x2_SR.png'}: already exists, made from another input, or with other weights or options; "
        "pass --reset to overwrite it or choose another --save"
    )
    assert snapshot("experiment") == before
    assert run(f"{line} --reset") == 0
    after = snapshot("experiment")
    assert after[RESULTS / "a_x2_SR.png"] != before[RESULTS / "a_x2_SR.png"]
    for kept in ("b_x2_SR.png", "notes.txt"):
        assert after[RESULTS / kept] == before[RESULTS / kept]


def test_images_whose_names_differ_in_the_extension_have_two_results(folder):
    write_photo("photos/a.png", 1)
    iio.imwrite("photos/a.bmp", iio.imread("photos/a.png")[:5])
    write_photo("photos/c.png", 2)
    assert run(DEMO) == 0
    assert set(pictures()) == {"a.bmp_x2_SR.png", "a.png_x2_SR.png", "c_x2_SR.png"}
    assert iio.imread(RESULTS / "a.bmp_x2_SR.png").shape == (10, 24, 3)


def test_a_name_that_is_too_long_for_its_result_is_that_image_s_failure(folder, capsys):
    write_photo(f"photos/{'n' * 250}.png", 1)
    write_photo("photos/a.png", 2)
    assert run(DEMO) == 1
    assert "the name of its result would be too long; rename it" in capsys.readouterr().err
    assert set(pictures()) == {"a_x2_SR.png"}


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_inputs_are_never_deleted_or_overwritten(folder):
    write_photo("photos/a.png", 1)
    run(DEMO)
    Path("both").mkdir()
    shutil.copy("photos/a.png", "both/a.png")
    Path("both/z.png").symlink_to((RESULTS / "a_x2_SR.png").resolve())
    before = snapshot("experiment") | snapshot("both")
    for source, message in (
        (RESULTS, f"--dir_demo {RESULTS}: is the folder of the results; choose another --save"),
        ("both", "--save: would overwrite both/z.png, which this call reads; choose another name"),
    ):
        for flags in ("", " --reset"):
            assert mistake(DEMO.replace("photos", str(source)) + flags) == message
    assert run(DEMO.replace("photos", f"{RESULTS}/a_x2_SR.png") + " --reset") == 0
    after = snapshot("experiment") | snapshot("both")
    assert all(after[path] == before[path] for path in before if path.suffix == ".png")


def test_a_damaged_record_does_no_harm(folder):
    write_photo("photos/a.png", 1)
    run(DEMO)
    (record,) = (RESULTS / ".finished").iterdir()
    content, outside = json.loads(record.read_bytes()), Path("mine.txt")
    outside.write_text("mine")
    for broken in (b"", b"[]", b'{"made_from": 1}', b"\xff", b"[" * 100_000):
        record.write_bytes(broken)
        assert mistake(DEMO).startswith(f"{RESULTS / 'a_x2_SR.png'}: already exists")
    record.write_text(json.dumps(content | {"files": {"../../../mine.txt": "x"}}))
    assert run(f"{DEMO} --reset") == 0
    assert outside.exists()
    for facts in (None, {}, content["facts"] | {"row": {"name": "a"}}, content["facts"] | {"cost": {"pixels": "x"}}):
        record.write_text(json.dumps(content | {"facts": facts}))
        assert run(DEMO) == 0


@pytest.mark.parametrize("option", ["pre_train", "vgg_weights"])
def test_a_reset_keeps_what_the_training_reads(folder, option):
    run(f"{TRAIN} --epochs 1")
    Path("link.pt").symlink_to(Path("experiment/run/model/model_best.pt").resolve())
    message = f"--reset: would delete --{option} link.pt; choose another --save"
    assert mistake(f"{TRAIN} --epochs 1 --reset --{option} link.pt") == message
    shutil.copytree("data", "experiment/run/data")
    before = list(Path("experiment/run/data").rglob("*.png"))
    assert run(f"{TRAIN} --epochs 1 --reset".replace("--dir_data data", "--dir_data experiment/run/data")) == 0
    assert all(path.is_file() for path in before)


def test_a_reset_removes_all_that_a_training_writes(folder):
    run(f"{TRAIN} --epochs 1 --ema 0.5 --save_models")
    experiment = Experiment("run")
    experiment.create(reset=True)
    assert not [path for path in Path("experiment/run").rglob("*") if path.is_file()]


def test_a_set_is_measured_again_with_other_options_and_says_so(folder, capsys):
    run(TEST)
    run(f"{TEST} --inference dense")
    assert "metrics.json: replacing the numbers of an earlier test" in capsys.readouterr().out
    run(f"{TEST} --inference dense --save dense")
    assert read_metrics("check")["gmacs_run"] == read_metrics("dense")["gmacs_run"]


@pytest.mark.parametrize("n_threads", [0, 1])
def test_an_image_that_breaks_during_a_training_is_named_with_what_to_do(folder, n_threads):
    run(f"{TRAIN} --epochs 1 --ext img")
    path = Path("data/Tiny/HR/img1.png")
    path.write_bytes(path.read_bytes()[:-100])
    message = mistake(f"--load run --epochs 5 --n_threads {n_threads}")
    assert message.startswith(f"{path}: not an image, or broken")
    assert message.endswith("; then resume with: python main.py --load run")


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_the_images_are_on_a_gpu_by_default_and_elsewhere_on_request(folder, name):
    def loader(flags):
        return build_loader(parse(f"{TRAIN} {flags}".split()), torch.device(name))

    assert isinstance(loader(""), DeviceLoader if name == "cuda" else PatchLoader)
    assert isinstance(loader("--ext device"), DeviceLoader)
    assert isinstance(loader("--ext sep"), PatchLoader)


def test_a_mistake_is_printed_in_one_line_with_exit_code_2(folder, capsys):
    done = subprocess.run([*MAIN, "--scale", "0"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --scale: ")
    assert done.stderr.count("\n") == 1
    with pytest.raises(SystemExit) as exited:
        run_program(lambda: run(f"{TRAIN} --model RCAN"))
    assert exited.value.code == 2
    assert capsys.readouterr().err == "error: --model: no such network 'RCAN'; there are SMSR, EDSR\n"


def start(line):
    """Start the program in a process group of its own."""
    return subprocess.Popen(
        [*MAIN, *line.split()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(condition, seconds=120):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_ctrl_c_saves_and_prints_how_to_resume(folder):
    process = start(f"{TRAIN.replace('--n_threads 0', '--n_threads 1')} --epochs 100000")
    wait_for(Path("experiment/run/log.csv").exists)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers too
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "resume with: python main.py --load run" in printed
    assert "Traceback" not in printed
    epoch = load("experiment/run/checkpoint.pt")["epoch"]
    assert run(f"--load run --epochs {epoch}") == 0


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="sends POSIX signals as Linux does")
def test_sigterm_to_all_processes_of_a_run_saves(folder):
    process = start(f"{TRAIN.replace('--n_threads 0', '--n_threads 2')} --test_every 1000000")
    wait_for(Path("experiment/run/checkpoint.pt").exists)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: len(children.read_text().split()) >= 2)
    time.sleep(1)  # until they ignore it
    workers = children.read_text().split()
    for pid in (*map(int, workers), process.pid):  # a batch system does this
        os.kill(pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "everything is saved" in printed
    assert "Traceback" not in printed
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_a_killed_run_can_be_resumed_while_its_workers_are_alive(folder):
    process = start(f"{TRAIN.replace('--n_threads 0', '--n_threads 1')} --epochs 100000")
    wait_for(Path("experiment/run/checkpoint.pt").exists)
    wait_for(Path("experiment/run/log.csv").exists)
    process.kill()
    process.wait()
    epoch = load("experiment/run/checkpoint.pt")["epoch"]
    assert run(f"--load run --epochs {epoch}") == 0
    process.communicate(timeout=60)  # returns when the workers, which hold the pipe, have ended too


def test_a_run_that_stopped_at_its_time_limit_can_be_resumed(folder, capsys):
    assert run(f"{TRAIN} --epochs 100000 --time_limit 0.02") == 0
    assert "resume with: python main.py --load run" in capsys.readouterr().out
    state = load("experiment/run/checkpoint.pt")
    assert run(f"--load run --epochs {state['epoch']}") == 0  # the limit is not resumed


def test_compiling_without_a_compiler_is_reported(folder):
    (folder / "empty").mkdir()
    environment = os.environ | {"PATH": str(folder / "empty"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "kernels")}
    done = subprocess.run(
        [*MAIN, *f"{TRAIN} --epochs 1 --compile --cpu".split()], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --compile: ")
    assert "Traceback" not in done.stderr


def test_a_dry_run_writes_nothing(folder, capsys):
    assert run(f"{TRAIN} --epochs 7 --dry_run") == 0
    printed = capsys.readouterr().out
    assert "remaining epochs: 7, about" in printed
    assert "GiB" in printed
    assert "changed" not in printed
    assert not (folder / "experiment").exists()


def test_weights_of_another_scale_are_loaded_except_for_the_tail(folder, make_set, tiny, capsys):
    make_set("Three", count=4, size=(60, 72), scale=3)
    line = TRAIN.replace("Tiny+Tiny2", "Three").replace("--data_train Tiny", "--data_train Three")
    run(f"{line} --scale 3 --epochs 1 --pre_train weights.pt --lr 1e-12 --lambda_warmup 9")
    assert "weights.pt: these are x2 weights; loading all but the tail for x3" in capsys.readouterr().out
    trained = load("experiment/run/model/model_latest.pt")
    for key, value in tiny.state_dict().items():
        if key.startswith("tail."):
            assert trained[key].shape[0] == 27
        else:
            torch.testing.assert_close(trained[key], value)


def test_changed_options_are_logged(folder, capsys):
    run(f"{TRAIN} --epochs 1")
    assert "changed: " not in capsys.readouterr().out
    run("--load run --epochs 2 --lr 1e-5")
    printed = capsys.readouterr().out
    assert "changed: lr 0.0002 → 1e-05\n" in printed
    assert "changed: epochs 1 → 2\n" in printed
    assert printed.count("changed: ") == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_two_runs_in_one_folder_are_refused(folder):
    run(f"{TRAIN} --epochs 1")
    with Experiment("run").lock():
        for line in ("--load run --epochs 2", f"{TRAIN} --reset"):
            assert mistake(line).startswith(f"{Path('experiment/run')}: another process is training there")
    assert run("--load run --epochs 2") == 0


def limit_files():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the files of a process as Linux does")
def test_a_full_disk_is_reported_and_nothing_is_lost(folder):
    run(f"{TRAIN} --epochs 1")
    before = Path("experiment/run/checkpoint.pt").read_bytes()
    line = "--load run --epochs 2"
    done = subprocess.run([*MAIN, *line.split()], capture_output=True, text=True, preexec_fn=limit_files)
    assert done.returncode == 2, done.stderr
    error = done.stderr.strip().splitlines()[-1]
    problem = "experiment/run/checkpoint.pt: File too large"
    assert error == f"error: {problem}; fix it, then resume with: python main.py --load run"
    assert "Traceback" not in done.stderr
    assert Path("experiment/run/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_whose_folder_is_deleted_ends_with_an_error_and_writes_nothing(folder, monkeypatch, replaced):
    evaluate = Trainer._evaluate

    def evaluate_and_delete(trainer):
        shutil.rmtree("experiment/run")
        if replaced:
            Path("experiment/run").mkdir()
        return evaluate(trainer)

    monkeypatch.setattr(Trainer, "_evaluate", evaluate_and_delete)
    message = "experiment/run: was deleted or moved while the run was writing to it; start it again"
    assert mistake(f"{TRAIN} --epochs 1") == message
    assert content(folder / "experiment") == {}


@pytest.mark.skipif(sys.platform != "linux", reason="writes to /dev/full")
def test_a_log_that_cannot_be_written_ends_a_run_in_one_line(folder):
    run(f"{TRAIN} --epochs 1")
    Path("experiment/run/log.txt").unlink()
    Path("experiment/run/log.txt").symlink_to("/dev/full")
    problem = "No space left on device; fix it, then resume with: python main.py --load run"
    assert mistake("--load run --epochs 2") == f"experiment/run/log.txt: {problem}"
    Path("experiment/run/log.txt").unlink()
    assert run("--load run --epochs 2") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="writes to /dev/full")
@pytest.mark.parametrize("is_closed", [False, True])
def test_a_console_that_cannot_be_written_ends_a_run_in_one_line(folder, is_closed):
    run(f"{TRAIN} --epochs 1")
    reader, writer = os.pipe() if is_closed else (None, os.open("/dev/full", os.O_WRONLY))
    if is_closed:
        os.close(reader)
    line = [*MAIN, "--load", "run", "--epochs", "2"]
    done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == (CLOSED_PIPE if is_closed else 2)
    assert done.stderr == (
        "" if is_closed else "error: standard output: No space left on device; free some disk space\n"
    )
    assert run("--load run --epochs 2") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="sends POSIX signals and reads /proc")
def test_a_killed_worker_is_reported(folder):
    process = start(f"{TRAIN.replace('--n_threads 0', '--n_threads 1')} --test_every 1000000")
    wait_for(Path("experiment/run/checkpoint.pt").exists)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(workers.read_text)
    for worker in workers.read_text().split():
        os.kill(int(worker), signal.SIGKILL)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    advice = "if memory is short, use fewer, or 0; resume with: python main.py --load run"
    how = r"(was killed \(Killed\)|has died)"  # PyTorch notices the one or the other
    assert re.search(rf"error: --n_threads: a worker process {how}; {re.escape(advice)}\n", printed)
    assert "Traceback" not in printed


@pytest.mark.parametrize("n_threads", [0, 1])
@pytest.mark.parametrize("set_name", ["Tiny", "benchmark/Tiny2"])
def test_a_set_that_vanishes_during_a_run_is_named_with_what_to_do(folder, monkeypatch, n_threads, set_name):
    run(f"{TRAIN} --epochs 1 --ext img")
    load_state = Trainer.load_state

    def load_and_delete(trainer, state):
        load_state(trainer, state)
        shutil.rmtree(folder / "data" / set_name)

    monkeypatch.setattr(Trainer, "load_state", load_and_delete)
    message = mistake(f"--load run --epochs 5 --n_threads {n_threads}")
    assert re.fullmatch(r".*img\d\.png: no such file; check the path; then resume with: .* --load run", message)


def test_tensorboard_is_optional(folder):
    pytest.importorskip("tensorboard")
    run(f"{TRAIN} --epochs 2 --tensorboard --images_every 1")
    assert list(Path("experiment/run/tensorboard").iterdir())


def test_without_tensorboard_the_message_names_what_to_install(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = "--tensorboard: the package is not installed; pip install tensorboard"
    assert mistake(f"{TRAIN} --epochs 1 --tensorboard") == message
    assert not Path("experiment").exists()


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_a_killed_run_leaves_a_checkpoint_that_loads(folder):
    process = start(f"{TRAIN} --epochs 100000 --test_every 100000")
    wait_for(Path("experiment/run/checkpoint.pt").exists)
    process.kill()
    process.communicate()
    assert run("--load run --epochs 1 --test_every 2") == 0


# ---- settings that travel with the weights ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A network, and a setting of it that is not the default."""

    model: str
    sizes: str  # as flags
    setting: str
    value: float
    build: Callable  # with the sizes; takes the setting

    @property
    def flag(self):
        return f"--{self.setting} {self.value}"

    @property
    def train(self):
        line = TRAIN.replace("--n_blocks 2 --n_layers 2", f"--model {self.model} {self.sizes}")
        return f"{line} --lr 1e-3 --epochs 1"

    @property
    def test(self):
        return f"{TEST} --pre_train {WEIGHTS} --model {self.model} --save_results"

    def upscale(self, lr, weights=None, **setting):
        """uint8 (H, W, 3) -> uint8 (2 H, 2 W, 3), by a network that takes only its parameters from the weights."""
        network, rgb_range = self.build(**setting).eval(), setting.get("rgb_range", 255)
        parameters, weights = dict(network.named_parameters()), load(weights or WEIGHTS)
        network.load_state_dict({key: weights[key] for key in parameters})
        return to_uint8(network(torch.from_numpy(lr).permute(2, 0, 1)[None] * (rgb_range / 255)), rgb_range)


CASES = [
    Case(
        model="SMSR",
        sizes="--n_blocks 1 --n_layers 2",
        setting="rgb_range",
        value=1.0,
        build=functools.partial(SMSR, 2, n_feats=8, n_blocks=1, n_layers=2),
    ),
    Case(
        model="EDSR",
        sizes="--n_resblocks 2",
        setting="res_scale",
        value=0.1,
        build=functools.partial(EDSR, 2, n_feats=8, n_resblocks=2),
    ),
]
WEIGHTS = "experiment/run/model/model_latest.pt"


@pytest.fixture(params=CASES, ids=[case.setting for case in CASES])
def trained(folder, request):
    """A case whose network was trained with its setting, with the weights WEIGHTS."""
    run(f"{request.param.train} {request.param.flag}")
    return request.param


@pytest.fixture
def lr(folder):
    return iio.imread("data/benchmark/Tiny2/LR_bicubic/X2/img0.png")


@pytest.fixture
def expected(trained, lr):
    """The image that the network makes of `lr`, which it would not make without its setting."""
    sr = trained.upscale(lr, **{trained.setting: trained.value})
    assert np.abs(sr.astype(int) - trained.upscale(lr)).max() > 2
    return sr


def test_a_test_takes_the_settings_from_the_weights(trained, expected):
    run(f"{trained.test} --save with_flag {trained.flag}")
    run(f"{trained.test} --save without_flag")
    run("--load run --test_only --data_test Tiny2 --save_results")
    assert np.abs(read_sr("with_flag").astype(int) - expected).max() <= 1
    assert (read_sr("with_flag") != expected).mean() < 0.01
    for name in ("without_flag", "run"):
        assert np.array_equal(read_sr(name), read_sr("with_flag"))
        assert read_metrics(name)["psnr_y"] == read_metrics("with_flag")["psnr_y"]
    message = (
        f"--{trained.setting}: {WEIGHTS} holds {trained.model} weights for {trained.setting} {trained.value:g}, not 3"
    )
    assert mistake(f"{trained.test} --{trained.setting} 3").startswith(message)


def test_the_moving_average_takes_the_settings_too(trained, lr):
    run(f"{trained.train} {trained.flag} --ema 0.5 --save average")
    average = "experiment/average/model/model_latest_ema.pt"
    run(f"{trained.test} --pre_train {average}")
    sr = trained.upscale(lr, average, **{trained.setting: trained.value})
    assert np.abs(read_sr("check").astype(int) - sr).max() <= 1


def test_python_code_takes_the_settings_from_the_weights(trained, lr, expected):
    network = load_model(WEIGHTS)
    assert getattr(network, trained.setting).item() == pytest.approx(trained.value)
    assert np.abs(network.upscale(lr).astype(int) - expected).max() <= 1


def test_a_comparison_takes_the_settings_from_the_weights(trained, monkeypatch, capsys):
    path = "data/benchmark/Tiny2/HR/img0.png"
    hr = iio.imread(path)
    lr, shown = downscale(hr, 2), []
    expected = trained.upscale(lr, **{trained.setting: trained.value})
    assert np.abs(expected.astype(int) - trained.upscale(lr)).max() > 2
    monkeypatch.setattr(compare_tool, "comparison", lambda image, crop, panels: shown.append(panels) or b"")
    capsys.readouterr()
    compare_tool.main(["--image", path, "--crop", "0,0,48,40", "--methods", WEIGHTS, "--output", "strip.png"])
    (((sr, _),),) = shown
    assert np.abs(sr.astype(int) - expected).max() <= 1
    assert (sr != expected).mean() < 0.01
    printed = capsys.readouterr().out.splitlines()[0]
    assert float(printed.split()[1]) == pytest.approx(compare(expected, hr, 2)["psnr_y"], abs=0.011)


def test_an_exported_graph_takes_the_settings_from_the_weights(trained, lr, expected):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    export_onnx.main(["--pre_train", WEIGHTS, "--output", "graph.onnx"])
    session = onnxruntime.InferenceSession("graph.onnx", providers=["CPUExecutionProvider"])
    (sr,) = session.run(["sr"], {"image": lr[None]})
    assert np.abs(sr[0].astype(int) - expected).max() <= 1
    assert (sr[0] != expected).mean() < 0.01


def test_a_resumed_run_keeps_the_settings(trained):
    run("--load run --epochs 2 --decay 1 --tau_epochs 2 --lambda_warmup 1")
    resumed = load(WEIGHTS)
    assert resumed[trained.setting].item() == pytest.approx(trained.value)
    schedules = "--decay 1 --tau_epochs 2 --lambda_warmup 1"
    run(f"{trained.train} {trained.flag} {schedules} --epochs 2 --save uninterrupted".replace("--epochs 1", ""))
    uninterrupted = load("experiment/uninterrupted/model/model_latest.pt")
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[key], uninterrupted[key]) for key in resumed)


def test_a_training_takes_the_settings_from_the_weights_it_starts_from(trained, lr):
    line = f"{trained.train} --pre_train {WEIGHTS}"
    for name, flag in (("with_flag", trained.flag), ("without_flag", "")):
        run(f"{line} --save {name} {flag}")
        run(f"--load {name} --epochs 2")
    assert read_options("without_flag")["options"][trained.setting] is None
    paths = [f"experiment/{name}/model/model_latest.pt" for name in ("with_flag", "without_flag")]
    ours, theirs = (load(path) for path in paths)
    assert ours[trained.setting].item() == pytest.approx(trained.value)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    run("--load without_flag --test_only --data_test Tiny2 --resume -1 --save_results")
    sr = trained.upscale(lr, paths[1], **{trained.setting: trained.value})
    assert np.abs(read_sr("without_flag").astype(int) - sr).max() <= 1
    assert mistake(f"{line} --save wrong --{trained.setting} 3").startswith(f"--{trained.setting}: {WEIGHTS} holds")


# ---- runs of version 0.1.0 -------------------------------------------------------------------------------------------

OLD_RUN = Path(__file__).parent / "fixtures/run_0.1.0"
OLD_NAME = "run_0.1.0"
# What version 0.1.0 itself wrote when it finished this run. Processors round differently: compare within one percent.
OLD_COLUMNS = ("loss", "loss_L1", "active", "psnr_rgb_Tiny", "psnr_y_Tiny2", "psnr_y_Tiny2_ema")
OLD_EPOCHS = {
    "2": (0.132672, 0.0566223, 0.760494, 21.7735, 26.5659, 26.2121),
    "3": (0.129246, 0.0552111, 0.740345, 22.007, 26.8071, 26.6061),
}


@pytest.fixture
def old_run(folder):
    """A run of version 0.1.0, in value range 1, that was interrupted in the middle of epoch 2."""
    return Path(shutil.copytree(OLD_RUN, folder / "experiment" / OLD_NAME))


def test_the_checkpoint_of_an_old_run_is_what_is_to_be_tested():
    state, options = load(OLD_RUN / "checkpoint.pt"), json.loads((OLD_RUN / "options.json").read_text())["options"]
    assert (state["epoch"], state["step"], [row["epoch"] for row in state["history"]]) == (2, 3, [1])
    assert (options["epochs"], options["test_every"], options["ema"], options["rgb_range"]) == (3, 6, 0.9, 1)
    assert state["names"] == ["loss", "loss_L1", "active_1", "active_2", "grad_norm"]
    assert state["sums"].shape == (6,)
    assert state["bad"].tolist() == [1, 0]
    assert "rgb_range" not in state["model"]
    assert "module.rgb_range" not in state["ema"]


def test_an_old_run_can_be_finished(old_run):
    finished_epochs, options = read_history(OLD_NAME), read_options(OLD_NAME)["options"]
    assert run(f"--load {OLD_NAME}") == 0
    history = {row["epoch"]: row for row in read_history(OLD_NAME)}
    assert list(history) == ["1", "2", "3"]
    densities = dict.fromkeys([column for column in history["1"] if column.startswith("density_")], "")  # unknown then
    assert history["1"] == finished_epochs[0] | densities
    assert history["2"]["density_1"] == "nan"  # that version took the first steps of this epoch
    for column in densities.keys() - {"density_1", "density_2"}:
        assert 0 <= float(history["2"][column]) <= 1
    assert 0 < float(history["3"]["density_1"]) < 1
    assert [row["skipped"] for row in history.values()] == ["0", "1", "0"]
    for epoch, numbers in OLD_EPOCHS.items():
        assert [float(history[epoch][column]) for column in OLD_COLUMNS] == pytest.approx(numbers, rel=0.01)
    ours = read_options(OLD_NAME)["options"]
    assert {key: ours[key] for key in options} == options | {"load": OLD_NAME}
    state = load(old_run / "checkpoint.pt")
    assert (state["epoch"], state["step"], len(state["history"])) == (4, 0, 3)
    assert state["history"][0] == load(OLD_RUN / "checkpoint.pt")["history"][0]
    assert state["model"]["rgb_range"] == state["ema"]["module.rgb_range"] == 1
    assert run(f"--load {OLD_NAME}") == 0
    assert load(old_run / "checkpoint.pt")["epoch"] == 4


def test_an_old_run_logs_no_changed_options_when_it_is_resumed(old_run, capsys):
    run(f"--load {OLD_NAME} --epochs 2")
    printed = capsys.readouterr().out
    assert printed.count("changed: ") == 1
    assert "changed: epochs 3 → 2" in printed


def test_the_weights_of_an_old_run_give_the_results_of_its_log(old_run):
    run(f"--load {OLD_NAME} --test_only --data_test Tiny2")
    (row,) = read_history(OLD_NAME)
    assert read_metrics(OLD_NAME)["psnr_y"] == pytest.approx(float(row["psnr_y_Tiny2"]), abs=0.01)
    run(f"{TEST} --pre_train {old_run / 'model/model_best.pt'} --rgb_range 1")  # these weights do not record it
    assert read_metrics("check")["psnr_y"] == pytest.approx(read_metrics(OLD_NAME)["psnr_y"])


def test_a_new_run_can_start_from_the_weights_of_an_old_one(old_run):
    run(f"{TRAIN} --epochs 1 --pre_train {old_run / 'model/model_best.pt'} --rgb_range 1 --lr 1e-12 --lambda_warmup 9")
    assert load(WEIGHTS)["rgb_range"] == 1
    run(f"{TEST} --pre_train {WEIGHTS}")
    (row,) = read_history(OLD_NAME)
    assert read_metrics("check")["psnr_y"] == pytest.approx(float(row["psnr_y_Tiny2"]), abs=0.01)


# ---- published and released weights ----------------------------------------------------------------------------------


def test_the_released_weights_run_on_the_sample_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = ROOT / "experiment/released/SMSR_X2/model/model_best.pt"
    run(f"--dir_data {ROOT / 'testsets'} --data_test Sample --pre_train {weights} --test_only --save check")
    metrics = json.loads((tmp_path / "experiment/check/results-Sample-x2/metrics.json").read_text())
    for row in metrics["images"]:
        lr = iio.imread(ROOT / f"testsets/benchmark/Sample/LR_bicubic/X2/{row['name']}.png")
        hr = iio.imread(ROOT / f"testsets/benchmark/Sample/HR/{row['name']}.png")
        bicubic = torch.nn.functional.interpolate(
            torch.from_numpy(lr).permute(2, 0, 1)[None].float(), scale_factor=2, mode="bicubic"
        )
        assert row["psnr_y"] > compare(to_uint8(bicubic), hr, 2)["psnr_y"] + 0.5


def test_published_weights_on_set5(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = shared / "reference/SMSR_X2.pt"
    run(f"--dir_data {shared / 'data'} --data_test Set5 --pre_train {weights} --test_only --save check --save_results")
    mean = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mean"))
    assert mean.split()[1] == "37.99"
    assert mean.split()[2][:5] == "0.960"
    assert len(list((tmp_path / "experiment/check/results-Set5-x2").glob("*_SR.png"))) == 5
