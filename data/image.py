"""Read image files of any kind as 8-bit grey or RGB."""

import contextlib
import functools

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageOps

from utility import InputError, write_whole

ORIENTATION, TURNED = 0x0112, {5, 6, 7, 8}  # the EXIF tag, and its values that swap height and width


def read_image(path, n_colors=3):
    """An image file -> uint8 (H, W, n_colors), n_colors 1 (grey) or 3 (RGB).

    Palettes and CMYK are converted, alpha is dropped, 16 bits are reduced to 8, EXIF rotation is applied, and of
    several frames the first is read. Raises InputError where the file is missing, broken or of 32 bits a channel.
    """
    with _open(path) as image:
        if image.mode in ("I", "F"):
            raise InputError(f"{path}: has 32 bits a pixel; save it with 8 or 16")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would clip, not scale
            image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
        array = np.asarray(image.convert("L" if n_colors == 1 else "RGB"))
    return array.reshape(*array.shape[:2], n_colors)


def image_size(path):
    """(height, width) as `read_image` gives them, from the head of the file alone."""
    with _open(path) as image:
        width, height = image.size
        # Pillow turns the size of a TIFF by itself, and looks for EXIF behind the pixels of a PNG, decoding them all.
        looked_for = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
        turned = looked_for and image.getexif().get(ORIENTATION) in TURNED
    return (width, height) if turned else (height, width)


def image_kind(path):
    """Such as "PNG RGB" or "PNG I;16", as Pillow names formats and modes: I;16 is grey of 16 bits, P a palette."""
    with _open(path) as image:
        return f"{image.format} {image.mode}"


def write_png(path, image):
    """uint8 (H, W, 1 or 3) -> a PNG file, whole or not at all."""
    write_whole(path, iio.imwrite("<bytes>", image[..., 0] if image.shape[2] == 1 else image, extension=".png"))


def list_images(folder):
    """The image files of a folder in the order of their names; {name without ending: path}.

    Raises InputError if the folder is missing or two files share a name.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file, not a folder" if folder.exists() else f"{folder}: no such folder")
    images = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _endings() and not path.name.startswith("."):
            if path.stem in images:
                raise InputError(f"{path}: has the name of {images[path.stem].name}; rename one of the two")
            images[path.stem] = path
    return images


@functools.cache
def _endings():
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


@contextlib.contextmanager
def _open(path):
    try:
        with Image.open(path) as image:
            yield image
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: is larger than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels; cut it") from None
    except Exception as error:  # decoders raise nearly anything on a broken file
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: is no image, or broken or cut off ({reason}); remove or replace it") from None
