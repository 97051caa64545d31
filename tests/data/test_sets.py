import dataclasses
import shutil

import imageio.v3 as iio
import numpy as np
import pytest

from data import DataSettings, PatchSettings, build_test_sets, build_train_loader, find_set, take_range
from data.srdata import WholeImages
from program import InputError

SMALL = PatchSettings(patch_size=8, ext="img", n_threads=0)


@pytest.mark.parametrize("lr_suffix", ["", "x2"])
@pytest.mark.parametrize("benchmark", [False, True])
def test_sets_are_found_in_both_layouts(make_set, lr_suffix, benchmark):
    images = find_set("Tiny", make_set(lr_suffix=lr_suffix, benchmark=benchmark), 2)
    assert list(images.pairs) == ["img0", "img1", "img2"]
    assert images.benchmark is benchmark
    assert images.has_hr
    hr, lr = images.pairs["img1"]
    assert (hr.name, lr.name) == ("img1.png", f"img1{lr_suffix}.png")


def test_div2k_is_found_as_published_and_like_any_other_set(make_set):
    root = make_set("DIV2K", count=4)
    assert list(find_set("DIV2K", root, 2).pairs) == ["img0", "img1", "img2", "img3"]
    div2k = root / "DIV2K"
    for part, names in (("train", ("img0", "img1", "img2")), ("valid", ("img3",))):
        (div2k / f"DIV2K_{part}_HR").mkdir()
        (div2k / f"DIV2K_{part}_LR_bicubic/X2").mkdir(parents=True)
        for name in names:
            shutil.move(div2k / f"HR/{name}.png", div2k / f"DIV2K_{part}_HR/{name}.png")
            shutil.move(div2k / f"LR_bicubic/X2/{name}.png", div2k / f"DIV2K_{part}_LR_bicubic/X2/{name}x2.png")
    (div2k / "HR").rmdir()
    images = find_set("DIV2K", root, 2)
    assert list(images.pairs) == ["img0", "img1", "img2", "img3"]
    assert images.pairs["img3"][1].name == "img3x2.png"
    shutil.rmtree(div2k / "DIV2K_train_LR_bicubic")
    advice = r"download DIV2K with: python tools/prepare_data\.py download DIV2K --scales 2 --out .*data$"
    with pytest.raises(InputError, match=r"X2: the LR images .*; " + advice):
        find_set("DIV2K", root, 2)
    for part in ("train", "valid"):
        shutil.rmtree(div2k / f"DIV2K_{part}_HR")
    with pytest.raises(InputError, match="DIV2K: holds neither DIV2K_train_HR nor HR; " + advice):
        find_set("DIV2K", root, 2)


def test_ranges_count_from_one_and_include_both_ends(make_set):
    images = find_set("Tiny", make_set(count=5), 2)
    assert list(take_range(images, (2, 3)).pairs) == ["img1", "img2"]
    with pytest.raises(InputError, match="range 4-9 is out of bounds: Tiny holds 5 images; ") as error:
        take_range(images, (4, 9))
    assert error.value.argument == "data_range"


def rename(root, names):
    """Give the images of a set new names."""
    for index, name in enumerate(names):
        for folder in ("HR", "LR_bicubic/X2"):
            (root / folder / f"img{index}.png").rename(root / folder / f"{name}.png")


def test_div2k_images_are_selected_by_number_as_in_edsr(make_set, caplog):
    root = make_set("DIV2K", count=4)
    rename(root / "DIV2K", ("0800", "0801", "0810", "0811"))
    settings = DataSettings(root)
    (images,) = build_test_sets(["DIV2K"], settings)
    assert images.names == ["0801", "0810"]
    assert len(build_train_loader(["DIV2K"], settings, SMALL).dataset) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"DIV2K: the range 801-810 asks for 10 images, but {root}/DIV2K holds only 2 of them",
        f"DIV2K: the range 1-800 asks for 800 images, but {root}/DIV2K holds only 1 of them",
    ]
    caplog.clear()
    settings = dataclasses.replace(settings, data_range=((810, 811), (801, 801)))  # a range takes precedence
    assert build_test_sets(["DIV2K"], settings)[0].names == ["0801"]
    assert len(build_train_loader(["DIV2K"], settings, SMALL).dataset) == 2
    assert not caplog.records


def test_ranges_are_numbers_where_all_names_are_numbers(make_set):
    root = make_set(count=4)
    rename(root / "Tiny", ("2", "9", "10", "11"))  # the order of the names is 10, 11, 2, 9
    images = find_set("Tiny", root, 2)
    assert set(take_range(images, (9, 10)).pairs) == {"9", "10"}
    message = r"range 3-8 holds no image: those of Tiny \(.*\) have the numbers 2 to 11; choose another range"
    with pytest.raises(InputError, match=message) as error:
        take_range(images, (3, 8))
    assert error.value.argument == "data_range"
    for folder in ("HR", "LR_bicubic/X2"):
        (root / "Tiny" / folder / "9.png").rename(root / "Tiny" / folder / "nine.png")
    assert list(take_range(find_set("Tiny", root, 2), (1, 2)).pairs) == ["10", "11"]


def test_ranges_do_not_apply_to_benchmark_sets(make_set):
    make_set(count=5, benchmark=True)
    root = make_set("Own", count=5)
    sets = build_test_sets(["Tiny", "Own"], DataSettings(root, data_range=((1, 3), (4, 5))))
    assert [len(images) for images in sets] == [5, 2]


def test_demo_takes_a_folder_or_a_file(make_set):
    root = make_set()
    folder = root / "Tiny/LR_bicubic/X2"
    (images,) = build_test_sets(["demo"], DataSettings("nowhere", dir_demo=str(folder), data_range=((1, 1), (2, 2))))
    name, lr, hr = images[2]
    assert (name, lr.shape, hr) == ("img2", (20, 24, 3), None)
    assert not images.has_hr
    (images,) = build_test_sets(["demo"], DataSettings("nowhere", dir_demo=str(folder / "img1.png")))
    assert images.names == ["img1"]


def test_demo_needs_images_and_cannot_be_trained_on(make_set, tmp_path):
    root = make_set()
    with pytest.raises(InputError, match="a folder of images or one image file") as error:
        build_test_sets(["demo"], DataSettings(root))
    assert error.value.argument == "dir_demo"
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none: holds no images; give a folder"):
        build_test_sets(["demo"], DataSettings(root, dir_demo=str(tmp_path / "none")))
    with pytest.raises(InputError, match=r"no such file or folder '.*absent'; check the path"):
        build_test_sets(["demo"], DataSettings(root, dir_demo=str(tmp_path / "absent")))
    with pytest.raises(InputError, match=r"^demo .* holds no HR images to train on") as error:
        build_train_loader(["Tiny", "demo"], DataSettings(root, dir_demo=str(root / "Tiny/HR")), SMALL)
    assert error.value.argument == "data_train"


@pytest.mark.parametrize("n_colors", [1, 3])
def test_whole_images_are_arrays_and_hr_is_cropped_to_a_multiple_of_the_scale(make_set, n_colors):
    root = make_set(size=(40, 48))
    hr = root / "Tiny/HR/img0.png"
    iio.imwrite(hr, np.pad(iio.imread(hr), ((0, 1), (0, 1), (0, 0))))
    name, lr, cropped = WholeImages(find_set("Tiny", root, 2), 2, n_colors)[0]
    assert name == "img0"
    assert lr.shape == (20, 24, n_colors)
    assert cropped.shape == (40, 48, n_colors)
    assert lr.dtype == cropped.dtype == np.uint8
    assert lr.flags.writeable  # else torch.from_numpy warns
    if n_colors == 3:
        assert np.array_equal(lr, iio.imread(root / "Tiny/LR_bicubic/X2/img0.png"))
        assert np.array_equal(cropped, iio.imread(hr)[:40, :48])


def test_mistakes_in_a_set_are_reported(make_set, tmp_path):
    root = make_set(count=3)
    tiny = root / "Tiny"

    def refuse(message, name="Tiny", scale=2, dir_data=root, argument=None):
        with pytest.raises(InputError, match=message) as error:
            find_set(name, dir_data, scale)
        assert error.value.argument == argument

    refuse("^.*: contains no set 'Other'; available sets: Tiny", name="Other")
    refuse(r"^.*: contains no set 'Set5'; .*prepare_data\.py download benchmark --out .*data$", name="Set5")
    refuse(r"^.*: contains no set 'DIV2K'; .*prepare_data\.py download DIV2K --scales 3 --out", name="DIV2K", scale=3)
    absent = tmp_path / "absent"
    refuse("no such folder .*; download it with: .* benchmark", name="B100", dir_data=absent, argument="dir_data")
    refuse("^.*: contains no set ''", name="")
    refuse("no such folder '.*absent'; give", dir_data=tmp_path / "absent", argument="dir_data")
    refuse(r"prepare_data\.py train --hr .*HR --name Tiny --scales 3 --out", scale=3)
    shutil.copytree(tiny / "LR_bicubic/X2", tiny / "LR_bicubic/X3")
    refuse(r"X3/img0\.png: 20x24 pixels do not fit .*HR/img0\.png \(40x48\) at x3; make", scale=3)
    shutil.copy(tiny / "LR_bicubic/X2/img0.png", tiny / "LR_bicubic/X2/more.png")
    refuse(r"more\.png: has no HR image in .*HR; remove it")
    (tiny / "LR_bicubic/X2/more.png").unlink()
    (tiny / "LR_bicubic/X2/img1.png").unlink()
    refuse(r"img1\.png: has no LR image in .*X2; make them with: python tools/prepare_data\.py train --hr .*HR")


def test_two_images_never_share_one_lr_image(make_set):
    tiny = make_set(count=2) / "Tiny"
    for folder in ("HR", "LR_bicubic/X2"):
        (tiny / folder / "img1.png").rename(tiny / folder / "img0x2.png")
    pairs = find_set("Tiny", tiny.parent, 2).pairs
    assert {name: lr.name for name, (_, lr) in pairs.items()} == {"img0": "img0.png", "img0x2": "img0x2.png"}
    (tiny / "LR_bicubic/X2/img0.png").unlink()
    with pytest.raises(InputError, match=r"img0\.png: has no LR image"):
        find_set("Tiny", tiny.parent, 2)


def test_empty_sets_are_refused(make_set):
    root = make_set(count=0)
    with pytest.raises(InputError, match=r"^Tiny \(.*\) holds no images to test on; ") as error:
        build_test_sets(["Tiny"], DataSettings(root))
    assert error.value.argument == "data_test"


def test_settings_are_frozen():
    for settings in (DataSettings("dataset"), SMALL):
        with pytest.raises(dataclasses.FrozenInstanceError):
            settings.scale = 3
