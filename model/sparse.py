"""SMSR as it is run: a trained network compiled into a plan that skips the masked work (paper section 3.3).

Indices, gathers and matrix products of what was gathered, with plain PyTorch operators and no gradient. The plan
equals `SMSR.masked_forward` up to the order of summation. docs/sparse-inference.md tells the method with a figure.

Features are maps of rows, C numbers a pixel, in the order of the pixels (N, H, W), which as an image (N, C, H, W) is
the channels-last format. A map of P pixels has a row P more: of zeros where it is read, of no interest where it is
written. It stands for what lies outside the image.

In the packed form a module gathers, layer by layer, the 3x3 neighbourhoods of its important pixels into rows and
multiplies them by the weights. The next layer gathers from the products and from the rim, which is what is not
important but beside a pixel that is; after the last they are scattered into a map. In the dense form nothing is
gathered, and what the masks deny is multiplied by zero.
"""

import functools

import torch
import torch.nn.functional as F

from model.common import Work, by_strips, conv_macs, strips
from model.product import build_product
from utility import InputError, measured_once, seconds_of

MODES = ("auto", "sparse", "dense")
TILE = 180  # side of a tile on a CPU, where maps of more pixels leave the cache and the heap
ROWS = 2048  # neighbourhoods gathered at a time, which the product then finds in the cache
COLLECTED = 8 * ROWS  # rows collected at a time, which are a ninth as long
VECTOR = 16  # a convolution computes outputs in vectors of so many; a part of one costs more than all of it


class Plan:
    """A trained SMSR, compiled from its weights as they are now.

    Call with images (N, n_colors, H, W) less their mean, H and W even.

    Args:
        mode: "sparse" packs in every module, "dense" in none, "auto" where that is quicker, by the density of the
            mask and a threshold measured once a device
        tile: run on strips of about tile x tile pixels and keep no more than three maps of features, to need less
            memory; the result is the same. None: as is quickest

    Returns SR images (N, n_colors, scale H, scale W) and the `Work` they took.

    Raises InputError if the weights hold NaN or infinity, or do not fit each other, and for another mode.
    """

    def __init__(self, model):
        self.model = model
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise InputError(f"{name}: the weights hold NaN or infinity; they cannot be run")
        n_feats = model.head[-1].out_channels
        self.blocks = [BlockPlan(block, n_feats, f"blocks.{k}") for k, block in enumerate(model.blocks)]
        _check_shape("collect.0.weight", model.collect[0].weight, (n_feats, n_feats * len(self.blocks), 1, 1))
        self.collect = [build_product(to_matrix(w)) for w in model.collect[0].weight.chunk(len(self.blocks), 1)]
        self.n_feats, self.head_macs = n_feats, conv_macs(model.head)
        self.fixed_macs = self.head_macs + conv_macs(model.collect) + conv_macs(model.tail)
        self._spaces = []  # workspaces that no call is using

    def __call__(self, x, mode="auto", tile=None):
        if mode not in MODES:
            raise InputError(f"--inference {mode}: no such mode; there are {', '.join(MODES)}")
        space = self._spaces.pop() if self._spaces else Workspace()  # of its own for each thread
        try:
            with torch.autocast(x.device.type, enabled=False):
                return self._run(x, mode, tile, space)
        finally:
            self._spaces.append(space)

    def _run(self, x, mode, tile, space):
        model, channels = self.model, self.n_feats
        n, _, height, width = x.shape
        shape, pixels = (n, height, width), n * height * width
        frugal = tile is not None
        cuts = strips(*shape, TILE if tile is None and x.is_cpu else tile)
        f = head = space.rows("head", pixels + 1, channels, x)
        features = head if frugal else space.rows("features", pixels + 1, channels, x)  # what modules write
        y = space.rows("module", pixels + 1, channels, x)
        total = space.rows("total", pixels, channels, x)
        head[pixels] = features[pixels] = 0
        by_strips(model.head, x, cuts, halo=2, out=to_image(head[:pixels], shape))
        works = []
        for plan, collect in zip(self.blocks, self.collect, strict=True):
            works.append(plan(f, y, shape, cuts, mode, space))
            factors = plan.attention(to_image(y[:pixels], shape).mean((2, 3), keepdim=True))  # (N, C, 1, 1)
            for image, factor in enumerate(factors.view(n, channels)):
                for part in _parts(image * height * width, (image + 1) * height * width, COLLECTED):
                    torch.addcmul(f[part], y[part], factor, out=features[part])
                    _accumulate(total[part], collect(features[part]), first_time=len(works) == 1)
            f = features
        total = to_image(total.add_(model.collect[0].bias).relu_(), shape)
        sr = model.upsample(x)
        for cut in cuts:
            near = cut.widened(2, height)  # as far as collect[2] and the tail see
            part = model.collect[2](near.of(total))
            if frugal:
                wider = near.widened(2, height)
                part += near.within(wider, model.head(wider.of(x)))
            else:
                part += near.of(to_image(head[:pixels], shape))
            cut.of(sr, model.scale).add_(cut.within(near, model.tail(part), model.scale))
        return sr, self._total(works, pixels, self.head_macs * pixels if frugal else 0)

    def _total(self, works, pixels, again):
        fixed = self.fixed_macs * pixels
        return Work(
            pixels=pixels,
            macs=fixed + sum(work.macs for work in works),
            macs_dense=fixed + sum(work.macs_dense for work in works),
            macs_run=fixed + again + sum(work.macs_run for work in works),
            important=tuple(count for work in works for count in work.important),
            active=sum(work.active for work in works) / len(works),
            masks=tuple(mask for work in works for mask in work.masks),
        )


class BlockPlan:
    """One sparse mask module: from a map of features to the map that its attention weighs."""

    def __init__(self, block, n_feats, name):
        self.block = block
        dense = block.hard_channel_mask()  # (C, L)
        _check_shape(f"{name}.channel_logits", dense, (n_feats, len(block.convs)))
        _check_shape(f"{name}.collect.weight", block.collect.weight, (n_feats, n_feats * len(block.convs), 1, 1))
        collect = block.collect.weight.chunk(len(block.convs), 1)  # L of (C, C, 1, 1)
        self.layers = []
        n_in, order_in = n_feats, torch.arange(n_feats, device=dense.device)  # the input is all dense
        for layer, conv in enumerate(block.convs):
            _check_shape(f"{name}.convs.{layer}.weight", conv.weight, (n_feats, n_feats, 3, 3))
            order = torch.argsort(dense[:, layer].int(), descending=True, stable=True)  # dense channels first
            n_out = int(dense[:, layer].sum())
            self.layers.append(LayerPlan(conv.weight[order][:, order_in], collect[layer][:, order], n_in, n_out))
            n_in, order_in = n_out, order
        # What a pixel that is not important collects, of its D dense channels.
        self.dense_weights = torch.cat([to_matrix(w[:, dense[:, i]]) for i, w in enumerate(collect)], 1)  # (C, D)
        self.n_dense = self.dense_weights.shape[1]
        self.collect_dense = build_product(self.dense_weights, block.collect.bias.detach())
        self.dense_share = dense.float().mean().item()
        self.macs_dense = conv_macs(block.convs) + conv_macs(block.collect)
        pooled = block.spatial_mask[3:]  # at half the resolution, the transposed convolution included
        transposed = pooled[2].weight.numel()
        self.mask_macs = conv_macs(block.spatial_mask[0]) + (conv_macs(pooled) + transposed) // 4

    def attention(self, pooled):
        """Pooled features (N, C, 1, 1) -> their weights (N, C, 1, 1)."""
        return self.block.attention.weights(pooled)

    def __call__(self, f, y, shape, cuts, mode, space):
        """Map of features f (P + 1, C) -> map y (P + 1, C), overwritten, and the `Work`; shape is (N, H, W)."""
        image = to_image(f[:-1], shape)
        mask = by_strips(self.block.hard_spatial_mask, image, cuts, halo=6)[:, 0]  # (N, H, W)
        important = int(mask.sum())
        packed = important < break_even(self, f) * mask.numel() if mode == "auto" else mode == "sparse"
        run = self._run_packed if packed else self._run_dense
        executed = self.mask_macs * mask.numel()
        for cut in cuts:
            near = cut.widened(len(self.layers), shape[1])  # a line a layer
            executed += run(f, y, near.of(mask), near.rows(shape).start, cut.rows(shape), space)
        return self._work(mask, important, executed)

    def _run_packed(self, f, y, mask, start, inner, space):
        """Write the rows `inner` of the map y; returns the multiply-adds executed.

        mask (n, h, w) is that of these pixels and of those that they see; the first is row `start` of the map f.
        """
        pixels, channels, outside = mask.numel(), f.shape[1], len(f) - 1
        own = slice(inner.start - start, inner.stop - start)  # of the pixels
        pixel = mask.flatten().nonzero()[:, 0]  # (M,)
        rim = (_dilated(mask) & ~mask).flatten().nonzero()[:, 0]  # (R,)
        count = len(pixel)
        # What layers gather from, after the first: important pixels, a row of zeros for what lies outside, the rim.
        packed = space.rows("packed", count + 1 + len(rim), channels, f)
        full, beside = packed[:count], packed[count + 1 :]
        packed[count] = 0
        place = torch.full((pixels + 1,), count, device=f.device)
        place[pixel] = torch.arange(count, device=f.device)
        place[rim] = torch.arange(count + 1, len(packed), device=f.device)
        around = neighbourhoods(mask, pixel)  # (M, 9)
        rows = torch.where(around == pixels, outside, around + start) if outside > pixels else around
        source, image = f, to_image(f[start : start + pixels], mask.shape)
        collected = space.rows("collected", count, channels, f)  # of all layers
        everywhere = space.rows("everywhere", len(inner), self.n_dense, f)  # (P, D)
        first = 0  # of this layer's channels in it
        executed = everywhere.numel() * channels
        parts = _parts(0, count, ROWS)
        for index, layer in enumerate(self.layers):
            n_out = layer.n_out
            if n_out:
                thin = to_rows(layer.run_thin(image))  # (P, n_out)
                everywhere[:, first : first + n_out] = thin[own]
                first += n_out
                executed += pixels * layer.thin.numel()
            products = [layer.full(gather(source, rows[part], space)) for part in parts]
            for part, product in zip(parts, products, strict=True):  # once all of them are gathered, not before
                full[part, layer.from_output :] = product
            if layer.from_output:
                full[:, : layer.from_output] = _take(thin, pixel)[:, : layer.from_output]
            for part in _parts(0, count, COLLECTED):
                _accumulate(collected[part], layer.collect(full[part]), first_time=index == 0)
            executed += count * (layer.full_macs + channels**2)
            if index == len(self.layers) - 1:
                break
            if index == 0:
                source, rows = packed, _take(place, around)
            beside[:, n_out : layer.n_in] = 0
            if n_out:
                beside[:, :n_out] = _take(thin, rim)
                if not layer.all_dense:
                    thin.index_copy_(0, pixel, full[:, :n_out])
                image = to_image(thin, mask.shape)
        y[inner.start : inner.stop] = self.collect_dense(everywhere)
        target = pixel + start
        if len(inner) < pixels:
            seen = (target < inner.start) | (target >= inner.stop)  # by this strip's pixels, written by another's
            target = target.masked_fill(seen, outside)
        y.index_copy_(0, target, collected.add_(self.block.collect.bias))
        return executed

    def _run_dense(self, f, y, mask, start, inner, space):
        """The same as `_run_packed`, without packing."""
        pixels = mask.numel()
        out = y[inner.start : inner.stop]
        own = slice(inner.start - start, inner.stop - start)
        image = to_image(f[start : start + pixels], mask.shape)
        allowed = mask[:, None].to(f.dtype)  # (n, 1, h, w)
        denied = 1 - allowed
        executed = 0
        for index, layer in enumerate(self.layers):
            n_out, thin = layer.n_out, image
            image = F.relu_(F.conv2d(image, layer.weight, padding=1))
            executed += pixels * layer.weight.numel() + len(inner) * f.shape[1] ** 2
            if layer.all_dense:
                image[:, n_out:].mul_(allowed)
            else:
                image.mul_(allowed)
                if n_out:
                    image[:, :n_out].addcmul_(layer.run_thin(thin[:, : layer.n_in]), denied)
                    executed += pixels * layer.thin.numel()
            _accumulate(out, layer.collect(to_rows(image)[own]), first_time=index == 0)
        out += self.block.collect.bias
        return executed

    def _work(self, mask, important, executed):
        pixels = mask.numel()
        masked = sum(layer.macs(pixels, important) for layer in self.layers)
        masking = self.mask_macs * pixels
        share = important + (pixels - important) * self.dense_share
        return Work(
            pixels,
            masking + masked,
            masking + self.macs_dense * pixels,
            executed,
            (important,),
            share,
            (mask[:, None],),
        )


class LayerPlan:
    """The weights of one sparse mask convolution and of its share of the collecting 1x1 convolution.

    weight (C, C, 3, 3) and collect (C, C, 1, 1) with dense channels first: n_in of the inputs, n_out of the outputs.
    """

    def __init__(self, weight, collect, n_in, n_out):
        channels = weight.shape[0]
        self.n_in, self.n_out = n_in, n_out
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.all_dense = n_in == channels  # then dense outputs are the same at important pixels as everywhere
        # Everywhere, dense outputs from dense inputs; at important pixels all outputs, or those that are not the same.
        self.thin = weight[:n_out, :n_in].contiguous(memory_format=torch.channels_last)
        self.from_output = n_out // VECTOR * VECTOR if self.all_dense else 0
        full = to_matrix(self.weight[self.from_output :])  # (C', 9 C)
        self.full, self.full_macs = build_product(full, relu=True), full.numel()
        self.collect_weight = to_matrix(collect)  # (C, C)
        self.collect = build_product(self.collect_weight)

    def run_thin(self, image):
        """Dense channels from dense channels everywhere: (n, n_in, h, w) -> (n, n_out, h, w)."""
        if self.n_in == 0:
            return image.new_zeros(len(image), self.n_out, *image.shape[2:])
        return F.relu_(F.conv2d(image, self.thin, padding=1))

    def macs(self, pixels, important):
        """Multiply-adds that the masks ask for, of so many pixels, of which so many are important."""
        channels = len(self.weight)
        sparse = channels - self.n_out if self.all_dense else channels
        convolved = pixels * self.thin.numel() + important * self.weight[:sparse].numel()
        collected = pixels * self.n_out + important * (channels - self.n_out)
        return convolved + collected * channels


class Workspace:
    """Memory that is used again: tensors by name, each as large as the largest that was asked for."""

    def __init__(self):
        self._tensors = {}

    def rows(self, name, count, channels, like):
        """An uninitialised tensor (count, channels), of the dtype and on the device of `like`."""
        size = count * channels
        tensor = self._tensors.get(name)
        if tensor is None or tensor.numel() < size:
            self._tensors.pop(name, None)
            with torch.inference_mode(False):  # else it could not be written to outside of that mode
                tensor = self._tensors[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return tensor[:size].view(count, channels)


def neighbourhoods(mask, pixel):
    """(M, 9): the pixels around each of `pixel` (M,) and itself, 0...P - 1 or P outside; mask is (n, h, w)."""
    n, height, width = mask.shape
    inside = torch.arange(-mask.numel(), 0, device=mask.device).view(n, height, width)
    bordered = F.pad(inside, (1, 1, 1, 1)).flatten() + mask.numel()  # a graph for export would keep another value
    # Where a pixel is within the border: each line and each image before it adds to its place.
    place = pixel + 2 * (pixel // width) + (2 * width + 4) * (pixel // (height * width)) + width + 3
    line = torch.arange(3, device=mask.device)
    offsets = ((line[:, None] - 1) * (width + 2) + line - 1).flatten()
    return _take(bordered, place[:, None] + offsets)


def _dilated(mask):
    """The mask (n, h, w) with the eight neighbours of where it is true; `max_pool2d` is four times as slow."""
    bordered = F.pad(mask, (1, 1, 1, 1))
    lines = bordered[:, :-2] | bordered[:, 1:-1] | bordered[:, 2:]
    return lines[..., :-2] | lines[..., 1:-1] | lines[..., 2:]


def gather(source, around, space):
    """Rows (M, 9 C) of the neighbours `around` (M, 9), which are rows of `source` (., C)."""
    gathered = space.rows("gathered", around.numel(), source.shape[1], source)
    torch.index_select(source, 0, around.flatten(), out=gathered)
    return gathered.view(len(around), -1)


def break_even(plan, f):
    """The share of important pixels above which the dense form of a module is quicker, for a map like f (., C).

    Measured once a device, dtype, number of channels, layers and threads, on the `BlockPlan` that asks first, in some
    tenths of a second.
    """
    key = "break-even", f.device, f.dtype, f.shape[1], len(plan.layers), torch.get_num_threads()
    return measured_once(key, lambda: _measured_break_even(plan, f))


def _measured_break_even(plan, like):
    shape = (1, 128, 128)
    pixels, rows, space = 128 * 128, range(128 * 128), Workspace()
    with torch.inference_mode(False):
        f, y = (torch.zeros(pixels + 1, like.shape[1], dtype=like.dtype, device=like.device) for _ in range(2))
        column = torch.arange(128, device=like.device).expand(shape) % 32
    sparser, denser = column < 8, column < 24  # a quarter, three quarters

    cases = [
        functools.partial(run, f, y, mask, 0, rows, space)
        for run, mask in ((plan._run_packed, sparser), (plan._run_packed, denser), (plan._run_dense, sparser))
    ]
    times = [[seconds_of(case, like.device) for case in cases] for _ in range(9)][2:]
    quarter, three_quarters, dense = (min(column) for column in zip(*times, strict=True))
    return 0.25 + 0.5 * (dense - quarter) / max(three_quarters - quarter, 1e-9)  # packed time is linear in the share


def _parts(start, stop, most):
    """Slices of start...stop as long as each other, to a unit, of at most `most`."""
    length = stop - start
    parts = -(-length // most)
    return [slice(start + length * part // parts, start + length * (part + 1) // parts) for part in range(parts)]


def _accumulate(total, addend, first_time):
    if first_time:
        total.copy_(addend)
    else:
        total.add_(addend)


def to_matrix(weight):
    """Weights of a convolution (C', C, h, w) -> (C', h w C), in the order of channels-last memory."""
    return weight.permute(0, 2, 3, 1).flatten(1).contiguous()


def _take(source, index):
    """source[index]; on a CPU indexing is slower than index_select."""
    return source.index_select(0, index.flatten()).view(*index.shape, *source.shape[1:])


def to_image(rows, shape):
    """Rows (n h w, C) of the pixels (n, h, w) -> the image (n, C, h, w), channels-last; the same memory."""
    return rows.view(*shape, rows.shape[1]).permute(0, 3, 1, 2)


def to_rows(image):
    """The reverse: (n, C, h, w) -> (n h w, C); a copy only if the image is not channels-last."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _check_shape(name, tensor, expected):
    if tuple(tensor.shape) != expected:
        raise InputError(f"{name}: the weights are {tuple(tensor.shape)} and not {expected}; they cannot be run")
