import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from picture import (
    Picture,
    decode,
    encode_png,
    image_kind,
    image_size,
    list_images,
    name_images,
    read_picture,
    skipped_files,
    to_8_bits,
    to_colors,
)
from program import InputError
from tests import icc

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 2**16, (20, 34, 4), dtype=np.uint16)  # red, green, blue, alpha
TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


# ---- orientation -----------------------------------------------------------------------------------------------------


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def xmp(orientation):
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="{orientation}"/></x:xmpmeta>'


def raw_profile(kind, content):
    """A profile as ImageMagick writes it into the texts of a PNG file: its length and its bytes in hexadecimal."""
    digits = content.hex()
    lines = [digits[start : start + 72] for start in range(0, len(digits), 72)]
    texts = PngImagePlugin.PngInfo()
    texts.add_text(f"Raw profile type {kind}", "\n".join(["", kind, f"{len(content):8}", *lines, ""]), zip=True)
    return {"format": "PNG", "pnginfo": texts}


def xmp_text(orientation):
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", xmp(orientation))
    return {"format": "PNG", "pnginfo": texts}


MARKS = {
    "PNG EXIF": lambda n: {"format": "PNG", "exif": exif(n)},
    "PNG XMP": xmp_text,
    "PNG raw EXIF": lambda n: raw_profile("exif", exif(n)),
    "PNG raw APP1": lambda n: raw_profile("APP1", exif(n)),
    "PNG raw XMP": lambda n: raw_profile("xmp", xmp(n).encode()),
    "TIFF": lambda n: {"format": "TIFF", "exif": exif(n)},
    "TIFF XMP": lambda n: {"format": "TIFF", "tiffinfo": {700: xmp(n).encode()}},
    "WebP EXIF": lambda n: {"format": "WEBP", "lossless": True, "exif": exif(n)},
    "WebP XMP": lambda n: {"format": "WEBP", "lossless": True, "xmp": xmp(n).encode()},
    "JPEG EXIF": lambda n: {"format": "JPEG", "exif": exif(n)},
    "JPEG XMP": lambda n: {"format": "JPEG", "xmp": xmp(n).encode()},
}


def metadata_last(png):
    """The content of a PNG file with all chunks of metadata moved behind its pixels."""
    chunks, position = [], 8
    while position < len(png):
        end = position + 12 + struct.unpack(">I", png[position : position + 4])[0]
        chunks.append(png[position:end])
        position = end
    chunks.sort(key=lambda chunk: [b"IHDR", b"IDAT", chunk[4:8], b"IEND"].index(chunk[4:8]))
    return png[:8] + b"".join(chunks)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("mark", MARKS)
def test_orientation_is_applied_wherever_it_is_marked(tmp_path, mark, orientation):
    content = io.BytesIO()
    Image.fromarray(RGB).save(content, **MARKS[mark](orientation))
    files = {"a": content.getvalue()}
    if mark.startswith("PNG"):
        files["b"] = metadata_last(files["a"])
        assert len(files["b"]) == len(files["a"])
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        pixels = decode(path).pixels
        assert pixels.shape[:2] == image_size(path) == ((9, 6) if orientation >= 5 else (6, 9))
        if not mark.startswith("JPEG"):
            assert np.array_equal(pixels, TURNS[orientation](RGB))


ODD_ORIENTATIONS = [(3, 1, struct.pack("<HH", value, 0)) for value in (0, 9, 65535)]  # type, count, value
ODD_ORIENTATIONS += [(2, 4, b"six\0"), (7, 4, b"\6\6\6\6"), (3, 0, bytes(4))]
ODD_ORIENTATIONS += [(5, 1, struct.pack("<I", 26))]


@pytest.mark.parametrize("entry", ODD_ORIENTATIONS)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
def test_an_orientation_without_sense_is_ignored(tmp_path, form, entry):
    kind, count, value = entry
    directory = b"II*\0" + struct.pack("<IHHHI", 8, 1, 0x0112, kind, count) + value + bytes(4) + bytes(8)
    if form == "TIFF":
        tifffile.imwrite(tmp_path / "a", RGB, photometric="rgb", extratags=[(0x0112, 3, 1, 6, True)])
        content = bytearray((tmp_path / "a").read_bytes())
        place = content.index(struct.pack("<HHI", 0x0112, 3, 1))
        content[place : place + 12] = struct.pack("<HHI", 0x0112, kind, count) + value
        (tmp_path / "a").write_bytes(content)
    else:
        Image.fromarray(RGB).save(tmp_path / "a", form, exif=b"Exif\0\0" + directory)
    assert decode(tmp_path / "a").pixels.shape == (6, 9, 3)
    assert image_size(tmp_path / "a") == (6, 9)


FAR_AWAY = b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 1, 0x0112, 12, 1, 10**6)  # a value behind the end of the data


@pytest.mark.parametrize("data", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"II*\0" * 9, FAR_AWAY])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_broken_exif_data_is_ignored(tmp_path, form, data):
    Image.fromarray(RGB).save(tmp_path / "a", form, exif=data)
    assert decode(tmp_path / "a").pixels.shape == (6, 9, 3)
    assert image_size(tmp_path / "a") == (6, 9)


# ---- 16 bits ---------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "strips": {"rowsperstrip": 3},
    "tiles": {"tile": (16, 16)},
    "big-endian": {"byteorder": ">"},
    "BigTIFF": {"bigtiff": True},
    "deflate": {"compression": "zlib"},
    "predictor": {"compression": "zlib", "predictor": True, "rowsperstrip": 3},
    "turned": {"compression": "zlib", "extratags": [(0x0112, 3, 1, 6, True)]},
}
KINDS = {  # channels as stored, channels as seen, tags
    "gray": (DEEP[..., :1], DEEP[..., :1], {"photometric": "minisblack"}),
    "white is zero": (DEEP[..., :1], 65535 - DEEP[..., :1], {"photometric": "miniswhite"}),
    "gray and alpha": (DEEP[..., :2], DEEP[..., :2], {"photometric": "minisblack", "extrasamples": ["unassalpha"]}),
    "RGB": (DEEP[..., :3], DEEP[..., :3], {"photometric": "rgb"}),
    "RGBA": (DEEP, DEEP, {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
    "RGB and something": (DEEP, DEEP[..., :3], {"photometric": "rgb", "extrasamples": ["unspecified"]}),
}


def with_alpha(picture):
    return np.dstack([picture.pixels] + ([] if picture.alpha is None else [picture.alpha]))


@pytest.mark.parametrize("planes_apart", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_16_bit_tiff_is_read_exactly(tmp_path, kind, layout, planes_apart):
    stored, seen, tags = KINDS[kind]
    if planes_apart and stored.shape[2] == 1:
        pytest.skip("has one plane")
    if planes_apart:
        stored, tags = np.moveaxis(stored, -1, 0), tags | {"planarconfig": "separate"}
    elif stored.shape[2] == 1:
        stored = stored[..., 0]
    else:
        tags = tags | {"planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "a.tif", stored, **tags, **LAYOUTS[layout])
    expected = np.rot90(seen, -1) if layout == "turned" else seen
    assert np.array_equal(with_alpha(decode(tmp_path / "a.tif")), expected)
    assert image_size(tmp_path / "a.tif") == expected.shape[:2]
    assert image_kind(tmp_path / "a.tif").startswith("TIFF ")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_lzw_compression_is_read(tmp_path, channels):
    bgr = DEEP[..., [[0], [], [2, 1, 0], [2, 1, 0, 3]][channels - 1]]
    cv2.imwrite(str(tmp_path / "a.tif"), bgr, [cv2.IMWRITE_TIFF_COMPRESSION, 5])
    assert np.array_equal(with_alpha(decode(tmp_path / "a.tif")), DEEP[..., :channels])


def test_premultiplied_alpha_is_undone(tmp_path):
    alpha = DEEP[..., 3:] // 2 + 2**15  # of at least a half
    stored = np.dstack([np.rint(DEEP[..., :3] * (alpha / 65535)).astype(np.uint16), alpha])
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=["assocalpha"])
    picture = decode(tmp_path / "a.tif")
    assert np.array_equal(picture.alpha, alpha[..., 0])
    assert np.abs(picture.pixels - DEEP[..., :3].astype(int)).max() <= 1


def test_tiffs_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "a.tif"
    for dtype, message in (
        (np.int32, "has 32 bits per channel; convert it to 8 or 16 bits"),
        (np.float32, "has 32 bits per channel"),
        (np.float64, "has 64 bits per channel"),
        (np.int16, "has signed or floating-point values per channel; convert it"),
        (np.float16, "has signed or floating-point values per channel; convert it"),
    ):
        tifffile.imwrite(path, np.zeros((5, 4), dtype))
        for read in (decode, image_size):
            with pytest.raises(InputError, match=message):
                read(path)
    tifffile.imwrite(path, DEEP[..., :3], photometric="rgb")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="not an image, or broken"):
        decode(path)


@pytest.mark.parametrize("magic", ["P2", "P3", "P5", "P6"])
@given(max_value=st.integers(1, 65535), height=st.integers(1, 4), width=st.integers(1, 4))
@hypothesis_settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_netpbm_of_any_depth_fills_the_range(tmp_path, magic, max_value, height, width):
    shape = (height, width, 3 if magic in ("P3", "P6") else 1)
    values = np.random.default_rng(max_value).integers(0, max_value + 1, shape)
    header = f"{magic}\n# comment\n{width} {height}\n{max_value}\n".encode()
    if magic in ("P2", "P3"):
        body = b"# comment\n" + " ".join(map(str, values.flatten())).encode()
    else:
        body = values.astype(">u2" if max_value > 255 else np.uint8).tobytes()
    path = tmp_path / "a.pnm"
    path.write_bytes(header + body)
    pixels = decode(path).pixels
    assert pixels.dtype == (np.uint16 if max_value > 255 else np.uint8)
    assert pixels.shape == shape
    assert image_size(path) == shape[:2]
    exact = values * (np.iinfo(pixels.dtype).max / max_value)
    assert np.abs(pixels - exact).max() <= 0.5
    if shape[0] > 1:
        path.write_bytes((header + body)[: len(header) + len(body) // 3])
        with pytest.raises(InputError, match="not an image, or broken"):
            decode(path)


@given(
    st.integers(1, 4), st.booleans(), st.booleans(), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(0, 99)
)
@hypothesis_settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_png_round_trip(tmp_path, channels, deep, has_profile, size, seed):
    dtype = np.uint16 if deep else np.uint8
    array = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (*size, channels), dtype=dtype)
    n_colors = 1 if channels < 3 else 3
    alpha = array[..., n_colors] if channels in (2, 4) else None
    profile = (icc.gray_profile(2.2) if n_colors == 1 else icc.rgb_profile()) if has_profile else None
    path = tmp_path / "a.png"
    path.write_bytes(encode_png(Picture(array[..., :n_colors], alpha, profile)))
    picture = read_picture(path, n_colors)
    assert np.array_equal(with_alpha(picture), array)
    assert picture.pixels.dtype == dtype
    assert picture.profile == profile
    other = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if channels in (3, 4):
        assert np.array_equal(other[..., [2, 1, 0, 3][:channels]], array)
    else:
        assert np.array_equal(other if channels == 1 else other[..., ::3], array[..., 0] if channels == 1 else array)


def test_a_16_bit_png_that_is_cut_off_is_named(tmp_path):
    content = encode_png(Picture(DEEP[..., :3]))
    path = tmp_path / "a.png"
    path.write_bytes(content + b"more than a file of 16 bits should have")
    assert np.array_equal(decode(path).pixels, DEEP[..., :3])
    for length in (40, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="not an image, or broken"):
            decode(path)


# ---- conversions -----------------------------------------------------------------------------------------------------


def test_depth_and_colors_are_converted_like_pillow():
    every = np.arange(2**16, dtype=np.uint16)[:, None, None]
    assert np.array_equal(to_8_bits(every), np.rint(every / 257))
    gray = np.asarray(Image.fromarray(RGB).convert("L"))
    assert np.array_equal(to_colors(RGB, 1)[..., 0], gray)
    assert np.abs(to_colors(RGB.astype(np.uint16) * 257, 1)[..., 0] / 257 - gray).max() <= 0.51
    assert np.array_equal(to_colors(RGB[..., :1], 3), np.repeat(RGB[..., :1], 3, 2))
    white = np.full((1, 1, 3), 65535, np.uint16)
    assert to_colors(white, 1).item() == 65535


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_is_upscaled_bicubically(dtype):
    alpha = RGB[..., 0]
    sr = np.zeros((18, 27, 3), dtype)
    levels = np.iinfo(dtype).max
    upscaled = Picture(RGB, alpha, b"profile").with_upscaled(sr)
    opacity = torch.from_numpy(alpha)[None, None] / 255
    expected = F.interpolate(opacity, size=(18, 27), mode="bicubic", antialias=True).clamp(0, 1)[0, 0].numpy()
    assert upscaled.alpha.dtype == dtype
    assert np.abs(upscaled.alpha / levels - expected).max() < 0.51 / levels + 1e-6
    assert upscaled.pixels is sr
    assert upscaled.profile == b"profile"
    full = Picture(RGB, np.full_like(alpha, 255)).with_upscaled(sr)
    assert (full.alpha == levels).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "RGB", "L"])
def test_transparency_of_every_mode_becomes_alpha(tmp_path, mode):
    image = Image.fromarray(np.array([[0, 0, 255, 255]], np.uint8)).convert("RGB")
    if mode in ("P", "RGB", "L"):  # one color is transparent
        image = image.convert(mode)
        image.save(tmp_path / "a.png", transparency=image.getpixel((0, 0)))
    else:
        image.putalpha(Image.fromarray(np.array([[0, 0, 255, 255]], np.uint8)))
        image.convert(mode).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png").alpha.tolist() == [[0, 0, 255, 255]]


# ---- color profiles --------------------------------------------------------------------------------------------------


def encode_srgb(linear):
    """IEC 61966-2-1"""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_the_profile_of_an_rgb_image_is_kept(tmp_path):
    for form in ("PNG", "JPEG", "TIFF", "WEBP"):
        Image.fromarray(RGB).save(tmp_path / "a", form, icc_profile=icc.rgb_profile())
        picture = read_picture(tmp_path / "a")
        assert picture.profile == icc.rgb_profile()
        assert np.array_equal(picture.pixels, decode(tmp_path / "a").pixels)
    tifffile.imwrite(tmp_path / "a", DEEP[..., :3], photometric="rgb", iccprofile=icc.rgb_profile())
    assert read_picture(tmp_path / "a").profile == icc.rgb_profile()


@pytest.mark.parametrize("deep", [False, True])
def test_gray_with_a_profile_becomes_srgb(tmp_path, deep):
    ramp = np.arange(256, dtype=np.uint8)[None]
    if deep:
        ramp = ramp.astype(np.uint16) * 257
    (tmp_path / "a.png").write_bytes(encode_png(Picture(ramp[..., None], profile=icc.gray_profile(1))))
    picture = read_picture(tmp_path / "a.png")
    levels = np.iinfo(ramp.dtype).max
    assert picture.pixels.dtype == ramp.dtype
    assert picture.profile is None
    assert np.abs(picture.pixels[0] / levels - encode_srgb(ramp[0, :, None] / levels)).max() < 1 / 255
    kept = read_picture(tmp_path / "a.png", n_colors=1)
    assert np.array_equal(kept.pixels[..., 0], ramp)
    assert kept.profile == icc.gray_profile(1)


def test_colors_with_a_profile_become_gray_through_srgb(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png", icc_profile=icc.rgb_profile(gamma=1))
    profiles = ImageCms.ImageCmsProfile(io.BytesIO(icc.rgb_profile(gamma=1))), ImageCms.createProfile("sRGB")
    expected = ImageCms.profileToProfile(Image.fromarray(RGB), *profiles).convert("L")
    picture = read_picture(tmp_path / "a.png", n_colors=1)
    assert np.array_equal(picture.pixels[..., 0], np.asarray(expected))
    assert picture.profile is None


def test_colors_and_alpha_have_the_same_depth(tmp_path):
    (tmp_path / "a.png").write_bytes(encode_png(Picture(DEEP[..., :3], DEEP[..., 3], icc.rgb_profile())))
    for n_colors in (1, 3):
        picture = read_picture(tmp_path / "a.png", n_colors)
        assert picture.pixels.dtype == picture.alpha.dtype == (np.uint8 if n_colors == 1 else np.uint16)


def test_an_rgb_profile_of_a_gray_image_is_kept(tmp_path):
    Image.fromarray(RGB[..., 0]).save(tmp_path / "a.png", icc_profile=icc.rgb_profile())
    assert read_picture(tmp_path / "a.png").profile == icc.rgb_profile()


@pytest.mark.parametrize("form", ["JPEG", "TIFF", "16-bit TIFF"])
def test_cmyk_is_converted_with_its_profile(tmp_path, form):
    ink = np.full((8, 8, 4), (10, 200, 30, 127), np.uint8)
    if form == "16-bit TIFF":
        stored = ink.astype(np.uint16) * 257
        tifffile.imwrite(tmp_path / "a", stored, photometric="separated", iccprofile=icc.cmyk_profile())
    else:
        Image.frombytes("CMYK", (8, 8), ink.tobytes()).save(tmp_path / "a", form, icc_profile=icc.cmyk_profile())
    picture = read_picture(tmp_path / "a")
    y = ((100 * (1 - 127 / 255) + 16) / 116) ** 3  # CIELAB lightness -> luminance
    assert picture.profile is None
    assert np.abs(picture.pixels - 255 * encode_srgb(y)).max() < 2


def test_cielab_is_converted(tmp_path):
    lab = Image.new("LAB", (3, 2), (128, 128, 128))  # a and b are stored with 128 as zero
    lab.save(tmp_path / "a.tif")
    pixels = read_picture(tmp_path / "a.tif").pixels
    assert np.abs(pixels - 255 * encode_srgb(((128 / 2.55 + 16) / 116) ** 3)).max() < 2


@pytest.mark.parametrize("profile", [b"broken", icc.rgb_profile()[:200], icc.cmyk_profile()])
def test_a_profile_that_is_broken_or_of_other_colors_is_named_and_ignored(tmp_path, caplog, profile):
    Image.fromarray(RGB).save(tmp_path / "a.png", icc_profile=profile)
    picture = read_picture(tmp_path / "a.png")
    assert np.array_equal(picture.pixels, RGB)
    assert picture.profile is None
    assert "a.png: its color profile is broken or of another color space" in caplog.text


# ---- odd, large and foreign files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "compressed text", "profile"])
def test_a_png_with_metadata_of_several_mib_is_read(tmp_path, kind):
    texts, profile = PngImagePlugin.PngInfo(), None
    if kind == "profile":
        profile = icc.rgb_profile() + RNG.bytes(3 * 2**20)
    else:
        texts.add_text("workflow", "node " * 2**20, zip=kind == "compressed text")
    Image.fromarray(RGB).save(tmp_path / "a.png", pnginfo=texts, icc_profile=profile)
    assert np.array_equal(decode(tmp_path / "a.png").pixels, RGB)
    assert image_size(tmp_path / "a.png") == (6, 9)


def test_bombs_are_refused_in_one_line(tmp_path, monkeypatch):
    png = encode_png(Picture(RGB))
    text = b"zTXtkey\0\0" + zlib.compress(bytes(100 * 2**20), 9)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    (tmp_path / "text.png").write_bytes(png[:33] + chunk + png[33:])
    tifffile.imwrite(tmp_path / "large.tif", DEEP[..., :3], photometric="rgb", compression="zlib")
    with pytest.raises(InputError, match=r"text\.png: not an image, or broken \(Decompressed data too large.*"):
        decode(tmp_path / "text.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(InputError, match=r"large\.tif: has more than 0 megapixels; split it"):
        decode(tmp_path / "large.tif")


FOREIGN = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "JPEG XL": b"\xff\x0a\xfa\x1f\x01\x90\x08\x10\x00",
}


@pytest.mark.parametrize("name", ["photo.jpg", "photo.bin"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_newer_formats_are_named_whatever_the_extension(tmp_path, kind, name):
    (tmp_path / name).write_bytes(FOREIGN[kind] + bytes(100))
    for read in (decode, image_size):
        with pytest.raises(InputError, match=rf"{name}: {kind} images cannot be read here; convert it to PNG or JPEG"):
            read(tmp_path / name)


def test_a_broken_file_of_a_readable_format_is_called_broken(tmp_path):
    pytest.importorskip("PIL._avif")
    (tmp_path / "a.avif").write_bytes(b"\0\0\0\x18ftypavif" + bytes(100))
    with pytest.raises(InputError, match=r"a\.avif: not an image, or broken"):
        decode(tmp_path / "a.avif")


def test_other_files_of_a_folder_are_named_by_kind(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    for name in ("b.HEIC", "c.jxl", "notes.txt", "clip.mpg", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert list(list_images(tmp_path)) == ["a"]
    assert skipped_files(tmp_path) == [
        f"{tmp_path}: skipped clip.mpg, notes.txt: not images",
        f"{tmp_path}: skipped b.HEIC: HEIC images cannot be read here; convert them to PNG or JPEG",
        f"{tmp_path}: skipped c.jxl: JPEG XL images cannot be read here; convert them to PNG or JPEG",
    ]
    for index in range(10):
        (tmp_path / f"{index}.txt").write_bytes(b"")
    assert skipped_files(tmp_path)[0].endswith("0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 7 more: not images")


def sample_files():
    """The contents of small files of many kinds."""
    for options in (MARKS["PNG raw EXIF"](6), MARKS["TIFF"](6), MARKS["JPEG EXIF"](8), MARKS["WebP EXIF"](5)):
        content = io.BytesIO()
        Image.fromarray(RGB).save(content, icc_profile=icc.rgb_profile(), **options)
        yield content.getvalue()
    yield metadata_last(next(sample_files()))
    yield encode_png(Picture(DEEP[..., :3], DEEP[..., 3], icc.rgb_profile()))
    yield b"P6 34 20 4095\n" + (DEEP[..., :3] >> 4).astype(">u2").tobytes()
    for options in ({}, {"compression": "zlib"}, {"tile": (16, 16), "byteorder": ">"}):
        content = io.BytesIO()
        tifffile.imwrite(content, DEEP[..., :3], photometric="rgb", **options)
        yield content.getvalue()


@given(st.sampled_from(list(sample_files())), st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=3))
@hypothesis_settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_altered_files_are_read_or_refused_and_size_and_pixels_agree(tmp_path, content, changes):
    path, altered = tmp_path / "a", bytearray(content)
    for position, value in changes:
        altered[position % len(altered)] = value
    path.write_bytes(altered)
    try:
        size = read_picture(path).pixels.shape[:2]
    except InputError as error:
        size, message = None, str(error)
    if size is None:
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
    else:
        assert image_size(path) == size


NAMES = ["a.png", "A.png", "a.jpg", "a.png.jpg", "a.png.png", "A.PNG.bmp", "b.png", "b.png.png", "c.jpg"]


@given(st.lists(st.sampled_from(NAMES), unique=True))
def test_files_of_a_folder_have_different_names_also_where_case_does_not_matter(files):
    files = list({name.casefold(): name for name in files}.values())
    named = name_images([Path(name) for name in files])
    assert [path.name for path in named.values()] == files
    assert len({name.casefold() for name in named}) == len(files)
    for name, path in named.items():
        assert name in (path.stem, path.name)
