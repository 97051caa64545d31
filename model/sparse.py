"""SMSR as it runs: a trained network compiled into a plan that skips the masked work (paper section 3.3).

The plan gathers features by index and multiplies matrices, with plain PyTorch operators and without gradients. Its
result equals that of `SMSR.masked_forward` up to the order of summation. docs/sparse-inference.md explains the method
with a figure.

Features are maps of rows, C numbers per pixel, in the order of the pixels (N, H, W). Viewed as an image (N, C, H, W)
that is the channels-last format. Maps have P + 1 rows; row P represents pixels outside the image: it is zero where a
map is read, and ignored where a map is written.

A module that runs sparsely gathers, layer by layer, the 3x3 neighborhoods of its important pixels into rows and
multiplies them by the weights. The next layer gathers from these products and from the rim, the pixels that are not
important but next to an important one. After the last layer the results are scattered into a map. A module that runs
masked dense gathers nothing: it convolves everything and then zeroes what the masks rule out.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from model.common import check_finite, pad_to_multiple
from model.matmul import build_matmul
from model.network import Cost, conv_macs
from model.tiling import Tile, map_tiles, split_into_tiles
from program import InputError
from utility import measure_once, seconds_of

INFERENCE_MODES = ("auto", "sparse", "dense")
CPU_TILE = 180  # side of a tile on a CPU, where larger maps leave the cache and the heap
GATHER_ROWS = 2048  # neighborhoods gathered at a time, so that the product finds them in the cache
COLLECT_ROWS = 8 * GATHER_ROWS  # rows collected at a time; they are a ninth as long
VECTOR = 16  # a convolution computes outputs in vectors of this length; computing a part of one costs more than all

Shape = tuple[int, int, int]  # N, H, W


class Plan:
    """A trained SMSR, compiled from its present weights.

    Call with images (N, n_colors, H, W) in 0...rgb_range. Returns SR images (N, n_colors, scale H, scale W) and their
    `Cost`. The other arguments of a call:

        mode: "sparse" gathers in every module, "dense" in none, "auto" where that is faster, by the density of the
            mask and a threshold that is measured once per device
        tile: run on strips of about tile x tile pixels and keep at most three feature maps, to save memory; the result
            is the same. None: whatever is fastest

    Raises InputError if weights or images contain NaN or infinity, weights do not fit each other, or for another mode.
    """

    peak_maps = 8  # feature maps in memory at its peak, as measured on a CPU

    def __init__(self, model: nn.Module):
        self.model = model
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise InputError(f"{name}: the weights contain NaN or infinity; use other weights")
        channels = self.n_feats = model.n_feats
        self.blocks = [BlockPlan(block, channels, f"blocks.{k}") for k, block in enumerate(model.blocks)]
        reduce = model.collect.reduce
        _check_shape("collect.0.weight", reduce.weight, (channels, channels * len(self.blocks), 1, 1))
        self.collect = [build_matmul(to_matrix(weight)) for weight in reduce.weight.chunk(len(self.blocks), 1)]
        self.head_macs = conv_macs(model.head)
        self.fixed_macs = self.head_macs + conv_macs(model.collect) + conv_macs(model.tail)
        self._workspaces = []  # those that no call is using

    def __call__(self, x: torch.Tensor, mode: str = "auto", tile: int | None = None) -> tuple[torch.Tensor, Cost]:
        if mode not in INFERENCE_MODES:
            raise InputError(f"no such mode {mode!r}; there are {', '.join(INFERENCE_MODES)}", argument="inference")
        check_finite(x)
        height, width = x.shape[-2:]
        x = pad_to_multiple(x - self.model.mean, 2).contiguous(memory_format=torch.channels_last)
        workspace = self._workspaces.pop() if self._workspaces else Workspace()  # each thread has its own
        try:
            with torch.autocast(x.device.type, enabled=False):
                sr, cost = self._run(x, mode, tile, workspace)
        finally:
            self._workspaces.append(workspace)
        masks = tuple(mask[..., :height, :width] for mask in cost.masks)
        scale = self.model.scale
        return sr[..., : height * scale, : width * scale], replace(cost, masks=masks)

    def _run(self, x, mode, tile, workspace):
        n, _, height, width = x.shape
        shape, pixels = (n, height, width), n * height * width
        save_memory = tile is not None
        tiles = split_into_tiles(*shape, CPU_TILE if tile is None and x.is_cpu else tile)
        f = head = workspace.rows("head", pixels + 1, self.n_feats, x)
        features = head if save_memory else workspace.rows("features", pixels + 1, self.n_feats, x)
        y = workspace.rows("module", pixels + 1, self.n_feats, x)
        total = workspace.rows("total", pixels, self.n_feats, x)
        head[pixels] = features[pixels] = 0
        map_tiles(self.model.head, x, tiles, halo=2, out=to_image(head[:pixels], shape))
        costs = []
        for index, block in enumerate(self.blocks):
            costs.append(block(f, y, shape=shape, tiles=tiles, mode=mode, workspace=workspace))
            self._finish_block(index, f, y, features=features, total=total, shape=shape)
            f = features
        total = to_image(total.add_(self.model.collect.reduce.bias).relu_(), shape)
        sr = self._reconstruct(x, total, None if save_memory else to_image(head[:pixels], shape), tiles)
        return sr, self.total_cost(costs, pixels, self.head_macs * pixels if save_memory else 0)

    def _finish_block(self, index, f, y, features, total, shape):
        """Write f + attention(y) to the map `features` and add its part of the 1x1 collection to `total`."""
        n, height, width = shape
        pixels = n * height * width
        pooled = to_image(y[:pixels], shape).mean((2, 3), keepdim=True)  # (N, C, 1, 1)
        for image, factors in enumerate(self.blocks[index].attention(pooled).view(n, -1)):
            for part in _parts(image * height * width, (image + 1) * height * width, COLLECT_ROWS):
                torch.addcmul(f[part], y[part], factors, out=features[part])
                _accumulate(total[part], self.collect[index](features[part]), is_first=index == 0)

    def _reconstruct(self, x, total, head, tiles):
        """Features `total` and `head`, (N, C, H, W), and the input x -> SR images; head None: compute it again."""
        model, height = self.model, x.shape[2]
        sr = model.upsample(x)
        for tile in tiles:
            wider = tile.grow(2, height)  # as far as the 3x3 convolutions `fuse` and `tail` see
            part = model.collect.fuse(wider.crop(total))
            if head is None:
                widest = wider.grow(2, height)
                part += wider.crop_from(widest, model.head(widest.crop(x)))
            else:
                part += wider.crop(head)
            tile.crop(sr, model.scale).add_(tile.crop_from(wider, model.tail(part), model.scale))
        return sr

    def total_cost(self, costs: list[Cost], pixels: int, again: int = 0) -> Cost:
        """The cost of the network from the costs of its modules; again: multiply-adds that were repeated."""
        fixed = self.fixed_macs * pixels
        return Cost(
            pixels=pixels,
            macs=fixed + sum(cost.macs for cost in costs),
            macs_dense=fixed + sum(cost.macs_dense for cost in costs),
            macs_run=fixed + again + sum(cost.macs_run for cost in costs),
            important=tuple(count for cost in costs for count in cost.important),
            active=sum(cost.active for cost in costs) / len(costs),
            masks=tuple(mask for cost in costs for mask in cost.masks),
        )


class BlockPlan:
    """One sparse mask module: from a map of features to the map that its attention weighs."""

    def __init__(self, block: nn.Module, n_feats: int, name: str):
        self.block = block
        dense = block.hard_channel_mask()  # (C, L)
        _check_shape(f"{name}.channel_logits", dense, (n_feats, len(block.convs)))
        _check_shape(f"{name}.collect.weight", block.collect.weight, (n_feats, n_feats * len(block.convs), 1, 1))
        collect = block.collect.weight.chunk(len(block.convs), 1)  # L of (C, C, 1, 1)
        self.layers = []
        for layer, conv in enumerate(block.convs):
            _check_shape(f"{name}.convs.{layer}.weight", conv.weight, (n_feats, n_feats, 3, 3))
        n_in = n_feats  # the input is all dense
        for _, weight, columns, n_out in block.dense_first():
            self.layers.append(LayerPlan(weight, columns, n_in, n_out))
            n_in = n_out
        # The 1x1 collection of the D dense channels of all layers, for pixels that are not important.
        self.dense_weights = torch.cat([to_matrix(w[:, dense[:, i]]) for i, w in enumerate(collect)], 1)  # (C, D)
        self.n_dense = self.dense_weights.shape[1]
        self.collect_dense = build_matmul(self.dense_weights, block.collect.bias.detach())
        self.dense_share = dense.float().mean().item()
        self.macs_dense = conv_macs(block.convs) + conv_macs(block.collect)
        branch = block.spatial_mask
        half = conv_macs(branch.pooled) + branch.logits.weight.numel()  # per pixel of half the resolution
        self.mask_macs = conv_macs(branch.full) + half // 4

    def attention(self, pooled: torch.Tensor) -> torch.Tensor:
        """Pooled features (N, C, 1, 1) -> the factors of the channels (N, C, 1, 1)."""
        return self.block.attention.factors(pooled)

    def __call__(
        self, f: torch.Tensor, y: torch.Tensor, *, shape: Shape, tiles: list[Tile], mode: str, workspace: "Workspace"
    ) -> Cost:
        """Run on the map f (P + 1, C) and overwrite the map y (P + 1, C)."""
        image = to_image(f[:-1], shape)
        mask = map_tiles(self.block.hard_spatial_mask, image, tiles, halo=6)[:, 0]  # (N, H, W)
        important = int(mask.sum())
        is_sparse = important < break_even(self, f) * mask.numel() if mode == "auto" else mode == "sparse"
        run = self._run_sparse if is_sparse else self._run_masked_dense
        executed = self.mask_macs * mask.numel()
        for tile in tiles:
            wider = tile.grow(len(self.layers), shape[1])  # one row per layer
            strip = Strip(wider.crop(mask), wider.pixels(shape).start, tile.pixels(shape))
            executed += run(f, y, strip, workspace)
        return self.cost(mask.numel(), important, executed, mask[:, None])

    def _run_sparse(self, f, y, strip, workspace):
        """Write the rows `strip.inner` of the map y; returns the multiply-adds executed."""
        kernel_map = build_kernel_map(strip.mask)
        collected, dense_features = self._run_layers(f, strip, kernel_map, workspace)
        self._write_back(y, strip, kernel_map, collected=collected, dense_features=dense_features)
        return self._sparse_macs(strip, len(kernel_map.pixel))

    def _run_layers(self, f, strip, kernel_map, workspace):
        """Run all layers on a strip.

        Returns the 1x1 collection of all features at important pixels (M, C), and the dense features of all layers at
        the inner pixels (len(inner), D).
        """
        pixel, rim, channels = kernel_map.pixel, kernel_map.rim, f.shape[1]
        count = len(pixel)
        # Layers after the first gather from important pixels, a zero row for pixels outside the image, and the rim.
        important_and_rim = workspace.rows("important_and_rim", count + 1 + len(rim), channels, f)
        features, rim_features = important_and_rim[:count], important_and_rim[count + 1 :]
        important_and_rim[count] = 0
        collected = workspace.rows("collected", count, channels, f)
        dense_features = workspace.rows("dense", len(strip.inner), self.n_dense, f)
        source, rows = f, strip.rows_in_map(kernel_map.neighbors, outside=len(f) - 1)
        image = to_image(f[strip.start : strip.start + strip.pixels], strip.mask.shape)
        first = 0  # the first column of this layer in dense_features
        for index, layer in enumerate(self.layers):
            if layer.n_out:
                thin = to_rows(layer.run_thin(image))  # (P, n_out)
                dense_features[:, first : first + layer.n_out] = thin[strip.inner_pixels]
                first += layer.n_out
            layer.run_full(source, rows, features, workspace)
            if layer.from_output:
                features[:, : layer.from_output] = _take(thin, pixel)[:, : layer.from_output]
            for part in _parts(0, count, COLLECT_ROWS):
                _accumulate(collected[part], layer.collect(features[part]), is_first=index == 0)
            if index == len(self.layers) - 1:
                break
            if index == 0:
                source, rows = important_and_rim, _take(kernel_map.row_of_pixel, kernel_map.neighbors)
            rim_features[:, layer.n_out : layer.n_in] = 0
            if layer.n_out:
                rim_features[:, : layer.n_out] = _take(thin, rim)
                if not layer.inputs_all_dense:
                    thin.index_copy_(0, pixel, features[:, : layer.n_out])
                image = to_image(thin, strip.mask.shape)
        return collected, dense_features

    def _write_back(self, y, strip, kernel_map, collected, dense_features):
        """Write the collected features of the inner pixels to the map y: dense ones everywhere, then important ones."""
        inner, outside = strip.inner, len(y) - 1
        y[inner.start : inner.stop] = self.collect_dense(dense_features)
        rows = kernel_map.pixel + strip.start
        if len(inner) < strip.pixels:
            is_halo = (rows < inner.start) | (rows >= inner.stop)  # another strip writes these pixels
            rows = rows.masked_fill(is_halo, outside)
        y.index_copy_(0, rows, collected.add_(self.block.collect.bias))

    def _sparse_macs(self, strip, count):
        channels = len(self.dense_weights)
        thin = sum(layer.thin.numel() for layer in self.layers)
        full = sum(layer.full_macs + channels**2 for layer in self.layers)
        return strip.pixels * thin + count * full + len(strip.inner) * self.n_dense * channels

    def _run_masked_dense(self, f, y, strip, workspace):
        """The same as `_run_sparse`, by convolving everything and applying the masks afterwards."""
        out = y[strip.inner.start : strip.inner.stop]
        image = to_image(f[strip.start : strip.start + strip.pixels], strip.mask.shape)
        important = strip.mask[:, None].to(f.dtype)  # (n, 1, h, w)
        unimportant = 1 - important
        executed = 0
        for index, layer in enumerate(self.layers):
            n_out, features = layer.n_out, image
            image = F.relu_(F.conv2d(image, layer.weight, padding=1))
            executed += strip.pixels * layer.weight.numel() + len(strip.inner) * f.shape[1] ** 2
            if layer.inputs_all_dense:
                image[:, n_out:].mul_(important)
            else:
                image.mul_(important)
                if n_out:
                    image[:, :n_out].addcmul_(layer.run_thin(features[:, : layer.n_in]), unimportant)
                    executed += strip.pixels * layer.thin.numel()
            _accumulate(out, layer.collect(to_rows(image)[strip.inner_pixels]), is_first=index == 0)
        out += self.block.collect.bias
        return executed

    def cost(self, pixels: int, important: int, executed: int, mask: torch.Tensor) -> Cost:
        """The cost of this module for a mask (N, 1, H, W) with some important pixels."""
        masking = self.mask_macs * pixels
        return Cost(
            pixels=pixels,
            macs=masking + sum(layer.macs(pixels, important) for layer in self.layers),
            macs_dense=masking + self.macs_dense * pixels,
            macs_run=executed,
            important=(important,),
            active=important + (pixels - important) * self.dense_share,
            masks=(mask,),
        )


class LayerPlan:
    """The weights of one sparse mask convolution and of its part of the 1x1 collection.

    weight (C, C, 3, 3) and collect (C, C, 1, 1) have dense channels first: n_in of the inputs, n_out of the outputs.
    """

    def __init__(self, weight: torch.Tensor, collect: torch.Tensor, n_in: int, n_out: int):
        channels = weight.shape[0]
        self.n_in, self.n_out = n_in, n_out
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.inputs_all_dense = (
            n_in == channels
        )  # then dense outputs at important pixels are the same as everywhere else
        # Everywhere, dense outputs from dense inputs; at important pixels, all outputs that are not the same there.
        self.thin = weight[:n_out, :n_in].contiguous(memory_format=torch.channels_last)
        self.from_output = n_out // VECTOR * VECTOR if self.inputs_all_dense else 0
        full = to_matrix(self.weight[self.from_output :])  # (C', 9 C)
        self.full, self.full_macs = build_matmul(full, relu=True), full.numel()
        self.collect_weight = to_matrix(collect)  # (C, C)
        self.collect = build_matmul(self.collect_weight)

    def run_thin(self, image: torch.Tensor) -> torch.Tensor:
        """Dense channels from dense channels everywhere: (n, n_in, h, w) -> (n, n_out, h, w)."""
        if self.n_in == 0:
            return image.new_zeros(len(image), self.n_out, *image.shape[2:])
        return F.relu_(F.conv2d(image, self.thin, padding=1))

    def run_full(
        self, source: torch.Tensor, rows: torch.Tensor, features: torch.Tensor, workspace: "Workspace"
    ) -> None:
        """Convolve the neighborhoods `rows` (M, 9) of `source` and write the outputs from `from_output` on.

        `source` may contain `features` (M, C), so nothing is written before everything is gathered.
        """
        parts = _parts(0, len(rows), GATHER_ROWS)
        products = [self.full(gather(source, rows[part], workspace)) for part in parts]
        for part, product in zip(parts, products, strict=True):
            features[part, self.from_output :] = product

    def macs(self, pixels: int, important: int) -> int:
        """Multiply-adds that the masks require for this many pixels, some of them important."""
        channels = len(self.weight)
        sparse = channels - self.n_out if self.inputs_all_dense else channels
        convolved = pixels * self.thin.numel() + important * self.weight[:sparse].numel()
        collected = pixels * self.n_out + important * (channels - self.n_out)
        return convolved + collected * channels


@dataclass(frozen=True)
class Strip:
    """The part of a map that a module runs at a time.

    mask   bool (n, h, w), the spatial mask of its P pixels, halo included
    start  the row of the map that its first pixel has
    inner  the rows of the map that it writes: those without the halo
    """

    mask: torch.Tensor
    start: int
    inner: range

    @property
    def pixels(self) -> int:
        return self.mask.numel()

    @property
    def inner_pixels(self) -> slice:
        """Which of the P pixels are inner ones."""
        return slice(self.inner.start - self.start, self.inner.stop - self.start)

    def rows_in_map(self, pixel: torch.Tensor, outside: int) -> torch.Tensor:
        """Pixels 0...P - 1, P outside the image -> their rows in the map, whose zero row is `outside`."""
        if outside == self.pixels:
            return pixel
        return torch.where(pixel == self.pixels, outside, pixel + self.start)


@dataclass(frozen=True)
class KernelMap:
    """Which features the layers of a module gather for the important pixels of a mask.

    pixel         (M,) the important pixels, of 0...P - 1
    rim           (R,) pixels that are not important but next to an important one
    neighbors     (M, 9) the pixels around each important pixel and itself; P outside the image
    row_of_pixel  (P + 1,) the row of a pixel among important pixels (0...M - 1), a zero row (M), and the rim
    """

    pixel: torch.Tensor
    rim: torch.Tensor
    neighbors: torch.Tensor
    row_of_pixel: torch.Tensor


def build_kernel_map(mask: torch.Tensor) -> KernelMap:
    """The kernel map of a mask, bool (n, h, w)."""
    pixel = mask.flatten().nonzero()[:, 0]
    rim = (_dilate(mask) & ~mask).flatten().nonzero()[:, 0]
    count = len(pixel)
    row_of_pixel = torch.full((mask.numel() + 1,), count, device=mask.device)
    row_of_pixel[pixel] = torch.arange(count, device=mask.device)
    row_of_pixel[rim] = torch.arange(count + 1, count + 1 + len(rim), device=mask.device)
    return KernelMap(pixel, rim, find_neighbors(mask, pixel), row_of_pixel)


class Workspace:
    """Reusable memory: named tensors, each as large as the largest request so far."""

    def __init__(self):
        self._tensors = {}

    def rows(self, name: str, count: int, channels: int, like: torch.Tensor) -> torch.Tensor:
        """An uninitialized tensor (count, channels) with the dtype and device of `like`."""
        size = count * channels
        tensor = self._tensors.get(name)
        if tensor is None or tensor.numel() < size:
            self._tensors.pop(name, None)
            with torch.inference_mode(False):  # else it could not be written to outside of that mode
                tensor = self._tensors[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return tensor[:size].view(count, channels)


def find_neighbors(mask: torch.Tensor, pixel: torch.Tensor) -> torch.Tensor:
    """(M, 9): the pixels around each of `pixel` (M,) and itself, 0...P - 1, or P outside; mask is (n, h, w)."""
    n, height, width = mask.shape
    inside = torch.arange(-mask.numel(), 0, device=mask.device).view(n, height, width)
    bordered = F.pad(inside, (1, 1, 1, 1)).flatten() + mask.numel()  # pads with 0: export keeps no other padding value
    # The index of a pixel in the bordered image: each row and each image before it shifts it.
    index = pixel + 2 * (pixel // width) + (2 * width + 4) * (pixel // (height * width)) + width + 3
    line = torch.arange(3, device=mask.device)
    offsets = ((line[:, None] - 1) * (width + 2) + line - 1).flatten()
    return _take(bordered, index[:, None] + offsets)


def _dilate(mask):
    """The mask (n, h, w) with the eight neighbors of its true pixels; `max_pool2d` is four times as slow."""
    bordered = F.pad(mask, (1, 1, 1, 1))
    lines = bordered[:, :-2] | bordered[:, 1:-1] | bordered[:, 2:]
    return lines[..., :-2] | lines[..., 1:-1] | lines[..., 2:]


def gather(source: torch.Tensor, neighbors: torch.Tensor, workspace: Workspace) -> torch.Tensor:
    """Gather the rows `neighbors` (M, 9) of `source` (., C) into rows (M, 9 C)."""
    gathered = workspace.rows("gathered", neighbors.numel(), source.shape[1], source)
    torch.index_select(source, 0, neighbors.flatten(), out=gathered)
    return gathered.view(len(neighbors), -1)


def break_even(plan: BlockPlan, f: torch.Tensor) -> float:
    """The share of important pixels above which a module runs faster masked dense, for a map like f (., C).

    Measured once per device, dtype, number of channels, layers and threads, on the `BlockPlan` that asks first. That
    takes a few tenths of a second.
    """
    key = "break-even", f.device, f.dtype, f.shape[1], len(plan.layers), torch.get_num_threads()
    return measure_once(key, lambda: _measure_break_even(plan, f))


def _measure_break_even(plan, like):
    shape = (1, 128, 128)
    pixels, workspace = math.prod(shape), Workspace()
    with torch.inference_mode(False):
        f, y = (torch.zeros(pixels + 1, like.shape[1], dtype=like.dtype, device=like.device) for _ in range(2))
        column = torch.arange(128, device=like.device).expand(shape) % 32
    quarter, three_quarters = (Strip(column < width, 0, range(pixels)) for width in (8, 24))
    calls = [
        functools.partial(run, f, y, strip, workspace)
        for run, strip in (
            (plan._run_sparse, quarter),
            (plan._run_sparse, three_quarters),
            (plan._run_masked_dense, quarter),
        )
    ]
    times = [[seconds_of(call, like.device) for call in calls] for _ in range(9)][2:]
    sparser, denser, masked_dense = (min(column) for column in zip(*times, strict=True))
    return 0.25 + 0.5 * (masked_dense - sparser) / max(denser - sparser, 1e-9)  # sparse time is linear in the share


def _parts(start: int, stop: int, longest: int) -> list[slice]:
    """Split start...stop into slices of equal length (within one) that are at most `longest`."""
    length = stop - start
    count = -(-length // longest)
    return [slice(start + length * i // count, start + length * (i + 1) // count) for i in range(count)]


def _accumulate(total, addend, is_first):
    if is_first:
        total.copy_(addend)
    else:
        total.add_(addend)


def to_matrix(weight: torch.Tensor) -> torch.Tensor:
    """Weights of a convolution (C', C, h, w) -> (C', h w C), in the order of channels-last memory."""
    return weight.permute(0, 2, 3, 1).flatten(1).contiguous()


def _take(source, index):
    """source[index]; on a CPU, indexing is slower than index_select."""
    return source.index_select(0, index.flatten()).view(*index.shape, *source.shape[1:])


def to_image(rows: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Rows (n h w, C) of the pixels (n, h, w) -> the image (n, C, h, w), channels-last; the same memory."""
    return rows.view(*shape, rows.shape[1]).permute(0, 3, 1, 2)


def to_rows(image: torch.Tensor) -> torch.Tensor:
    """The reverse: (n, C, h, w) -> (n h w, C); a copy only if the image is not channels-last."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _check_shape(name, tensor, expected):
    if tuple(tensor.shape) != expected:
        raise InputError(f"{name}: the weights are {tuple(tensor.shape)}, not {expected}; this network cannot run")
