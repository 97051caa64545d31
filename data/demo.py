"""The user's own images: a folder or one file. They have no HR images."""

from pathlib import Path

from data.image import list_images
from data.imageset import ImageSet
from utility import InputError


def find(dir_demo: str | Path) -> ImageSet:
    """The set "demo". Raises InputError if `dir_demo` is empty, does not exist or holds no images."""
    if not dir_demo:
        raise InputError("missing; the set 'demo' needs a folder of images or one image file", argument="dir_demo")
    path = Path(dir_demo)
    images = {path.stem: path} if path.is_file() else list_images(path)
    if not images:
        raise InputError(f"{path}: holds no images; give a folder of images or one image file")
    return ImageSet("demo", path, {name: (None, lr) for name, lr in images.items()})
