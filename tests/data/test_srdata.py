import itertools
import pickle
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from data import DataSettings, PatchSettings, build_train_loader, find_set
from data.srdata import EpochSampler, Patches, PatchLoader, _turn
from program import InputError

SMALL = PatchSettings(patch_size=8, ext="img", batch_size=2, steps=4, n_threads=0)


def patches_of(root, n_colors=3, scale=2, **settings):
    return Patches([find_set("Tiny", root, scale)], scale, n_colors, replace(SMALL, **({"augment": False} | settings)))


def write_coordinates(root):
    """Write images whose pixels hold their low-resolution position: red the row, green the column."""
    for hr in (root / "Tiny/HR").iterdir():
        height, width = iio.imread(hr).shape[:2]
        rows, columns = np.mgrid[: height // 2, : width // 2].astype(np.uint8)
        lr = np.dstack([rows, columns, np.zeros_like(rows)])
        iio.imwrite(root / "Tiny/LR_bicubic/X2" / hr.name, lr)
        iio.imwrite(hr, lr.repeat(2, 0).repeat(2, 1))


def expected_patch(image, key, seed, lr_shape, size, scale, augment):
    """The patch of an image at `scale` times the low resolution, cut and turned by numpy alone."""
    rng = np.random.default_rng((seed, *key[1:]))
    top, left = (int(rng.integers(length - size + 1)) for length in lr_shape[:2])
    rows, columns = (slice(first * scale, (first + size) * scale) for first in (top, left))
    patch = image[rows, columns]
    if augment:
        flip_rows, flip_columns, transpose = rng.integers(2, size=3)
        patch = patch[::-1] if flip_rows else patch
        patch = patch[:, ::-1] if flip_columns else patch
        patch = patch.swapaxes(0, 1) if transpose else patch
    return patch


@pytest.mark.parametrize("ext", ["img", "sep", "bin"])
@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("scale", [2, 3])
def test_patches_equal_an_independent_computation(make_set, ext, augment, scale):
    root = make_set(size=(48, 60), scale=scale)
    pairs = find_set("Tiny", root, scale).pairs.values()
    images = [tuple(iio.imread(path) for path in pair) for pair in pairs]
    patches = patches_of(root, scale=scale, augment=augment, ext=ext, seed=7)
    for draw in range(20):
        key = (draw % 3, 4, draw)
        hr_image, lr_image = images[key[0]]
        lr, hr = patches[key]
        assert np.array_equal(lr, expected_patch(lr_image, key, 7, lr_image.shape, 8, 1, augment))
        assert np.array_equal(hr, expected_patch(hr_image, key, 7, lr_image.shape, 8, scale, augment))
        assert lr.dtype == hr.dtype == np.uint8


def test_both_patches_show_the_same_place(make_set):
    root = make_set()
    write_coordinates(root)
    patches = patches_of(root, augment=True)
    for draw in range(50):
        lr, hr = patches[draw % 3, 1, draw]
        assert lr.shape == (8, 8, 3)
        assert np.array_equal(hr, lr.repeat(2, 0).repeat(2, 1))


def test_patches_reach_every_row_and_column(make_set):
    root = make_set(count=1, size=(40, 48))
    write_coordinates(root)
    patches = patches_of(root)
    corners = [patches[0, 1, draw][0][0, 0, :2].tolist() for draw in range(600)]
    tops, lefts = zip(*corners, strict=True)
    assert set(tops) == set(range(20 - 8 + 1))
    assert set(lefts) == set(range(24 - 8 + 1))


def test_augmentation_reaches_all_eight_orientations_and_no_other(make_set):
    root = make_set(count=1, size=(16, 16))
    write_coordinates(root)
    patches = patches_of(root, augment=True)
    plain = patches_of(root)[0, 1, 0][0]
    allowed = {np.rot90(image, turns).tobytes() for image in (plain, plain[::-1]) for turns in range(4)}
    assert len(allowed) == 8
    seen = {patches[0, 1, draw][0].tobytes() for draw in range(200)}
    assert seen == allowed


@pytest.mark.parametrize("n_colors", [1, 3])
@pytest.mark.parametrize("flags", itertools.product((0, 1), repeat=3))
def test_turns_equal_those_of_numpy(n_colors, flags):
    flip_rows, flip_columns, transpose = flags
    image = np.random.default_rng(0).integers(0, 256, (5, 7, n_colors), dtype=np.uint8)
    expected = image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    expected = expected.transpose(1, 0, 2) if transpose else expected
    assert np.array_equal(_turn(image, *flags), expected)


@pytest.mark.parametrize("n_colors", [1, 3])
@pytest.mark.parametrize("n_threads", [0, 1])
def test_batches_are_stacked_patches(make_set, n_colors, n_threads):
    patches = patches_of(make_set(), n_colors=n_colors, augment=True)
    sampler = EpochSampler(3, 1, 3)
    items = [patches[key] for key in sampler]
    (batches,) = PatchLoader(patches, sampler, n_threads=n_threads)
    for batch, images, size in zip(batches, zip(*items, strict=True), (8, 16), strict=True):
        assert batch.shape == (3, size, size, n_colors)
        assert batch.dtype == torch.uint8
        assert torch.equal(batch, torch.from_numpy(np.stack(images)))
        assert batch.is_contiguous()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ext", ["sep", "device"])
@pytest.mark.parametrize("n_threads", [0, 2])
def test_batches_on_a_gpu_equal_those_on_the_cpu(make_set, ext, n_threads):
    root = make_set()
    settings = replace(SMALL, ext="sep", steps=20, n_threads=n_threads)
    expected, loader = (
        build_train_loader(["Tiny"], DataSettings(root), patches)
        for patches in (settings, replace(settings, ext=ext, device=torch.device("cuda")))
    )
    for _ in range(2):  # epochs
        for images, expected_images in zip(itertools.chain(*loader), itertools.chain(*expected), strict=True):
            assert images.is_cuda
            assert torch.equal(images.cpu(), expected_images)


def test_images_must_be_as_large_as_a_patch(make_set):
    root = make_set(size=(40, 48))
    assert patches_of(root, patch_size=20)[0, 1, 0][0].shape == (20, 20, 3)
    with pytest.raises(InputError, match=r"21x21 pixels do not fit into .*img0\.png \(20x24\); use smaller") as error:
        patches_of(root, patch_size=21)
    assert error.value.argument == "patch_size"


def test_an_epoch_shows_all_images_equally_often_in_its_own_order():
    sampler = EpochSampler(n_images=7, steps=7, batch_size=3, seed=3)
    first = list(sampler)
    assert sorted(image for image, _, _ in first) == sorted([*range(7)] * 3)
    assert [draw for _, _, draw in first] == list(range(21))
    sampler.epoch = 2
    assert [key[0] for key in sampler] != [key[0] for key in first]
    sampler.epoch, sampler.first_step = 1, 3
    assert list(sampler) == first[9:]
    assert len(sampler) == 12


@pytest.mark.parametrize("first_step", [0, 3])
def test_the_order_of_an_epoch_is_a_sequence_of_permutations(first_step):
    """As it always was, so that runs of earlier versions resume; and without a list of all draws."""
    sampler = EpochSampler(n_images=5, steps=4, batch_size=4, seed=3, rank=1, world_size=2)
    sampler.epoch, sampler.first_step = 2, first_step
    rng = np.random.default_rng((3, 2))
    order = np.concatenate([rng.permutation(5) for _ in range(4)])
    draws = [4 * step + draw for step in range(first_step, 4) for draw in (2, 3)]
    assert list(sampler) == [(order[draw], 2, draw) for draw in draws]
    sampler.steps = 10**12
    assert next(iter(sampler)) == (order[draws[0]], 2, draws[0])


def test_processes_share_every_batch():
    whole = list(EpochSampler(n_images=5, steps=4, batch_size=6))
    shares = [list(EpochSampler(5, 4, 6, rank=rank, world_size=3)) for rank in range(3)]
    batches = [key for step in range(4) for share in shares for key in share[2 * step : 2 * step + 2]]
    assert batches == whole
    with pytest.raises(InputError, match=r"6 patches .* 4 processes; use a multiple of 4") as error:
        EpochSampler(5, 4, 6, world_size=4)
    assert error.value.argument == "batch_size"


def test_loaders_of_several_processes_share_every_batch(make_set):
    settings = DataSettings(make_set())
    (whole,) = build_train_loader(["Tiny"], settings, replace(SMALL, batch_size=4, steps=1))
    parts = [
        next(iter(build_train_loader(["Tiny"], settings, replace(SMALL, batch_size=4), rank=rank, world_size=2)))
        for rank in range(2)
    ]
    for batch, shares in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(shares), batch)


def batches(root, epoch=1, **settings):
    loader = build_train_loader(["Tiny"], DataSettings(root), replace(SMALL, **settings))
    loader.sampler.epoch = epoch
    return torch.cat([lr for lr, _ in loader])


def test_patches_depend_on_seed_and_epoch_but_not_on_the_workers(make_set):
    root = make_set()
    drawn = batches(root)
    assert torch.equal(batches(root, n_threads=2), drawn)
    assert not torch.equal(batches(root, seed=2), drawn)
    assert not torch.equal(batches(root, epoch=2), drawn)
    assert len({patch.numpy().tobytes() for patch in drawn}) > 4  # patches differ within an epoch


def test_loading_does_not_change_the_global_random_state(make_set):
    root = make_set()
    before = torch.get_rng_state()
    batches(root)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_can_be_spawned_as_on_windows_and_macos(make_set):
    root = make_set()
    here, spawned = (
        build_train_loader(["Tiny"], DataSettings(root), replace(SMALL, ext="sep", steps=2, n_threads=n_threads))
        for n_threads in (0, 1)
    )
    spawned.multiprocessing_context = "spawn"
    for (lr, hr), (expected_lr, expected_hr) in zip(spawned, here, strict=True):
        assert torch.equal(lr, expected_lr)
        assert torch.equal(hr, expected_hr)


@pytest.mark.parametrize("ext", ["img", "sep", "bin"])
def test_patches_can_be_pickled_with_every_kind_of_cache(make_set, ext):
    patches = patches_of(make_set(), ext=ext)
    assert np.array_equal(pickle.loads(pickle.dumps(patches))[1, 1, 5][0], patches[1, 1, 5][0])


def test_errors_in_a_worker_are_one_line_that_starts_with_the_file(make_set):
    root = make_set()
    loader = build_train_loader(["Tiny"], DataSettings(root), replace(SMALL, n_threads=1))
    for path in (root / "Tiny/LR_bicubic/X2").iterdir():
        path.write_text("broken")
    with pytest.raises(InputError) as error:
        list(loader)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(root / "Tiny/LR_bicubic/X2/img"))
    assert "not an image, or broken" in str(error.value)


def test_several_sets_are_joined_and_empty_ones_are_refused(make_set):
    make_set(count=2)
    root = make_set("Other", count=3)
    settings = DataSettings(root)
    assert len(build_train_loader(["Tiny", "Other"], settings, SMALL).dataset) == 5
    make_set("Empty", count=0)
    for names in (["Empty"], ["Tiny", "Empty"]):
        with pytest.raises(InputError, match=r"^Empty \(.*\) holds no images to train on") as error:
            build_train_loader(names, settings, SMALL)
        assert error.value.argument == "data_train"
