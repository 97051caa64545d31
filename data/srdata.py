"""Pairs of HR and LR images: random patches to train on, whole images to test on."""

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data import cache
from data.image import image_size, read_image
from utility import InputError


class Patches(Dataset):
    """Random patches of image pairs.

    An item is asked for by (image, epoch, draw) and gives LR (n_colors, P, P) and HR (n_colors, sP, sP), uint8. What
    is cut and how it is turned depends on the seed, the epoch and the draw alone: not on the worker, nor on how many
    there are.

    Args:
        sets: ImageSets
        scale: s
        patch_size: P, low-resolution pixels
        augment: flip and turn by 90 degrees at random
        ext: kind of cache, see cache.py
        seed: >= 0
        n_threads: that build the cache

    Raises:
        InputError: a set holds no image, one is smaller than a patch, or a file is broken
    """

    def __init__(self, sets, scale, patch_size=96, augment=True, n_colors=3, ext="sep", seed=1, n_threads=1):
        self.scale, self.patch_size, self.augment, self.n_colors, self.seed = scale, patch_size, augment, n_colors, seed
        for images in sets:
            if not images.pairs:
                raise InputError(
                    f"--data_train {images.name}: {images.root} holds no images to train on; see --data_range"
                )
            for _, lr in images.pairs.values():
                height, width = image_size(lr)
                if min(height, width) < patch_size:
                    raise InputError(
                        f"{lr}: {height}x{width} pixels are smaller than --patch_size {patch_size}; "
                        f"take smaller patches or the image out"
                    )
        self.hr, self.lr = [], []
        for images in sets:
            hr, lr = zip(*images.pairs.values(), strict=True)
            self.hr += cache.prepare(hr, images.root, ext, n_colors, n_threads)
            self.lr += cache.prepare(lr, images.root, ext, n_colors, n_threads)

    def __len__(self):
        return len(self.lr)

    def __getitem__(self, key):
        image, epoch, draw = key
        rng = np.random.default_rng((self.seed, epoch, draw))
        lr = cache.open_image(self.lr[image], self.n_colors)
        hr = cache.open_image(self.hr[image], self.n_colors)
        size, scale = self.patch_size, self.scale
        top = rng.integers(lr.shape[0] - size + 1)
        left = rng.integers(lr.shape[1] - size + 1)
        lr = lr[top : top + size, left : left + size]
        hr = hr[top * scale : (top + size) * scale, left * scale : (left + size) * scale]
        if self.augment:
            flip_rows, flip_columns, transpose = rng.integers(2, size=3)
            lr, hr = (_turn(patch, flip_rows, flip_columns, transpose) for patch in (lr, hr))
        return _to_tensor(lr), _to_tensor(hr)


class EpochSampler(Sampler):
    """The keys of one epoch of `Patches`: all images in random order, again and again, `steps` batches in all.

    Set `epoch` before each epoch, and `first_step` to begin in the middle of one. Of each batch of `batch_size` the
    process of rank r among `world_size` gets the r-th part: together they see what one process would see.

    Raises InputError if a batch cannot be shared out evenly.
    """

    def __init__(self, n_images, steps, batch_size, seed=1, rank=0, world_size=1):
        if batch_size % world_size:
            raise InputError(
                f"--batch_size {batch_size}: {world_size} processes cannot share it evenly; take a multiple of them"
            )
        self.n_images, self.steps, self.batch_size, self.seed = n_images, steps, batch_size, seed
        self.share = batch_size // world_size  # of a batch, for this process
        self.rank = rank
        self.epoch, self.first_step = 1, 0

    def __len__(self):
        return (self.steps - self.first_step) * self.share

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        draws = self.steps * self.batch_size
        order = np.concatenate([rng.permutation(self.n_images) for _ in range(-(-draws // self.n_images))])
        for step in range(self.first_step, self.steps):
            first = step * self.batch_size + self.rank * self.share
            for draw in range(first, first + self.share):
                yield int(order[draw]), self.epoch, draw


class WholeImages(Dataset):
    """The images of an ImageSet: (name, LR (n_colors, H, W) uint8, HR uint8 array (sH, sW, n_colors) or None)."""

    def __init__(self, images, scale, n_colors=3):
        if not images.pairs:
            flag = "--dir_demo" if images.name == "demo" else "--data_range"
            raise InputError(f"--data_test {images.name}: {images.root} holds no images to test on; see {flag}")
        self.name, self.benchmark = images.name, images.benchmark
        self.names, self.paths = list(images.pairs), list(images.pairs.values())
        self.scale, self.n_colors = scale, n_colors

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        hr_path, lr_path = self.paths[index]
        lr = read_image(lr_path, self.n_colors)
        hr = None
        if hr_path is not None:
            height, width = lr.shape[0] * self.scale, lr.shape[1] * self.scale
            hr = read_image(hr_path, self.n_colors)[:height, :width]  # as long as it is not a multiple of the scale
        return self.names[index], _to_tensor(lr), hr


class PatchLoader(DataLoader):
    """A DataLoader of `Patches`: LR (N, n_colors, P, P), HR (N, n_colors, sP, sP), uint8, in channels-last memory.

    Batches come from the workers as arrays, by copy: to page in the shared memory that tensors would travel in takes
    longer than all the rest.

    Args:
        patches, sampler: Patches and their EpochSampler
        n_threads: worker processes, which persist; 0: none
        pin: put batches into pinned memory, from where a GPU copies them by itself
        options: of DataLoader
    """

    def __init__(self, patches, sampler, n_threads, pin=False, **options):
        super().__init__(
            patches, sampler.share, sampler=sampler, num_workers=n_threads, persistent_workers=n_threads > 0,
            collate_fn=_stack, **options,
        )  # fmt: skip
        self.pin = pin

    def __iter__(self):
        for arrays in super().__iter__():
            tensors = (torch.from_numpy(array) for array in arrays)
            yield [(batch.pin_memory() if self.pin else batch).permute(0, 3, 1, 2) for batch in tensors]


def _stack(pairs):
    """[(LR, HR)], each (n_colors, H, W) in channels-last memory -> arrays (N, H, W, n_colors)."""
    return [np.stack([image.permute(1, 2, 0).numpy() for image in images]) for images in zip(*pairs, strict=True)]


def _turn(patch, flip_rows, flip_columns, transpose):
    """Flip and transpose an image (H, W, C) through OpenCV: numpy would take longer for it than for all the rest."""
    height, width, n_colors = patch.shape
    if flip_rows or flip_columns:
        patch = cv2.flip(patch, -1 if flip_rows and flip_columns else int(flip_columns))
    if transpose:
        patch = cv2.transpose(patch)
        height, width = width, height
    return patch.reshape(height, width, n_colors)  # OpenCV drops the axis of a single color


def _to_tensor(image):
    """(H, W, C) -> a copy, as the cache is read-only, (C, H, W), in channels-last memory."""
    return torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)
