import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from data import find_set
from data.resize import downscale
from tools.prepare_data import main
from utility import InputError


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (26, 37, 3), dtype=np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 256, (31, 29), dtype=np.uint8)).save(folder / "b.jpg")
    return folder


@pytest.mark.parametrize("kind", ["train", "benchmark"])
def test_a_prepared_set_is_found_at_every_scale(photos, tmp_path, kind):
    out = tmp_path / "out"
    main([kind, "--hr", str(photos), "--name", "Own", "--scales", "2", "3", "--out", str(out)])
    for scale in (2, 3):
        images = find_set("Own", out, scale)
        assert list(images.pairs) == ["a", "b"]
        for hr, lr in images.pairs.values():
            assert np.array_equal(iio.imread(lr), downscale(iio.imread(hr), scale))
    assert iio.imread(images.pairs["a"][0]).shape == (24, 36, 3)
    assert images.benchmark == (kind == "benchmark")


def test_a_scale_can_be_added_later_and_in_place(photos, tmp_path):
    line = ["train", "--name", "Own", "--out", str(tmp_path), "--scales"]
    main([*line, "3", "4", "--hr", str(photos)])
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "Own").rglob("*.png")}
    main([*line, "2", "--hr", str(tmp_path / "Own/HR")])
    assert len(find_set("Own", tmp_path, 2).pairs) == 2
    assert len(find_set("Own", tmp_path, 3).pairs) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


def test_mistakes_are_named(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "twin").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "twin/a.bmp")
    Image.new("RGB", (30, 3)).save(tmp_path / "small.png")

    def refuse(said, *folders, scales="2"):
        with pytest.raises(InputError, match=said):
            main(["train", "--hr", *folders, "--name", "Own", "--scales", scales, "--out", str(tmp_path / "out")])

    refuse("no images there", str(tmp_path / "empty"))
    refuse("has the name of", str(photos), str(tmp_path / "twin"))
    refuse("no such folder", str(tmp_path / "absent"))
    refuse(r"small\.png: is smaller than 4", str(tmp_path), scales="4")
    refuse("whole number", str(photos), scales="0")
    with pytest.raises(InputError, match="--name"):
        main(["train", "--hr", str(photos), "--name", "../up", "--scales", "2", "--out", str(tmp_path / "out")])
