"""What every network here offers: its settings, conversion from and to 8-bit images, and the cost of a forward pass."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from model.common import check_images, mean_color
from model.hub import read_hub_folder
from picture import from_pillow, to_pillow
from program import InputError

MAX_SCALE = 64  # larger ones are a mistake
PIXEL_DTYPES = {torch.uint8: np.uint8, torch.uint16: np.uint16}
MEAN_SHIFTS = ("sub_mean.", "add_mean.")  # published checkpoints keep the mean as two fixed convolutions


@dataclass(frozen=True)
class Cost:
    """The cost of one or several forward passes. Costs add up: `cost + cost`.

    pixels      low-resolution pixels processed, padding and overlaps included
    macs        multiply-adds of the convolutions that the masks require, as the paper counts them
    macs_dense  multiply-adds of the same network if nothing is skipped
    macs_run    multiply-adds executed: more by the overhead of skipping, fewer by Winograd's transform
    important   important pixels in the mask of each SMM; empty for a network without masks
    active      active share of the sparse convolutions (1: nothing skipped), times `pixels`
    masks       of each SMM, bool (N, 1, H, W), true where a pixel is important; dropped by addition
    """

    pixels: int
    macs: int
    macs_dense: int
    macs_run: int
    important: tuple[int, ...] = ()
    active: float = 0.0
    masks: tuple[torch.Tensor, ...] = field(default=(), compare=False, repr=False)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            pixels=self.pixels + other.pixels,
            macs=self.macs + other.macs,
            macs_dense=self.macs_dense + other.macs_dense,
            macs_run=self.macs_run + other.macs_run,
            important=tuple(a + b for a, b in zip(self.important, other.important, strict=True)),
            active=self.active + other.active,
        )

    def without_masks(self) -> "Cost":
        return replace(self, masks=())

    @property
    def mask_density(self) -> list[float]:
        """Share of important pixels in the mask of each SMM, 0...1."""
        return [count / self.pixels for count in self.important]

    @property
    def active_share(self) -> float:
        """Share of the work of the sparse convolutions that was done, 0...1."""
        return self.active / self.pixels


class DeferredCost:
    """A `Cost` that is computed when one of its counts is read, because that waits for the device.

    compute: returns the Cost; masks: as in Cost, available without waiting
    """

    def __init__(self, compute: Callable[[], Cost], masks: tuple[torch.Tensor, ...] = ()):
        self._compute, self._cost, self.masks = compute, None, masks

    def resolve(self) -> Cost:
        """The Cost itself. Raises InputError if the images contained NaN or infinity."""
        if self._cost is None:
            self._cost = self._compute()
            self._compute = None
        return self._cost

    def __getattr__(self, name: str):
        if name.startswith("_"):  # copying and pickling ask for such names before there is a Cost
            raise AttributeError(name)
        return getattr(self.resolve(), name)

    def __add__(self, other: Cost) -> Cost:
        return self.resolve() + other


Predict = Callable[[torch.Tensor], tuple[torch.Tensor, Cost]]  # LR images -> SR images and their cost
Pixels = TypeVar("Pixels", np.ndarray, torch.Tensor, Image.Image)


class Network(nn.Module):
    """A super-resolution network. Images are (N, n_colors, H, W) in 0...rgb_range, with any H and W >= 1.

    A subclass defines `peak_maps`, `forward(x)`, `training_forward(x, tau)` -> (SR, [(m, c), ...]), where no tau means
    no masks, `inference(x, mode, tile)` -> (SR, Cost), and the static methods `hyperparameters(state_dict)` and
    `translate(state_dict)`. A network with masks also defines the methods `copy_mask`, `freeze_masks` and
    `mask_parameters`.

    Args:
        scale: upscaling factor
        n_feats: feature channels
        n_colors: image channels
        rgb_range: largest pixel value; like every name in `settings` it is saved with the weights
    """

    settings = ("rgb_range",)  # buffers that change what the network computes
    peak_maps: int  # feature maps that inference holds in memory at its peak

    def __init__(self, scale: int, n_feats: int, n_colors: int = 3, rgb_range: float = 255):
        super().__init__()
        if not 1 <= scale <= MAX_SCALE:
            raise ValueError(f"networks upscale by 1 to {MAX_SCALE}, not by {scale}")
        self.scale, self.n_feats, self.n_colors = scale, n_feats, n_colors
        self.register_buffer("rgb_range", torch.tensor(float(rgb_range)))
        self.register_buffer("mean", mean_color(n_colors, rgb_range), persistent=False)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "Network":
        """The network in a folder that tools/export_hub.py or huggingface_hub wrote, or in a repository "owner/name".

        It is in eval mode on the CPU. Raises InputError, see hub.read_hub_folder.
        """
        return read_hub_folder(cls, source)

    def copy_mask(self, source: int, target: int) -> None:
        """Give a module the spatial mask of another one. Modules count from 0."""
        raise NotImplementedError("this network has no masks")

    def freeze_masks(self, spatial: bool) -> None:
        """Train with the channel masks of inference from now on, and with the `spatial` ones, too: without noise."""
        raise NotImplementedError("this network has no masks")

    def mask_parameters(self) -> list[nn.Parameter]:
        """The parameters that only training with masks changes."""
        return []

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def dtype(self) -> torch.dtype:
        return self.mean.dtype

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def to_input(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """uint8 or uint16 (N, H, W, n_colors) -> (N, n_colors, H, W) in 0...rgb_range, channels-last, as forward takes.

        All bits are kept as far as the precision of the network allows.
        """
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(np.require(images, requirements=("C", "W")))
        levels = torch.iinfo(images.dtype).max
        if self.device.type == "cuda" and not images.is_cuda:
            images = images.pin_memory()  # else the copy would wait for the GPU
        x = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float(memory_format=torch.channels_last)
        return (x * (self.rgb_range.float() / levels)).to(self.dtype)

    def to_images(self, x: torch.Tensor, dtype: np.dtype = np.uint8) -> torch.Tensor:
        """(N, n_colors, H, W) in 0...rgb_range -> (N, H, W, n_colors), clamped and rounded to uint8 or uint16."""
        levels = np.iinfo(dtype).max
        x = (x.float() * (levels / self.rgb_range.float())).clamp(0, levels).round()
        return x.to(torch.uint8 if levels == 255 else torch.uint16).permute(0, 2, 3, 1)

    @torch.no_grad()
    def upscale(self, image: Pixels, predict: Predict | None = None) -> Pixels:
        """Upscale an array, a Pillow image or a batch of tensors; the result is of the same type.

        Args:
            image: an array (H, W, n_colors), uint8 or uint16;
                a Pillow image, whose orientation is applied, with its alpha (bicubic) and color profile;
                or a tensor (N, n_colors, H, W), uint8, uint16, or float in 0...1 whatever the rgb_range, on any device
            predict: runs the network, see inference.build_predictor; None: self.inference

        Raises InputError if it is not such an image.
        """
        predict = predict or self.inference
        if isinstance(image, torch.Tensor):
            return self._upscale_tensor(image, predict)
        if isinstance(image, Image.Image):
            picture = from_pillow(image, self.n_colors)
            return to_pillow(picture.with_upscaled(self._upscale_array(picture.pixels, predict)))
        return self._upscale_array(image, predict)

    def _upscale_array(self, image, predict):
        dtype, shape = getattr(image, "dtype", type(image).__name__), getattr(image, "shape", ())
        is_image = dtype in PIXEL_DTYPES.values() and len(shape) == 3 and shape[2] == self.n_colors
        if not is_image or not image.size:
            fix = "open it with Pillow first" if isinstance(image, str | os.PathLike) else "convert the image"
            found = f"{dtype} {shape}" if shape else dtype
            raise InputError(
                f"this network upscales uint8 or uint16 arrays (H, W, {self.n_colors}), not {found}; {fix}"
            )
        sr, _ = predict(self.to_input(image[None]))
        return to_numpy(self.to_images(sr, image.dtype)[0])

    def _upscale_tensor(self, images, predict):
        check_images(images, self.n_colors)
        if images.dtype in PIXEL_DTYPES:
            sr, _ = predict(self.to_input(images.permute(0, 2, 3, 1)))
            sr = self.to_images(sr, PIXEL_DTYPES[images.dtype]).permute(0, 3, 1, 2)
        else:
            _check_unit_range(images)
            sr, _ = predict((images.to(self.device).float() * self.rgb_range.float()).to(self.dtype))
            sr = (sr.float() / self.rgb_range.float()).clamp(0, 1)
        return sr.to(images.device, images.dtype).contiguous()

    def _apply_settings(self) -> None:
        """Derive what depends on the settings; called after they were loaded."""
        self.mean = mean_color(self.n_colors, self.rgb_range.float().cpu()).to(self.mean)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name in self.settings:  # weights of version 0.1.0 lack them: keep the values from the constructor
            state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._apply_settings()


def _check_unit_range(images: torch.Tensor) -> None:
    """Raise InputError unless a tensor has floating-point numbers in 0...1. Waits for the device."""
    if not images.is_floating_point():
        raise InputError(f"this network upscales tensors of uint8, uint16 or float, not {images.dtype}; convert them")
    low, high = (value.item() for value in images.aminmax())
    if math.isnan(low):
        raise InputError("upscale takes floating-point images in 0...1, and these contain NaN; replace it")
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"upscale takes floating-point images in 0...1, and these reach from {low:g} to {high:g}; "
            "scale or clamp them, or call the network itself, which takes 0...rgb_range"
        )


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy of a tensor in host memory. From a GPU it is made through pinned memory, which is faster."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor).numpy()


def stored_settings(network: type[Network], state_dict: dict[str, torch.Tensor]) -> dict[str, float]:
    """The settings that translated weights record, without the rounding of float32: 0.1, not 0.10000000149."""
    present = [name for name in network.settings if name in state_dict and state_dict[name].numel() == 1]
    return {name: float(f"{state_dict[name].item():.6g}") for name in present}


def count_modules(state_dict: dict[str, torch.Tensor], prefix: str) -> int:
    """How many numbered modules, `<prefix><number>.`, a state dict has: no more than it has keys."""
    return len({key.removeprefix(prefix).partition(".")[0] for key in state_dict if key.startswith(prefix)})


def drop_mean_shifts(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace the mean shifts of published checkpoints by the value range that they imply, as "rgb_range"."""
    kept = {key: value for key, value in state_dict.items() if not key.startswith(MEAN_SHIFTS)}
    bias = state_dict.get("sub_mean.bias")  # -rgb_range * mean
    if bias is not None and bias.ndim == 1 and len(bias):
        rgb_range = float(f"{-bias.double().mean() / mean_color(len(bias), 1).mean():.6g}")
        if torch.allclose(-bias.float(), mean_color(len(bias), rgb_range).flatten(), rtol=1e-3):  # no other mean
            kept.setdefault("rgb_range", torch.tensor(rgb_range))
    return kept


def conv_macs(module: nn.Module) -> int:
    """Multiply-adds of all convolutions in `module` per pixel of the grid they write to."""
    return sum(
        conv.in_channels * conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        for conv in module.modules()
        if isinstance(conv, nn.Conv2d)
    )
