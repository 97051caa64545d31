"""Read image files of any format as 8-bit gray or RGB, and write PNG files."""

import contextlib
import functools
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageOps

from utility import InputError, write_whole

ORIENTATION, TURNED = 0x0112, {5, 6, 7, 8}  # the EXIF tag, and its values that swap height and width


def read_image(path: Path, n_colors: int = 3) -> np.ndarray:
    """Read an image file -> uint8 (H, W, n_colors), n_colors 1 (gray) or 3 (RGB). The array may be read-only.

    Palettes and CMYK are converted, alpha is dropped, 16 bits are reduced to 8 and EXIF rotation is applied. Only the
    first frame of a file is read.

    Raises InputError if the file is missing, broken or has 32 bits per channel.
    """
    with _open(path) as image:
        if image.mode in ("I", "F"):
            raise InputError(f"{path}: has 32 bits per channel; convert it to 8 or 16")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would clip the values instead of scaling them
            image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
        array = np.asarray(image.convert("L" if n_colors == 1 else "RGB"))
    return array.reshape(*array.shape[:2], n_colors)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of what `read_image` returns, from the file header only. Raises InputError."""
    with _open(path) as image:
        width, height = image.size
        # Pillow applies the rotation to the size of a TIFF itself. To find the EXIF data of a PNG it may read beyond
        # the pixels and decode them all, so PNGs are only searched if the header has EXIF data.
        may_be_turned = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
        turned = may_be_turned and image.getexif().get(ORIENTATION) in TURNED
    return (width, height) if turned else (height, width)


def image_kind(path: Path) -> str:
    """Format and mode as Pillow names them, e.g. "PNG RGB" or "PNG I;16" (16-bit gray). Raises InputError."""
    with _open(path) as image:
        return f"{image.format} {image.mode}"


def write_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 (H, W, 1 or 3) as a PNG file, completely or not at all."""
    write_whole(path, iio.imwrite("<bytes>", image[..., 0] if image.shape[2] == 1 else image, extension=".png"))


def list_images(folder: Path) -> dict[str, Path]:
    """The image files of a folder, sorted by file name: {name without extension: path}. Hidden files are ignored.

    Raises InputError if the folder is missing or two files have the same name without extension.
    """
    if not folder.is_dir():
        if folder.exists():
            raise InputError(f"{folder}: is a file, not a folder; give the folder that holds the images")
        raise InputError(f"{folder}: no such folder; check the path")
    images = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _extensions() and not path.name.startswith("."):
            if path.stem in images:
                raise InputError(f"{path}: has the same name as {images[path.stem].name}; rename one of them")
            images[path.stem] = path
    return images


@functools.cache
def _extensions():
    return {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}


@contextlib.contextmanager
def _open(path):
    """Open an image file; whatever fails while it is open becomes an InputError."""
    try:
        with Image.open(path) as image:
            yield image
    except (InputError, MemoryError):
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        raise InputError(f"{path}: has more than {limit:.0f} megapixels; split it into smaller images") from None
    except Exception as error:  # decoders raise nearly any type of exception on a broken file
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not an image, or broken ({reason}); remove or replace it") from None
