import shutil
import zipfile

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
    refuse(r"none of 1 images can serve", str(tmp_path), scales="4")
    refuse("whole number", str(photos), scales="0")
    with pytest.raises(InputError, match="--name"):
        main(["train", "--hr", str(photos), "--name", "../up", "--scales", "2", "--out", str(tmp_path / "out")])


def test_what_cannot_serve_is_left_out_of_a_training_and_refused_in_a_benchmark(photos, tmp_path, capsys):
    (photos / "broken.png").write_text("broken")
    Image.new("RGB", (50, 27)).save(photos / "flat.png")
    line = ["--hr", str(photos), "--name", "Own", "--scales", "2", "--out", str(tmp_path)]
    main(["train", *line, "--min_size", "28"])
    assert list(find_set("Own", tmp_path, 2).pairs) == ["b"]
    printed = capsys.readouterr().out
    for said in ("a.png: 26x37 is smaller than 28", "flat.png: 27x50 is smaller", "broken.png: is no image"):
        assert said in printed
    assert "1 images, 3 left out" in printed
    with pytest.raises(InputError, match=r"broken\.png: is no image"):
        main(["benchmark", *line])


def test_what_is_left_after_cropping_is_at_least_min_size(tmp_path):
    (tmp_path / "photos").mkdir()
    for height in (23, 24):
        Image.new("RGB", (24, height)).save(tmp_path / f"photos/{height}.png")
    flags = ["--name", "Own", "--scales", "3", "4", "--min_size", "22", "--out", str(tmp_path)]
    main(["train", "--hr", str(tmp_path / "photos"), *flags])
    assert list(find_set("Own", tmp_path, 4).pairs) == ["24"]


def test_every_kind_of_file_is_taken(tmp_path):
    folder = tmp_path / "kinds"
    folder.mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8))
    for mode, ending in (("RGB", "jpg"), ("P", "png"), ("RGBA", "webp"), ("CMYK", "tiff"), ("L", "bmp")):
        image.convert(mode).save(folder / f"{mode}.{ending}")
    main(["benchmark", "--hr", str(folder), "--name", "Own", "--scales", "2", "--out", str(tmp_path)])
    assert len(find_set("Own", tmp_path, 2).pairs) == 5


# ---- check -----------------------------------------------------------------------------------------------------------


def test_a_good_set_has_nothing_wrong(make_set, capsys):
    assert main(["check", str(make_set(lr_suffix="x2") / "Tiny"), "--scale", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("Tiny at x2: 3 pairs")
    assert printed[1:] == [
        "files: 6 PNG RGB",
        "HR images: from 40x48 to 40x48 pixels",
        "LR images: 100.00% of the values are those of MATLAB's bicubic, the farthest is off by 0",
        "nothing wrong",
    ]


def test_all_that_is_wrong_is_listed(make_set, capsys):
    root = make_set(count=7) / "Tiny"
    lr = root / "LR_bicubic/X2"
    (lr / "img0.png").unlink()
    (root / "HR/img1.png").unlink()
    (lr / "img2.png").write_text("broken")
    iio.imwrite(lr / "img3.png", iio.imread(lr / "img3.png")[1:])
    iio.imwrite(lr / "img4.png", iio.imread(root / "HR/img4.png")[::2, ::2])
    far = iio.imread(lr / "img5.png")
    far[3, 4, 0] ^= 4
    iio.imwrite(lr / "img5.png", far)
    assert main(["check", str(root), "--scale", "2"]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrong: ")]
    said = (
        "img0.png: has no LR",
        "img1.png: has no HR",
        "img2.png: is no",
        "img3.png: 19x24",
        "img4.png: is not MATLAB",
    )
    assert len(wrong) == 6
    for line, expected in zip(wrong, (*said, "the farthest is off by 4"), strict=True):
        assert expected in line


def test_a_folder_that_is_no_set_is_refused(make_set, tmp_path):
    with pytest.raises(InputError, match="is no set"):
        main(["check", str(tmp_path), "--scale", "2"])
    root = make_set(count=0) / "Tiny"
    with pytest.raises(InputError, match="no images there"):
        main(["check", str(root), "--scale", "2"])
    with pytest.raises(InputError, match="X3: no such folder"):
        main(["check", str(root), "--scale", "3"])


@pytest.mark.parametrize("scale", ["2", "3", "4"])
def test_published_images_are_matlabs(shared, scale):
    assert main(["check", str(shared / "data/benchmark/Set5"), "--scale", scale]) == 0


# ---- DIV2K -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path, make_set):
    """Two images of DIV2K: one part in archives, one in folders."""
    root, folder = make_set(count=2) / "Tiny", tmp_path / "published"
    folder.mkdir()
    for part, source, suffix in (("HR", root / "HR", ""), ("LR_bicubic/X2", root / "LR_bicubic/X2", "x2")):
        with zipfile.ZipFile(folder / f"DIV2K_train_{part.replace('/', '_')}.zip", "w") as archive:
            archive.write(source / "img0.png", f"DIV2K_train_{part}/0001{suffix}.png")
        target = folder / f"DIV2K_valid_{part}/0801{suffix}.png"
        target.parent.mkdir(parents=True)
        shutil.copy(source / "img1.png", target)
    return folder


def test_archives_and_folders_of_div2k_become_a_set(published, tmp_path, capsys):
    line = ["div2k", "--archive_dir", str(published), "--out", str(tmp_path / "out")]
    main(line)
    images = find_set("DIV2K", tmp_path / "out", 2)
    assert list(images.pairs) == ["0001", "0801"]
    assert "DIV2K_train_HR: 1 images; 800 are published" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "out/DIV2K"), "--scale", "2"]) == 0
    hr, lr = images.pairs["0001"]
    hr.write_bytes(hr.read_bytes()[:100])  # cut off
    kept = lr.stat().st_mtime_ns
    main(line)
    assert iio.imread(hr).shape == (40, 48, 3)
    assert lr.stat().st_mtime_ns == kept


def test_a_broken_archive_is_named(published, tmp_path):
    line = ["div2k", "--archive_dir", str(published), "--out", str(tmp_path / "out")]
    archive = published / "DIV2K_train_HR.zip"
    content = archive.read_bytes()
    archive.write_bytes(content[:-30])
    with pytest.raises(InputError, match=r"DIV2K_train_HR\.zip: is no whole archive"):
        main(line)
    archive.write_bytes(content[:60] + bytes(20) + content[80:])
    with pytest.raises(InputError, match=r"DIV2K_train_HR\.zip: .*0001\.png in it is broken"):
        main(line)
    with pytest.raises(InputError, match="holds no DIV2K_train_HR"):
        main(["div2k", "--archive_dir", str(tmp_path), "--out", str(tmp_path / "out")])


def test_an_image_that_cannot_serve_must_leave_a_set_that_is_made_in_place(make_set, capsys):
    root = make_set(count=2)
    iio.imwrite(root / "Tiny/HR/small.png", np.zeros((8, 8, 3), np.uint8))
    line = f"train --hr {root}/Tiny/HR --name Tiny --scales 2 --out {root} --min_size 16"
    with pytest.raises(InputError, match="HR: 1 of its images cannot serve"):
        main(line.split())
    assert "small.png: 8x8" in capsys.readouterr().out


def test_another_image_of_a_name_that_is_there_is_not_passed_over(make_set, tmp_path, capsys):
    root = make_set(count=2, size=(40, 48))
    other = tmp_path / "other"
    other.mkdir()
    iio.imwrite(other / "img0.png", np.zeros((20, 20, 3), np.uint8))
    line = f"train --hr {other} --name Tiny --scales 2 --out {root}"
    with pytest.raises(InputError, match="none of 1 images can serve"):
        main(line.split())
    assert "img0.png: is there already, of another image than" in capsys.readouterr().out
    (other / "img0.png").rename(other / "more.png")
    main(line.split())
    assert "3 images; use it with" in capsys.readouterr().out


def test_names_that_mean_something_else_are_refused(make_set, tmp_path):
    root = make_set()
    with pytest.raises(InputError, match="--name demo: "):
        main(f"train --hr {root}/Tiny/HR --name demo --scales 2 --out {tmp_path}".split())
