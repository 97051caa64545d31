"""Decoded training images (--ext): a patch is read without decoding the image around it.

img        nothing is kept, files are decoded each time
sep        one .npy an image under <set>/bin, memory-mapped
sep_reset  the same, made anew
bin        everything in memory

A cached file bears size and time of its source in its name, so a changed source is decoded anew; it appears by
rename, so nobody ever finds half of one.
"""

import glob
import io

import numpy as np
from tqdm import tqdm

from data.image import read_image
from utility import InputError, write_whole

KINDS = ("img", "sep", "sep_reset", "bin")


def prepare(paths, root, kind, n_colors=3):
    """Image paths below the folder `root` -> as many sources for `open_image`. Raises InputError."""
    if kind == "img":
        return list(paths)
    with tqdm(paths, desc=f"cache {root.name}", unit="image", leave=False) as progress:
        if kind == "bin":
            return [read_image(path, n_colors) for path in progress]
        return [_cached(path, root, n_colors, anew=kind == "sep_reset") for path in progress]


def open_image(source, n_colors=3):
    """A source of `prepare` -> uint8 (H, W, n_colors), memory-mapped where it is a cached file."""
    if isinstance(source, np.ndarray):
        return source
    if source.suffix == ".npy":
        try:
            return np.load(source, mmap_mode="r")
        except (ValueError, EOFError):
            raise InputError(f"{source}: is broken; --ext sep_reset makes it anew") from None
    return read_image(source, n_colors)


def _cached(path, root, n_colors, anew):
    stat = path.stat()
    folder = root / "bin" / path.relative_to(root).parent
    stem = f"{path.name}.{n_colors}c"
    cached = folder / f"{stem}.{stat.st_size}-{stat.st_mtime_ns}.npy"
    if anew or not cached.exists():
        content = io.BytesIO()
        np.save(content, read_image(path, n_colors))
        try:
            write_whole(cached, content.getvalue())
            for old in folder.glob(f"{glob.escape(stem)}.*.npy"):
                if old != cached:
                    old.unlink()
        except OSError as error:
            raise InputError(f"{cached}: cannot be written ({error.strerror}); --ext img needs no cache") from None
    return cached
