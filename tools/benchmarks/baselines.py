"""What the benchmarks compare this project with: unmasked networks, a plain training loop, and pickled images."""

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import PatchSettings
from data.image import read_image
from data.imageset import ImageSet
from data.srdata import Patches
from model.common import pad_to_multiple
from model.smsr import IMPORTANT, SMM, SMSR, SPARSE

# ---- inference -------------------------------------------------------------------------------------------------------


class Unmasked(nn.Module):
    """The network of a trained SMSR without masks, in the fastest form known for eager PyTorch.

    A 1x1 convolution of concatenated features is the sum of 1x1 convolutions of each of them, which needs no
    concatenation. What can be computed in place is. The weights are those that the model has now.

    Images (N, n_colors, H, W) in 0...rgb_range -> (N, n_colors, scale H, scale W).
    """

    def __init__(self, model: SMSR):
        super().__init__()
        self.model = model
        self.reduce_weights = self._split(model.collect.reduce, len(model.blocks))
        self.collect_weights = [self._split(block.collect, len(block.convs)) for block in model.blocks]

    @staticmethod
    def _split(conv: nn.Conv2d, count: int) -> list[torch.Tensor]:
        """The weights (C, C, 1, 1) of `count` convolutions that add up to `conv`, which has count x C inputs."""
        parts = conv.weight.detach().chunk(count, 1)
        return [weight.contiguous(memory_format=torch.channels_last) for weight in parts]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        model, (height, width) = self.model, x.shape[2:]
        x = pad_to_multiple(x - model.mean, 2)
        head = f = model.head(x)  # (N, C, H, W)
        reduced = None
        for block, collect_weights, weight in zip(model.blocks, self.collect_weights, self.reduce_weights, strict=True):
            f = self._block(block, collect_weights, f)
            product = F.conv2d(f, weight, model.collect.reduce.bias if reduced is None else None)
            reduced = product if reduced is None else reduced.add_(product)
        f = model.collect.fuse(reduced.relu_()).add_(head)
        return model.tail(f).add_(model.upsample(x))[..., : height * model.scale, : width * model.scale]

    @staticmethod
    def _block(block: SMM, collect_weights: list[torch.Tensor], f: torch.Tensor) -> torch.Tensor:
        """One block without masks: features (N, C, H, W) -> features (N, C, H, W)."""
        g, y = f, None
        for conv, weight in zip(block.convs, collect_weights, strict=True):
            g = F.relu_(conv(g))
            y = F.conv2d(g, weight, block.collect.bias) if y is None else y.add_(F.conv2d(g, weight))
        return torch.addcmul(f, y, block.attention.factors(y.mean((2, 3), keepdim=True)))


@torch.no_grad()
def with_density(model: SMSR, x: torch.Tensor, density: float) -> SMSR:
    """A copy of the network whose masks are shifted: in each, this share of the pixels of x is important.

    x: images (N, n_colors, H, W) in 0...rgb_range; density: 0...1
    """
    model = copy.deepcopy(model)
    f = model.head(pad_to_multiple(x - model.mean, 2))
    for block in model.blocks:
        logits = block.spatial_mask(f)  # (N, 2, H, W)
        margins = (logits[:, IMPORTANT] - logits[:, SPARSE]).flatten().float().sort(descending=True).values
        count = round(density * len(margins))
        bounds = torch.cat([margins[:1] + 1, margins, margins[-1:] - 1])  # count margins are at least bounds[count]
        threshold = bounds[count : count + 2].mean()
        block.spatial_mask.logits.bias[IMPORTANT] -= threshold.to(f.dtype)
        f = block(f, *block.hard_masks(f))
    return model


# ---- training --------------------------------------------------------------------------------------------------------


def block_with_branches(block: SMM, x: torch.Tensor, m: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The result of `SMM.forward` for the same features and masks, computed branch by branch (paper eq. 5)."""
    c = [c_l.view(1, -1, 1, 1) for c_l in c[0].unbind(1)]
    z = block.convs[0](x)
    outputs = [F.relu(z * c[0] + z * (1 - c[0]) * m)]
    for conv, c_in, c_out in zip(block.convs[1:], c[:-1], c[1:], strict=True):
        dense, sparse = conv(outputs[-1] * c_in), conv(outputs[-1] * (1 - c_in))
        dense_to_dense, dense_to_sparse = dense * c_out, dense * (1 - c_out) * m
        sparse_to_dense, sparse_to_sparse = sparse * c_out * m, sparse * (1 - c_out) * m
        outputs.append(F.relu(dense_to_dense + dense_to_sparse + sparse_to_dense + sparse_to_sparse))
    return x + block.attention(block.collect(torch.cat(outputs, 1)))


class PlainTraining:
    """Training of an SMSR with a plain loop: float32, eager, with branches written out, the loss read in every step."""

    def __init__(self, model: SMSR):
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), 2e-4, foreach=False)

    def step(self, lr: torch.Tensor, hr: torch.Tensor, tau: float, lambda_: float) -> float:
        """One step on LR (N, C, P, P) and HR (N, C, sP, sP) in 0...rgb_range. Returns the loss."""
        self.optimizer.zero_grad()
        sr, share = self._forward(lr, tau)
        loss = F.l1_loss(sr, hr) + lambda_ * share
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def _forward(self, lr, tau):
        """The SR images and the active share, as the mean of a tensor with every module, layer, channel and pixel."""
        model = self.model
        x = pad_to_multiple(lr - model.mean, 2)
        head = f = model.head(x)
        features, shares = [], []
        for block in model.blocks:
            m, c = block.sample_masks(f, tau)
            shares += [m * (1 - c_l) + c_l for c_l in (c[..., i].view(1, -1, 1, 1) for i in range(c.shape[2]))]
            f = block_with_branches(block, f, m, c)
            features.append(f)
        sr = model.reconstruct(model.collect(torch.cat(features, 1)) + head, x)
        sr = sr[..., : lr.shape[2] * model.scale, : lr.shape[3] * model.scale]
        return sr, torch.cat(shares).mean()


# ---- data ------------------------------------------------------------------------------------------------------------


class PickledPatches(Patches):
    """Patches cut from pickled whole images, as EDSR (PyTorch) caches them: every patch unpickles its two images.

    Items are LR (n_colors, P, P) and HR (n_colors, sP, sP), contiguous float32 tensors in 0...255. Next to every image
    file, a file NAME.pickle is written. `settings.ext` must be "img".
    """

    def __init__(self, sets: Sequence[ImageSet], scale: int, n_colors: int, patches: PatchSettings):
        super().__init__(sets, scale, n_colors, patches)
        self.hr_files, self.lr_files = (
            [_pickle_image(path, n_colors) for path in paths] for paths in (self.hr, self.lr)
        )

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        image = key[0]
        self.hr, self.lr = {image: _unpickle(self.hr_files[image])}, {image: _unpickle(self.lr_files[image])}
        lr, hr = super().__getitem__(key)
        return _to_planes(lr), _to_planes(hr)


def _pickle_image(path: Path, n_colors: int) -> Path:
    target = path.with_suffix(".pickle")
    target.write_bytes(pickle.dumps(read_image(path, n_colors)))
    return target


def _unpickle(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        return pickle.load(file)


def _to_planes(patch: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, C) -> contiguous float32 (C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(patch.transpose(2, 0, 1))).float()
