import copy
import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from evaluation import compare, macs_at_1280x720
from model import engines, load_model, sparse
from model.smsr import DENSE, SMM, SMSR
from model.sparse import INFERENCE_MODES, BlockPlan, Plan, Workspace, break_even, build_kernel_map, find_neighbors
from model.tiling import split_into_tiles
from program import InputError
from tests.model.masks import with_dense_channels, with_density


@pytest.fixture(autouse=True)
def plain_engine(monkeypatch):
    """Networks on the CPU run by the plan itself, whatever other engines there are."""
    monkeypatch.setattr(engines, "pick_engine", lambda plan, name: plan)


@torch.no_grad()
def run_block(block, x, mode, tile=None):
    """Run the plan of a block on features x (N, C, H, W). Returns features and their `Cost`."""
    n, channels, height, width = x.shape
    f = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, channels), torch.zeros(1, channels)])
    y = torch.full_like(f, torch.nan)  # rows that are never written would show up
    plan = BlockPlan(block, channels, "block")
    shape = (n, height, width)
    cost = plan(f, y, shape=shape, tiles=split_into_tiles(*shape, tile), mode=mode, workspace=Workspace())
    y = y[:-1].view(n, height, width, channels).permute(0, 3, 1, 2)
    return x + block.attention(y), cost


def assert_block_equals_masked(block, x):
    with torch.no_grad():
        expected = block(x, *block.hard_masks(x))
    costs = {}
    for mode in INFERENCE_MODES:
        result, costs[mode] = run_block(block, x, mode)
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert costs["sparse"].macs == costs["dense"].macs
    assert costs["auto"].macs_run in (costs["sparse"].macs_run, costs["dense"].macs_run)
    return costs["sparse"]


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
def test_extreme_masks_and_channel_masks(density, dense, size):
    block = SMM(16, 3)
    x = torch.randn(2, 16, *size)
    with_density(block, x, density)
    with_dense_channels(block, dense)
    cost = assert_block_equals_masked(block, x)
    pixels = 2 * size[0] * size[1]
    expected = round(density * pixels)
    assert cost.important == (expected,)
    if density == 1 or dense == (16, 16, 16):
        assert cost.active_share == 1
    if dense == (16, 16, 16):
        assert cost.macs == cost.macs_dense
    if density == 0 and dense == (0, 0, 0):
        assert cost.active_share == 0
        assert cost.macs == cost.macs_dense - pixels * (3 * 9 * 16 * 16 + 3 * 16 * 16)


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


def test_more_pixels_than_are_gathered_at_a_time():
    model = SMSR(2, n_blocks=2).eval()
    x = torch.rand(1, 3, 130, 140) * 255
    with torch.no_grad():
        for block in model.blocks:
            block.spatial_mask.logits.bias[1] += 100  # all pixels are important
        sr, cost = model.inference(x, "sparse")
        assert cost.mask_density == [1.0] * 2
        assert (sr - model.masked_forward(x)).abs().max() < 1e-3


def test_a_batch_gives_the_results_of_its_images():
    model = SMSR(2, n_feats=16).eval()
    x = torch.rand(3, 3, 12, 10) * 255
    sr, cost = model.inference(x)
    single = [model.inference(image[None]) for image in x]
    torch.testing.assert_close(sr, torch.cat([sr for sr, _ in single]), atol=1e-3, rtol=0)
    total = single[0][1] + single[1][1] + single[2][1]
    assert replace(cost, macs_run=0) == replace(total, macs_run=0)


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

    optimizer.step()  # in eval mode too
    second = assert_current(tiny)

    tiny.load_state_dict(SMSR(2, n_feats=8, n_blocks=2, n_layers=2).state_dict())
    assert not torch.equal(assert_current(tiny), second)

    clone = copy.deepcopy(tiny)
    with torch.no_grad():
        clone.blocks[0].channel_logits.copy_(clone.blocks[0].channel_logits.flip(3))
    assert_current(clone)
    assert_current(tiny)
    assert_current(tiny.double())


def test_changes_that_autograd_does_not_see_are_noticed(tiny):
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


def masks():
    """Masks bool (n, h, w), odd sizes included."""

    def of_shape(shape):
        count = math.prod(shape)
        return st.lists(st.booleans(), min_size=count, max_size=count).map(lambda v: torch.tensor(v).view(shape))

    return st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6)).flatmap(of_shape)


@given(mask=masks())
def test_neighbors_are_those_of_a_convolution(mask):
    n, height, width = mask.shape
    numbers = torch.arange(1.0, mask.numel() + 1).view(n, 1, height, width)
    every = F.unfold(numbers, 3, padding=1).transpose(1, 2).reshape(-1, 9).long() - 1  # -1: outside
    found = find_neighbors(mask, mask.flatten().nonzero()[:, 0])
    assert torch.equal(found, torch.where(every < 0, mask.numel(), every)[mask.flatten()])


def assert_kernel_map_as_defined(mask):
    """Compare the kernel map of a mask with its definition, written out pixel by pixel."""
    n, height, width = mask.shape
    places = list(itertools.product(range(n), range(height), range(width)))
    number = {place: index for index, place in enumerate(places)}
    outside = len(places)

    def around(image, row, column):
        return [number.get((image, row + i, column + j), outside) for i in (-1, 0, 1) for j in (-1, 0, 1)]

    important = [number[place] for place in places if mask[place]]
    next_to_important = {pixel for place in places if mask[place] for pixel in around(*place)} - {outside}
    rim = sorted(next_to_important - set(important))
    row_of_pixel = [len(important)] * (outside + 1)  # the zero row
    for row, pixel in enumerate(important):
        row_of_pixel[pixel] = row
    for row, pixel in enumerate(rim, start=len(important) + 1):
        row_of_pixel[pixel] = row

    kernel_map = build_kernel_map(mask)
    assert kernel_map.pixel.tolist() == important
    assert kernel_map.rim.tolist() == rim
    assert kernel_map.neighbors.shape == (len(important), 9)
    assert kernel_map.neighbors.tolist() == [around(*places[pixel]) for pixel in important]
    assert kernel_map.row_of_pixel.tolist() == row_of_pixel
    return kernel_map


@given(mask=masks())
def test_kernel_maps_are_as_defined(mask):
    assert_kernel_map_as_defined(mask)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 1, 5), (3, 4, 1), (2, 5, 4)])
def test_kernel_maps_of_empty_and_full_masks(shape):
    kernel_map = assert_kernel_map_as_defined(torch.zeros(shape, dtype=torch.bool))
    assert len(kernel_map.pixel) == len(kernel_map.rim) == 0
    kernel_map = assert_kernel_map_as_defined(torch.ones(shape, dtype=torch.bool))
    assert len(kernel_map.pixel) == math.prod(shape)
    assert len(kernel_map.rim) == 0


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 2, 2), (2, 5, 4)])
def test_kernel_maps_of_a_single_important_pixel(shape):
    for place in itertools.product(*map(range, shape)):
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[place] = True
        kernel_map = assert_kernel_map_as_defined(mask)
        assert len(kernel_map.pixel) == 1
        assert kernel_map.neighbors[0, 4] == kernel_map.pixel[0]
        if shape[1:] == (2, 2):
            assert len(kernel_map.rim) == 3  # the rest of its image, and nothing of the other one


@given(mask=masks(), seed=st.integers(0, 99))
def test_a_kernel_map_gathers_what_a_convolution_sees(mask, seed):
    n, height, width = mask.shape
    kernel_map = build_kernel_map(mask)
    features = torch.rand(mask.numel(), 1, generator=torch.Generator().manual_seed(seed))
    every = F.unfold(features.view(n, 1, height, width), 3, padding=1).transpose(1, 2).reshape(-1, 9)
    packed = torch.cat([features[kernel_map.pixel], torch.zeros(1, 1), features[kernel_map.rim]])
    gathered = packed[kernel_map.row_of_pixel[kernel_map.neighbors]][..., 0]
    assert torch.equal(gathered, every[kernel_map.pixel])


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("mode", INFERENCE_MODES)
def test_tiles_change_nothing(n, mode):
    model = SMSR(2, n_blocks=3).eval().to(memory_format=torch.channels_last)
    x = torch.rand(n, 3, 301, 170) * 255
    for block, density in zip(model.blocks, (0.1, 0.5, 0.95), strict=True):
        with_density(block, torch.randn(1, 64, 64, 64), density)
        with_dense_channels(block, (24, 9, 3, 0))
    whole, cost = model.inference(x, mode, tile=10**6)
    for tile in (1, 150, 200):
        sr, tiled_cost = model.inference(x, mode, tile=tile)
        assert (sr - whole).abs().max() < 1e-3
        differing = (model.to_images(sr) != model.to_images(whole)).numpy()
        assert np.mean(differing) < 1e-4  # sums in another order may round a half differently
        assert (tiled_cost.macs, tiled_cost.important) == (cost.macs, cost.important)


def test_workspaces_do_not_leak_from_call_to_call():
    model = SMSR(2, n_feats=16, n_blocks=2).eval()
    images = [torch.rand(n, 3, *size) * 255 for n, size in ((1, (40, 40)), (2, (6, 8)), (1, (30, 50)), (1, (1, 1)))]
    expected = [copy.deepcopy(model)(x) for x in images]
    results = [model(x) for x in images]
    again = [model(x) for x in images[::-1]][::-1]
    for one, two, three in zip(expected, results, again, strict=True):
        torch.testing.assert_close(two, one, atol=1e-4, rtol=0)
        torch.testing.assert_close(three, one, atol=1e-4, rtol=0)


def test_one_model_in_several_threads():
    model = SMSR(2, n_feats=16, n_blocks=2).eval()
    images = [torch.rand(1, 3, 20 + i, 30) * 255 for i in range(8)]
    expected = [model(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for result, alone in zip(pool.map(model, images), expected, strict=True):
                torch.testing.assert_close(result, alone, atol=1e-3, rtol=0)


def test_results_can_be_overwritten_inside_and_outside_of_inference_mode(tiny):
    x = torch.rand(1, 3, 8, 8)
    tiny.eval()
    with torch.inference_mode():
        tiny(x)
    tiny(x).clamp_(0, 255)
    with torch.inference_mode():
        tiny(x).clamp_(0, 255)


def test_nan_and_infinity_are_refused(tiny):
    tiny.eval()
    x = torch.rand(1, 3, 8, 8)
    x[0, 1, 2, 3] = torch.nan
    with pytest.raises(InputError, match="nan at row 2, column 3, channel 1"):
        tiny(x)
    with torch.no_grad():
        tiny.blocks[1].convs[0].weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(InputError, match=r"blocks\.1\.convs\.0\.weight"):
        tiny(torch.rand(1, 3, 8, 8))


def test_weights_that_do_not_fit_each_other_are_refused(tiny):
    other = SMSR(2, n_feats=16, n_blocks=2, n_layers=2)
    for name in ("channel_logits", "convs", "collect"):
        model = copy.deepcopy(tiny)
        setattr(model.blocks[1], name, getattr(other.blocks[1], name))
        with pytest.raises(InputError, match=rf"blocks\.1\.{name}.*16.*8"):
            Plan(model)
    model = copy.deepcopy(tiny)
    model.collect = other.collect
    with pytest.raises(InputError, match=r"collect\.0\.weight.*32.*16"):
        Plan(model)


def test_auto_is_sparse_below_the_threshold(monkeypatch):
    monkeypatch.setattr(sparse, "break_even", lambda plan, f: 0.6)
    block = SMM(8, 2)
    x = torch.randn(1, 8, 40, 40)
    for density, same_as in ((0.1, "sparse"), (0.9, "dense")):
        with_density(block, x, density)
        runs = {mode: run_block(block, x, mode)[1].macs_run for mode in INFERENCE_MODES}
        assert runs["sparse"] != runs["dense"]
        assert runs["auto"] == runs[same_as]


def test_unknown_modes_are_refused(tiny):
    with pytest.raises(InputError, match=r"^no such mode 'fast'; there are auto, sparse, dense$") as error:
        tiny.eval().inference(torch.rand(1, 3, 4, 4), "fast")
    assert error.value.argument == "inference"


def test_the_threshold_is_measured_once():
    first, second = (BlockPlan(SMM(8, 2), 8, "block") for _ in range(2))
    f = torch.zeros(2, 8)
    assert break_even(second, torch.ones(5, 8)) == break_even(first, f)


@pytest.mark.parametrize(("scale", "dense"), [(2, 224.1), (3, 100.5), (4, 57.2)])
def test_dense_multiply_adds_are_those_of_the_paper(scale, dense):
    _, cost = SMSR(scale).eval().inference(torch.rand(1, 3, 4, 6) * 255)
    assert macs_at_1280x720([cost], "macs_dense", scale) / 1e9 == pytest.approx(dense, rel=0.01)


def test_multiply_adds_are_those_that_pytorch_counts():
    model = SMSR(3, n_feats=16, n_blocks=2, n_layers=3).eval()
    n, height, width = 2, 10, 12
    pixels = n * height * width
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        f = model.head(torch.rand(n, 3, height, width))
        for block in model.blocks:
            block.hard_spatial_mask(f)
            for conv in block.convs:
                conv(f)
            block.collect(torch.cat([f] * 3, 1))
        model.tail(model.collect(torch.cat([f] * 2, 1)))
    _, cost = model.inference(torch.rand(n, 3, height, width))
    assert cost.pixels == pixels
    assert 2 * cost.macs_dense == counter.get_total_flops()


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_executed_multiply_adds_are_those_that_pytorch_counts(mode):
    model = SMSR(2, n_blocks=2).eval()
    for block in model.blocks:
        with_dense_channels(block, (5, 3, 0, 1))
    x = torch.rand(1, 3, 40, 50) * 255
    model(x)

    def product(rows, *_, out_shape, **__):  # PyTorch does not count this operator itself
        return 2 * math.prod(out_shape) * rows[-1]

    custom = {torch.ops.mkldnn._linear_pointwise: product} if torch.backends.mkldnn.is_available() else {}
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        _, cost = model.inference(x, mode)
    assert 2 * cost.macs_run == pytest.approx(counter.get_total_flops(), rel=1e-3)  # it does not count the attention


def test_the_plan_is_kept_until_the_weights_change(tiny):
    tiny.eval()(torch.rand(1, 3, 4, 4))
    plan = tiny._engine
    tiny.eval()(torch.rand(2, 3, 6, 6))
    assert tiny._engine is plan


def test_weights_created_in_inference_mode():
    x = torch.rand(1, 3, 6, 6) * 255
    with torch.inference_mode():
        model = SMSR(2, n_feats=8, n_blocks=1).eval()
        before = model(x)
        model.tail.conv.bias += 5
        torch.testing.assert_close(model(x), before + 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_close_to_single(tiny, dtype):
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
        sr, cost = model.inference(torch.from_numpy(lr).permute(2, 0, 1)[None].float())
        sr = model.to_images(sr)[0].numpy()
        assert cost.mask_density == pytest.approx(expected["mask_density"], abs=1e-3)
        difference = np.abs(sr.astype(int) - iio.imread(shared / f"reference/SMSR_X2_Set5_SR/{name}.png"))
        assert difference.max() <= 1
        assert (difference == 0).mean() >= 0.999
        measured = compare(sr, hr[: sr.shape[0], : sr.shape[1]], 2)
        assert measured["psnr_y"] == pytest.approx(expected["psnr_y"], abs=0.002)
        assert measured["ssim_y"] == pytest.approx(expected["ssim_y_bt601"], abs=1e-4)


def test_low_precision_hardly_changes_psnr(shared):
    model = load_model(shared / "reference/SMSR_X2.pt")
    low = copy.deepcopy(model).bfloat16()
    lr = iio.imread(shared / "data/benchmark/Set5/LR_bicubic/X2/butterfly.png")
    hr = iio.imread(shared / "data/benchmark/Set5/HR/butterfly.png")
    single, half = (compare(network.upscale(lr), hr, 2)["psnr_y"] for network in (model, low))
    assert abs(single - half) < 0.02
