import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from data.resize import downscale, upscale
from evaluation import compare
from model.edsr import EDSR
from model.smsr import SMSR
from program import InputError
from tools.compare import main


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    iio.imwrite("hr.png", np.random.default_rng(0).integers(0, 256, (41, 52, 3), dtype=np.uint8))
    torch.save(tiny.state_dict(), "smsr.pt")
    torch.save(EDSR(2, n_feats=8, n_resblocks=1).state_dict(), "edsr.pt")
    torch.save(SMSR(3, n_feats=8, n_blocks=1, n_layers=2).state_dict(), "x3.pt")
    return tmp_path


def compare_methods(line):
    main(f"--image hr.png --output new/strip.png {line}".split())


def test_methods_are_shown_side_by_side(folder, capsys):
    (folder / "experiment/mine/model").mkdir(parents=True)
    shutil.copy("smsr.pt", "experiment/mine/model/model_best.pt")
    compare_methods("--crop 10,5,20,10 --methods bicubic edsr.pt smsr.pt experiment/mine/model/model_best.pt hr")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[:-1]] == ["bicubic", "edsr", "smsr", "mine"]
    hr = iio.imread("hr.png")[:40]
    metrics = compare(upscale(downscale(hr, 2), 2), hr, 2)
    assert printed[0] == f"bicubic: {metrics['psnr_y']:.2f} dB / {metrics['ssim_y']:.4f}"
    height, width = iio.imread("new/strip.png").shape[:2]
    assert width > 2 * height  # three crops of 2:1 in each of two rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--crop 40,0,13,5 --methods smsr.pt", r"--crop 40,0,13,5: the crop extends beyond the image \(52x40\)"),
        ("--crop 1,2,3 --methods hr", "--crop: '1,2,3'"),
        ("--crop 0,0,0,5 --methods hr", "--crop"),
        ("--crop 0,0,5,5 --methods bicubic", "pass --scale"),
        ("--crop 0,0,5,5 --methods smsr.pt x3.pt", "x2, x3"),
        ("--crop 0,0,5,5 --methods smsr.pt --scale 4", "x2, x4"),
        ("--crop 0,0,5,5 --methods absent.pt", "absent.pt"),
        ("--crop 0,0,5,5 --methods bicubic hr --image absent.png", "^absent.png: no such file"),
        ("--crop 0,0,5,5 --methods bicubic --scale 60", "hr.png: the image is smaller than 60"),
    ],
)
def test_errors_name_the_flag_or_file(folder, line, message):
    with pytest.raises(InputError, match=message):
        compare_methods(line)


def test_the_image_is_not_overwritten(folder):
    before = (folder / "hr.png").read_bytes()
    (folder / "link.png").symlink_to(folder / "hr.png")
    line = "--crop 0,0,9,9 --methods bicubic --scale 2"
    for image, output in (("hr.png", "hr.png"), ("link.png", "hr.png"), ("hr.png", "new/../hr.png")):
        (folder / "new").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=f"would overwrite {image}, which this call reads"):
            main(f"{line} --image {image} --output {output}".split())
    assert (folder / "hr.png").read_bytes() == before
