"""What all networks have in common; every test runs for each of them."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from torch import nn

from model import MODELS, build_model
from model.inference import build_predictor
from model.network import Cost, DeferredCost, conv_macs
from picture import to_8_bits
from program import InputError

SIZES = {
    "SMSR": {"n_feats": 8, "n_blocks": 2, "n_layers": 2},
    "EDSR": {"n_feats": 8, "n_resblocks": 2},
}
every_network = pytest.mark.parametrize("name", MODELS)


def build(name, scale=2, **arguments):
    return build_model(name, scale=scale, **SIZES[name], **arguments).eval()


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ---- cost of a forward pass ------------------------------------------------------------------------------------------


def test_costs_add_up():
    mask = torch.ones(1, 1, 2, 5, dtype=torch.bool)
    a = Cost(pixels=10, macs=1, macs_dense=4, macs_run=2, important=(2, 5), active=3.0, masks=(mask, mask))
    b = Cost(pixels=30, macs=10, macs_dense=40, macs_run=20, important=(10, 1), active=7.0, masks=(mask, mask))
    total = a + b
    assert total == Cost(pixels=40, macs=11, macs_dense=44, macs_run=22, important=(12, 6), active=10.0)
    assert total.masks == ()
    assert total.mask_density == [12 / 40, 6 / 40]
    assert total.active_share == 10 / 40


def test_multiply_adds_of_convolutions_are_counted_per_pixel():
    layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(5, 2, 1)))
    assert conv_macs(layers) == 3 * 5 * 9 + 5 * 2


# ---- from and to 8-bit images ----------------------------------------------------------------------------------------


@every_network
@pytest.mark.parametrize("rgb_range", [1, 255])
@pytest.mark.parametrize("n_colors", [1, 3])
@given(n=st.integers(1, 3), height=st.integers(1, 20), width=st.integers(1, 20), seed=st.integers(0, 99))
def test_images_survive_the_way_to_the_input_and_back(name, rgb_range, n_colors, n, height, width, seed):
    model = build(name, n_colors=n_colors, rgb_range=rgb_range)
    images = random_images(n, height, width, n_colors, seed=seed)
    x = model.to_input(images)
    assert x.shape == (n, n_colors, height, width)
    assert x.dtype == torch.float32
    assert 0 <= x.min() <= x.max() <= rgb_range
    back = model.to_images(x)
    assert back.dtype == torch.uint8
    assert np.array_equal(back.numpy(), images)


@every_network
@pytest.mark.parametrize("rgb_range", [1, 255])
def test_the_input_is_in_the_range_of_the_network(name, rgb_range):
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = build(name, n_colors=1, rgb_range=rgb_range).to_input(images)
    expected = torch.arange(256).view(1, 1, 16, 16) / 255 * rgb_range
    torch.testing.assert_close(x, expected.float(), atol=1e-6, rtol=1e-6)


@every_network
def test_arrays_and_tensors_of_any_layout_become_the_same_channels_last_input(name):
    model = build(name)
    images = random_images(2, 7, 6, 3)
    expected = model.to_input(images)
    read_only = images.copy()
    read_only.flags.writeable = False
    flipped_twice = images[:, ::-1, ::-1].copy()[:, ::-1, ::-1]  # negative strides
    color_planes = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for same in (images, read_only, flipped_twice, torch.from_numpy(images), color_planes):
        x = model.to_input(same)
        assert torch.equal(x, expected)
        assert x.is_contiguous(memory_format=torch.channels_last)


@every_network
@pytest.mark.parametrize("rgb_range", [1, 255])
def test_output_is_clamped_and_rounded(name, rgb_range):
    values = torch.tensor([-3.0, 0.4, 0.6, 254.6, 300.0]).view(1, 1, 1, 5) * rgb_range / 255
    images = build(name, n_colors=1, rgb_range=rgb_range).to_images(values)
    assert images.shape == (1, 1, 5, 1)
    assert images.flatten().tolist() == [0, 0, 1, 255, 255]


@every_network
@pytest.mark.parametrize("n_colors", [1, 3])
@pytest.mark.parametrize("rgb_range", [1, 255])
def test_upscale_is_inference_on_8_bit_images(name, n_colors, rgb_range):
    model = build(name, scale=3, n_colors=n_colors, rgb_range=rgb_range)
    image = random_images(7, 9, n_colors)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 * rgb_range
    sr = model.inference(x)[0][0].double() / rgb_range * 255
    expected = sr.clamp(0, 255).permute(1, 2, 0).numpy()
    upscaled = model.upscale(image)
    assert upscaled.dtype == np.uint8
    assert upscaled.shape == (21, 27, n_colors)
    assert np.abs(upscaled - expected).max() < 0.5 + 1e-3  # rounded to the nearest number
    assert upscaled.std() > 1  # not all clamped to one color


@every_network
def test_upscale_uses_the_given_predictor(name):
    model = build(name)
    image = random_images(6, 5, 3)
    inputs = []

    def predict(x):
        inputs.append(x)
        return torch.full((1, 3, 12, 10), 76.6), Cost(30, 0, 0, 0)

    assert (model.upscale(image, predict) == 77).all()
    assert len(inputs) == 1
    assert torch.equal(inputs[0], model.to_input(image[None]))
    in_tiles = model.upscale(image, build_predictor(model, mode="dense", chop=True))
    difference = in_tiles.astype(int) - model.upscale(image)  # sums in another order may round differently
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.01


@every_network
@pytest.mark.parametrize("rgb_range", [1, 255])
def test_16_bits_are_kept(name, rgb_range):
    model = build(name, rgb_range=rgb_range)
    image = np.random.default_rng(0).integers(0, 2**16, (6, 5, 3), dtype=np.uint16)
    x = torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)[None] * rgb_range / 65535
    assert torch.allclose(model.to_input(image[None]).double(), x, rtol=1e-6)
    sr, _ = model.inference(model.to_input(image[None]))
    exact = sr[0].permute(1, 2, 0).double().numpy() * 65535 / rgb_range
    upscaled = model.upscale(image)
    assert upscaled.dtype == np.uint16
    assert np.abs(upscaled - exact.clip(0, 65535)).max() < 0.6
    whole = model.upscale((image // 257).astype(np.uint8)).astype(int)
    assert np.abs(model.upscale(image // 257 * 257) / 257 - whole).max() < 0.51


@every_network
@pytest.mark.parametrize("n_colors", [1, 3])
def test_arrays_that_are_not_images_are_refused(name, n_colors):
    model = build(name, n_colors=n_colors)
    wrong = [
        np.zeros((4, 5, n_colors), np.float32),
        np.zeros((4, 5, n_colors), np.int64),
        np.zeros((4, 5, n_colors), np.int16),
        np.zeros((4, 5, 4 - n_colors), np.uint8),  # RGB for a network of gray images, and the reverse
        np.zeros((4, 5, 4), np.uint8),
        np.zeros((4, 5), np.uint8),
        np.zeros((1, 4, 5, n_colors), np.uint8),
        np.zeros((0, 5, n_colors), np.uint8),
        np.zeros((4, 0, n_colors), np.uint8),
    ]
    for image in wrong:
        with pytest.raises(InputError) as error:
            model.upscale(image)
        message = str(error.value)
        assert f"uint8 or uint16 arrays (H, W, {n_colors}), not {image.dtype} {image.shape}" in message
        assert "\n" not in message


@every_network
def test_upscaling_leaves_the_image_and_the_gradients_alone(name):
    model = build(name)
    image = random_images(6, 5, 3)
    before = image.copy()
    result = model.upscale(image)
    assert np.array_equal(image, before)
    assert result.flags.writeable
    sr, _ = model.inference(model.to_input(image[None]))
    assert not sr.requires_grad


@every_network
@pytest.mark.parametrize("rgb_range", [1, 255])
@pytest.mark.parametrize("n_colors", [1, 3])
def test_batches_of_tensors_are_upscaled_like_arrays(name, rgb_range, n_colors):
    model = build(name, n_colors=n_colors, rgb_range=rgb_range)
    arrays = random_images(2, 6, 5, n_colors)
    expected = np.stack([model.upscale(array) for array in arrays])
    batch = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    sr = model.upscale(batch)
    assert (sr.dtype, sr.shape) == (torch.uint8, (2, n_colors, 12, 10))
    assert sr.is_contiguous()
    assert np.abs(sr.permute(0, 2, 3, 1).numpy().astype(int) - expected).max() <= 1  # sums in another order
    deep = model.upscale((batch.int() * 257).to(torch.uint16))
    assert deep.dtype == torch.uint16
    for dtype in (torch.float32, torch.float64):
        unit = model.upscale(batch.to(dtype) / 255)
        assert unit.dtype == dtype
        assert 0 <= unit.min() <= unit.max() <= 1
        assert (unit * 255 - sr).abs().max() < 0.5 + 1e-3
        assert (unit * 65535 - deep.int()).abs().max() < 0.6


@every_network
def test_tensors_that_are_not_images_are_refused(name):
    model = build(name)
    image = torch.rand(1, 3, 4, 5)
    broken = image.clone()
    broken[0, 1, 2, 3] = torch.nan
    for wrong, message in (
        (image * 255, r"in 0\.\.\.1, and these reach from [\d.]+ to 2[\d.]+; scale or clamp them"),
        (image - 0.5, r"reach from -0\.\d+"),
        (broken, "these contain NaN; replace it"),
        (image.to_sparse(), r"takes dense tensors with data, not torch\.sparse_coo on cpu"),
        (image.to("meta"), r"takes dense tensors with data, not torch\.strided on meta"),
        (image[0], r"takes images \(N, 3, H, W\), not \(3, 4, 5\)"),
        (image[:, :1], r"not \(1, 1, 4, 5\)"),
        (image[:0], r"not \(0, 3, 4, 5\)"),
        (image.long(), r"not torch\.int64; convert them"),
        (image.bool(), r"not torch\.bool"),
    ):
        with pytest.raises(InputError, match=message):
            model.upscale(wrong)
    with pytest.raises(InputError, match="not str; open it with Pillow first"):
        model.upscale("photo.png")


@every_network
@pytest.mark.parametrize("n_colors", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pillow_images_of_every_mode_are_upscaled(name, n_colors, mode):
    model = build(name, n_colors=n_colors)
    image = Image.fromarray(random_images(6, 5, 3)).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(77)
    sr = model.upscale(image)
    assert sr.size == (10, 12)
    assert sr.getbands() == (("R", "G", "B") if n_colors == 3 else ("L",)) + (("A",) if mode in ("LA", "RGBA") else ())
    colors = "RGB" if n_colors == 3 else "L"
    pixels = np.asarray(image.convert("L" if mode in ("1", "L", "LA") else "RGB").convert(colors))
    expected = model.upscale(pixels.reshape(6, 5, n_colors))
    assert np.array_equal(np.asarray(sr.convert(colors)).reshape(12, 10, n_colors), expected)
    if "A" in sr.getbands():
        assert (np.asarray(sr.getchannel("A")) == 77).all()


@every_network
def test_16_bits_of_pillow_images_are_kept_where_pillow_can(name):
    levels = np.random.default_rng(0).integers(0, 2**16, (6, 5), dtype=np.uint16)
    image = Image.fromarray(levels)
    gray, color = (build(name, n_colors=n_colors) for n_colors in (1, 3))
    assert np.array_equal(gray.upscale(image), gray.upscale(levels[..., None])[..., 0])
    expected = color.upscale(np.repeat(levels[..., None], 3, axis=2))
    assert np.array_equal(color.upscale(image), to_8_bits(expected))


def test_orientation_and_color_profile_of_pillow_images_are_kept(tmp_path):
    model = build("SMSR")
    image = Image.fromarray(random_images(6, 5, 3))
    exif = image.getexif()
    exif[0x0112] = 6  # turned to the right
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "turned.png", exif=exif, icc_profile=profile)
    sr = model.upscale(Image.open(tmp_path / "turned.png"))
    assert np.array_equal(sr, model.upscale(np.rot90(np.asarray(image), -1)))
    assert sr.info["icc_profile"] == profile


def test_pillow_images_that_cannot_be_upscaled_are_refused_in_one_line(tmp_path):
    model = build("SMSR")
    Image.fromarray(random_images(40, 50, 3)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    for wrong, message in (
        (Image.new("F", (5, 6)), "this F image: has 32 bits per channel; convert it to 8 or 16"),
        (Image.open(tmp_path / "cut.png"), r"cut\.png: broken \(.*\); replace it"),
    ):
        with pytest.raises(InputError, match=message):
            model.upscale(wrong)


# ---- device and dtype ------------------------------------------------------------------------------------------------


@every_network
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_input_has_the_dtype_of_the_network(name, dtype):
    model = build(name).to(dtype)
    assert model.dtype == dtype
    images = np.arange(255, dtype=np.uint8).reshape(1, 17, 5, 3)
    x = model.to_input(images)
    assert x.dtype == dtype
    assert np.array_equal(model.to_images(x), images)  # integers up to 256 are exact in every dtype
    assert model.upscale(images[0]).shape == (34, 10, 3)


@every_network
def test_the_input_is_on_the_device_of_the_network(name):
    model = build(name)
    assert model.device == torch.device("cpu")
    images = random_images(1, 4, 5, 3)
    assert model.to_input(images).device == model.device
    model.to("meta")  # a device that every machine has
    assert model.device == torch.device("meta")
    x = model.to_input(images)
    assert x.device == torch.device("meta")
    assert model.to_images(x).device == torch.device("meta")


# ---- settings: numbers that are saved with the weights ---------------------------------------------------------------


@every_network
def test_sizes_are_attributes(name):
    model = build(name, scale=4, n_colors=1, rgb_range=1)
    assert (model.scale, model.n_feats, model.n_colors, float(model.rgb_range)) == (4, 8, 1, 1.0)
    assert model.rgb_range.shape == ()
    assert model.rgb_range.dtype == torch.float32


@every_network
def test_the_state_dict_has_the_settings_and_no_mean(name):
    keys = build(name).state_dict().keys()
    assert set(MODELS[name].settings) <= keys
    assert "rgb_range" in keys
    assert "mean" not in keys


@every_network
def test_load_state_dict_takes_over_the_value_range(name):
    source, target = build(name, rgb_range=1), build(name, rgb_range=255)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.rgb_range, source.rgb_range)
    assert torch.equal(target.mean, source.mean)
    image = random_images(6, 5, 3)
    assert np.array_equal(target.upscale(image), source.upscale(image))
    x = torch.rand(1, 3, 6, 5)
    assert torch.equal(target.inference(x, "dense")[0], source.inference(x, "dense")[0])


@every_network
def test_load_state_dict_without_settings_keeps_those_of_the_network(name):
    source, target = build(name, rgb_range=255), build(name, rgb_range=1)
    state_dict = {key: value for key, value in source.state_dict().items() if key not in source.settings}
    keys = set(state_dict)
    result = target.load_state_dict(state_dict)  # strict
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert set(state_dict) == keys  # the dict of the caller stays as it is
    assert float(target.rgb_range) == 1
    assert torch.equal(target.mean, build(name, rgb_range=1).mean)


@every_network
def test_settings_load_if_the_network_is_part_of_a_module(name):
    source, target = (nn.ModuleDict({"generator": build(name, rgb_range=rgb_range)}) for rgb_range in (1, 255))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target["generator"].mean, source["generator"].mean)


@every_network
def test_loading_keeps_the_dtype(name):
    model = build(name, rgb_range=255).bfloat16()
    model.load_state_dict(build(name, rgb_range=1).state_dict())
    assert model.dtype == model.rgb_range.dtype == torch.bfloat16
    torch.testing.assert_close(model.mean.float(), build(name, rgb_range=1).mean, atol=0, rtol=2**-8)


@every_network
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("after_a_call", [False, True])
def test_copies_are_independent_and_equal(name, duplicate, after_a_call):
    model = build(name, rgb_range=1)
    image = random_images(6, 5, 3)
    if after_a_call:
        model.upscale(image)
    clone = duplicate(model)
    expected = model.upscale(image)
    assert np.array_equal(clone.upscale(image), expected)
    assert float(clone.rgb_range) == 1
    assert (clone.scale, clone.n_colors, clone.training) == (model.scale, model.n_colors, model.training)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.mul_(3)
    assert not np.array_equal(clone.upscale(image), expected)
    assert np.array_equal(model.upscale(image), expected)


# ---- deferred costs --------------------------------------------------------------------------------------------------


def deferred(calls):
    cost = Cost(pixels=10, macs=20, macs_dense=40, macs_run=30, important=(5,), active=6.0)
    masks = (torch.ones(1, 1, 2, 5, dtype=torch.bool),)

    def compute():
        calls.append(1)
        return replace(cost, masks=masks)

    return cost, DeferredCost(compute, masks)


def test_a_deferred_cost_is_computed_once_and_only_when_a_count_is_read():
    calls = []
    cost, later = deferred(calls)
    assert len(later.masks) == 1
    assert not calls
    assert (later.macs, later.important, later.active_share) == (20, (5,), cost.active_share)
    assert later.mask_density == [0.5]
    assert len(calls) == 1


def test_deferred_costs_add_up_with_each_other_and_with_costs():
    cost, later = deferred([])
    assert later + later == cost + cost
    assert cost + later == cost + cost
    assert later + cost == cost + cost


def test_masks_can_be_dropped():
    cost, later = deferred([])
    for value in (later, later.resolve()):
        assert value.without_masks() == cost
        assert value.without_masks().masks == ()
