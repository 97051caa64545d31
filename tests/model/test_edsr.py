import copy

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.edsr import EDSR
from program import InputError


def test_baseline_has_the_published_size():
    assert sum(p.numel() for p in EDSR(2).parameters()) == 1_369_859


def test_named_parts_keep_their_keys():
    model = EDSR(4, n_feats=8, n_resblocks=1)
    assert model.state_dict().keys() == {
        "rgb_range",
        "res_scale",
        *(f"head.0.{kind}" for kind in ("weight", "bias")),
        *(f"body.0.body.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")),
        *(f"body.1.{kind}" for kind in ("weight", "bias")),
        *(f"tail.0.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")),  # the two steps to x4
        *(f"tail.1.{kind}" for kind in ("weight", "bias")),
    }
    assert model.tail.upsampler is model.tail[0]
    assert model.tail.conv is model.tail[1]


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (5, 6)])
def test_any_size_is_upscaled(scale, size):
    model = EDSR(scale, n_feats=8, n_resblocks=2)
    assert model(torch.rand(2, 3, *size)).shape == (2, 3, scale * size[0], scale * size[1])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_macs_are_those_that_pytorch_counts(scale):
    model = EDSR(scale, n_feats=8, n_resblocks=2)
    with FlopCounterMode(display=False) as counter:
        _, cost = model.inference(torch.rand(1, 3, 6, 8))
    assert 2 * cost.macs == 2 * cost.macs_dense == 2 * cost.macs_run == counter.get_total_flops()
    assert cost.active_share == 1
    assert cost.mask_density == []


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


def test_load_state_dict_takes_over_res_scale():
    source, target = (EDSR(2, n_feats=8, n_resblocks=3, res_scale=res_scale) for res_scale in (0.1, 1.0))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.res_scale, source.res_scale)
    assert [block.res_scale for block in target.body[:-1]] == [0.1] * 3
    x = torch.rand(1, 3, 4, 4)
    assert torch.equal(target(x), source(x))
    for same in (copy.deepcopy(target), copy.deepcopy(target).double()):
        torch.testing.assert_close(same(x.to(same.dtype)), source(x), check_dtype=False, atol=1e-3, rtol=0)


def test_load_state_dict_without_res_scale_keeps_that_of_the_network():
    source, target = (EDSR(2, n_feats=8, n_resblocks=3, res_scale=res_scale) for res_scale in (1.0, 0.1))
    state_dict = source.state_dict()
    del state_dict["res_scale"]
    target.load_state_dict(state_dict)
    assert float(target.res_scale) == pytest.approx(0.1)
    assert [block.res_scale for block in target.body[:-1]] == [0.1] * 3


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_tiles_change_nothing(scale):
    model = EDSR(scale, n_feats=16, n_resblocks=2).eval()
    x = torch.rand(2, 3, 270, 160) * 255
    whole, cost = model.inference(x)
    sr, tiled_cost = model.inference(x, tile=1)
    torch.testing.assert_close(sr, whole, atol=1e-3, rtol=0)
    differing = (model.to_images(sr) != model.to_images(whole)).numpy()
    assert np.mean(differing) < 1e-4  # sums in another order may round a half differently
    assert cost == tiled_cost


def test_there_is_nothing_to_skip():
    model = EDSR(2, n_feats=8, n_resblocks=1)
    x = torch.rand(1, 3, 4, 4)
    with pytest.raises(InputError, match=r"skips nothing.* 'sparse'") as error:
        model.inference(x, mode="sparse")
    assert error.value.argument == "inference"
    assert "--" not in str(error.value)
    assert torch.equal(model.inference(x, mode="auto")[0], model.inference(x, mode="dense")[0])


def test_nan_in_an_image_is_refused():
    x = torch.rand(1, 3, 4, 4)
    x[0, 1, 2, 3] = torch.nan
    with pytest.raises(InputError, match="nan at row 2, column 3, channel 1"):
        EDSR(2, n_feats=8, n_resblocks=1).inference(x)
