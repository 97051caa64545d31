import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from loss.sparsity import active_shares
from model.smsr import SMM, SMSR, gumbel_softmax
from tests.model.masks import with_dense_channels

MEAN_SHIFTS = 24  # weights of the two fixed convolutions that the published count includes


@pytest.mark.parametrize(("scale", "published"), [(2, 987_330), (3, 995_985), (4, 1_008_102)])
def test_parameter_count_is_the_published_one(scale, published):
    assert sum(p.numel() for p in SMSR(scale).parameters()) + MEAN_SHIFTS == published


@pytest.mark.parametrize(("scale", "gmacs"), [(2, 224.1), (3, 100.5), (4, 57.2)])
def test_dense_macs_at_720p_are_those_of_the_paper(scale, gmacs):
    _, cost = SMSR(scale).eval().inference(torch.rand(1, 3, 8, 8))
    at_720p = cost.macs_dense / cost.pixels * (1280 // scale) * (720 // scale) / 1e9
    assert at_720p == pytest.approx(gmacs, rel=0.01)


def test_named_parts_keep_their_keys():
    model = SMSR(2, n_feats=8, n_blocks=1, n_layers=2)
    assert model.state_dict().keys() == {
        "rgb_range",
        *(f"head.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")),
        *(f"blocks.0.spatial_mask.{index}.{kind}" for index in (0, 3, 5) for kind in ("weight", "bias")),
        "blocks.0.channel_logits",
        "blocks.0.convs.0.weight",
        "blocks.0.convs.1.weight",
        *(f"blocks.0.collect.{kind}" for kind in ("weight", "bias")),
        *(f"blocks.0.attention.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")),
        *(f"collect.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")),
        *(f"tail.0.{kind}" for kind in ("weight", "bias")),
    }
    modules = dict(model.named_modules())
    assert model.collect.reduce is modules["collect.0"]
    assert model.collect.fuse is modules["collect.2"]
    assert model.tail.conv is modules["tail.0"]
    assert model.tail.shuffle is modules["tail.1"]
    assert model.blocks[0].spatial_mask.full is modules["blocks.0.spatial_mask.0"]
    assert model.blocks[0].spatial_mask.pooled is modules["blocks.0.spatial_mask.3"]
    assert model.blocks[0].spatial_mask.logits is modules["blocks.0.spatial_mask.5"]


def test_the_collection_is_a_1x1_convolution_a_relu_and_a_3x3_convolution():
    collect = SMSR(2, n_feats=8, n_blocks=3).collect
    outputs = torch.randn(2, 3 * 8, 5, 4)
    reduced = F.relu(F.conv2d(outputs, collect.reduce.weight, collect.reduce.bias))
    expected = F.conv2d(reduced, collect.fuse.weight, collect.fuse.bias, padding=1)
    torch.testing.assert_close(collect(outputs), expected)


def test_the_mask_branch_computes_logits_at_half_the_resolution():
    branch = SMM(16).spatial_mask
    x = torch.randn(2, 16, 6, 8)
    half = F.relu(branch.pooled(F.avg_pool2d(F.relu(branch.full(x)), 2)))
    assert half.shape == (2, 4, 3, 4)
    torch.testing.assert_close(branch(x), branch.logits(half))
    assert branch(x).shape == (2, 2, 6, 8)


def test_the_attention_scales_channels_by_factors_of_the_mean():
    attention = SMM(32).attention
    x = torch.randn(2, 32, 5, 4)
    factors = attention.factors(x.mean((2, 3), keepdim=True))
    assert factors.shape == (2, 32, 1, 1)
    assert ((factors > 0) & (factors < 1)).all()
    torch.testing.assert_close(attention(x), x * factors)


@pytest.mark.parametrize("training", [True, False])
def test_the_network_adds_to_the_bicubic_image(training):
    model = SMSR(2, n_feats=8, n_blocks=1, n_layers=2).train(training)
    with torch.no_grad():
        for parameter in model.tail.parameters():
            parameter.zero_()
    x = torch.rand(1, 3, 6, 8) * 255
    expected = F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)
    torch.testing.assert_close(model(x), expected, atol=1e-3, rtol=0)


def test_dense_macs_per_pixel_at_x2():
    _, cost = SMSR(2).eval().inference(torch.rand(1, 3, 6, 4))
    assert cost.macs_dense == 971_368 * 24


def four_branches(block, x, m, c):
    """The layers of an SMM as in the figure of the paper, with a branch per pair of dense or sparse channels."""
    outputs, f, dense_in = [], x, None
    for layer, conv in enumerate(block.convs):
        dense_out = c[:, :, layer, None, None]
        if layer == 0:
            everything = conv(f)
            f = everything * dense_out + everything * (1 - dense_out) * m
        else:
            from_dense, from_sparse = conv(f * dense_in), conv(f * (1 - dense_in))
            dense_to_dense = from_dense * dense_out
            dense_to_sparse = from_dense * (1 - dense_out) * m
            sparse_to_dense = from_sparse * dense_out * m
            sparse_to_sparse = from_sparse * (1 - dense_out) * m
            f = dense_to_dense + dense_to_sparse + sparse_to_dense + sparse_to_sparse
        f = F.relu(f)
        dense_in = dense_out
        outputs.append(f)
    return x + block.attention(block.collect(torch.cat(outputs, 1)))


@pytest.mark.parametrize("n_layers", [1, 2, 4])
@pytest.mark.parametrize("hard", [False, True])
def test_a_block_equals_the_four_branch_form(n_layers, hard):
    block = SMM(16, n_layers).double()
    x = torch.randn(2, 16, 6, 8, dtype=torch.float64)
    m, c = torch.rand(2, 1, 6, 8).double(), torch.rand(1, 16, n_layers).double()
    if hard:
        m, c = m.round(), c.round()
    torch.testing.assert_close(block(x, m, c), four_branches(block, x, m, c))


def test_gumbel_softmax_samples_the_categories_with_their_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0]).repeat(20_000, 1)
    frequency = gumbel_softmax(logits, tau=0.1, dim=1).argmax(1).bincount(minlength=3) / len(logits)
    torch.testing.assert_close(frequency, F.softmax(logits[0], 0), atol=0.02, rtol=0)


def test_gumbel_softmax_is_closer_to_one_hot_at_lower_temperatures():
    logits = torch.zeros(1000, 2)
    warm, cold = (gumbel_softmax(logits, tau, dim=1).max(1).values.mean() for tau in (1.0, 0.1))
    assert warm < cold - 0.1
    torch.testing.assert_close(gumbel_softmax(logits, 0.4, dim=1).sum(1), torch.ones(1000))


@pytest.mark.parametrize("drawn", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gumbel_noise_is_finite_for_the_extreme_random_numbers(monkeypatch, drawn, dtype):
    def rand(shape, dtype=torch.float32, device=None):
        assert dtype == torch.float32  # whatever the precision of the logits
        return torch.full(shape, drawn)

    monkeypatch.setattr(torch, "rand", rand)
    logits = torch.zeros(3, 2, dtype=dtype, requires_grad=True)
    sample = gumbel_softmax(logits, 0.4, dim=1)
    sample[:, 0].sum().backward()
    assert sample.dtype == dtype
    assert sample.isfinite().all()
    assert logits.grad.isfinite().all()


def test_training_reaches_every_parameter():
    model = SMSR(2, n_blocks=2, n_layers=2)
    sr, masks = model.training_forward(torch.rand(2, 3, 8, 8) * 255, tau=0.7)
    densities, channel_masks = [m.mean() for m, _ in masks], [c for _, c in masks]
    (F.l1_loss(sr, torch.rand_like(sr) * 255) + 0.1 * active_shares(densities, channel_masks).mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert [tuple(m.shape) for m, _ in masks] == [(2, 1, 8, 8)] * 2
    assert [tuple(c.shape) for _, c in masks] == [(1, 64, 2)] * 2
    assert all(((mask >= 0) & (mask <= 1)).all() for pair in masks for mask in pair)


def test_without_masks_the_network_is_that_with_full_masks():
    model, x = SMSR(2, n_feats=8, n_blocks=2, n_layers=3), torch.rand(2, 3, 5, 7) * 255
    sr, masks = model.training_forward(x, tau=None)
    assert all(torch.equal(m, torch.ones(2, 1, 6, 8)) and torch.equal(c, torch.ones(1, 8, 3)) for m, c in masks)
    (sr.mean() + sum(m.mean() + c.mean() for m, c in masks)).backward()
    for name, parameter in model.named_parameters():
        if "spatial_mask" in name or "channel_logits" in name:
            assert not parameter.grad.any()
        elif "convs" in name:
            assert parameter.grad.any()
    assert not torch.allclose(model.masked_forward(x), sr)
    for block in model.blocks:
        block.spatial_mask.logits.weight.data.zero_()
        block.spatial_mask.logits.bias.data = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(model.masked_forward(x), sr)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=3), st.integers(0, 2**32 - 1))
def test_frozen_channel_masks_are_those_of_inference(counts, seed):
    torch.manual_seed(seed)
    model = SMSR(2, n_feats=8, n_blocks=2, n_layers=len(counts))
    for block in model.blocks:
        with_dense_channels(block, counts)
    frozen = copy.deepcopy(model)
    frozen.freeze_masks(spatial=False)
    assert all(list(block.n_dense) == counts for block in frozen.blocks)
    x, f, m = torch.rand(1, 3, 4, 6) * 255, torch.randn(2, 8, 4, 6), torch.rand(2, 1, 4, 6)
    torch.testing.assert_close(frozen.masked_forward(x), model.masked_forward(x), rtol=1e-4, atol=1e-3)
    for ours, theirs in zip(frozen.blocks, model.blocks, strict=True):
        _, c = ours.sample_masks(f, tau=0.5)
        assert torch.equal(c, torch.tensor([[float(k < n) for n in counts] for k in range(8)])[None])
        hard = theirs.hard_channel_mask().float()[None]
        torch.testing.assert_close(ours(f, m, c), theirs(f, m, hard), rtol=1e-4, atol=1e-5)
        thrifty = torch.autograd.grad(ours(f, m, c).square().sum(), list(ours.convs.parameters()))
        ours.n_dense = None
        full = torch.autograd.grad(ours(f, m, c).square().sum(), list(ours.convs.parameters()))
        torch.testing.assert_close(thrifty, full, rtol=1e-4, atol=1e-4)


def test_with_all_masks_frozen_training_computes_what_inference_does():
    model, x = SMSR(2, n_feats=8, n_blocks=2), torch.rand(2, 3, 6, 8) * 255
    model.freeze_masks(spatial=True)
    sr, masks = model.training_forward(x, tau=0.4)
    assert torch.equal(sr, model.masked_forward(x))
    assert all(m.unique().tolist() in ([0, 1], [0], [1]) for m, _ in masks)
    sr.mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == ("spatial_mask" in name or "channel_logits" in name)


def test_freezing_masks_again_changes_nothing():
    model = SMSR(2, n_feats=8, n_blocks=2)
    model.freeze_masks(spatial=True)
    before = copy.deepcopy(model.state_dict())
    model.freeze_masks(spatial=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 2), (7, 9)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_any_size_is_upscaled(size, training, scale):
    model = SMSR(scale, n_feats=8, n_blocks=1, n_layers=2).train(training)
    assert model(torch.rand(2, 3, *size)).shape == (2, 3, scale * size[0], scale * size[1])


def test_gray_images():
    model = SMSR(2, n_feats=8, n_blocks=1, n_layers=2, n_colors=1, rgb_range=1).eval()
    assert model(torch.rand(1, 1, 4, 4)).shape == (1, 1, 8, 8)


def test_layers_use_the_channel_mask_of_the_layer_before():
    """Outside the mask, layer 2 does not read the sparse output channels of layer 1."""
    block = SMM(4, 2)
    x, m = torch.rand(1, 4, 4, 4), torch.zeros(1, 1, 4, 4)
    c = torch.ones(1, 4, 2)
    c[:, 0, 0] = 0  # channel 0 of layer 1 is sparse
    before = block(x, m, c)
    with torch.no_grad():
        block.convs[1].weight[:, 0] += 1
    torch.testing.assert_close(block(x, m, c), before)
    c[:, 0, 0] = 1
    assert not torch.allclose(block(x, m, c), before)
