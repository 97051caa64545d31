import logging
import os
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from data import DataSettings, PatchSettings, build_train_loader
from data.device import DeviceImages, DeviceLoader
from data.srdata import CPU, PatchLoader, Place

SMALL = PatchSettings(patch_size=8, ext="sep", batch_size=4, steps=5, n_threads=0)
MAX_KERNELS = 8  # per batch: two products with sums and a gather for LR and for HR, and room for two more


def build(ext, root, data=None, names=("Tiny",), rank=0, world_size=1, **settings):
    data = data or DataSettings(root)
    return build_train_loader(names, data, replace(SMALL, ext=ext, **settings), rank=rank, world_size=world_size)


def assert_same_batches(root, epoch=1, first_step=0, **options):
    loaders = [build(ext, root, **options) for ext in ("sep", "device")]
    assert [type(loader) for loader in loaders] == [PatchLoader, DeviceLoader]
    for loader in loaders:
        loader.sampler.epoch, loader.sampler.first_step = epoch, first_step
    expected, batches = (list(loader) for loader in loaders)
    assert len(batches) == len(expected) == loaders[0].sampler.steps - first_step
    for pair, expected_pair in zip(batches, expected, strict=True):
        for images, expected_images in zip(pair, expected_pair, strict=True):
            assert torch.equal(images, expected_images)
            assert images.dtype == torch.uint8
            assert images.is_contiguous()
    assert len(loaders[1].dataset) == len(loaders[0].dataset)


# ---- the same patches ------------------------------------------------------------------------------------------------


def turned(image, place, size, scale):
    """The patch at a place, cut and turned by numpy alone."""
    rows, columns = (slice(first * scale, (first + size) * scale) for first in place[:2])
    patch = image[rows, columns]
    patch = patch[::-1] if place.flip_rows else patch
    patch = patch[:, ::-1] if place.flip_columns else patch
    return patch.swapaxes(0, 1) if place.transpose else patch


@given(st.data())
def test_patches_equal_those_cut_by_numpy(data):
    size, scale = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    n_colors, count = data.draw(st.sampled_from((1, 3))), data.draw(st.integers(1, 4))
    length = st.integers(size * scale, size * scale + 7)
    images, places = [], []
    for _ in range(count):
        height, width = data.draw(length), data.draw(length)
        first = [data.draw(st.integers(0, length // scale - size)) for length in (height, width)]
        places.append(Place(*first, *data.draw(st.tuples(*[st.integers(0, 1)] * 3))))
        images.append(np.random.default_rng(height).integers(0, 256, (height, width, n_colors), dtype=np.uint8))
    device_images = DeviceImages(images, n_colors, CPU, n_threads=1)
    order = data.draw(st.permutations(range(count)))
    walks = device_images.walks(order, [places[index] for index in order], size * scale, scale)
    patches = device_images.cut(torch.from_numpy(walks), torch.arange(size * scale)).numpy()
    for patch, index in zip(patches, order, strict=True):
        assert np.array_equal(patch, turned(images[index], places[index], size, scale))


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("n_colors", [1, 3])
def test_batches_equal_those_of_the_loader(make_set, augment, n_colors):
    root = make_set()
    assert_same_batches(root, data=DataSettings(root, n_colors=n_colors), augment=augment)


@pytest.mark.parametrize("scale", [1, 3, 4])
def test_batches_equal_at_every_scale(make_set, scale):
    root = make_set(size=(36, 60), scale=scale)
    assert_same_batches(root, data=DataSettings(root, scale=scale))


def test_batches_equal_for_several_sets_with_images_of_several_sizes(make_set):
    make_set("Wide", count=2, size=(32, 90))
    root = make_set()
    for path in (root / "Tiny/HR").iterdir():  # HR images may be larger than their LR images ask for
        iio.imwrite(path, np.pad(iio.imread(path), ((0, 1), (0, 1), (0, 0))))
    data = DataSettings(root, data_range=[(1, 2), (1, 1)])
    assert_same_batches(root, data=data, names=("Tiny", "Wide"), steps=8, n_threads=2)


@pytest.mark.parametrize("first_step", [0, 3, 5])
def test_batches_equal_from_any_step_of_any_epoch(make_set, first_step):
    assert_same_batches(make_set(), epoch=7, first_step=first_step, seed=3)


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_equal_in_every_process(make_set, rank):
    assert_same_batches(make_set(), rank=rank, world_size=2)


def test_an_epoch_can_be_left_and_started_again(make_set):
    loader = build("device", make_set())
    first = next(iter(loader))
    for images, expected in zip(next(iter(loader)), first, strict=True):
        assert torch.equal(images, expected)


def test_no_patch_is_drawn_for_the_steps_that_are_done(make_set, monkeypatch):
    loader = build("device", make_set())
    loader.sampler.first_step = 3
    drawn, place = [], loader.dataset.place
    monkeypatch.setattr(loader.dataset, "place", lambda *args: (drawn.append(args[2]), place(*args))[1])
    assert len(list(loader)) == 2
    assert drawn == list(range(3 * 4, 5 * 4))


# ---- what a batch costs ----------------------------------------------------------------------------------------------


class Kernels(TorchDispatchMode):
    """Counts the operators that compute or copy something, and forbids those that wait for the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        self.count += not function.is_view
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("batch_size", [2, 64])
def test_a_batch_takes_a_handful_of_kernels(make_set, batch_size):
    batches = iter(build("device", make_set(), batch_size=batch_size))
    with Kernels() as kernels:
        for _ in range(3):
            next(batches)
    assert 0 < kernels.count <= 3 * MAX_KERNELS


# ---- sets that do not fit, broken files ------------------------------------------------------------------------------


def test_images_that_do_not_fit_are_read_by_the_loader(make_set, monkeypatch, caplog):
    root, needed = make_set(), 3 * 3 * (40 * 48 + 20 * 24)
    monkeypatch.setattr("data.device.free_memory", lambda device: 2 * needed)
    assert isinstance(build("device", root), DeviceLoader)
    with caplog.at_level(logging.INFO, "smsr"):
        monkeypatch.setattr("data.device.free_memory", lambda device: 2 * needed - 1)
        loader = build("device", root)
    (record,) = caplog.records
    assert record.getMessage() == (
        "the training images (0.00 GiB) take too much of the memory of cpu: worker processes read them instead"
    )
    for batch, expected in zip(loader, build("sep", root), strict=True):
        assert all(torch.equal(*images) for images in zip(batch, expected, strict=True))


def test_if_memory_runs_out_the_loader_reads_the_images(make_set, monkeypatch, caplog):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")

    monkeypatch.setattr("data.device.in_parallel", fail)
    with caplog.at_level(logging.INFO, "smsr"):
        assert isinstance(build("device", make_set()), PatchLoader)
    assert len(caplog.records) == 1


def test_a_damaged_cached_file_is_rebuilt(make_set):
    root = make_set()
    expected = next(iter(build("sep", root)))
    os.truncate(next((root / "Tiny/bin/HR").iterdir()), 100)
    batch = next(iter(build("device", root)))
    assert all(torch.equal(*images) for images in zip(batch, expected, strict=True))
