"""SMSR as it is trained: "Exploring Sparsity in Image Super-Resolution for Efficient Inference", CVPR 2021.

The differentiable network of the paper, with soft masks and no indices. sparse.py runs a trained network and skips the
masked work.

Symbols, as in the paper: K modules (SMM) of L convolutions with C feature channels; m is the spatial mask of a module,
the probability that a pixel is important; c_l is the channel mask of its layer l, the probability that a channel is
dense; tau is the temperature of the Gumbel-softmax.
"""

import re
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from model import engines, sparse
from model.common import check_images, conv3x3, pad_to_multiple
from model.network import Cost, Network, count_modules, drop_mean_shifts, stored_settings
from model.snapshot import Snapshot

SPARSE, IMPORTANT = 0, 1  # index into the two spatial logits of a pixel
DENSE = 0  # index into the two channel logits of a channel

Masks = tuple[torch.Tensor, torch.Tensor]  # of a module: m (N, 1, H, W) and c (1, C, L)


def gumbel_softmax(logits: torch.Tensor, tau: float | torch.Tensor, dim: int) -> torch.Tensor:
    """A relaxed one-hot sample, softmax((logits + g) / tau), g ~ Gumbel(0, 1) (paper section 3.1, eqs. 1 and 3).

    The noise is drawn in float32 whatever the precision of the logits, and is always finite.

    logits: any shape; tau: > 0; dim: the axis of the categories. Returns the shape of the logits, in 0...1.
    """
    uniform = torch.rand(logits.shape, device=logits.device)
    tiny, one = torch.finfo(torch.float32).tiny, 1 - torch.finfo(torch.float32).eps
    gumbel = -torch.log(-torch.log(uniform.clamp(tiny, one)))
    return F.softmax((logits.float() + gumbel) / tau, dim).to(logits.dtype)


# The parts below are nn.Sequential with a name for each part, so that state dicts keep the published numbered keys.


class ChannelAttention(nn.Sequential):
    """Squeeze and excitation: scale each channel of x (N, C, H, W) by a factor in 0...1, one per image."""

    def __init__(self, n_feats: int, reduction: int = 16):
        hidden = max(n_feats // reduction, 1)
        super().__init__(nn.Conv2d(n_feats, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, n_feats, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factors(x.mean((2, 3), keepdim=True))

    def factors(self, pooled: torch.Tensor) -> torch.Tensor:
        """Features averaged over the image (N, C, 1, 1) -> the factors of the channels (N, C, 1, 1)."""
        return super().forward(pooled)


class MaskBranch(nn.Sequential):
    """Features (N, C, H, W), H and W even -> spatial logits (N, 2, H, W), sparse first, important second."""

    def __init__(self, n_feats: int):
        hidden = max(n_feats // 4, 1)
        super().__init__(
            conv3x3(n_feats, hidden),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
            conv3x3(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(hidden, 2, 3, stride=2, padding=1, output_padding=1),
        )

    @property
    def full(self) -> nn.Conv2d:
        """The convolution at full resolution."""
        return self[0]

    @property
    def pooled(self) -> nn.Conv2d:
        """The convolution at half the resolution."""
        return self[3]

    @property
    def logits(self) -> nn.ConvTranspose2d:
        """The transposed convolution, from half to full resolution."""
        return self[5]


class SMM(nn.Module):
    """Sparse mask module (paper section 3.2, fig. 3): L sparse mask convolutions, their 1x1 collection, attention."""

    n_dense: Sequence[int] | None = None  # dense channels of each layer, if the channel masks are frozen
    has_frozen_spatial_mask = False

    def __init__(self, n_feats: int = 64, n_layers: int = 4):
        super().__init__()
        self.spatial_mask = MaskBranch(n_feats)
        self.channel_logits = nn.Parameter(torch.rand(1, n_feats, n_layers, 2))
        self.convs = nn.ModuleList(conv3x3(n_feats, n_feats, bias=False) for _ in range(n_layers))
        self.collect = nn.Conv2d(n_feats * n_layers, n_feats, 1)
        self.attention = ChannelAttention(n_feats)

    def sample_masks(self, x: torch.Tensor, tau: float | torch.Tensor) -> Masks:
        """Masks for training, in 0...1: m (N, 1, H, W) from the features x (N, C, H, W), and c (1, C, L)."""
        if self.has_frozen_spatial_mask:
            m = self.hard_spatial_mask(x).to(x.dtype)
        else:
            m = gumbel_softmax(self.spatial_mask(x), tau, dim=1)[:, IMPORTANT:]
        if self.n_dense is None:
            return m, gumbel_softmax(self.channel_logits, tau, dim=3)[..., DENSE]
        return m, self.hard_channel_mask().to(self.channel_logits.dtype)[None]

    def freeze_spatial_mask(self) -> None:
        """Train with the spatial mask of inference from now on. It still depends on the features, which change."""
        self.spatial_mask.requires_grad_(False)
        self.has_frozen_spatial_mask = True

    @torch.no_grad()
    def freeze_channels(self) -> None:
        """Train with the channel masks of inference from now on, which takes less work in `forward`.

        The channels are reordered as by `dense_first`; weights that are loaded later must have the same order.
        """
        orders, weights, columns, self.n_dense = zip(*self.dense_first(), strict=True)
        for layer, (order, conv, weight) in enumerate(zip(orders, self.convs, weights, strict=True)):
            conv.weight.copy_(weight)
            self.channel_logits[:, :, layer] = self.channel_logits[:, order, layer]
        self.collect.weight.copy_(torch.cat(columns, 1))
        self.channel_logits.requires_grad_(False)

    def dense_first(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
        """Each layer with its channels in the order dense, then sparse, which does not change what the module computes.

        Yields the order of the channels (C,), the weights (C, C, 3, 3) of the layer, its columns (C, C, 1, 1) of
        `collect`, and the number of dense channels.
        """
        is_dense, before = self.hard_channel_mask(), slice(None)
        columns = self.collect.weight.chunk(len(self.convs), 1)
        for layer, conv in enumerate(self.convs):
            order = is_dense[:, layer].int().argsort(descending=True, stable=True)
            yield order, conv.weight[order][:, before], columns[layer][:, order], int(is_dense[:, layer].sum())
            before = order

    def mask_parameters(self) -> list[nn.Parameter]:
        """The parameters on which only the masks depend."""
        return [*self.spatial_mask.parameters(), self.channel_logits]

    def full_masks(self, x: torch.Tensor) -> Masks:
        """Masks that keep everything, in the shapes of `sample_masks`: all of m and c is 1.

        They give every parameter of the masks that is not frozen a gradient, 0, which several processes need.
        """
        one = 1 + 0 * sum(parameter.sum() for parameter in self.mask_parameters())
        return one.expand(len(x), 1, *x.shape[2:]), one.expand(self.channel_logits.shape[:3])

    def hard_spatial_mask(self, x: torch.Tensor) -> torch.Tensor:
        """The spatial mask of inference, bool (N, 1, H, W): the larger logit of each pixel, without noise."""
        logits = self.spatial_mask(x)
        return logits[:, IMPORTANT:] > logits[:, SPARSE:IMPORTANT]

    def hard_channel_mask(self) -> torch.Tensor:
        """The channel mask of inference, bool (C, L), true where a channel is dense; the same for every image."""
        return self.channel_logits[0].argmax(2) == DENSE

    def hard_masks(self, x: torch.Tensor) -> Masks:
        """Both masks of inference as numbers 0 and 1, in the shapes of `sample_masks`."""
        return self.hard_spatial_mask(x).to(x.dtype), self.hard_channel_mask().to(x.dtype)[None]

    def forward(self, x: torch.Tensor, m: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Features (N, C, H, W), masks m (N, 1, H, W) and c (1, C, L) -> features (N, C, H, W).

        At important pixels a layer computes everything; elsewhere it computes only dense channels, from dense channels.
        This is the paper's four-branch form with the branches summed: the probabilities of dense and sparse add up to
        1. Both terms convolve the same features, so a layer is one convolution with two sets of weights. If the channel
        masks are frozen, the second set has the dense channels only.
        """
        c = c[0].unbind(1)  # L of (C,)
        f = F.relu(self.convs[0](x) * (m + (1 - m) * c[0].to(m.dtype).view(1, -1, 1, 1)))
        outputs = [f]
        n_feats = len(c[0])
        for layer, conv in enumerate(self.convs[1:], start=1):
            n = n_feats if self.n_dense is None else self.n_dense[layer]  # only these channels, the first, may be dense
            dense_pairs = torch.outer(c[layer][:n], c[layer - 1])[:, :, None, None]  # (n, C, 1, 1)
            thin = conv.weight[:n] * dense_pairs  # dense channels from dense channels
            full, dense = F.conv2d(f, torch.cat([conv.weight, thin]), padding=1).split([n_feats, n], 1)
            dense = (1 - m) * dense
            if n < n_feats:
                dense = F.pad(dense, (0, 0, 0, 0, 0, n_feats - n))
            f = F.relu(m * full + dense)
            outputs.append(f)
        return x + self.attention(self.collect(torch.cat(outputs, 1)))

    def unmasked_forward(self, x: torch.Tensor) -> torch.Tensor:
        """What `forward` computes if all of m is 1, with half of its work: (N, C, H, W) -> (N, C, H, W)."""
        f, outputs = x, []
        for conv in self.convs:
            f = F.relu(conv(f))
            outputs.append(f)
        return x + self.attention(self.collect(torch.cat(outputs, 1)))


class Collect(nn.Sequential):
    """The outputs of K modules, (N, K C, H, W) -> (N, C, H, W)."""

    def __init__(self, n_feats: int, n_blocks: int):
        super().__init__(nn.Conv2d(n_feats * n_blocks, n_feats, 1), nn.ReLU(), conv3x3(n_feats, n_feats))

    @property
    def reduce(self) -> nn.Conv2d:
        """The 1x1 convolution that a ReLU follows."""
        return self[0]

    @property
    def fuse(self) -> nn.Conv2d:
        """The 3x3 convolution."""
        return self[2]


class Tail(nn.Sequential):
    """Features (N, C, H, W) -> images (N, n_colors, scale H, scale W)."""

    def __init__(self, n_feats: int, n_colors: int, scale: int):
        super().__init__(conv3x3(n_feats, n_colors * scale**2), nn.PixelShuffle(scale))

    @property
    def conv(self) -> nn.Conv2d:
        return self[0]

    @property
    def shuffle(self) -> nn.PixelShuffle:
        return self[1]


class SMSR(Network):
    """The network (paper fig. 3). Images go in and out as (N, n_colors, H, W) in 0...rgb_range, any H and W >= 1.

    In eval mode a call runs the compiled sparse network, without gradients (see sparse.py). In training mode it runs
    the differentiable network with masks sampled at tau = 1; `training_forward` takes tau and returns the masks too.

    Args:
        scale: upscaling factor, an integer >= 1
        n_feats: C, feature channels
        n_blocks: K, sparse mask modules
        n_layers: L, sparse mask convolutions per module
        n_colors: image channels
        rgb_range: largest pixel value, saved with the weights
    """

    def __init__(
        self,
        scale: int,
        n_feats: int = 64,
        n_blocks: int = 5,
        n_layers: int = 4,
        n_colors: int = 3,
        rgb_range: float = 255,
    ):
        super().__init__(scale, n_feats, n_colors, rgb_range)
        self.head = nn.Sequential(conv3x3(n_colors, n_feats), nn.ReLU(inplace=True), conv3x3(n_feats, n_feats))
        self.blocks = nn.ModuleList(SMM(n_feats, n_layers) for _ in range(n_blocks))
        self.collect = Collect(n_feats, n_blocks)
        self.tail = Tail(n_feats, n_colors, scale)
        self._engine, self._engine_name, self._planned = None, "auto", None

    # ---- training --------------------------------------------------------------------------------------------------

    def training_forward(self, x: torch.Tensor, tau: float | torch.Tensor | None) -> tuple[torch.Tensor, list[Masks]]:
        """Run with soft masks at temperature tau, or without masks if it is None.

        Returns the SR images and, for the sparsity loss, K pairs (m, c).
        """
        masks = []

        def run(block, f):
            masks.append(block.full_masks(f) if tau is None else block.sample_masks(f, tau))
            return block.unmasked_forward(f) if tau is None else block(f, *masks[-1])

        return self._forward(x, run), masks

    def masked_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute everything, then apply the hard masks: the reference of sparse inference. Returns SR images."""
        return self._forward(x, lambda block, f: block(f, *block.hard_masks(f)))

    def unmasked_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute everything, as if all masks were 1. Returns SR images."""
        return self._forward(x, SMM.unmasked_forward)

    def copy_mask(self, source: int, target: int) -> None:
        self.blocks[target].spatial_mask.load_state_dict(self.blocks[source].spatial_mask.state_dict())

    def freeze_masks(self, spatial: bool) -> None:
        for block in self.blocks:
            block.freeze_channels()
            if spatial:
                block.freeze_spatial_mask()

    def mask_parameters(self) -> list[nn.Parameter]:
        return [parameter for block in self.blocks for parameter in block.mask_parameters()]

    def _forward(self, x: torch.Tensor, run: Callable[[SMM, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        height, width = x.shape[-2:]
        x = pad_to_multiple(x - self.mean, 2)  # the mask branch halves the resolution
        head = f = self.head(x)
        outputs = []
        for block in self.blocks:
            f = run(block, f)
            outputs.append(f)
        f = head + self.collect(torch.cat(outputs, 1))
        return self.reconstruct(f, x)[..., : height * self.scale, : width * self.scale]

    def reconstruct(self, f: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Features (N, C, H, W) and the input without its mean -> SR images (N, n_colors, scale H, scale W)."""
        return self.tail(f) + self.upsample(x)

    def upsample(self, x: torch.Tensor) -> torch.Tensor:
        """The input without its mean -> bicubically upsampled images (N, n_colors, scale H, scale W), with the mean."""
        x = (x + self.mean).contiguous()  # PyTorch is slower at this in channels-last memory
        return F.interpolate(x, scale_factor=self.scale, mode="bicubic", align_corners=False)

    # ---- inference -------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """LR images -> SR images (N, n_colors, scale H, scale W), not clamped."""
        return self.training_forward(x, tau=1.0)[0] if self.training else self.inference(x)[0]

    @torch.no_grad()
    def inference(self, x: torch.Tensor, mode: str = "auto", tile: int | None = None) -> tuple[torch.Tensor, Cost]:
        """LR images -> SR images and their cost, without gradients; the masked work is skipped.

        mode and tile are described in `sparse.Plan`: how each module runs, and how much of an image at a time.
        Raises InputError if the images or the weights contain NaN or infinity; on a GPU, reading the cost does.
        """
        check_images(x, self.n_colors)
        return self._current_engine()(x, mode, tile)

    def train(self, mode: bool = True) -> "SMSR":
        """As in nn.Module; the network is compiled again, because not every optimizer tells that it changes weights."""
        if mode:
            self._forget_plan()
        return super().train(mode)

    def _apply(self, *args, **options):  # also moves and converts weights, perhaps into memory that others had before
        self._forget_plan()
        return super()._apply(*args, **options)

    def _forget_plan(self):
        self._engine = self._planned = None

    def use_engine(self, name: str) -> None:
        """Choose what runs inference: "auto", the fastest engine here, or another of engines.NAMES.

        The next call of `inference` raises InputError if that engine cannot run.
        """
        self._engine_name = name
        self._forget_plan()

    @property
    def engine(self) -> str:
        """The name of the engine that runs inference, of engines.NAMES. Raises InputError if the chosen one cannot."""
        return engines.name_of(self._current_engine())

    @property
    def peak_maps(self) -> int:
        """Feature maps that inference holds in memory at its peak."""
        engine = self._engine or self._current_engine()  # whether weights have changed is checked by `inference`
        return engine.peak_maps

    def _current_engine(self) -> engines.Engine:
        if self._planned is None or not self._planned.matches():
            self._engine = engines.pick_engine(sparse.Plan(self), self._engine_name)
            self._planned = Snapshot(self)
        return self._engine

    def __getstate__(self):  # copies and pickles build their own plan
        return {**super().__getstate__(), "_engine": None, "_planned": None}

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @staticmethod
    def hyperparameters(state_dict: dict[str, torch.Tensor]) -> dict[str, float]:
        """The constructor arguments that a translated state dict records; KeyError if it is not of this network."""
        tail = state_dict["tail.0.weight"].shape[0]
        n_feats, n_colors = state_dict["head.0.weight"].shape[:2]
        return {
            "scale": round((tail / n_colors) ** 0.5),
            "n_feats": n_feats,
            "n_blocks": count_modules(state_dict, "blocks."),
            "n_layers": count_modules(state_dict, "blocks.0.convs."),
            "n_colors": n_colors,
            **stored_settings(SMSR, state_dict),
        }

    @staticmethod
    def translate(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename the keys of the published checkpoints to ours; other keys stay the same."""
        return {_rename(key): value for key, value in drop_mean_shifts(state_dict).items()}


_PUBLISHED_KEYS = (
    (r"^body\.(\d+)\.spa_mask\.", r"blocks.\1.spatial_mask."),
    (r"^body\.(\d+)\.body\.ch_mask$", r"blocks.\1.channel_logits"),
    (r"^body\.(\d+)\.body\.body\.", r"blocks.\1.convs."),
    (r"^body\.(\d+)\.body\.collect\.", r"blocks.\1.collect."),
    (r"^body\.(\d+)\.ca\.conv_du\.", r"blocks.\1.attention."),
)


def _rename(key: str) -> str:
    for published, ours in _PUBLISHED_KEYS:
        key = re.sub(published, ours, key)
    return key
