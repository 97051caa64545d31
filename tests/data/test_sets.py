import shutil

import imageio.v3 as iio
import numpy as np
import pytest

from data import build_test_sets, build_train_loader, find_set, take_range
from data.srdata import WholeImages
from utility import InputError


@pytest.mark.parametrize("lr_suffix", ["", "x2"])
@pytest.mark.parametrize("benchmark", [False, True])
def test_sets_are_found_by_looking(make_set, lr_suffix, benchmark):
    images = find_set("Tiny", make_set(lr_suffix=lr_suffix, benchmark=benchmark), 2)
    assert list(images.pairs) == ["img0", "img1", "img2"]
    assert images.benchmark is benchmark
    hr, lr = images.pairs["img1"]
    assert (hr.name, lr.name) == ("img1.png", f"img1{lr_suffix}.png")


def test_div2k_as_published_and_as_any_set(make_set):
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
    with pytest.raises(InputError, match=r"DIV2K_train_LR_bicubic_X2\.zip"):
        find_set("DIV2K", root, 2)


def test_ranges_count_from_one_and_include_both_ends(make_set):
    images = find_set("Tiny", make_set(count=5), 2)
    assert list(take_range(images, (2, 3)).pairs) == ["img1", "img2"]
    with pytest.raises(InputError, match="4-9: Tiny holds 5"):
        take_range(images, (4, 9))


def test_div2k_is_tested_on_the_images_of_edsr_by_their_number(make_set):
    root = make_set("DIV2K", count=4)
    for old, new in zip(range(4), ("0800", "0801", "0810", "0811"), strict=True):
        for folder in ("HR", "LR_bicubic/X2"):
            (root / f"DIV2K/{folder}/img{old}.png").rename(root / f"DIV2K/{folder}/{new}.png")
    (images,) = build_test_sets(["DIV2K"], root, 2)
    assert images.names == ["0801", "0810"]
    assert len(build_train_loader(["DIV2K"], root, 2, patch_size=8, ext="img", n_threads=0).dataset) == 1


def test_ranges_leave_benchmark_sets_alone(make_set):
    make_set(count=5, benchmark=True)
    root = make_set("Own", count=5)
    sets = build_test_sets(["Tiny", "Own"], root, 2, data_range=((1, 3), (4, 5)))
    assert [len(images) for images in sets] == [5, 2]


def test_demo_takes_a_folder_or_a_file(make_set):
    root = make_set()
    folder = root / "Tiny/LR_bicubic/X2"
    (images,) = build_test_sets(["demo"], "nowhere", 2, dir_demo=str(folder))
    name, lr, hr = images[2]
    assert (name, tuple(lr.shape), hr) == ("img2", (3, 20, 24), None)
    (images,) = build_test_sets(["demo"], "nowhere", 2, dir_demo=str(folder / "img1.png"))
    assert images.names == ["img1"]


def test_hr_images_need_not_be_a_multiple_of_the_scale(make_set):
    root = make_set(size=(40, 48))
    hr = root / "Tiny/HR/img0.png"
    iio.imwrite(hr, np.pad(iio.imread(hr), ((0, 1), (0, 1), (0, 0))))
    _, lr, cropped = WholeImages(find_set("Tiny", root, 2), 2)[0]
    assert lr.shape == (3, 20, 24)
    assert cropped.shape == (40, 48, 3)


def test_what_is_wrong_with_a_set_is_named(make_set, tmp_path):
    root = make_set(count=3)
    tiny = root / "Tiny"

    def refuse(said, name="Tiny", scale=2, dir_data=root):
        with pytest.raises(InputError, match=said):
            find_set(name, dir_data, scale)

    refuse("the sets there: Tiny", name="Set5")
    refuse("no such folder", dir_data=tmp_path / "absent")
    refuse(r"prepare_data\.py train --hr .*HR --name Tiny --scales 3 --out", scale=3)
    shutil.copytree(tiny / "LR_bicubic/X2", tiny / "LR_bicubic/X3")
    refuse(r"X3/img0\.png: 20x24 pixels are not .*HR/img0\.png \(40x48\) at x3", scale=3)
    shutil.copy(tiny / "LR_bicubic/X2/img0.png", tiny / "LR_bicubic/X2/more.png")
    refuse(r"more\.png: has no HR image")
    (tiny / "LR_bicubic/X2/more.png").unlink()
    (tiny / "LR_bicubic/X2/img1.png").unlink()
    refuse(r"img1\.png: has no LR image")


def test_two_images_never_share_one_lr_image(make_set):
    tiny = make_set(count=2) / "Tiny"
    for folder in ("HR", "LR_bicubic/X2"):
        (tiny / folder / "img1.png").rename(tiny / folder / "img0x2.png")
    assert {name: lr.name for name, (_, lr) in find_set("Tiny", tiny.parent, 2).pairs.items()} == {
        "img0": "img0.png", "img0x2": "img0x2.png",
    }  # fmt: skip
    (tiny / "LR_bicubic/X2/img0.png").unlink()
    with pytest.raises(InputError, match=r"img0\.png: has no LR image"):
        find_set("Tiny", tiny.parent, 2)


def test_an_empty_set_is_an_error(make_set):
    root = make_set(count=0)
    with pytest.raises(InputError, match="holds no images"):
        build_test_sets(["Tiny"], root, 2)
    with pytest.raises(InputError, match="--dir_demo"):
        build_test_sets(["demo"], root, 2)
