"""Training images in the memory of a device, which cuts the patches itself.

Wherever a patch lies and however it is turned, its pixel (i, j) is pixel start + i * down + j * right of all images in
a row. So a batch takes three numbers per patch, and a few kernels that compute indices and gather pixels.
"""

import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from data import cache
from data.prefetch import Prefetcher
from data.srdata import EpochSampler, Patches, Place
from program import is_out_of_memory
from utility import free_memory, in_parallel, logger

MAX_SHARE = 0.5  # of the free memory of the device that the images may take; training needs the rest


class DeviceImages:
    """uint8 images of any sizes in one tensor (pixels, n_colors) on a device, row after row.

    Args:
        sources: from cache.prepare
        n_threads: threads that read the images

    Raises:
        InputError: a file is missing or broken
    """

    def __init__(self, sources: Sequence[Path | np.ndarray], n_colors: int, device: torch.device, n_threads: int):
        self.sources, self.n_colors = sources, n_colors
        self.shapes = [cache.open_image(source, n_colors).shape[:2] for source in sources]
        self.widths = np.array([width for _, width in self.shapes])
        ends = list(itertools.accumulate(height * width for height, width in self.shapes))
        self.starts = np.array([0, *ends[:-1]])  # of the images, in pixels
        self.pixels = torch.empty(ends[-1], n_colors, dtype=torch.uint8, device=device)
        self._uploading = threading.Lock()
        in_parallel(self._upload, range(len(sources)), n_threads, f"copy to {device}")

    def _upload(self, index):
        image = cache.open_image(self.sources[index], self.n_colors)
        staged = torch.empty(image.shape, dtype=torch.uint8, pin_memory=self.pixels.is_cuda)
        staged.numpy()[...] = image  # reads the file
        start, count = int(self.starts[index]), math.prod(image.shape[:2])
        with self._uploading:
            self.pixels[start : start + count].copy_(staged.view(count, self.n_colors))

    def walks(self, images: Sequence[int], places: Sequence[Place], size: int, scale: int) -> np.ndarray:
        """(start, down, right) of N patches, int64 (N, 3).

        Args:
            images: indices of the images
            places: of the patches, in low-resolution pixels
            size: pixels per side of a patch
            scale: pixels of these images per low-resolution pixel
        """
        top, left, flip_rows, flip_columns, transpose = np.array(places).T
        width = self.widths[list(images)]
        row, column = scale * top + (size - 1) * flip_rows, scale * left + (size - 1) * flip_columns
        start = self.starts[list(images)] + row * width + column
        down, right = width * (1 - 2 * flip_rows), 1 - 2 * flip_columns
        return np.stack([start, np.where(transpose, right, down), np.where(transpose, down, right)], axis=1)

    def cut(self, walks: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Walks (N, 3) and the numbers 0 ... P - 1, on the device -> patches (N, P, P, n_colors)."""
        start, down, right = walks[:, :, None, None].unbind(1)  # (N, 1, 1)
        rows = torch.addcmul(start, down, steps[:, None])  # (N, P, 1)
        indices = torch.addcmul(rows, right, steps)  # (N, P, P)
        # Three times as fast on a CPU as self.pixels[indices].
        return self.pixels.index_select(0, indices.flatten()).view(*indices.shape, self.n_colors)


class DeviceLoader:
    """Yields the batches of a `PatchLoader`, bit for bit, but cuts them on a device that holds all images.

    Args:
        patches: tells which images there are and where patches lie
        n_threads: threads that read the images

    Raises:
        InputError: a file is missing or broken
    """

    def __init__(self, patches: Patches, sampler: EpochSampler, device: torch.device, n_threads: int):
        self.dataset, self.sampler, self.prefetch = patches, sampler, Prefetcher(device)
        self.lr, self.hr = (
            DeviceImages(sources, patches.n_colors, device, n_threads) for sources in (patches.lr, patches.hr)
        )
        self.size, self.hr_size = patches.patch_size, patches.patch_size * patches.scale
        self.steps = torch.arange(self.hr_size, device=device)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for lr_walks, hr_walks in self.prefetch(self._walks()):
            yield [self.lr.cut(lr_walks, self.steps[: self.size]), self.hr.cut(hr_walks, self.steps)]

    def _walks(self):
        """The walks of each batch, for LR and for HR, on the CPU."""
        keys = iter(self.sampler)
        for batch in zip(*[keys] * self.sampler.share, strict=True):
            images = [image for image, _, _ in batch]
            places = [self.dataset.place(self.lr.shapes[image], epoch, draw) for image, epoch, draw in batch]
            lr_walks = self.lr.walks(images, places, self.size, scale=1)
            hr_walks = self.hr.walks(images, places, self.hr_size, scale=self.dataset.scale)
            yield [torch.from_numpy(lr_walks), torch.from_numpy(hr_walks)]


def build_device_loader(
    patches: Patches, sampler: EpochSampler, device: torch.device, n_threads: int
) -> DeviceLoader | None:
    """Build a `DeviceLoader`; returns None and logs why if the images do not fit. Raises InputError as it does."""
    sources = (*patches.lr, *patches.hr)
    needed = sum(math.prod(cache.open_image(source, patches.n_colors).shape) for source in sources)
    try:
        if needed <= MAX_SHARE * free_memory(device):
            return DeviceLoader(patches, sampler, device, n_threads)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    logger.info(
        f"the training images ({needed / 2**30:.2f} GiB) take too much of the memory of {device}: "
        "worker processes read them instead"
    )
    return None
