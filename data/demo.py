"""Where the user's own images lie: a folder of them, or one file. They have no HR image."""

from pathlib import Path

from data.benchmark import ImageSet
from data.image import list_images
from utility import InputError


def find(dir_demo):
    """The set "demo". Raises InputError if there is nothing at `dir_demo`."""
    if not dir_demo:
        raise InputError("--data_test demo: say with --dir_demo where the images are, a folder or a file")
    path = Path(dir_demo)
    images = {path.stem: path} if path.is_file() else list_images(path)
    return ImageSet("demo", path, {name: (None, lr) for name, lr in images.items()})
