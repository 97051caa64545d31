"""Read image files of any kind as 8-bit grey or RGB."""

import contextlib

import imageio.v3 as iio
import numpy as np

from utility import InputError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"}
TURNED = {5, 6, 7, 8}  # EXIF orientations that swap height and width


def read_image(path, n_colors=3):
    """An image file -> uint8 (H, W, n_colors), n_colors 1 (grey) or 3 (RGB).

    Palettes and CMYK are converted, alpha is dropped, 16 bits are rounded to 8, EXIF rotation is applied, and of
    several frames the first is read. Raises InputError where the file is missing, broken or of 32 bits a channel.
    """
    with _open(path) as file:
        mode = file.metadata(index=0, exclude_applied=False)["mode"]
        if mode in ("I", "F"):
            raise InputError(f"{path}: has 32 bits a pixel; save it with 8 or 16")
        if mode.startswith("I;16"):
            image = file.read(index=0, rotate=True)
            image = np.round(image / 257).astype(np.uint8)  # 65535 -> 255
            return np.repeat(image[..., None], n_colors, 2)
        image = file.read(index=0, mode="L" if n_colors == 1 else "RGB", rotate=True)
    return np.ascontiguousarray(image.reshape(*image.shape[:2], n_colors))


def image_size(path):
    """(height, width) as `read_image` gives them, from the head of the file alone."""
    with _open(path) as file:
        metadata = file.metadata(index=0, exclude_applied=False)
    width, height = metadata["shape"]
    return (width, height) if metadata.get("Orientation") in TURNED else (height, width)


def write_png(path, image):
    """uint8 (H, W, 1 or 3) -> a PNG file."""
    iio.imwrite(path, image[..., 0] if image.shape[2] == 1 else image, extension=".png")


def list_images(folder):
    """The image files of a folder in the order of their names; {name without ending: path}.

    Raises InputError if the folder is missing or two files share a name.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    images = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
            if path.stem in images:
                raise InputError(f"{path}: has the name of {images[path.stem].name}; rename one of the two")
            images[path.stem] = path
    return images


@contextlib.contextmanager
def _open(path):
    try:
        with iio.imopen(path, "r", plugin="pillow") as file:
            yield file
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # decoders raise nearly anything on a broken file
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: is no image, or broken or cut off ({reason}); remove or replace it") from None
