"""Decoded training images (--ext): a patch is read without decoding the image around it.

img        nothing is kept, files are decoded each time
sep        one .npy an image under <set>/bin, memory-mapped
sep_reset  the same, made anew
bin        everything in memory

A cached file bears size and time of its source in its name, so a changed source is decoded anew; it appears by
rename, so nobody ever finds half of one.
"""

import functools
import glob
import io

import numpy as np
import torch

from data.image import read_image
from utility import InputError, in_parallel, remove_unfinished, write_whole

KINDS = ("img", "sep", "sep_reset", "bin")


def prepare(paths, root, kind, n_colors=3, n_threads=1):
    """Image paths below the folder `root` -> as many sources for `open_image`. Raises InputError."""
    _mapped.cache_clear()  # files may be replaced
    if kind == "img":
        return list(paths)
    if kind == "bin":
        read = functools.partial(read_image, n_colors=n_colors)
    else:
        read = functools.partial(_cached, root=root, n_colors=n_colors, anew=kind == "sep_reset")
        for folder in {_folder(path, root) for path in paths}:
            remove_unfinished(folder, seconds=3600)  # what is younger may be another's work in progress
    return in_parallel(read, list(paths), n_threads, f"cache {root.name}")


def open_image(source, n_colors=3):
    """A source of `prepare` -> uint8 (H, W, n_colors), memory-mapped where it is a cached file."""
    if isinstance(source, np.ndarray):
        return source
    if source.suffix == ".npy":
        return _mapped(source)
    return read_image(source, n_colors)


@functools.lru_cache(maxsize=16384)  # to map a file takes longer than to read a patch; Linux allows 65530 maps
def _mapped(path):
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
        # numpy's own maps would each keep a file open, of which systems often allow 1024.
        content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8).numpy()
        image = content[start:].reshape(shape)
    except ValueError:
        raise InputError(f"{path}: is broken; --ext sep_reset makes it anew") from None
    image.flags.writeable = False
    return image


def _cached(path, root, n_colors, anew):
    stat = path.stat()
    folder = _folder(path, root)
    stem = f"{path.name}.{n_colors}c"
    cached = folder / f"{stem}.{stat.st_size}-{stat.st_mtime_ns}.npy"
    if anew or not cached.exists():
        content = io.BytesIO()
        np.save(content, read_image(path, n_colors))
        try:
            write_whole(cached, content.getvalue())
            for old in folder.glob(f"{glob.escape(stem)}.*.npy"):
                if old != cached:
                    old.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{cached}: cannot be written ({error.strerror}); --ext img needs no cache") from None
    return cached


def _folder(path, root):
    return root / "bin" / path.relative_to(root).parent
