import shutil

import imageio.v3 as iio
import numpy as np

from tools import make_figures


def test_all_pictures_of_the_readme_are_made(tmp_path, capfd):
    released = tmp_path / "released/SMSR_X2"
    released.mkdir(parents=True)
    shutil.copy(make_figures.RELEASED / "SMSR_X2/log.csv", released)
    code = make_figures.main(["--output", str(tmp_path / "docs"), "--released", str(tmp_path / "released")])
    pictures = {path.name: iio.imread(path) for path in (tmp_path / "docs").iterdir()}
    expected = {"masks.png", "channels.png", "comparison.png", "limits.png"} | ({"report.png"} if code == 0 else set())
    assert pictures.keys() == expected
    assert code == ("left out: " in capfd.readouterr().err)
    for name in ("masks.png", "comparison.png", "limits.png"):
        assert len(np.unique(pictures[name].reshape(-1, pictures[name].shape[-1]), axis=0)) > 10_000  # full color
    curves = {path.name for path in released.glob("*.png")}
    assert curves == {"loss.png", "psnr.png", "active_share.png", "density.png", "masks.png"}


def test_without_a_browser_the_picture_of_the_report_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_figures, "run", lambda folder, program, *arguments: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: None)
    monkeypatch.setattr(make_figures, "shrink", lambda source, target, width: None)
    assert make_figures.draw(tmp_path, tmp_path) == 1
    assert "report.png: " in capsys.readouterr().err
