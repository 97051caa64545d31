"""SMSR as it is run: a trained network compiled into a plan that skips the masked work (paper section 3.3).

Indices, gathers and convolutions of what was gathered, with plain PyTorch operators and no gradient. The plan equals
`SMSR.masked_forward` up to the order of summation. docs/sparse-inference.md tells the method with a figure.

Features are maps of rows, C numbers a pixel, in the order of the pixels (N, H, W), which as an image (N, C, H, W) is
the channels-last format. A map of P pixels has a row P more: of zeros where it is read, of no interest where it is
written. It stands for what lies outside the image.

In the packed form a module gathers its important pixels, with the pixels on their left and right, into an image of
one line: a column each, of the pixel and those above and below it. An ordinary 3x3 convolution of these three lines
is then the sparse convolution. In the dense form nothing is gathered, and what the masks deny is overwritten.
"""

import functools
import threading
import time

import torch
import torch.nn.functional as F

from model.common import Work, by_strips, conv_macs, strips
from utility import InputError, synchronize

MODES = ("auto", "sparse", "dense")
TILE = 224  # side of a tile on a CPU, where maps of more pixels leave the cache and the heap
COLUMNS = 16384  # columns gathered at a time
ROWS = 8192  # rows that two passes in turn find in the cache
VECTOR = 16  # a convolution computes outputs in vectors of so many; a part of one costs more than all of it
SMALL = 20480  # numbers: up to these PyTorch convolves on a CPU with another library, that rounds differently


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
        self.collect = [w.contiguous() for w in model.collect[0].weight.flatten(1).T.chunk(len(self.blocks))]  # (C, C)
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
        f = space.rows("features", pixels + 1, channels, x)
        y = space.rows("module", pixels + 1, channels, x)
        total = space.rows("collected", pixels, channels, x)
        f[pixels] = 0
        by_strips(model.head, x, cuts, halo=2, out=_image(f[:pixels], shape))
        head = None if frugal else _image(f[:pixels], shape).clone()  # (N, C, H, W)
        works = []
        for plan, weight in zip(self.blocks, self.collect, strict=True):
            works.append(plan(f, y, shape, cuts, mode, space))
            factors = plan.attention(_image(y[:pixels], shape).mean((2, 3), keepdim=True))  # (N, C, 1, 1)
            for image, factor in enumerate(factors.view(n, channels)):
                for begin, end in _even_parts(image * height * width, (image + 1) * height * width, ROWS):
                    f[begin:end].addcmul_(y[begin:end], factor)
                    _add_product(total[begin:end], f[begin:end], weight, first_time=len(works) == 1)
        total = _image(total.add_(model.collect[0].bias).relu_(), shape)
        sr = model.upsample(x)
        for cut in cuts:
            near = cut.widened(2, height)  # as far as collect[2] and the tail see
            part = model.collect[2](near.of(total))
            if frugal:
                wider = near.widened(2, height)
                part += near.within(wider, model.head(wider.of(x)))
            else:
                part += near.of(head)
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
        collect = block.collect.weight.flatten(1).T.chunk(len(block.convs))  # L of (C, C)
        self.layers = []
        n_in, order_in = n_feats, torch.arange(n_feats, device=dense.device)  # the input is all dense
        for layer, conv in enumerate(block.convs):
            _check_shape(f"{name}.convs.{layer}.weight", conv.weight, (n_feats, n_feats, 3, 3))
            order = torch.argsort(dense[:, layer].int(), descending=True, stable=True)  # dense channels first
            n_out = int(dense[:, layer].sum())
            self.layers.append(LayerPlan(conv.weight[order][:, order_in], collect[layer][order], n_in, n_out))
            n_in, order_in = n_out, order
        # What a pixel that is not important collects: dense channels, and 1 for the bias.
        self.collect_dense = torch.cat([w.collect[: w.n_out] for w in self.layers] + [block.collect.bias[None]])
        self.has_halo = any(layer.n_out for layer in self.layers[:-1])
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
        image = _image(f[:-1], shape)
        mask = by_strips(self.block.hard_spatial_mask, image, cuts, halo=6)[:, 0]  # (N, H, W)
        important = int(mask.sum())
        if mode == "auto":
            packed = int(_with_neighbours(F.pad(mask, (1, 1))).sum()) < break_even(f) * mask.numel()
        else:
            packed = mode == "sparse"
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
        least = SMALL // (3 * channels) + 1 if f.is_cpu else 0
        own = slice(inner.start - start, inner.stop - start)  # of the pixels
        columns = Columns(mask, start, outside, self.has_halo, least)
        thin = _image(f[start : start + pixels], mask.shape)
        everywhere = space.rows("everywhere", len(inner), len(self.collect_dense), f)  # (P, D + 1)
        everywhere[:, -1] = 1
        first = 0  # of this layer's channels in it
        source, around = f, columns.in_map
        packed = space.rows("packed", columns.count, channels, f)  # collected
        executed = everywhere.numel() * channels
        for index, layer in enumerate(self.layers):
            n_out, last = layer.n_out, index == len(self.layers) - 1
            store = space.rows(f"store{index % 2}", columns.stored, channels, f)
            if n_out:
                thin = layer.run_thin(thin)
                executed += pixels * layer.thin.numel()
                thin_rows = _rows(thin)  # (P, D)
            if columns.count:
                if layer.full.numel():
                    convolve(source, around, layer.full, store[1 : columns.count - 1, layer.from_output :], space)
                executed += (columns.count - 2) * layer.full.numel()
                if layer.from_output:
                    store[: columns.count, :n_out] = _take(thin_rows, columns.pixel)
                if n_out and not layer.all_dense and not last:
                    thin_rows[columns.pixel[columns.important]] = store[: columns.count][columns.important, :n_out]
                    thin = _image(thin_rows, mask.shape)
                if not last:
                    halo = store[columns.count :]
                    halo.zero_()
                    if n_out:
                        halo[:-1, :n_out] = _take(thin_rows, columns.halo)
                _add_product(packed, store[: columns.count], layer.collect, first_time=index == 0)
                executed += columns.count * layer.collect.numel()
            if n_out:
                everywhere[:, first : first + n_out] = thin_rows[own]
                first += n_out
            source, around = store, columns.in_store
        torch.mm(everywhere, self.collect_dense, out=y[inner.start : inner.stop])  # (P, D + 1) @ (D + 1, C)
        if columns.count:
            target = columns.in_map[1]
            theirs = columns.denied | (target < inner.start) | (target >= inner.stop)
            y.index_copy_(0, target.masked_fill(theirs, outside), packed.add_(self.block.collect.bias))
        return executed

    def _run_dense(self, f, y, mask, start, inner, space):
        """The same as `_run_packed`, without packing."""
        pixels = mask.numel()
        out = y[inner.start : inner.stop]
        own = slice(inner.start - start, inner.stop - start)
        denied = mask.logical_not().flatten().nonzero()[:, 0]  # (V,)
        image = _image(f[start : start + pixels], mask.shape)
        executed = 0
        for index, layer in enumerate(self.layers):
            n_out = layer.n_out
            thin = image  # of its channels, the dense ones
            image = F.relu_(F.conv2d(image, layer.weight, padding=1))
            executed += pixels * layer.weight.numel() + len(inner) * layer.collect.numel()
            rows = _rows(image)  # (P, C)
            if len(denied):
                allowed = rows.new_zeros(len(denied), rows.shape[1])
                if n_out:
                    if layer.all_dense:
                        thin_rows = rows[:, :n_out]
                    else:
                        thin_rows = _rows(layer.run_thin(thin))
                        executed += pixels * layer.thin.numel()
                    allowed[:, :n_out] = thin_rows[denied]
                rows.index_copy_(0, denied, allowed)
                image = _image(rows, mask.shape)
            _add_product(out, rows[own], layer.collect, first_time=index == 0)
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

    weight (C, C, 3, 3) and collect (C_in, C_out) with dense channels first: n_in of the inputs, n_out of the outputs.
    """

    def __init__(self, weight, collect, n_in, n_out):
        channels = weight.shape[0]
        self.n_in, self.n_out = n_in, n_out
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.all_dense = n_in == channels  # then dense outputs are the same at important pixels as everywhere
        # Everywhere, dense outputs from dense inputs; at important pixels all outputs, or those that are not the same.
        self.thin = weight[:n_out, :n_in].contiguous(memory_format=torch.channels_last)
        self.from_output = n_out // VECTOR * VECTOR if self.all_dense else 0
        self.full = self.weight[self.from_output :]
        self.collect = collect.contiguous()

    def run_thin(self, image):
        """Dense channels from dense channels, the first of image (n, ., h, w), everywhere -> (n, n_out, h, w)."""
        if self.n_in == 0:
            return image.new_zeros(len(image), self.n_out, *image.shape[2:])
        return F.relu_(F.conv2d(image[:, : self.n_in], self.thin, padding=1))

    def macs(self, pixels, important):
        """Multiply-adds that the masks ask for, of so many pixels, of which so many are important."""
        channels = len(self.collect)
        sparse = channels - self.n_out if self.all_dense else channels
        convolved = pixels * self.thin.numel() + important * self.weight[:sparse].numel()
        collected = pixels * self.n_out + important * (channels - self.n_out)
        return convolved + collected * channels


class Columns:
    """Which pixels a mask (n, h, w) packs, and where their neighbours are.

    The pixels of the mask are rows `start` and on of a map, whose row `outside` is zero. There are at least `least`
    columns, if any. After a layer its features lie in a store: a row a column, then one for each pixel of the halo,
    then one of zeros. The halo are pixels next to important ones that are not important themselves: there only dense
    channels are not zero.

        count       S columns, 0 if nothing is important; the first and the last are never important
        in_map      (3, S) row in the map of the pixel above, at and below each column
        in_store    (3, S) the same in a store
        stored      rows of a store
        pixel       (S,) pixel of each column, 0...P - 1; any, for a column outside
        denied      (S,) whether the pixel of a column is not important
        important   (M,) columns of important pixels
        halo        pixels of the halo
    """

    def __init__(self, mask, start, outside, has_halo=True, least=0):
        n, height, width = mask.shape
        pixels, line, device = mask.numel(), width + 2, mask.device
        important = F.pad(mask, (1, 1, 1, 1))  # (n, h + 2, w + 2): a border, so that all neighbours have a place
        columns = _with_neighbours(important).flatten().nonzero()[:, 0]
        important = important.flatten()
        if 0 < len(columns) < least:
            columns = F.pad(columns, (0, least - len(columns)), value=line)  # a place in the border
        self.count = len(columns)
        inside = torch.arange(pixels, device=device).view(n, height, width)
        pixel = F.pad(inside, (1, 1, 1, 1), value=pixels).flatten()
        around = columns + torch.tensor([[-line], [0], [line]], device=device)  # (3, S), into the bordered mask
        in_map = _take(pixel, around)
        self.pixel = in_map[1].clamp(max=pixels - 1)
        kept = important[columns]
        self.denied, self.important = ~kept, kept.nonzero()[:, 0]
        self.in_map = torch.where(in_map == pixels, outside, in_map + start)
        place = torch.empty_like(pixel)
        place[columns] = torch.arange(self.count, device=device)
        halo = columns[:0]
        if has_halo:
            near = torch.zeros_like(important)
            near[around.flatten()] = True
            halo = (near & ~important & (pixel < pixels)).nonzero()[:, 0]
        self.stored = self.count + len(halo) + 1
        place.masked_fill_(~important, self.stored - 1)
        place[halo] = torch.arange(self.count, self.stored - 1, device=device)
        self.in_store = _take(place, around)
        self.halo = pixel[halo]


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


def convolve(source, around, weight, out, space):
    """relu(conv(source)) at the columns but the first and the last.

    source: rows (., C); around: (3, S), the rows of each column; weight: (C', C, 3, 3); out: (S - 2, C'), overwritten
    """
    channels = source.shape[1]
    for begin, end in _even_parts(0, len(out), COLUMNS):
        index = around[:, begin : end + 2].flatten()
        packed = space.rows("gathered", len(index), channels, source)
        torch.index_select(source, 0, index, out=packed)
        product = F.conv2d(_image(packed, (1, 3, end - begin + 2)), weight)  # (1, C', 1, S - 2)
        torch.clamp_min(_rows(product), 0, out=out[begin:end])


_measuring = threading.Lock()


def break_even(f):
    """The share of columns among the pixels of a module above which its dense form is quicker, for a map like f.

    Measured once a device, dtype, number of channels and threads, in some hundredths of a second.
    """
    with _measuring:
        return _measured_break_even(f.device, f.dtype, f.shape[1], torch.get_num_threads())


@functools.cache
def _measured_break_even(device, dtype, channels, threads):
    side, space = 128, Workspace()
    pixels = side * side
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(0)  # leaves the user's random numbers alone
        f = torch.randn(pixels + 1, channels, generator=generator).to(device, dtype)
        weight = torch.randn(channels, channels, 3, 3, generator=generator).to(device, dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    columns = Columns(torch.arange(side, device=device).expand(1, side, side) % 16 < 7, 0, pixels)
    store = space.rows("store", columns.count - 2, channels, f)

    def packed():
        convolve(f, columns.in_map, weight, store, space)

    def dense():
        F.relu_(F.conv2d(_image(f[:-1], (1, side, side)), weight, padding=1))

    def seconds(run):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - started

    times = [(seconds(packed), seconds(dense)) for _ in range(9)][2:]
    packed_seconds, dense_seconds = (min(column) for column in zip(*times, strict=True))
    return (dense_seconds / pixels) / (packed_seconds / columns.count)


def _with_neighbours(mask):
    """Also true left and right of where mask (..., W) is; its first and last column must be false."""
    wide = mask.clone()
    wide[..., 1:] |= mask[..., :-1]
    wide[..., :-1] |= mask[..., 1:]
    return wide


def _even_parts(start, stop, most):
    """(begin, end) of parts of start...stop as long as each other, to a unit, of at most `most`."""
    length = stop - start
    parts = -(-length // most)
    return [(start + length * part // parts, start + length * (part + 1) // parts) for part in range(parts)]


def _add_product(total, rows, weight, first_time):
    if first_time:
        torch.mm(rows, weight, out=total)
    else:
        total.addmm_(rows, weight)


def _take(source, index):
    """source[index]; on a CPU indexing is slower than index_select."""
    return source.index_select(0, index.flatten()).view(*index.shape, *source.shape[1:])


def _image(rows, shape):
    """Rows (n h w, C) of the pixels (n, h, w) -> the image (n, C, h, w), channels-last; the same memory."""
    return rows.view(*shape, rows.shape[1]).permute(0, 3, 1, 2)


def _rows(image):
    """The reverse: (n, C, h, w) -> (n h w, C); a copy only if the image is not channels-last."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _check_shape(name, tensor, expected):
    if tuple(tensor.shape) != expected:
        raise InputError(f"{name}: the weights are {tuple(tensor.shape)} and not {expected}; they cannot be run")
