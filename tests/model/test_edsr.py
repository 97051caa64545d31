import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from metrics import quantize
from model.edsr import EDSR
from utility import InputError


def test_baseline_has_the_published_size():
    assert sum(p.numel() for p in EDSR(2).parameters()) == 1_369_859


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (5, 6)])
def test_any_size_is_upscaled(scale, size):
    model = EDSR(scale, n_feats=8, n_resblocks=2)
    assert model(torch.rand(2, 3, *size)).shape == (2, 3, scale * size[0], scale * size[1])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_macs_are_those_that_pytorch_counts(scale):
    model = EDSR(scale, n_feats=8, n_resblocks=2)
    with FlopCounterMode(display=False) as counter:
        _, work = model.inference(torch.rand(1, 3, 6, 8))
    assert 2 * work.macs == 2 * work.macs_dense == counter.get_total_flops()
    assert work.active_share == 1


def test_scale_must_be_a_power_of_two_or_three():
    with pytest.raises(ValueError, match="by 6"):
        EDSR(6)


def test_residual_branches_are_scaled():
    model = EDSR(2, n_feats=8, n_resblocks=1, res_scale=0.0)
    x = torch.rand(1, 3, 4, 4)
    before = model(x)
    with torch.no_grad():
        model.body[0].body[0].weight.mul_(3)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_tiles_change_nothing(scale):
    model = EDSR(scale, n_feats=16, n_resblocks=2).eval()
    x = torch.rand(2, 3, 270, 160) * 255
    whole, work = model.inference(x)
    sr, tiled_work = model.inference(x, tile=1)
    torch.testing.assert_close(sr, whole, atol=1e-3, rtol=0)
    differing = [quantize(a, 255) != quantize(b, 255) for a, b in zip(sr, whole, strict=True)]
    assert np.mean(differing) < 1e-4  # at a half another order of summation may round the other way
    assert work == tiled_work


def test_there_is_nothing_to_skip():
    with pytest.raises(InputError, match="--inference sparse"):
        EDSR(2, n_feats=8, n_resblocks=1).inference(torch.rand(1, 3, 4, 4), mode="sparse")
