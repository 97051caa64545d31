"""The commands of the paper's page work to the letter, in a folder that has DIV2K in dataset/."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.image import write_png
from data.resize import downscale
from main import main
from program import InputError

ROOT = Path(__file__).resolve().parents[1]
TRAIN = "python main.py --model SMSR --save SMSR_X2 --scale 2 --patch_size 96 --batch_size 16"
TEST = "python main.py --dir_data testsets --data_test Set5 --scale 2 --model SMSR --save SMSR_X2"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """The working directory of a test, with three images of DIV2K in the published layout."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 1), ("train", 800), ("valid", 801)):
        hr = rng.integers(0, 256, (194, 201, 3), dtype=np.uint8)
        root = tmp_path / f"dataset/DIV2K/DIV2K_{part}"
        write_png(Path(f"{root}_HR/{number:04}.png"), hr)
        write_png(Path(f"{root}_LR_bicubic/X2/{number:04}x2.png"), downscale(hr[:, :200], 2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_training_starts(clone):
    assert TRAIN in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    command = [sys.executable, str(ROOT / "main.py"), *TRAIN.split()[2:]]
    training = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with training:
        lines = []
        for line in training.stdout:
            lines.append(line.rstrip())
            if line.startswith("SMSR x2"):
                break
        training.kill()
    assert ", 2 images, " in lines[-1]
    assert "DIV2K: the range 1-800 asks for 800 images, but dataset/DIV2K holds only 2 of them" in lines
    assert "DIV2K: the range 801-810 asks for 10 images, but dataset/DIV2K holds only 1 of them" in lines
    assert (clone / "experiment/SMSR_X2/options.json").is_file()


def test_training_finishes_an_epoch(clone):
    smaller = "--n_feats 8 --n_blocks 1 --n_layers 2 --test_every 2 --epochs 1 --n_threads 0"
    assert main([*TRAIN.split()[2:], *smaller.split()]) == 0
    assert (clone / "experiment/SMSR_X2/model/model_best.pt").is_file()


def test_a_test_without_set5_names_the_command_that_gets_it(clone):
    weights = ROOT / "experiment/released/SMSR_X2/model/model_best.pt"
    line = [*TEST.split()[2:], "--pre_train", str(weights), "--test_only", "--save_results"]
    remedy = r"download it with: python tools/prepare_data\.py download benchmark --out testsets$"
    with pytest.raises(InputError, match="no such folder 'testsets'; " + remedy):
        main(line)
    (clone / "testsets").mkdir()
    with pytest.raises(InputError, match="^testsets: contains no set 'Set5'; " + remedy):
        main(line)
    assert not (clone / "experiment").exists()


def test_a_training_without_div2k_names_the_command_that_gets_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"prepare_data\.py download DIV2K --scales 2 --out dataset$") as error:
        main(TRAIN.split()[2:])
    assert error.value.argument == "dir_data"
