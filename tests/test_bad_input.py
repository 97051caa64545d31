"""Hundreds of damaged files and odd command lines: the programs work, or end with one line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from main import main

COUNTS = {"weights": 90, "checkpoint": 45, "options": 35, "results": 40, "cache": 10, "onnx": 30, "images": 40}
COUNTS |= {"mp4": 10, "mkv": 10}  # 310 files
N_COMMANDS = 60  # odd_commands.py tries any number
TRAIN = (
    "--dir_data data --data_train Tiny --data_test Tiny2 --n_feats 8 --n_blocks 1 --n_layers 2 --patch_size 8 "
    "--batch_size 2 --test_every 1 --epochs 2 --time_limit 1e-9 --n_threads 0 --ema 0.9 --save run"
)
TEST = "--dir_data data --data_test Tiny2 --pre_train weights.pt --test_only --save tested --save_results --save_masks"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")


@pytest.fixture
def folder(tmp_path, monkeypatch, make_set, tiny):
    """Weights, a run that can be resumed, its cache and a tested one."""
    monkeypatch.chdir(tmp_path)
    make_set("Tiny", count=2)
    make_set("Tiny2", count=1, size=(24, 24), benchmark=True)
    torch.save(tiny.state_dict(), "weights.pt")
    main(TRAIN.split())
    main(TEST.split())
    return tmp_path


def write_photos(folder):
    (folder / "photos").mkdir()
    image = Image.open(folder / "data/Tiny/HR/img0.png").crop((0, 0, 10, 8))
    for index, suffix in enumerate(("png", "jpg", "tif", "ppm", "webp", "bmp", "gif")):
        image.save(folder / f"photos/img{index}.{suffix}")


def run(program, *arguments):
    command = [sys.executable, Path(__file__).with_name(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("kind", COUNTS)
def test_damaged_files_work_or_are_reported_in_one_line(folder, kind, request):
    if kind == "onnx":
        exported = request.getfixturevalue("exported")
        (folder / "w.onnx").write_bytes((exported / "w.onnx").read_bytes())
        (folder / "data/benchmark/Tiny2/HR").rename(folder / "photos")
    if kind == "images":
        write_photos(folder)
    if kind in ("mp4", "mkv"):
        from tests.data import clips  # skips the test without PyAV

        frames = list(np.random.default_rng(0).integers(0, 256, (4, 24, 32, 3), dtype=np.uint8))
        clips.write_clip(folder / f"clip.{kind}", frames, codec="mpeg4", pix_fmt="yuv420p", sound=["aac"])
    done = run("damaged_files.py", kind, folder, "0", str(COUNTS[kind]))
    assert done.stdout == ""
    assert done.returncode == 0, done.stderr


def test_odd_commands_work_or_are_refused_in_one_line(folder, exported):
    (folder / "w.onnx").write_bytes((exported / "w.onnx").read_bytes())
    write_photos(folder)
    (folder / "photos/notes.txt").write_text("no image")
    done = run("odd_commands.py", folder, "0", str(N_COMMANDS))
    assert done.stdout == ""
    assert done.returncode == 0, done.stderr
