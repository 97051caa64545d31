"""SMSR as it is trained: "Exploring Sparsity in Image Super-Resolution for Efficient Inference", CVPR 2021.

The differentiable network of the paper: soft masks, no index in sight. How the trained network is run, skipping
the masked work, is told in sparse.py.

Symbols, as in the paper: K modules (SMM) of L convolutions with C feature channels; m the spatial mask of a
module, the probability that a pixel is important; c_l the channel mask of its layer l, the probability that a
channel is dense; tau the temperature of the Gumbel-softmax.
"""

import re
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from model import sparse
from model.common import MEAN_SHIFTS, check_images, conv3x3, mean_color, pad_to_multiple

SPARSE, IMPORTANT = 0, 1  # index into the two spatial logits of a pixel
DENSE = 0  # index into the two channel logits of a channel


def gumbel_softmax(logits, tau, dim):
    """A relaxed one-hot sample, softmax((logits + g) / tau), g ~ Gumbel(0, 1) (paper section 3.1, eqs. 1 and 3).

    The noise is drawn in float32 whatever the precision of the logits, and is always finite.

    logits: any shape; tau: > 0; dim: the axis of the categories. Returns the shape of the logits, in 0...1.
    """
    uniform = torch.rand(logits.shape, device=logits.device)
    tiny, one = torch.finfo(torch.float32).tiny, 1 - torch.finfo(torch.float32).eps
    gumbel = -torch.log(-torch.log(uniform.clamp(tiny, one)))
    return F.softmax((logits.float() + gumbel) / tau, dim).to(logits.dtype)


class ChannelAttention(nn.Sequential):
    """Squeeze and excitation: scales each channel of x (N, C, H, W) by a number in 0...1, one an image."""

    def __init__(self, n_feats, reduction=16):
        hidden = max(n_feats // reduction, 1)
        super().__init__(nn.Conv2d(n_feats, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, n_feats, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.weights(x.mean((2, 3), keepdim=True))

    def weights(self, pooled):
        """Features averaged over the image (N, C, 1, 1) -> the factors of the channels (N, C, 1, 1)."""
        return super().forward(pooled)


def mask_branch(n_feats):
    """Features (N, C, H, W), H and W even -> spatial logits (N, 2, H, W), sparse first, important second."""
    hidden = max(n_feats // 4, 1)
    return nn.Sequential(
        conv3x3(n_feats, hidden),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        conv3x3(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(hidden, 2, 3, stride=2, padding=1, output_padding=1),
    )


class SMM(nn.Module):
    """Sparse mask module (paper section 3.2, fig. 3): L sparse mask convolutions, their collection, attention."""

    def __init__(self, n_feats=64, n_layers=4):
        super().__init__()
        self.spatial_mask = mask_branch(n_feats)
        self.channel_logits = nn.Parameter(torch.rand(1, n_feats, n_layers, 2))
        self.convs = nn.ModuleList(conv3x3(n_feats, n_feats, bias=False) for _ in range(n_layers))
        self.collect = nn.Conv2d(n_feats * n_layers, n_feats, 1)
        self.attention = ChannelAttention(n_feats)

    def sample_masks(self, x, tau):
        """Soft masks for training: m (N, 1, H, W) from the features x (N, C, H, W), c (1, C, L), both in 0...1."""
        m = gumbel_softmax(self.spatial_mask(x), tau, dim=1)[:, IMPORTANT:]
        c = gumbel_softmax(self.channel_logits, tau, dim=3)[..., DENSE]
        return m, c

    def hard_spatial_mask(self, x):
        """The mask of inference, bool (N, 1, H, W): the more probable of the two at every pixel, without noise."""
        logits = self.spatial_mask(x)
        return logits[:, IMPORTANT:] > logits[:, SPARSE:IMPORTANT]

    def hard_channel_mask(self):
        """The mask of inference, bool (C, L), true where a channel is dense; it is the same for every image."""
        return self.channel_logits[0].argmax(2) == DENSE

    def hard_masks(self, x):
        """Both masks of inference, as numbers 0 and 1 in the shapes of `sample_masks`."""
        return self.hard_spatial_mask(x).to(x.dtype), self.hard_channel_mask().to(x.dtype)[None]

    def forward(self, x, m, c):
        """Features (N, C, H, W), masks m (N, 1, H, W) and c (1, C, L) -> features (N, C, H, W).

        At important pixels a layer computes everything; elsewhere only dense channels, from dense channels. This is
        the paper's four-branch form with the branches summed: the probabilities of dense and sparse add up to 1.
        Both terms convolve the same features, so a layer is one convolution with two sets of weights.
        """
        c = c[0].unbind(1)  # L of (C,)
        f = F.relu(self.convs[0](x) * (m + (1 - m) * c[0].to(m.dtype).view(1, -1, 1, 1)))
        outputs = [f]
        for conv, c_in, c_out in zip(self.convs[1:], c[:-1], c[1:], strict=True):
            dense_pairs = torch.outer(c_out, c_in)[:, :, None, None]  # (C, C, 1, 1): dense channels from dense channels
            thin = conv.weight * dense_pairs
            full, dense = F.conv2d(f, torch.cat([conv.weight, thin]), padding=1).chunk(2, 1)  # 2 (N, C, H, W)
            f = F.relu(m * full + (1 - m) * dense)
            outputs.append(f)
        return x + self.attention(self.collect(torch.cat(outputs, 1)))


class SMSR(nn.Module):
    """The network (paper fig. 3). Images go in and out as (N, n_colors, H, W) in 0...rgb_range, any H and W >= 1.

    In eval mode a call runs the compiled sparse network, without gradients (see sparse.py). In training mode it runs
    the differentiable one with masks sampled at tau = 1; `training_forward` takes tau and gives the masks too.

    Args:
        scale: upscaling factor, a whole number >= 1
        n_feats: C, feature channels
        n_blocks: K, sparse mask modules
        n_layers: L, sparse mask convolutions a module
        n_colors: image channels
        rgb_range: largest pixel value
    """

    def __init__(self, scale, n_feats=64, n_blocks=5, n_layers=4, n_colors=3, rgb_range=255):
        super().__init__()
        self.scale, self.n_feats = scale, n_feats
        self.peak_maps = 8  # maps of features that inference holds in memory at a time, at most
        self.register_buffer("mean", mean_color(n_colors, rgb_range), persistent=False)
        self.head = nn.Sequential(conv3x3(n_colors, n_feats), nn.ReLU(inplace=True), conv3x3(n_feats, n_feats))
        self.blocks = nn.ModuleList(SMM(n_feats, n_layers) for _ in range(n_blocks))
        self.collect = nn.Sequential(nn.Conv2d(n_feats * n_blocks, n_feats, 1), nn.ReLU(), conv3x3(n_feats, n_feats))
        self.tail = nn.Sequential(conv3x3(n_feats, n_colors * scale**2), nn.PixelShuffle(scale))
        self._plan = self._planned_weights = None

    # ---- training --------------------------------------------------------------------------------------------------

    def training_forward(self, x, tau):
        """Soft masks at temperature tau. Returns the SR images and, for the sparsity loss, the K pairs (m, c)."""
        return self._forward(x, lambda block, f: block.sample_masks(f, tau))

    def masked_forward(self, x):
        """The dense computation that sparse inference must equal: hard masks, nothing skipped. Returns SR images."""
        return self._forward(x, SMM.hard_masks)[0]

    def _forward(self, x, masks_of):
        height, width = x.shape[-2:]
        x = pad_to_multiple(x - self.mean, 2)  # the mask branch halves the resolution
        head = f = self.head(x)
        outputs, masks = [], []
        for block in self.blocks:
            m, c = masks_of(block, f)
            f = block(f, m, c)
            outputs.append(f)
            masks.append((m, c))
        f = head + self.collect(torch.cat(outputs, 1))
        return self.reconstruct(f, x)[..., : height * self.scale, : width * self.scale], masks

    def reconstruct(self, f, x):
        """Features (N, C, H, W) and the input less its mean -> SR images (N, n_colors, scale H, scale W)."""
        return self.tail(f) + self.upsample(x)

    def upsample(self, x):
        """The input less its mean -> bicubically upsampled images (N, n_colors, scale H, scale W), with the mean."""
        x = (x + self.mean).contiguous()  # in channels-last memory PyTorch does this more slowly
        return F.interpolate(x, scale_factor=self.scale, mode="bicubic", align_corners=False)

    # ---- inference -------------------------------------------------------------------------------------------------

    def forward(self, x):
        """LR images -> SR images (N, n_colors, scale H, scale W), not clamped."""
        return self.training_forward(x, tau=1.0)[0] if self.training else self.inference(x)[0]

    @torch.no_grad()
    def inference(self, x, mode="auto", tile=None):
        """LR images -> SR images and what they cost (common.Work); skips the masked work. Keeps no gradients.

        mode and tile are those of `sparse.Plan`: how each module is run, and how much of an image at a time.
        Raises InputError if the images or the weights hold NaN or infinity.
        """
        check_images(x, self.mean.shape[1])
        height, width = x.shape[-2:]
        x = pad_to_multiple(x - self.mean, 2).contiguous(memory_format=torch.channels_last)
        sr, work = self._current_plan()(x, mode, tile)
        masks = tuple(mask[..., :height, :width] for mask in work.masks)
        return sr[..., : height * self.scale, : width * self.scale], replace(work, masks=masks)

    def _current_plan(self):
        def same(a, b):  # by value: writes to .data are seen, too
            return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)

        weights, planned = list(self.parameters()), self._planned_weights
        if planned is None or len(weights) != len(planned) or not all(map(same, weights, planned)):
            self._plan, self._planned_weights = sparse.Plan(self), [weight.detach().clone() for weight in weights]
        return self._plan

    def __getstate__(self):  # copies and pickles make their own plan
        return {**super().__getstate__(), "_plan": None, "_planned_weights": None}

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @staticmethod
    def hyperparameters(state_dict):
        """The constructor arguments that the shapes of a state dict tell; KeyError if it is not of this network."""
        tail = state_dict["tail.0.weight"].shape[0]
        n_feats, n_colors = state_dict["head.0.weight"].shape[:2]
        return {
            "scale": round((tail / n_colors) ** 0.5),
            "n_feats": n_feats,
            "n_blocks": state_dict["collect.0.weight"].shape[1] // n_feats,
            "n_layers": state_dict["blocks.0.collect.weight"].shape[1] // n_feats,
            "n_colors": n_colors,
        }

    @staticmethod
    def translate(state_dict):
        """Rename the keys of the published checkpoints to ours; other keys stay as they are."""
        return {_rename(key): value for key, value in state_dict.items() if not key.startswith(MEAN_SHIFTS)}


_PUBLISHED_KEYS = (
    (r"^body\.(\d+)\.spa_mask\.", r"blocks.\1.spatial_mask."),
    (r"^body\.(\d+)\.body\.ch_mask$", r"blocks.\1.channel_logits"),
    (r"^body\.(\d+)\.body\.body\.", r"blocks.\1.convs."),
    (r"^body\.(\d+)\.body\.collect\.", r"blocks.\1.collect."),
    (r"^body\.(\d+)\.ca\.conv_du\.", r"blocks.\1.attention."),
)


def _rename(key):
    for published, ours in _PUBLISHED_KEYS:
        key = re.sub(published, ours, key)
    return key
