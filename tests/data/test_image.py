import cv2
import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from data.image import image_kind, image_size, list_images, read_image, write_png
from program import InputError


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "ppm", "gif", "jp2"])
def test_lossless_formats_are_read_exactly(tmp_path, ending):
    image = np.full((6, 9, 3), (10, 200, 30), np.uint8)
    Image.fromarray(image).save(tmp_path / f"a.{ending}")
    assert np.array_equal(read_image(tmp_path / f"a.{ending}"), image)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("n_colors", [1, 3])
def test_every_mode_is_converted_to_8_bits(tmp_path, mode, n_colors):
    gray = np.full((6, 9), 255, np.uint8)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(gray.astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(gray).convert("RGB").convert(mode).save(path)
    image = read_image(path, n_colors)
    assert image.shape == (6, 9, n_colors)
    assert image.dtype == np.uint8
    assert (image >= 254).all()


def test_16_bits_are_rounded_to_8(tmp_path):
    values = np.array([[0, 128, 129, 256, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "gray.png")
    assert read_image(tmp_path / "gray.png", 1)[..., 0].tolist() == [[0, 0, 1, 1, 128, 255]]
    cv2.imwrite(str(tmp_path / "rgb.png"), np.full((4, 4, 3), 65535, np.uint16))
    assert (read_image(tmp_path / "rgb.png") == 255).all()


def test_alpha_is_dropped(tmp_path, rgb):
    Image.fromarray(np.dstack([rgb, np.zeros((6, 9), np.uint8)])).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), rgb)


TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("ending", ["png", "tif", "jpg", "webp"])
def test_exif_rotation_is_applied(tmp_path, rgb, orientation, ending):
    path = tmp_path / f"a.{ending}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(path, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    image = read_image(path)
    assert image.shape[:2] == image_size(path) == ((9, 6) if orientation >= 5 else (6, 9))
    if ending != "jpg":
        assert np.array_equal(image, TURNS[orientation](rgb))


def test_unreadable_files_are_reported(tmp_path, rgb):
    (tmp_path / "text.png").write_text("no image")
    iio.imwrite(tmp_path / "cut.png", np.kron(rgb, np.ones((50, 50, 1), np.uint8)))
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-300])
    (tmp_path / "empty.png").write_bytes(b"")
    Image.fromarray(np.zeros((4, 4), np.int32)).save(tmp_path / "deep.tif")
    for name in ("text.png", "cut.png", "empty.png", "deep.tif", "absent.png"):
        with pytest.raises(InputError, match=name) as error:
            read_image(tmp_path / name)
        assert "\n" not in str(error.value)
        assert error.value.argument is None
    with pytest.raises(InputError, match=r"text\.png: not an image, or broken \(.*\); remove or replace it"):
        read_image(tmp_path / "text.png")
    with pytest.raises(InputError, match=r"deep\.tif: has 32 bits per channel; convert it to 8 or 16"):
        read_image(tmp_path / "deep.tif")


def test_images_that_are_too_large_are_reported(tmp_path, rgb, monkeypatch):
    iio.imwrite(tmp_path / "large.png", rgb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(InputError, match=r"large\.png: has more than 0 megapixels; split it"):
        read_image(tmp_path / "large.png")


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "PNG RGB"), ("P", "PNG P"), ("I;16", "PNG I;16")])
def test_image_kind_names_format_and_mode(tmp_path, mode, kind):
    Image.new(mode, (4, 4)).save(tmp_path / "a.png")
    assert image_kind(tmp_path / "a.png") == kind


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path, rgb, channels):
    write_png(tmp_path / "a.png", rgb[..., :channels])
    assert np.array_equal(read_image(tmp_path / "a.png", channels), rgb[..., :channels])


def test_only_images_are_listed_by_name(tmp_path, rgb):
    for name in ("b.png", "a.JPG", ".hidden.png"):
        iio.imwrite(tmp_path / name, rgb)
    (tmp_path / "notes.txt").write_text("")
    assert list(list_images(tmp_path)) == ["a", "b"]
    iio.imwrite(tmp_path / "a.png", rgb)
    with pytest.raises(InputError, match=r"a\.png: has the same name as a\.JPG; rename one of them"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="absent: no such folder"):
        list_images(tmp_path / "absent")
    with pytest.raises(InputError, match=r"notes\.txt: is a file, not a folder"):
        list_images(tmp_path / "notes.txt")
