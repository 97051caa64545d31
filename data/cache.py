"""Cache of decoded training images, so that reading a patch does not decode a whole image.

img        no cache: files are decoded every time
sep        one memory-mapped .npy file per image under <set>/bin
sep_reset  like sep, but all files are rebuilt
bin        all images are kept in memory
device     like sep; data/device.py copies the images to the memory of a device

The name of a cached file holds size and modification time of its source, so a changed source is decoded again. A
cached file appears by rename, so no process ever sees an incomplete one.
"""

import functools
import glob
import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from data.image import read_image
from utility import InputError, in_parallel, remove_unfinished, write_whole

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
        return _map_file(source)
    return read_image(source, n_colors)


@functools.lru_cache(maxsize=16384)  # mapping a file takes longer than reading a patch; Linux allows 65530 maps
def _map_file(path):
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
        # np.memmap would keep each file open, and systems often allow only 1024 open files.
        content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8).numpy()
        image = content[start:].reshape(shape)
    except ValueError:
        raise InputError(f"{path}: the cached image is broken; rebuild the cache (ext sep_reset)") from None
    image.flags.writeable = False
    return image


def _write_cached(path, root, n_colors, rebuild):
    """Write the cached file of an image unless it exists, remove outdated ones, and return its path."""
    stat = path.stat()
    folder = _folder(path, root)
    encoded = os.fsencode(path.name)  # file systems limit names to 255 bytes
    name = path.name if len(encoded) <= MAX_NAME_BYTES else hashlib.sha256(encoded).hexdigest()
    stem = f"{name}.{n_colors}c"
    cached = folder / f"{stem}.{stat.st_size}-{stat.st_mtime_ns}.npy"
    if rebuild or not cached.exists():
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
