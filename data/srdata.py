"""Pairs of HR and LR images: random patches for training, whole images for testing."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data import cache
from data.image import image_size, read_image
from data.imageset import ImageSet
from data.prefetch import Prefetcher
from picture import Picture, read_picture
from program import InputError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class PatchSettings:
    """How training patches are cut and loaded."""

    patch_size: int = 96  # P, in low-resolution pixels
    augment: bool = True  # flip and rotate by 90 degrees at random
    ext: str = "sep"  # kind of cache, one of cache.CACHE_KINDS
    seed: int = 1  # of all random choices, at least 0
    batch_size: int = 16  # patches per step, of all processes together
    steps: int = 1000  # batches per epoch
    n_threads: int = 4  # worker processes that load patches, and threads that build the cache; 0: no workers
    device: torch.device = CPU  # that the batches are for


class Place(NamedTuple):
    """Where a patch lies in its image, in low-resolution pixels, and how it is turned: flipped, then transposed."""

    top: int
    left: int
    flip_rows: int = 0  # 0 or 1
    flip_columns: int = 0
    transpose: int = 0


class Patches(Dataset):
    """Random patches of image pairs.

    The item of a key (image, epoch, draw) is a pair of uint8 arrays, LR (P, P, n_colors) and HR (sP, sP, n_colors).
    They may be views of cached images, so they must not be modified. The position and orientation of a patch depend
    only on the seed, the epoch and the draw, not on the number of workers.

    Args:
        sets: the images to train on
        scale: s, high-resolution pixels per low-resolution pixel
        n_colors: 1 (gray) or 3 (RGB)
        patches: all its fields except batch_size, steps and device are used

    Raises:
        InputError: a set holds no images or no HR images, an image is smaller than a patch, or a file is broken
    """

    def __init__(self, sets: Sequence[ImageSet], scale: int, n_colors: int, patches: PatchSettings):
        self.scale, self.n_colors = scale, n_colors
        self.patch_size, self.augment, self.seed = patches.patch_size, patches.augment, patches.seed
        for images in sets:
            _check_trainable(images, patches.patch_size)
        self.hr, self.lr = [], []
        for images in sets:
            hr, lr = zip(*images.pairs.values(), strict=True)
            prepare = functools.partial(
                cache.prepare, root=images.root, kind=patches.ext, n_colors=n_colors, n_threads=patches.n_threads
            )
            self.hr += prepare(hr)
            self.lr += prepare(lr)

    def __len__(self) -> int:
        return len(self.lr)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        image, epoch, draw = key
        lr = cache.open_image(self.lr[image], self.n_colors)
        hr = cache.open_image(self.hr[image], self.n_colors)
        size, scale = self.patch_size, self.scale
        top, left, *turn = self.place(lr.shape, epoch, draw)
        lr = lr[top : top + size, left : left + size]
        hr = hr[top * scale : (top + size) * scale, left * scale : (left + size) * scale]
        return _turn(lr, *turn), _turn(hr, *turn)

    def __getitems__(
        self, keys: Sequence[tuple[int, int, int]]
    ) -> list[tuple[np.ndarray, np.ndarray]] | InputError | OSError:
        """The items of a batch, or the error of reading them: a worker process can only raise its text."""
        try:
            return [self[key] for key in keys]
        except (InputError, OSError) as error:
            return error

    def place(self, lr_shape: Sequence[int], epoch: int, draw: int) -> Place:
        """Draw the place of a patch in an image whose low-resolution shape is (H, W, ...)."""
        rng = np.random.default_rng((self.seed, epoch, draw))
        top = int(rng.integers(lr_shape[0] - self.patch_size + 1))
        left = int(rng.integers(lr_shape[1] - self.patch_size + 1))
        return Place(top, left, *(rng.integers(2, size=3).tolist() if self.augment else ()))


class EpochSampler(Sampler):
    """The keys of one epoch of `Patches`: random orders of all images, repeated until `steps` batches are full.

    Set `epoch` before each epoch. Set `first_step` to start in the middle of an epoch. The process of rank r draws the
    r-th of `world_size` equal parts of each batch, so all processes together see what a single process would see.

    Args:
        n_images: length of the Patches
        steps: batches per epoch
        batch_size: patches per batch, of all processes together

    Raises:
        InputError: batch_size is not a multiple of world_size
    """

    def __init__(self, n_images: int, steps: int, batch_size: int, seed: int = 1, rank: int = 0, world_size: int = 1):
        if batch_size % world_size:
            raise InputError(
                f"{batch_size} patches cannot be divided evenly among {world_size} processes; "
                f"use a multiple of {world_size}",
                argument="batch_size",
            )
        self.n_images, self.steps, self.batch_size, self.seed = n_images, steps, batch_size, seed
        self.share = batch_size // world_size  # patches of a batch for this process
        self.rank = rank
        self.epoch, self.first_step = 1, 0

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.share

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        images = itertools.islice(self._images(), self.first_step * self.batch_size, self.steps * self.batch_size)
        mine = range(self.rank * self.share, (self.rank + 1) * self.share)
        for draw, image in enumerate(images, self.first_step * self.batch_size):
            if draw % self.batch_size in mine:
                yield image, self.epoch, draw

    def _images(self):
        """The image of each draw of the epoch, without end."""
        rng = np.random.default_rng((self.seed, self.epoch))
        while True:
            yield from rng.permutation(self.n_images).tolist()


class PatchLoader(DataLoader):
    """A DataLoader of `Patches` that yields batches LR (N, P, P, n_colors), HR (N, sP, sP, n_colors), uint8 tensors.

    If `device` is a CUDA device the batches lie there, else on the CPU.

    Workers send batches as arrays, which are copied through a pipe. Tensors would travel in newly allocated shared
    memory, and its page faults take longer than the copy and everything else.

    Args:
        n_threads: worker processes, which persist between epochs; 0: the calling process loads the patches
        device: that the batches are for
        options: of DataLoader
    """

    def __init__(self, patches: Patches, sampler: EpochSampler, n_threads: int, device: torch.device = CPU, **options):
        super().__init__(
            patches,
            batch_size=sampler.share,
            sampler=sampler,
            num_workers=n_threads,
            persistent_workers=n_threads > 0,
            collate_fn=_stack,
            **options,
        )
        self.prefetch = Prefetcher(device)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        batches = super().__iter__()  # in the main thread, which a signal then tells if a worker has died
        return self.prefetch(map(_to_tensors, batches))


class WholeImages(Dataset):
    """The images of a set: (name, LR (H, W, n_colors), HR (sH, sW, n_colors) or None), uint8 arrays.

    Without an HR image, LR looks like the image in its file, see `picture.read_picture`, and is uint16 if the file has
    16 bits per channel.

    Raises InputError if the set is empty.
    """

    def __init__(self, images: ImageSet, scale: int, n_colors: int = 3):
        if not images.pairs:
            raise InputError(
                f"{images.name} ({images.root}) holds no images to test on; add images or choose another range of them",
                argument="data_test",
            )
        self.name, self.benchmark, self.has_hr = images.name, images.benchmark, images.has_hr
        self.names, self.paths = list(images.pairs), list(images.pairs.values())
        self.scale, self.n_colors = scale, n_colors
        # Of one image, because `source` follows the reading of its pixels.
        self._read_picture = functools.lru_cache(maxsize=1)(functools.partial(read_picture, n_colors=n_colors))

    def __len__(self) -> int:
        return len(self.names)

    def check_files(self) -> None:
        """Raise InputError if a file cannot be read as an image. The pixels are not decoded."""
        for path in (path for pair in self.paths for path in pair if path):
            image_size(path)

    def source(self, name: str) -> Picture:
        """An image without HR image as it is in its file, with alpha and color profile. Raises InputError."""
        return self._read_picture(self.paths[self.names.index(name)][1])

    def __getitem__(self, index: int) -> tuple[str, np.ndarray, np.ndarray | None]:
        hr_path, lr_path = self.paths[index]
        stored = self._read_picture(lr_path).pixels if hr_path is None else read_image(lr_path, self.n_colors)
        lr = np.array(stored)  # a writable copy, which torch.from_numpy asks for
        if hr_path is None:
            return self.names[index], lr, None
        height, width = lr.shape[0] * self.scale, lr.shape[1] * self.scale
        hr = read_image(hr_path, self.n_colors)[:height, :width]  # HR sizes need not be multiples of the scale
        return self.names[index], lr, hr


def _check_trainable(images, patch_size):
    """Raise InputError unless the set holds HR and LR images that are at least as large as a patch."""
    if not images.pairs:
        raise InputError(
            f"{images.name} ({images.root}) holds no images to train on; add images or choose another range of them",
            argument="data_train",
        )
    if not images.has_hr:
        raise InputError(
            f"{images.name} ({images.root}) holds no HR images to train on; choose another set", argument="data_train"
        )
    for hr, lr in images.pairs.values():
        image_size(hr)
        height, width = image_size(lr)
        if min(height, width) < patch_size:
            raise InputError(
                f"patches of {patch_size}x{patch_size} pixels do not fit into {lr} ({height}x{width}); "
                "use smaller patches or remove the image",
                argument="patch_size",
            )


def _stack(pairs):
    """N pairs of arrays (LR, HR), each (H, W, n_colors) -> [LR, HR], each (N, H, W, n_colors); errors stay errors."""
    return pairs if isinstance(pairs, Exception) else [np.stack(images) for images in zip(*pairs, strict=True)]


def _to_tensors(arrays):
    """Arrays from a worker process -> tensors. Raises the error that it sent instead."""
    if isinstance(arrays, Exception):
        raise arrays
    return [torch.from_numpy(array) for array in arrays]


def _turn(patch, flip_rows, flip_columns, transpose):
    """Flip and transpose an image (H, W, C) with OpenCV: doing it with numpy takes longer than everything else here."""
    height, width, n_colors = patch.shape
    if flip_rows or flip_columns:
        patch = cv2.flip(patch, -1 if flip_rows and flip_columns else int(flip_columns))
    if transpose:
        patch = cv2.transpose(patch)
        height, width = width, height
    return patch.reshape(height, width, n_colors)  # OpenCV drops the axis of a single color
