import shutil
import zipfile

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from data import DataSettings, PatchSettings, build_test_sets, build_train_loader, find_set
from data.image import read_image
from data.resize import crop_to_multiple, downscale
from program import InputError
from tools.prepare_data import main


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
            assert np.array_equal(iio.imread(lr), downscale(crop_to_multiple(iio.imread(hr), scale), scale))
    assert np.array_equal(iio.imread(images.pairs["a"][0]), iio.imread(photos / "a.png"))
    assert images.benchmark == (kind == "benchmark")


def test_a_scale_can_be_added_later_and_in_place(photos, tmp_path):
    line = ["train", "--name", "Own", "--out", str(tmp_path), "--scales"]
    main([*line, "3", "4", "--hr", str(photos)])
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "Own").rglob("*.png")}
    main([*line, "2", "--hr", str(tmp_path / "Own/HR")])
    assert len(find_set("Own", tmp_path, 2).pairs) == 2
    assert len(find_set("Own", tmp_path, 3).pairs) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


def test_errors_name_the_flag_or_file(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "twin").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "twin/a.bmp")
    Image.new("RGB", (30, 3)).save(tmp_path / "small.png")

    def refuse(message, *folders, scales="2"):
        with pytest.raises(InputError, match=message):
            main(["train", "--hr", *folders, "--name", "Own", "--scales", scales, "--out", str(tmp_path / "out")])

    refuse("no images found", str(tmp_path / "empty"))
    refuse("has the same name", str(photos), str(tmp_path / "twin"))
    refuse("no such folder", str(tmp_path / "absent"))
    refuse(r"no usable image \(1 skipped", str(tmp_path), scales="4")
    refuse("--scales: .0. is not a positive integer", str(photos), scales="0")
    with pytest.raises(InputError, match="--name"):
        main(["train", "--hr", str(photos), "--name", "../up", "--scales", "2", "--out", str(tmp_path / "out")])


def test_unusable_images_are_skipped_for_training_and_refused_for_a_benchmark(photos, tmp_path, capsys):
    (photos / "broken.png").write_text("broken")
    Image.new("RGB", (50, 27)).save(photos / "flat.png")
    line = ["--hr", str(photos), "--name", "Own", "--scales", "2", "--out", str(tmp_path)]
    main(["train", *line, "--min_size", "28"])
    assert list(find_set("Own", tmp_path, 2).pairs) == ["b"]
    printed = capsys.readouterr().out
    for reason in ("a.png: 26x37 is below --min_size 28", "flat.png: 27x50 is below", "broken.png: not an image"):
        assert reason in printed
    assert "1 image, 3 skipped" in printed
    with pytest.raises(InputError, match=r"broken\.png: not an image"):
        main(["benchmark", *line])


@pytest.mark.parametrize("scales", [("2", "3", "4"), ("4", "3", "2"), ("3",)])
def test_every_scale_is_cropped_for_itself(tmp_path, scales):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (228, 344)).save(tmp_path / "photos/woman.png")  # of the size of woman in Set5
    flags = ["--name", "Own", "--out", str(tmp_path), "--scales", *scales]
    main(["benchmark", "--hr", str(tmp_path / "photos"), *flags])
    published = {"2": (114, 172), "3": (76, 114), "4": (57, 86)}
    for scale in scales:
        with Image.open(tmp_path / f"benchmark/Own/LR_bicubic/X{scale}/woman.png") as lr:
            assert lr.size == published[scale]
    with Image.open(tmp_path / "benchmark/Own/HR/woman.png") as hr:
        assert hr.size == (228, 344)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_set_with_remainders_is_trained_on_and_tested(photos, tmp_path, scale):
    main(f"train --hr {photos} --name Own --scales 2 3 4 --out {tmp_path}".split())
    settings = DataSettings(str(tmp_path), scale=scale)
    for name, lr, hr in build_test_sets(["Own"], settings)[0]:
        source = read_image(next(photos.glob(f"{name}.*")))
        assert hr.shape[:2] == (lr.shape[0] * scale, lr.shape[1] * scale)
        assert np.array_equal(hr, crop_to_multiple(source, scale))
    batches = []
    for ext in ("img", "sep", "bin", "device"):
        patches = PatchSettings(patch_size=6, ext=ext, batch_size=2, steps=8, n_threads=0)
        batches.append(list(build_train_loader(["Own"], settings, patches)))
    for lr, hr in batches[0]:
        assert lr.shape == (2, 6, 6, 3)
        assert hr.shape == (2, 6 * scale, 6 * scale, 3)
    for other in batches[1:]:
        assert all(
            torch.equal(a, b) for one, two in zip(batches[0], other, strict=True) for a, b in zip(one, two, strict=True)
        )


@pytest.mark.parametrize("scale", ["2", "3", "4"])
def test_set5_gets_the_published_sizes_and_values(shared, tmp_path, scale):
    published = shared / "data/benchmark/Set5"
    main(f"benchmark --hr {published}/HR --name Set5 --scales {scale} --out {tmp_path}".split())
    for path in (published / f"LR_bicubic/X{scale}").iterdir():
        lr, ours = iio.imread(path), iio.imread(tmp_path / f"benchmark/Set5/LR_bicubic/X{scale}/{path.name}")
        assert ours.shape == lr.shape
        assert (ours == lr).mean() > 0.99
    line = f"benchmark --hr {published}/HR --name Set5 --scales {scale} --out {tmp_path}/copy"
    shutil.copytree(published, tmp_path / "copy/benchmark/Set5")
    main(line.split())  # the published LR images are accepted as made from these HR images


def test_every_image_format_is_accepted(tmp_path):
    folder = tmp_path / "formats"
    folder.mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8))
    for mode, suffix in (("RGB", "jpg"), ("P", "png"), ("RGBA", "webp"), ("CMYK", "tiff"), ("L", "bmp")):
        image.convert(mode).save(folder / f"{mode}.{suffix}")
    main(["benchmark", "--hr", str(folder), "--name", "Own", "--scales", "2", "--out", str(tmp_path)])
    assert len(find_set("Own", tmp_path, 2).pairs) == 5


# ---- check -----------------------------------------------------------------------------------------------------------


def test_a_good_set_has_no_problems(make_set, capsys):
    assert main(["check", str(make_set(lr_suffix="x2") / "Tiny"), "--scale", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("Tiny at x2: 3 pairs")
    assert printed[1:] == [
        "files: 6 PNG RGB",
        "HR images: 40x48 to 40x48 pixels",
        "LR images: 100.00% of the values equal MATLAB's bicubic; the largest difference is 0",
        "no problems found",
    ]


def test_all_problems_are_listed(make_set, capsys):
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
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "6 problems found"
    problems = [line for line in printed if line.startswith("problem: ")]
    expected = (
        "img0.png: has no LR",
        "img1.png: has no HR",
        "img2.png: not an image",
        "img3.png: 19x24",
        "img4.png: differs from MATLAB",
    )
    assert len(problems) == 6
    for line, part in zip(problems, (*expected, "the largest difference is 4"), strict=True):
        assert part in line


def test_a_folder_that_is_not_a_set_is_refused(make_set, tmp_path):
    with pytest.raises(InputError, match="not an image set"):
        main(["check", str(tmp_path), "--scale", "2"])
    root = make_set(count=0) / "Tiny"
    with pytest.raises(InputError, match="no images found"):
        main(["check", str(root), "--scale", "2"])
    with pytest.raises(InputError, match="X3: no such folder"):
        main(["check", str(root), "--scale", "3"])


@pytest.mark.parametrize("scale", ["2", "3", "4"])
def test_published_images_are_made_with_matlab(shared, scale):
    assert main(["check", str(shared / "data/benchmark/Set5"), "--scale", scale]) == 0


# ---- DIV2K -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path, make_set):
    """Two images of DIV2K: 0001 in archives, 0801 in folders."""
    root, folder = make_set(count=2) / "Tiny", tmp_path / "published"
    folder.mkdir()
    for part, source, suffix in (("HR", root / "HR", ""), ("LR_bicubic/X2", root / "LR_bicubic/X2", "x2")):
        with zipfile.ZipFile(folder / f"DIV2K_train_{part.replace('/', '_')}.zip", "w") as archive:
            archive.write(source / "img0.png", f"DIV2K_train_{part}/0001{suffix}.png")
        target = folder / f"DIV2K_valid_{part}/0801{suffix}.png"
        target.parent.mkdir(parents=True)
        shutil.copy(source / "img1.png", target)
    return folder


def test_archives_and_folders_of_div2k_are_combined(published, tmp_path, capsys):
    line = ["div2k", "--archive_dir", str(published), "--out", str(tmp_path / "out")]
    main(line)
    images = find_set("DIV2K", tmp_path / "out", 2)
    assert list(images.pairs) == ["0001", "0801"]
    assert "DIV2K_train_HR: 1 of 800 images" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "out/DIV2K"), "--scale", "2"]) == 0
    hr, lr = images.pairs["0001"]
    whole, kept = hr.read_bytes(), lr.stat().st_mtime_ns
    for other in (whole[:100], whole[:-1] + b"?"):
        hr.write_bytes(other)
        with pytest.raises(InputError, match=r"0001\.png: already exists and differs from .*DIV2K_train_HR\.zip"):
            main(line)
        assert hr.read_bytes() == other
    hr.unlink()
    main(line)
    assert hr.read_bytes() == whole
    assert lr.stat().st_mtime_ns == kept


def test_damaged_archives_are_named(published, tmp_path):
    line = ["div2k", "--archive_dir", str(published), "--out", str(tmp_path / "out")]
    archive = published / "DIV2K_train_HR.zip"
    content = archive.read_bytes()
    archive.write_bytes(content[:-30])
    with pytest.raises(InputError, match=r"DIV2K_train_HR\.zip: not a complete zip file"):
        main(line)
    archive.write_bytes(content[:60] + bytes(20) + content[80:])
    with pytest.raises(InputError, match=r"DIV2K_train_HR\.zip: .*0001\.png inside it is damaged"):
        main(line)
    with pytest.raises(InputError, match="contains neither DIV2K_train_HR"):
        main(["div2k", "--archive_dir", str(tmp_path), "--out", str(tmp_path / "out")])


def test_unusable_images_must_be_removed_from_a_set_made_in_place(make_set, capsys):
    root = make_set(count=2)
    iio.imwrite(root / "Tiny/HR/small.png", np.zeros((8, 8, 3), np.uint8))
    line = f"train --hr {root}/Tiny/HR --name Tiny --scales 2 --out {root} --min_size 16"
    with pytest.raises(InputError, match="HR: cannot use 1 of its images"):
        main(line.split())
    assert "small.png: 8x8" in capsys.readouterr().out


@pytest.fixture
def other_photos(photos, tmp_path):
    """Other images with the names and sizes of `photos`."""
    folder = tmp_path / "other"
    folder.mkdir()
    for path in photos.iterdir():
        Image.fromarray(255 - iio.imread(path)).save(folder / path.name)
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.png")}


@pytest.mark.parametrize("kind", ["train", "benchmark"])
def test_sources_are_compared_by_content(photos, other_photos, tmp_path, kind):
    line = f"--name Own --scales 2 3 --out {tmp_path}/out"
    main([kind, "--hr", str(photos), *line.split()])
    written = contents(tmp_path / "out")
    assert len(written) == 6
    main([kind, "--hr", str(photos), *line.split()])
    with pytest.raises(InputError, match=r"HR/[ab]\.png: already exists and is another image than .*other/[ab]\."):
        main([kind, "--hr", str(other_photos), *line.split()])
    assert contents(tmp_path / "out") == written


def test_the_same_image_in_another_format_is_accepted(photos, tmp_path):
    line = f"--name Own --scales 2 --out {tmp_path}/out"
    main(["train", "--hr", str(photos), *line.split()])
    (tmp_path / "copies").mkdir()
    for path in photos.iterdir():
        Image.open(path).save(tmp_path / "copies" / f"{path.stem}.tiff")
    main(["train", "--hr", str(tmp_path / "copies"), *line.split()])


def test_lr_images_of_another_size_or_content_are_not_kept_silently(photos, tmp_path):
    line = f"--name Own --scales 2 3 --out {tmp_path}"
    main(["train", "--hr", str(photos), *line.split()])
    lr = tmp_path / "Own/LR_bicubic/X3/a.png"
    good = iio.imread(lr)
    for wrong in (good[1:], 255 - good):
        iio.imwrite(lr, wrong)
        for source in (photos, tmp_path / "Own/HR"):  # also in place
            with pytest.raises(InputError, match=r"X3/a\.png: already exists and was not made from .*a\.png at x3; "):
                main(["train", "--hr", str(source), *line.split()])
        assert np.array_equal(iio.imread(lr), wrong)
    lr.unlink()
    main(["train", "--hr", str(photos), *line.split()])
    assert np.array_equal(iio.imread(lr), good)


def test_nothing_is_written_if_one_image_conflicts(photos, other_photos, tmp_path):
    line = f"--name Own --scales 2 --out {tmp_path}/out"
    main(["train", "--hr", str(photos), *line.split()])
    written = contents(tmp_path / "out")
    (other_photos / "b.jpg").rename(other_photos / "new.jpg")
    with pytest.raises(InputError, match=r"HR/a\.png: already exists"):
        main(["train", "--hr", str(other_photos), *line.split()])
    assert contents(tmp_path / "out") == written


def test_only_training_sets_are_merged(photos, other_photos, tmp_path, capsys):
    for path in list(other_photos.iterdir()):
        path.rename(path.with_stem(f"more_{path.stem}"))
    for kind in ("train", "benchmark"):
        main(f"{kind} --hr {photos} --name Own --scales 2 --out {tmp_path}/out".split())
    main(f"train --hr {other_photos} --name Own --scales 2 --out {tmp_path}/out".split())
    assert "4 images; use it with" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"Own: already holds a set with other images \(a and 1 more "):
        main(f"benchmark --hr {other_photos} --name Own --scales 2 --out {tmp_path}/out".split())
    main(f"benchmark --hr {photos} {other_photos} --name Own --scales 2 --out {tmp_path}/out".split())


def test_reserved_names_are_refused(make_set, tmp_path):
    root = make_set()
    with pytest.raises(InputError, match="--name demo: "):
        main(f"train --hr {root}/Tiny/HR --name demo --scales 2 --out {tmp_path}".split())
