"""Cache of decoded training images, so that reading a patch does not decode a whole image.

img        no cache: files are decoded every time
sep        one memory-mapped .npy file per image under <set>/bin
sep_reset  like sep, but all files are rebuilt
bin        all images are kept in memory
device     like sep; data/device.py copies the images to the memory of a device

The name of a cached file holds size and modification time of its source, so a changed source is decoded again. A
cached file appears by rename, so no process ever sees an incomplete one; files that were damaged later are rebuilt.
"""

import functools
import glob
import hashlib
import io
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from data.image import image_size, read_image
from files import write_whole
from program import InputError
from utility import in_parallel, remove_unfinished

CACHE_KINDS = ("img", "sep", "sep_reset", "bin", "device")
MAX_NAME_BYTES = 180  # longer names are replaced by a hash
STALE_SECONDS = 3600  # younger unfinished files may belong to a process that is still writing them


def prepare(
    paths: Iterable[Path], root: Path, kind: str, n_colors: int = 3, n_threads: int = 1
) -> list[Path | np.ndarray]:
    """Build the cache of some images.

    Args:
        paths: images in or below the folder `root`
        kind: one of CACHE_KINDS

    Returns:
        a source for `open_image` per path

    Raises:
        InputError: an image cannot be read, the cache cannot be written, or there is no such kind of cache
    """
    if kind not in CACHE_KINDS:
        raise InputError(f"no such kind of cache {kind!r}; there are {', '.join(CACHE_KINDS)}", argument="ext")
    _map_file.cache_clear()  # files may be replaced
    paths = list(paths)
    if kind == "img":
        return paths
    if kind == "bin":
        read = functools.partial(read_image, n_colors=n_colors)
    else:
        read = functools.partial(_write_cached, root=root, n_colors=n_colors, rebuild=kind == "sep_reset")
        for folder in {_folder(path, root) for path in paths}:
            remove_unfinished(folder, seconds=STALE_SECONDS)
    return in_parallel(read, paths, n_threads, f"cache {root.name}")


def open_image(source: Path | np.ndarray, n_colors: int = 3) -> np.ndarray:
    """A source from `prepare` -> uint8 (H, W, n_colors), not to be modified; cached files are memory-mapped.

    Raises InputError if a file is missing or broken.
    """
    if isinstance(source, np.ndarray):
        return source
    if source.suffix == ".npy":
        try:
            return _map_file(source, source.stat().st_size)  # a file cut off meanwhile is mapped, and checked, again
        except (OSError, ValueError):
            raise InputError(f"{source}: the cached image is broken; rebuild the cache (ext sep_reset)") from None
    return read_image(source, n_colors)


@functools.lru_cache(maxsize=16384)  # mapping a file takes longer than reading a patch; Linux allows 65530 maps
def _map_file(path, size):
    """The image in a cached file of `size` bytes. Raises ValueError if the header does not fit the file."""
    shape, start = _read_header(path, size)
    # np.memmap would keep each file open, and systems often allow only 1024 open files.
    image = torch.from_file(str(path), size=size, dtype=torch.uint8).numpy()[start:].reshape(shape)
    image.flags.writeable = False
    return image


def _read_header(path, size):
    """Shape of the image in a cached file of `size` bytes, and where its pixels start. Raises ValueError."""
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            shape, is_transposed, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception:  # a broken header may raise nearly anything
            raise ValueError("not a .npy file") from None
        start = file.tell()
    is_image = version == (1, 0) and dtype == np.uint8 and not is_transposed and len(shape) == 3 and min(shape) > 0
    if not is_image or start + math.prod(shape) != size:
        raise ValueError("not an image, or cut off")
    return shape, start


def _is_image_of(cached, path, n_colors):
    """Whether a cached file exists, is whole and has the size of the image `path`."""
    try:
        return cached.is_file() and _read_header(cached, cached.stat().st_size)[0] == (*image_size(path), n_colors)
    except (OSError, ValueError):
        return False


def _write_cached(path, root, n_colors, rebuild):
    """Write the cached file of an image unless it is there and whole, remove outdated ones, and return its path."""
    stat = path.stat()
    folder = _folder(path, root)
    encoded = os.fsencode(path.name)  # file systems limit names to 255 bytes
    name = path.name if len(encoded) <= MAX_NAME_BYTES else hashlib.sha256(encoded).hexdigest()
    stem = f"{name}.{n_colors}c"
    cached = folder / f"{stem}.{stat.st_size}-{stat.st_mtime_ns}.npy"
    if rebuild or not _is_image_of(cached, path, n_colors):
        content = io.BytesIO()
        np.save(content, read_image(path, n_colors))
        try:
            write_whole(cached, content.getvalue())
            for old in folder.glob(f"{glob.escape(stem)}.*.npy"):
                if old != cached:
                    old.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(
                f"{cached}: cannot be written ({error.strerror}); read the images without a cache (ext img)"
            ) from None
    return cached


def _folder(path, root):
    return root / "bin" / path.relative_to(root).parent
