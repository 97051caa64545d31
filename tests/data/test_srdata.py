import itertools
import pickle

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from data import build_train_loader, find_set
from data.srdata import EpochSampler, Patches, PatchLoader, _turn
from utility import InputError


def patches_of(root, **options):
    options = {"patch_size": 8, "ext": "img", "augment": False} | options
    return Patches([find_set("Tiny", root, 2)], 2, **options)


def write_coordinates(root):
    """Images whose pixels tell where they are: red the row, green the column, of the low-resolution pixel."""
    for hr in (root / "Tiny/HR").iterdir():
        height, width = iio.imread(hr).shape[:2]
        rows, columns = np.mgrid[: height // 2, : width // 2].astype(np.uint8)
        lr = np.dstack([rows, columns, np.zeros_like(rows)])
        iio.imwrite(root / "Tiny/LR_bicubic/X2" / hr.name, lr)
        iio.imwrite(hr, lr.repeat(2, 0).repeat(2, 1))


def test_patches_of_both_show_the_same_place(make_set):
    root = make_set()
    write_coordinates(root)
    patches = patches_of(root, augment=True)
    for draw in range(50):
        lr, hr = patches[draw % 3, 1, draw]
        assert lr.shape == (3, 8, 8)
        assert torch.equal(hr, lr.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_patches_reach_every_row_and_column(make_set):
    root = make_set(count=1, size=(40, 48))
    write_coordinates(root)
    patches = patches_of(root)
    corners = [patches[0, 1, draw][0][:2, 0, 0].tolist() for draw in range(600)]
    tops, lefts = zip(*corners, strict=True)
    assert set(tops) == set(range(20 - 8 + 1))
    assert set(lefts) == set(range(24 - 8 + 1))


def test_augmentation_reaches_all_eight_orientations_and_no_other(make_set):
    root = make_set(count=1, size=(16, 16))
    write_coordinates(root)
    patches = patches_of(root, augment=True)
    plain = patches_of(root)[0, 1, 0][0]
    allowed = {
        image.rot90(turns, (1, 2)).contiguous().numpy().tobytes()
        for image in (plain, plain.flip(1))
        for turns in range(4)
    }
    seen = {patches[0, 1, draw][0].numpy().tobytes() for draw in range(200)}
    assert seen == allowed


@pytest.mark.parametrize("n_colors", [1, 3])
@pytest.mark.parametrize("flags", itertools.product((0, 1), repeat=3))
def test_turns_are_those_of_numpy(n_colors, flags):
    flip_rows, flip_columns, transpose = flags
    image = np.random.default_rng(0).integers(0, 256, (5, 7, n_colors), dtype=np.uint8)
    expected = image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    expected = expected.transpose(1, 0, 2) if transpose else expected
    assert np.array_equal(_turn(image, *flags), expected)


@pytest.mark.parametrize("n_colors", [1, 3])
@pytest.mark.parametrize("n_threads", [0, 1])
def test_a_batch_is_its_items_in_channels_last_memory(make_set, n_colors, n_threads):
    patches = patches_of(make_set(), n_colors=n_colors)
    sampler = EpochSampler(3, 1, 3)
    items = [patches[key] for key in sampler]
    (batches,) = PatchLoader(patches, sampler, n_threads=n_threads)
    for batch, images in zip(batches, zip(*items, strict=True), strict=True):
        assert torch.equal(batch, torch.stack(images))
        assert batch.is_contiguous(memory_format=torch.channels_last)


def test_an_image_as_large_as_a_patch_is_enough_and_a_smaller_one_is_named(make_set):
    root = make_set(size=(40, 48))
    assert patches_of(root, patch_size=20)[0, 1, 0][0].shape == (3, 20, 20)
    with pytest.raises(InputError, match=r"img0\.png: 20x24 .* --patch_size 21"):
        patches_of(root, patch_size=21)


def test_an_epoch_shows_all_images_equally_often_in_an_order_of_its_own():
    sampler = EpochSampler(n_images=7, steps=7, batch_size=3, seed=3)
    first = list(sampler)
    assert sorted(image for image, _, _ in first) == sorted([*range(7)] * 3)
    assert [draw for _, _, draw in first] == list(range(21))
    sampler.epoch = 2
    assert [key[0] for key in sampler] != [key[0] for key in first]
    sampler.epoch, sampler.first_step = 1, 3
    assert list(sampler) == first[9:]
    assert len(sampler) == 12


def test_processes_share_every_batch():
    whole = list(EpochSampler(n_images=5, steps=4, batch_size=6))
    shares = [list(EpochSampler(5, 4, 6, rank=rank, world_size=3)) for rank in range(3)]
    batches = [key for step in range(4) for share in shares for key in share[2 * step : 2 * step + 2]]
    assert batches == whole
    with pytest.raises(InputError, match="--batch_size 6: 4 processes"):
        EpochSampler(5, 4, 6, world_size=4)


def batches(root, n_threads, seed=1, epoch=1):
    loader = build_train_loader(
        ["Tiny"], root, 2, patch_size=8, ext="img", batch_size=2, steps=4, n_threads=n_threads, seed=seed
    )
    loader.sampler.epoch = epoch
    return torch.cat([lr for lr, _ in loader])


def test_what_is_drawn_depends_on_seed_and_epoch_and_not_on_the_workers(make_set):
    root = make_set()
    drawn = batches(root, n_threads=0)
    assert torch.equal(batches(root, n_threads=2), drawn)
    assert not torch.equal(batches(root, n_threads=0, seed=2), drawn)
    assert not torch.equal(batches(root, n_threads=0, epoch=2), drawn)
    assert len({patch.numpy().tobytes() for patch in drawn}) > 4  # patches differ within an epoch


def test_loading_leaves_the_global_random_state_alone(make_set):
    root = make_set()
    before = torch.get_rng_state()
    batches(root, n_threads=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_can_be_spawned_as_on_windows_and_macos(make_set):
    root = make_set()
    here, spawned = (
        build_train_loader(["Tiny"], root, 2, patch_size=8, batch_size=2, steps=2, n_threads=n) for n in (0, 1)
    )
    spawned.multiprocessing_context = "spawn"
    for (lr, hr), (expected_lr, expected_hr) in zip(spawned, here, strict=True):
        assert torch.equal(lr, expected_lr)
        assert torch.equal(hr, expected_hr)


@pytest.mark.parametrize("ext", ["img", "sep", "bin"])
def test_every_kind_of_cache_can_be_pickled(make_set, ext):
    patches = patches_of(make_set(), ext=ext)
    assert torch.equal(pickle.loads(pickle.dumps(patches))[1, 1, 5][0], patches[1, 1, 5][0])


def test_an_error_in_a_worker_stays_one_line(make_set):
    root = make_set()
    loader = build_train_loader(["Tiny"], root, 2, patch_size=8, ext="img", batch_size=2, steps=4, n_threads=1)
    for path in (root / "Tiny/LR_bicubic/X2").iterdir():
        path.write_text("broken")
    with pytest.raises(InputError) as error:
        list(loader)
    assert "\n" not in str(error.value)
    assert "is no image" in str(error.value)


def test_several_sets_are_joined_and_none_is_an_error(make_set):
    make_set(count=2)
    root = make_set("Other", count=3)
    loader = build_train_loader(["Tiny", "Other"], root, 2, patch_size=8, ext="img", n_threads=0)
    assert len(loader.dataset) == 5
    make_set("Empty", count=0)
    with pytest.raises(InputError, match="holds no images"):
        build_train_loader(["Empty"], root, 2, patch_size=8)
    with pytest.raises(InputError, match=r"Empty: .* holds no images"):
        build_train_loader(["Tiny", "Empty"], root, 2, patch_size=8)
