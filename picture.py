"""Read image files with all that belongs to what they look like, and write it as PNG.

One rule for all who read images: which way up they are, how large they are, and how many bits they have. Pillow reads
most files. It reduces colors of 16 bits to 8 and misreads some TIFFs, so tifffile and OpenCV read files of 16 bits.
Nothing here needs PyTorch.
"""

import contextlib
import functools
import io
import logging
import os
import re
import struct
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from program import InputError

logger = logging.getLogger("smsr")
ORIENTATION, ICC_PROFILE = 0x0112, 0x8773  # tags of EXIF and TIFF
TURNS = {  # EXIF orientation: how to turn an array (H, W, C) the right way up
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image),
}
SWAPPED = {5, 6, 7, 8}  # orientations that swap height and width
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_COLORS = {"MINISWHITE": 1, "MINISBLACK": 1, "RGB": 3, "SEPARATED": 4}  # channels without alpha
ORIENTED_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type ")  # keys of PNG texts that may hold the orientation
PNG_START = b"\x89PNG\r\n\x1a\n"
CMS_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "LAB": "LAB"}  # color space of an ICC profile: mode
NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow cannot decode by itself
FOREIGN_KINDS = {".heic": "HEIC", ".heif": "HEIC", ".hif": "HEIC", ".avif": "AVIF", ".jxl": "JPEG XL"}
BRANDS = dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC")
BRANDS |= dict.fromkeys((b"avif", b"avis"), "AVIF")  # bytes 8 to 11 of a file

PngImagePlugin.MAX_TEXT_CHUNK = 64 * 2**20  # some programs store workflows or profiles of several MiB
PngImagePlugin.MAX_TEXT_MEMORY = 256 * 2**20
warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata; about large images, which memory limits


@dataclass(frozen=True)
class Picture:
    """A decoded image, the right way up."""

    pixels: np.ndarray  # uint8 or uint16 (H, W, 1 or 3), gray or RGB
    alpha: np.ndarray | None = None  # (H, W), of the same type; None: opaque
    profile: bytes | None = None  # ICC profile of the pixels; None: sRGB

    def with_upscaled(self, pixels: np.ndarray) -> "Picture":
        """The picture of these upscaled pixels (sH, sW, C), with alpha (bicubic) and profile of this one."""
        if self.alpha is None:
            return Picture(pixels, None, self.profile)
        opacity = Image.fromarray(self.alpha / np.float32(np.iinfo(self.alpha.dtype).max))  # 0...1
        opacity = np.asarray(opacity.resize(pixels.shape[1::-1], Image.Resampling.BICUBIC)).clip(0, 1)
        alpha = np.rint(opacity * np.iinfo(pixels.dtype).max).astype(pixels.dtype)
        return Picture(pixels, alpha, self.profile)


def to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """uint8 or uint16 -> uint8, rounded."""
    return pixels if pixels.dtype == np.uint8 else ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def to_colors(pixels: np.ndarray, n_colors: int) -> np.ndarray:
    """(H, W, 1 or 3) -> (H, W, n_colors) of the same type. Gray is the luma of BT.601, rounded as Pillow does."""
    if pixels.shape[2] < n_colors:
        return np.repeat(pixels, n_colors, axis=2)
    if pixels.shape[2] > n_colors:
        weights = np.array([19595, 38470, 7471], np.uint32)  # 0.299, 0.587, 0.114, times 2^16
        return ((pixels @ weights + 2**15) >> 16).astype(pixels.dtype)[..., None]
    return pixels


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_picture(path: Path, n_colors: int = 3) -> Picture:
    """Read an image file as gray (n_colors 1) or RGB (n_colors 3) so that it looks the same.

    A color profile is kept where it still applies, else the pixels are converted to sRGB. A broken one is logged and
    ignored. Raises InputError as `decode` does.
    """
    return _in_colors(decode(path), n_colors, path)


def from_pillow(image: Image.Image, n_colors: int = 3) -> Picture:
    """A Pillow image as gray or RGB, as `read_picture` returns the image of a file; its orientation is applied.

    Raises InputError if its mode has 32 bits per channel, or its file is broken.
    """
    name = getattr(image, "filename", "") or f"this {image.mode} image"
    if image.mode in ("I", "F"):
        raise InputError(f"{name}: has 32 bits per channel; convert it to 8 or 16")
    try:
        image = ImageOps.exif_transpose(image)  # also decodes the file of an image that was only opened
    except Exception as error:  # decoders raise nearly any type of exception on a broken file
        raise InputError(f"{name}: broken ({error}); replace it") from None
    profile = image.info.get("icc_profile")
    if image.mode in ("CMYK", "LAB"):
        channels, profile = _convert_to_srgb(image, profile, name), None
    else:
        channels = _pillow_channels(image)
    return _in_colors(_split(channels, profile), n_colors, name)


def _in_colors(picture, n_colors, path):
    """A decoded picture as gray or RGB, see `read_picture`."""
    pixels, alpha, profile = picture.pixels, picture.alpha, picture.profile
    if profile:
        wanted, stored = ("GRAY" if n == 1 else "RGB" for n in (n_colors, pixels.shape[2]))
        try:
            space, transform = _color_transform(profile)
        except Exception:  # LittleCMS and Pillow raise many types on a broken profile
            space, transform = "unknown", None
        if space == stored and space != wanted:
            pixels, profile = _to_srgb(pixels, transform), None
        elif space != wanted:
            _warn_of_profile(path)
            profile = None
    if alpha is not None and alpha.dtype != pixels.dtype:
        alpha = to_8_bits(alpha)
    return Picture(to_colors(pixels, n_colors), alpha, profile)


def decode(path: Path) -> Picture:
    """Read an image file as it is stored, with its orientation applied. Only the first frame is read.

    CMYK and CIELAB are converted to sRGB at 8 bits, palettes to RGB. The arrays may be read-only.

    Raises InputError if the file is missing, broken, too large, of a format that cannot be read here, or has neither 8
    nor 16 bits per channel.
    """
    with _reading(path) as file:
        page = _open_deep_tiff(file, path)
        decoded = _decode_with_pillow(file, path) if page is None else _decode_deep_tiff(page, file, path)
    channels, profile, orientation = decoded
    return _split(np.ascontiguousarray(TURNS[orientation](channels)), profile)


def _split(channels, profile):
    """The picture of 1 to 4 channels (H, W, C): gray, gray and alpha, RGB, or RGBA."""
    n_colors = channels.shape[2] - 1 | 1  # 1, 1, 3, 3 of 1, 2, 3, 4 channels
    alpha = channels[..., n_colors] if channels.shape[2] > n_colors else None
    return Picture(channels[..., :n_colors], alpha, profile)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of what `decode` returns, in almost all cases without decoding the pixels. Raises InputError."""
    with _reading(path) as file:
        page = _open_deep_tiff(file, path)
        if page is not None:
            size, orientation = (page.imagelength, page.imagewidth), _tiff_orientation(page)
        else:
            with Image.open(file) as image:
                position = file.tell()
                if image.format == "PNG" and _is_oriented_behind_pixels(file):
                    file.seek(position)
                    image.load()
                orientation = _orientation(image)
                size = image.size[::-1]
                if image.format == "TIFF":  # Pillow has turned its size already
                    size = image.tag_v2[0x0101], image.tag_v2[0x0100]
    return size[::-1] if orientation in SWAPPED else size


def image_kind(path: Path) -> str:
    """Format and mode as Pillow names them, e.g. "PNG RGB" or "PNG I;16" (16-bit gray). Raises InputError."""
    with _reading(path) as file:
        page = _open_deep_tiff(file, path)
        if page is not None:
            return f"TIFF {page.photometric.name};16"
        with Image.open(file) as image:
            return f"{image.format} {image.mode}"


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """Open an image file; whatever fails while it is open becomes an InputError."""
    try:
        with open(path, "rb") as file:
            yield file
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except MemoryError:
        raise InputError(f"{path}: not enough memory to read it; split it into smaller images") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        raise InputError(f"{path}: has more than {limit:.0f} megapixels; split it into smaller images") from None
    except Exception as error:  # decoders raise nearly any type of exception on a broken file
        if isinstance(error, UnidentifiedImageError):
            if kind := _foreign_kind(path):
                raise InputError(f"{path}: {kind} images cannot be read here; convert it to PNG or JPEG") from None
            error = "unknown format"
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not an image, or broken ({reason}); remove or replace it") from None


def _foreign_kind(path):
    """The name of a newer format that this Pillow does not read; "" for all other files. Extensions are often wrong."""
    with open(path, "rb") as file:
        start = file.read(12)
    if start.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        kind = "JPEG XL"
    else:
        kind = BRANDS.get(start[8:12], "") if start[4:8] == b"ftyp" else ""
    readable = {FOREIGN_KINDS[extension] for extension in FOREIGN_KINDS.keys() & _extensions()}
    return "" if kind in readable else kind


# ---- what Pillow reads -----------------------------------------------------------------------------------------------


def _decode_with_pillow(file, path):
    """Decode a file -> channels (H, W, 1 to 4), the profile of its colors, and the orientation to apply."""
    with Image.open(file) as image:
        if image.format == "PPM" and (max_value := _netpbm_max_value(image, file)) > 255:
            return _decode_netpbm(image, file, max_value), None, 1
        if image.mode in ("I", "F"):
            raise InputError(f"{path}: has 32 bits per channel; convert it to 8 or 16")
        if image.format == "TIFF":
            _orientation(image)  # Pillow turns TIFFs when it loads them; broken EXIF data only fails the first time
            image.load()
            orientation = 1
        else:
            image.load()  # the metadata of a PNG may follow its pixels
            orientation = _orientation(image)
        profile = image.info.get("icc_profile")
        if image.mode in ("CMYK", "LAB"):
            return _convert_to_srgb(image, profile, path), None, orientation
        return _channels(image, file, path), profile, orientation


def _channels(image, file, path):
    """The channels of a loaded image: gray, gray and alpha, RGB, or RGBA."""
    if image.format == "PNG":
        depth, color_type = _read_at(file, 24, 2)
        if depth == 16 and image.mode != "I;16":
            if max(end for _, end, _ in _png_chunks(file)) > os.fstat(file.fileno()).st_size:
                raise ValueError("cut off")  # OpenCV allocates the lengths that chunks claim, up to 4 GiB each
            channels = _decode_with_opencv(file, path)
            return channels[..., ::3] if color_type == 4 else channels  # OpenCV repeats the gray of gray and alpha
    return _pillow_channels(image)


def _pillow_channels(image):
    """The channels of an image with the depth of its mode: gray, gray and alpha, RGB, or RGBA."""
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)[..., None]
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    mode += "A" * image.has_transparency_data
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array.reshape(*array.shape[:2], -1)


def _orientation(image):
    """The EXIF orientation of an image, from EXIF, XMP, or ImageMagick's raw profiles; 1 if it makes no sense.

    Load a PNG first: its metadata may follow the pixels.
    """
    try:
        for kind in ("APP1", "xmp"):  # Pillow knows the third raw profile, "exif"
            if text := image.info.get(f"Raw profile type {kind}"):
                profile = bytes.fromhex("".join(text.split("\n")[3:]))
                image.info.setdefault("exif" if profile.startswith(b"Exif") else "xmp", profile)
        orientation = Image.Image.getexif(image).get(ORIENTATION)  # the method of a PNG would decode its pixels
        return orientation if orientation in TURNS else 1
    except Exception:  # Pillow raises many types on broken EXIF data
        return 1


def _is_oriented_behind_pixels(file):
    """Whether a PNG file has chunks after its pixels that may hold the orientation."""
    after_pixels = False
    for kind, _, start in _png_chunks(file):
        if after_pixels and (kind == b"eXIf" or start.startswith(ORIENTED_TEXTS)):
            return True
        after_pixels = after_pixels or kind == b"IDAT"
    return False


def _png_chunks(file):
    """Yield (type, end in the file, first bytes) of each chunk of a PNG file."""
    position, kind = len(PNG_START), b""
    while kind != b"IEND" and len(header := _read_at(file, position, 8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        position += length + 12
        yield kind, position, file.read(min(length, 20))


def _read_at(file, position, count):
    file.seek(position)
    return file.read(count)


def _netpbm_max_value(image, file):
    """The value of white in a PGM or PPM file that was opened but not loaded; 1 in other files of the family."""
    if image.mode not in ("L", "I", "RGB"):
        return 1
    return int(_read_at(file, 0, image.tile[0].offset).split()[-1])


def _decode_netpbm(image, file, max_value):
    """Decode a PGM or PPM file with more than 8 bits -> uint16 (H, W, 1 or 3), full range. Pillow keeps 8 of them."""
    (width, height), n_colors = image.size, 3 if image.mode == "RGB" else 1
    count = width * height * n_colors
    is_text = _read_at(file, 0, 2) in (b"P2", b"P3")
    content = _read_at(file, image.tile[0].offset, -1 if is_text else 2 * count)
    if is_text:
        values = np.array(re.sub(rb"#[^\r\n]*", b"", content).split()[:count]).astype(np.float64)
    else:
        values = np.frombuffer(content, ">u2").astype(np.float64)
    scaled = np.rint(values.clip(0, max_value) * (65535 / max_value))
    return scaled.astype(np.uint16).reshape(height, width, n_colors)


def _decode_with_opencv(file, path):
    """Decode a file -> gray, RGB or RGBA (H, W, C) of its own depth. Raises InputError if OpenCV is not installed."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # problems of a file are reported as an InputError instead
    try:
        import cv2
    except ImportError:
        raise InputError(f"{path}: 16 bits per channel need OpenCV; pip install opencv-python-headless") from None
    image = cv2.imdecode(np.frombuffer(_read_at(file, 0, -1), np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ValueError("OpenCV cannot decode it")
    if image.ndim == 2:
        return image[..., None]
    return image[..., [2, 1, 0, 3][: image.shape[2]]]  # OpenCV has blue first


# ---- TIFF with 16 bits per channel -----------------------------------------------------------------------------------


def _open_deep_tiff(file, path):
    """The first page of a TIFF with 16 bits per channel, a tifffile.TiffPage; None if Pillow is to read the file.

    Raises InputError if the TIFF has another depth above 8 bits, or tifffile is not installed.
    """
    start = file.read(4)
    file.seek(0)
    if start not in TIFF_STARTS:
        return None
    try:
        import tifffile
    except ImportError:
        raise InputError(f"{path}: TIFF images need the package tifffile; pip install tifffile") from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs what is odd about a file
    try:
        page = tifffile.TiffFile(file).pages[0]
    except Exception:  # tifffile raises many types; Pillow may be able to read the file, or names the problem
        return None
    finally:
        file.seek(0)
    bits = int(np.max(page.bitspersample))
    if bits <= 8:
        return None
    if bits != 16 or page.sampleformat != tifffile.SAMPLEFORMAT.UINT:
        kind = f"{bits} bits" if bits != 16 else "signed or floating-point values"
        raise InputError(f"{path}: has {kind} per channel; convert it to 8 or 16 bits, unsigned")
    if page.imagelength * page.imagewidth * page.samplesperpixel > 8 * Image.MAX_IMAGE_PIXELS:  # twice, four channels
        raise Image.DecompressionBombError
    if page.compression == 1 and page.nbytes > page.parent.filehandle.size:
        raise ValueError("cut off")
    return page


def _tiff_orientation(page):
    tag = page.tags.get(ORIENTATION)
    return tag.value if tag is not None and tag.value in TURNS else 1


def _decode_deep_tiff(page, file, path):
    """Decode a page -> channels (H, W, 1 to 4), the profile of its colors, and the orientation to apply."""
    space = getattr(page.photometric, "name", page.photometric)
    if space not in TIFF_COLORS:
        raise InputError(f"{path}: has {space} colors of 16 bits; convert it to RGB")
    samples, orientation = _read_samples(page, file, path)
    colors = samples[..., : TIFF_COLORS[space]]
    if space == "MINISWHITE":
        colors = 65535 - colors
    # 1: alpha that the colors were multiplied by; 2: alpha, as without the tag; 0: something else
    extra = page.extrasamples[:1] or (2,)
    alpha = samples[..., colors.shape[2] :][..., :1] if extra in ((1,), (2,)) else samples[..., :0]
    if extra == (1,):
        colors = np.rint(colors / np.maximum(alpha / 65535, 1 / 65535)).clip(0, 65535).astype(np.uint16)
    tag = page.tags.get(ICC_PROFILE)
    profile = tag and bytes(tag.value)
    if space == "SEPARATED":
        colors = _convert_to_srgb(_cmyk_image(to_8_bits(colors)), profile, path)
        alpha, profile = to_8_bits(alpha), None
    return np.concatenate([colors, alpha], axis=2), profile, orientation


def _cmyk_image(array):
    return Image.frombytes("CMYK", array.shape[1::-1], array.tobytes())


def _read_samples(page, file, path):
    """All samples of a page, uint16 (H, W, samples), and the orientation to apply."""
    is_packed, planes_apart = page.compression != 1, page.planarconfig == 2
    is_simple = page.samplesperpixel in (1, 3, 4) and page.photometric.name != "SEPARATED"
    if is_packed and is_simple and not planes_apart:
        return _decode_with_opencv(file, path), 1  # OpenCV turns TIFFs itself, and misreads planes that are apart
    try:
        samples = page.asarray(squeeze=False)  # (planes, depth, H, W, samples per plane)
    except (KeyError, ValueError) as error:
        if "imagecodecs" not in str(error):
            raise
        layout = " with planes apart" * planes_apart
        raise InputError(
            f"{path}: a 16-bit TIFF{layout} and {page.compression.name} compression cannot be read here; "
            "save it without compression, or pip install imagecodecs"
        ) from None
    samples = np.moveaxis(samples[:, 0], 0, -1)
    return samples.reshape(*samples.shape[:2], -1), _tiff_orientation(page)


# ---- color profiles --------------------------------------------------------------------------------------------------


def _color_transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform]:
    """The color space of an ICC profile, as in CMS_MODES, and the transform from there to sRGB. Raises if broken."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip().upper()
    # The tables that make transforms of large images fast are too coarse for the dark tones of linear gray.
    flags = ImageCms.Flags.NOOPTIMIZE if space == "GRAY" else ImageCms.Flags.NONE
    srgb = ImageCms.createProfile("sRGB")
    return space, ImageCms.buildTransform(opened, srgb, inMode=CMS_MODES[space], outMode="RGB", flags=flags)


def _to_srgb(pixels, transform):
    """Pixels (H, W, 1 or 3) -> sRGB (H, W, 3). Gray keeps its depth; RGB of 16 bits is reduced to 8."""
    if pixels.shape[2] == 3:
        return np.asarray(transform.apply(Image.fromarray(to_8_bits(pixels))))
    ramp = np.arange(256, dtype=np.uint8)[None]
    curve = np.asarray(transform.apply(Image.fromarray(ramp)))[0, :, 0].astype(np.float64)  # the same for all colors
    factor = np.iinfo(pixels.dtype).max // 255
    gray = np.interp(pixels[..., 0], np.arange(256) * factor, curve * factor)
    return to_colors(np.rint(gray).astype(pixels.dtype)[..., None], 3)


def _convert_to_srgb(image, profile, path):
    """A CMYK or CIELAB image -> sRGB, uint8 (H, W, 3)."""
    if image.mode == "LAB":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    if profile:
        try:
            return np.asarray(_color_transform(profile)[1].apply(image))
        except Exception:  # LittleCMS and Pillow raise many types on a broken profile
            _warn_of_profile(path)
    return np.asarray(image.convert("RGB"))


def _warn_of_profile(path):
    logger.warning(f"{path}: its color profile is broken or of another color space; ignored, so colors may differ")


# ---- writing ---------------------------------------------------------------------------------------------------------


def encode_png(picture: Picture) -> bytes:
    """The content of a PNG file with 8 or 16 bits per channel, and with alpha and color profile if there are any."""
    if picture.pixels.dtype == np.uint16:
        return _encode_deep_png(_join(picture), picture.profile)
    content = io.BytesIO()
    to_pillow(picture).save(content, "PNG", icc_profile=picture.profile)
    return content.getvalue()


def to_pillow(picture: Picture) -> Image.Image:
    """A picture as a Pillow image, with its alpha and profile. Pillow has 16 bits for gray without alpha alone."""
    channels = _join(picture)
    if channels.shape[2] > 1:
        channels = to_8_bits(channels)
    image = Image.fromarray(channels[..., 0] if channels.shape[2] == 1 else channels)
    if picture.profile:
        image.info["icc_profile"] = picture.profile
    return image


def _join(picture):
    """The channels of a picture (H, W, 1 to 4), alpha last."""
    alpha = [] if picture.alpha is None else [picture.alpha]
    return np.dstack([picture.pixels, *alpha])


def _encode_deep_png(channels, profile):
    """Encode uint16 (H, W, 1 to 4), which Pillow cannot for colors and OpenCV cannot with a profile.

    See the PNG specification of the W3C, sections 5, 9 and 11.
    """
    height, width, count = channels.shape
    rows = channels.astype(">u2").reshape(height, -1).view(np.uint8)
    rows[:, 2 * count :] -= rows[:, : -2 * count].copy()  # filter 1: the difference from the pixel to the left
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[count]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0))]
    if profile:
        chunks.append((b"iCCP", b"ICC\0\0" + zlib.compress(profile)))
    chunks += [(b"IDAT", zlib.compress(np.insert(rows, 0, 1, axis=1))), (b"IEND", b"")]
    return PNG_START + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


# ---- folders ---------------------------------------------------------------------------------------------------------


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by file name. Hidden files are ignored. Raises InputError."""
    return [path for path in _visible_files(folder) if path.suffix.lower() in _extensions()]


def list_images(folder: Path) -> dict[str, Path]:
    """The image files of a folder, as `image_files` returns them: {name without extension: path}.

    Raises InputError if the folder is missing or two files have the same name without extension.
    """
    images = {}
    for path in image_files(folder):
        if path.stem in images:
            raise InputError(f"{path}: has the same name as {images[path.stem].name}; rename one of them")
        images[path.stem] = path
    return images


def name_images(paths: Sequence[Path]) -> dict[str, Path]:
    """Files of one folder: {name: path}, with the extension only in the names of files that share theirs without it.

    So the results of a.png and a.jpg do not have the same name, also where upper and lower case are the same.
    """
    stems = Counter(path.stem.casefold() for path in paths)
    names = {path.name.casefold() for path in paths}
    return {
        path.name if stems[path.stem.casefold()] > 1 or path.stem.casefold() in names else path.stem: path
        for path in paths
    }


def skipped_files(folder: Path) -> list[str]:
    """What `image_files` leaves out except hidden files, one line per kind of file. Raises InputError as it does."""
    by_kind = defaultdict(list)
    for path in _visible_files(folder):
        if path.suffix.lower() not in _extensions():
            by_kind[FOREIGN_KINDS.get(path.suffix.lower(), "")].append(path.name)
    lines = []
    for kind, names in sorted(by_kind.items()):
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        reason = f"{kind} images cannot be read here; convert them to PNG or JPEG" if kind else "not images"
        lines.append(f"{folder}: skipped {listed}: {reason}")
    return lines


def _visible_files(folder):
    if not folder.is_dir():
        if folder.exists():
            raise InputError(f"{folder}: is a file, not a folder; give the folder that holds the images")
        raise InputError(f"{folder}: no such folder; check the path")
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    return [path for path in files if path.is_file() or (path.is_symlink() and not path.exists())]  # or a broken link


@functools.cache
def _extensions():
    kinds = Image.registered_extensions()  # also loads the decoders
    return {extension for extension, kind in kinds.items() if kind in Image.OPEN and kind not in NOT_IMAGES}
