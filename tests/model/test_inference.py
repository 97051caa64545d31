import pytest
import torch
import torch.nn.functional as F

from model.common import Work
from model.edsr import EDSR
from model.inference import _tiles, chop, self_ensemble


def nearest(x):
    return F.interpolate(x, scale_factor=2), Work(x.shape[2] * x.shape[3], 1, 2, (3,), 4.0)


def test_self_ensemble_of_an_equivariant_function_is_that_function():
    x = torch.rand(2, 3, 5, 7)
    sr, work = self_ensemble(nearest, x)
    torch.testing.assert_close(sr, nearest(x)[0])
    assert work == Work(8 * 35, 8, 16, (24,), 32.0)


def test_self_ensemble_sees_all_eight_orientations_and_undoes_them():
    seen = []

    def first_pixel_marked(x):
        seen.append(x.flatten().tolist())
        sr = torch.zeros_like(x)
        sr[..., 0, 0] = 8
        return sr, Work(1, 0, 0)

    sr, _ = self_ensemble(first_pixel_marked, torch.arange(4.0).view(1, 1, 2, 2))
    assert len({tuple(values) for values in seen}) == 8
    assert torch.equal(sr, torch.full((1, 1, 2, 2), 2.0))  # each corner came first twice


@pytest.mark.parametrize("size", [(20, 70), (50, 33), (34, 34), (1, 100)])
def test_chop_equals_the_whole_where_the_overlap_covers_the_receptive_field(size):
    model = EDSR(2, n_feats=4, n_resblocks=2).eval()  # reaches over 8 pixels
    x = torch.rand(1, 3, *size) * 255
    whole, _ = model.inference(x)
    sr, work = chop(model.inference, x, scale=2, tile=33, overlap=9)
    torch.testing.assert_close(sr, whole, atol=1e-3, rtol=0)
    assert work.pixels >= size[0] * size[1]


@pytest.mark.parametrize("length", [1, 32, 33, 34, 47, 48, 49, 100, 1000])
def test_tiles_cover_each_place_once_and_stay_within_the_image(length):
    covered = []
    for start, stop, keep_from, keep_to in _tiles(length, 33, 16):
        assert 0 <= start <= keep_from < keep_to <= stop <= length
        assert stop - start <= 33
        assert start == 0 or keep_from - start >= 16
        assert stop == length or stop - keep_to >= 16
        covered += range(keep_from, keep_to)
    assert covered == list(range(length))


def test_a_tile_must_be_larger_than_its_overlaps():
    with pytest.raises(ValueError, match="32"):
        chop(nearest, torch.rand(1, 3, 64, 64), scale=2, tile=32, overlap=16)
