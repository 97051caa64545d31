"""The user's own images: a folder or one file. They have no HR images."""

from pathlib import Path

from data.imageset import ImageSet
from picture import image_files, name_images, skipped_files
from program import InputError
from utility import logger


def find(dir_demo: str | Path) -> ImageSet:
    """The set "demo"; files that are not images are skipped and logged.

    Raises InputError if `dir_demo` is empty, does not exist or holds no images.
    """
    if not dir_demo:
        raise InputError("missing; the set 'demo' needs a folder of images or one image file", argument="dir_demo")
    path = Path(dir_demo)
    if path.is_file():
        images = {path.stem: path}
    elif not path.exists():
        raise InputError(f"no such file or folder {str(path)!r}; check the path", argument="dir_demo")
    else:
        images = name_images(image_files(path))
        for line in skipped_files(path):
            logger.warning(line)
    if not images:
        raise InputError(f"{path}: holds no images; give a folder of images or one image file")
    return ImageSet("demo", path, {name: (None, lr) for name, lr in images.items()})
