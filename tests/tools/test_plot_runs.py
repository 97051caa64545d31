import math

import imageio.v3 as iio
import pytest

from program import InputError
from summary import write_history
from tools.plot_runs import find_measure, main, read_curve


def write_log(folder, rows):
    folder.mkdir()
    write_history(folder, rows)
    return folder


def row(epoch, psnr, share, **more):
    return {"epoch": epoch, "seconds": 1800, "psnr_y_Set5": psnr, "active_share_Set5": share, **more}


def test_runs_are_drawn_and_their_last_epochs_printed(tmp_path, capsys):
    averaged = {"psnr_y_Set5_ema": 37.5, "active_share_Set5_ema": 0.25}
    dense = write_log(tmp_path / "dense", [row(1, 36.0, 1.0), row(2, 37.0, 1.0)])
    sparse = write_log(tmp_path / "sparse", [row(1, 35.0, 0.5, **averaged)])
    main([str(dense), str(sparse), "--set", "Set5", "--output", str(tmp_path / "runs.png")])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{dense}: 37.00 dB on Set5 after 1.00 hours, active share 1.00"
    assert printed[1] == f"{sparse}: 37.50 dB on Set5 after 0.50 hours, active share 0.25"
    assert iio.imread(tmp_path / "runs.png").ndim == 3


def test_lines_have_one_point_per_epoch():
    history = [{"epoch": 1, "seconds": 360}, {"epoch": 2, "seconds": 3240, "psnr_rgb_A": 30.0, "active_share_A": 0.5}]
    hours, shares, psnr = read_curve(history, "psnr_rgb", "A")
    assert hours == [0.1, 1.0]
    assert math.isnan(psnr[0])  # validated on another set
    assert math.isnan(shares[0])
    assert (shares[1], psnr[1]) == (0.5, 30.0)


def test_the_measure_is_one_that_all_runs_have(tmp_path):
    both, rgb = {"psnr_y_A": 30.0, "psnr_rgb_A": 29.0}, {"psnr_rgb_A": 28.0}
    assert find_measure({tmp_path / "1": [both], tmp_path / "2": [both]}, "A") == "psnr_y"
    assert find_measure({tmp_path / "1": [both], tmp_path / "2": [rgb]}, "A") == "psnr_rgb"
    with pytest.raises(
        InputError, match=r"2/log\.csv: has no PSNR of A; pass a set that all runs validate on"
    ) as error:
        find_measure({tmp_path / "1": [both], tmp_path / "2": [row(1, 30, 0.5)]}, "A")
    assert error.value.argument == "set"


def test_files_that_are_read_or_are_something_else_are_kept(tmp_path):
    run = write_log(tmp_path / "run", [row(1, 36.0, 1.0)])
    (tmp_path / "photo.png").write_bytes(b"photo")
    for output, message in (("photo.png", "exists and is something else"), ("run/log.csv", "does not end")):
        before = (tmp_path / output).read_bytes()
        with pytest.raises(InputError, match=message):
            main([str(run), "--set", "Set5", "--output", str(tmp_path / output)])
        assert (tmp_path / output).read_bytes() == before
    with pytest.raises(InputError, match=r"none/log\.csv: No such file or directory"):
        main([str(tmp_path / "none"), "--set", "Set5", "--output", str(tmp_path / "runs.png")])
