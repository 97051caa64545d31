import copy
import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import load_model
from model.smsr import DENSE, SMM, SMSR
from model.sparse import BlockPlan
from trainer import compare
from utility import quantize


def with_density(block, x, density):
    """Shift the mask branch so that this share of the pixels of x is important."""
    with torch.no_grad():
        logits = block.spatial_mask(x)
        margin = (logits[:, 1] - logits[:, 0]).flatten().sort().values
        important = round(density * len(margin))
        if important == 0:
            cut = margin[-1] + 1
        elif important == len(margin):
            cut = margin[0] - 1
        else:
            cut = margin[len(margin) - important - 1 : len(margin) - important + 1].mean()
        block.spatial_mask[-1].bias[0] += cut


def with_dense_channels(block, counts):
    """Let the first layers have so many dense channels, at random places."""
    with torch.no_grad():
        for layer, count in enumerate(counts):
            dense = torch.randperm(block.channel_logits.shape[1])[:count]
            block.channel_logits[0, :, layer] = torch.tensor([0.0, 1.0])
            block.channel_logits[0, dense, layer] = torch.tensor([1.0, 0.0])


def assert_block_equals_masked(block, x):
    with torch.no_grad():
        result, work = BlockPlan(block)(x)
        torch.testing.assert_close(result, block(x, *block.hard_masks(x)), atol=1e-4, rtol=1e-4)
    return work


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 3),
    half_size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    density=st.floats(0, 1),
    dense=st.lists(st.integers(0, 8), min_size=1, max_size=4),
)
def test_block_equals_the_masked_dense_computation(seed, n, half_size, density, dense):
    torch.manual_seed(seed)
    block = SMM(8, len(dense))
    x = torch.randn(n, 8, 2 * half_size[0], 2 * half_size[1])
    with_density(block, x, density)
    with_dense_channels(block, dense)
    assert_block_equals_masked(block, x)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "dense", [(0, 0, 0), (16, 16, 16), (1, 0, 1), (0, 16, 0), (16, 0, 16), (15, 15, 15), (1, 1, 1)]
)
@pytest.mark.parametrize("size", [(2, 2), (6, 10)])
def test_degenerate_splits(density, dense, size):
    block = SMM(16, 3)
    x = torch.randn(2, 16, *size)
    with_density(block, x, density)
    with_dense_channels(block, dense)
    work = assert_block_equals_masked(block, x)
    pixels = 2 * size[0] * size[1]
    expected = round(density * pixels)
    assert work.important == (expected,)
    if density == 1 or dense == (16, 16, 16):
        assert work.active_share == 1
    if dense == (16, 16, 16):
        assert work.macs == work.macs_dense
    if density == 0 and dense == (0, 0, 0):
        assert work.active_share == 0
        assert work.macs == work.macs_dense - pixels * (3 * 9 * 16 * 16 + 3 * 16 * 16)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3), (40, 61)])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_network_equals_the_masked_dense_computation(size, n, channels_last):
    model = SMSR(2, n_feats=16, n_blocks=3, n_layers=4).eval()
    x = torch.rand(n, 3, *size) * 255
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert (model(x) - model.masked_forward(x)).abs().max() < 1e-3


def test_more_important_pixels_than_one_chunk():
    model = SMSR(2).eval()
    x = torch.rand(1, 3, 80, 64) * 255
    with torch.no_grad():
        for block in model.blocks:
            block.spatial_mask[-1].bias[1] += 100  # all are important
        sr, work = model.inference(x)
        assert work.mask_density == [1.0] * 5
        assert (sr - model.masked_forward(x)).abs().max() < 1e-3


def test_a_batch_is_its_images():
    model = SMSR(2, n_feats=16).eval()
    x = torch.rand(3, 3, 12, 10) * 255
    sr, work = model.inference(x)
    single = [model.inference(image[None]) for image in x]
    torch.testing.assert_close(sr, torch.cat([sr for sr, _ in single]), atol=1e-3, rtol=0)
    assert work == single[0][1] + single[1][1] + single[2][1]


def test_the_plan_follows_the_weights(tiny):
    x = torch.rand(1, 3, 8, 8) * 255
    tiny.eval()

    def assert_current(model):
        with torch.no_grad():
            expected = model.masked_forward(x.to(model.mean.dtype))
        torch.testing.assert_close(model(x.to(model.mean.dtype)), expected, atol=1e-3, rtol=0)
        return expected

    first = assert_current(tiny)

    tiny.train()
    optimizer = torch.optim.Adam(tiny.parameters(), 0.01)
    tiny.training_forward(x, 1.0)[0].mean().backward()
    optimizer.step()
    tiny.eval()
    assert not torch.equal(assert_current(tiny), first)

    optimizer.step()  # in eval mode, too
    second = assert_current(tiny)

    tiny.load_state_dict(SMSR(2, n_feats=8, n_blocks=2, n_layers=2).state_dict())
    assert not torch.equal(assert_current(tiny), second)

    clone = copy.deepcopy(tiny)
    with torch.no_grad():
        clone.blocks[0].channel_logits.copy_(clone.blocks[0].channel_logits.flip(3))
    assert_current(clone)
    assert_current(tiny)
    assert_current(tiny.double())


def test_writes_behind_the_back_of_autograd_are_noticed(tiny):
    x = torch.rand(1, 3, 8, 8) * 255
    tiny.eval()(x)
    for write in (lambda p: p.data.mul_(1.5), lambda p: np.negative(p.detach().numpy(), out=p.detach().numpy())):
        for parameter in tiny.parameters():
            write(parameter)
        with torch.no_grad():
            assert (tiny(x) - tiny.masked_forward(x)).abs().max() < 1e-2


def test_under_autocast(tiny):
    x = torch.rand(1, 3, 8, 8) * 255
    expected = tiny.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (tiny(x) - expected).abs().mean() < 2


def test_the_plan_is_kept_while_the_weights_stay(tiny):
    tiny.eval()(torch.rand(1, 3, 4, 4))
    plan = tiny._plan
    tiny.eval()(torch.rand(2, 3, 6, 6))
    assert tiny._plan is plan


def test_weights_made_in_inference_mode():
    x = torch.rand(1, 3, 6, 6) * 255
    with torch.inference_mode():
        model = SMSR(2, n_feats=8, n_blocks=1).eval()
        before = model(x)
        model.tail[0].bias += 5
        torch.testing.assert_close(model(x), before + 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near_single(tiny, dtype):
    x = torch.rand(1, 3, 12, 12) * 255
    expected = tiny.eval()(x)
    result = copy.deepcopy(tiny).to(dtype)(x.to(dtype))
    assert result.dtype == dtype
    assert (result - expected).abs().mean() < 2


def test_published_weights_give_the_published_results(shared):
    model = load_model(shared / "reference/SMSR_X2.pt")
    reference = json.loads((shared / "reference/SMSR_X2_Set5.json").read_text())
    for block, split in zip(model.blocks, reference["channel_split"], strict=True):
        assert (block.channel_logits[0].argmax(2) == DENSE).sum(0).tolist() == split["dense_out"]
    for name, expected in reference["images"].items():
        lr = iio.imread(shared / f"data/benchmark/Set5/LR_bicubic/X2/{name}.png")
        hr = iio.imread(shared / f"data/benchmark/Set5/HR/{name}.png")
        sr, work = model.inference(torch.from_numpy(lr).permute(2, 0, 1)[None].float())
        sr = quantize(sr[0], 255)
        assert work.mask_density == pytest.approx(expected["mask_density"], abs=1e-3)
        difference = np.abs(sr.astype(int) - iio.imread(shared / f"reference/SMSR_X2_Set5_SR/{name}.png"))
        assert difference.max() <= 1
        assert (difference == 0).mean() >= 0.999
        measured = compare(sr, hr[: sr.shape[0], : sr.shape[1]], 2)
        assert measured["psnr_y"] == pytest.approx(expected["psnr_y"], abs=0.002)
        assert measured["ssim_y"] == pytest.approx(expected["ssim_y_bt601"], abs=1e-4)
