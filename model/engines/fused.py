"""The fused engine: SMSR on a GPU with Triton kernels that gather while they multiply.

It computes what sparse.Plan computes, from the same preparation of the weights: channels of a layer in the order dense,
then sparse. Important pixels, their number and pooled sums stay on the device, so a forward never waits for the host.
docs/sparse-inference.md explains the method.
"""

import functools
import itertools
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import nn
from triton.compiler import CompiledKernel

from model.common import bicubic_weights
from model.engines import fused_kernels as kernels
from model.engines.graphs import MAX_SHARE, GraphCache, run_both
from model.engines.weights import pad_to, to_taps
from model.network import Cost, DeferredCost
from model.sparse import BlockPlan, Plan
from program import InputError, is_out_of_memory, usable_processors
from utility import logger

MAX_FEATS = 128  # a tile holds all channels of its pixels in registers
MAX_NUMBERS = 2**31 - 1  # in a map of one image: kernels count them in 32 bits
# (channels, bytes of a number): pixels per tile, stages; chosen to fit the registers and 100 KB of shared memory
TILES = {(64, 2): (128, 3), (64, 4): (64, 2), (128, 2): (32, 3), (128, 4): (32, 1)}
MIN_TILES, SMALLEST_TILE = 256, 32  # about two tiles per processor of a large GPU, if the image is not too small
REDUCE_TILE, ATTEND_TILE = 64, 64  # pixels per tile, at most, of kernels that mostly wait for memory
TAIL_NUMBERS, TAIL_BYTES = 16384, 32768  # of `reconstruct`: outputs of a tile, and weights of a step, at most


def pad_size(size: int) -> int:
    """The smallest power of two that holds `size` channels and that a tensor core can multiply; 0 for none."""
    return 0 if size == 0 else max(16, triton.next_power_of_2(size))


def pick_tile(largest: int, pixels: int) -> int:
    """The size of tiles that keep all processors of a GPU busy."""
    tile = largest
    while tile > SMALLEST_TILE and pixels < tile * MIN_TILES:
        tile //= 2
    return tile


def count_tiles(height: int, width: int, tile: int, columns: int) -> int:
    """How many tiles of `tile` pixels in `columns` columns cover a map."""
    return triton.cdiv(height, tile // columns) * triton.cdiv(width, columns)


def layer_warps(channels: int, tile: int, is_last: bool) -> int:
    """Warps of `important_layer`. In the last layer, which also collects, a large tile needs more registers."""
    return 8 if channels > 64 or (is_last and tile > 64) else 4


def to_windows(weight: torch.Tensor, channels: int, outputs: int) -> torch.Tensor:
    """Weights of a convolution (R, C, K, K) -> ((K + 1)^2, channels, 4 outputs), padded, for 2x2 pixels at once."""
    weight = weight.detach().permute(2, 3, 1, 0)  # (K, K, C, R)
    size, _, n_in, n_out = weight.shape
    windows = weight.new_zeros(size + 1, size + 1, channels, 2, 2, outputs)
    for y, x in itertools.product(range(2), repeat=2):
        windows[y : y + size, x : x + size, :n_in, y, x, :n_out] = weight
    return windows.reshape((size + 1) ** 2, channels, 4 * outputs).contiguous()


@dataclass(frozen=True)
class FusedLayer:
    """Weights of one sparse mask convolution: w (9, C, C), dense (9, d_in, d_out); padded numbers of dense channels."""

    w: torch.Tensor
    dense: torch.Tensor
    d_in: int
    d_out: int


class FusedBlock:
    """The weights of a sparse mask module, padded and in the order that the kernels read."""

    def __init__(self, plan: BlockPlan, channels: int):
        block = plan.block
        d_outs = [pad_size(layer.n_out) for layer in plan.layers]
        for index in reversed(range(len(d_outs) - 1)):
            if d_outs[index + 1] and not d_outs[index]:
                d_outs[index] = pad_size(1)  # the kernel of the next layer needs an input; its weights are zero
        self.layers = []
        for layer, d_in, d_out in zip(plan.layers, [channels, *d_outs[:-1]], d_outs, strict=True):
            dense = pad_to(to_taps(layer.weight[: layer.n_out, : layer.n_in]), max(d_in, 1), max(d_out, 1))
            self.layers.append(FusedLayer(pad_to(to_taps(layer.weight), channels, channels), dense, d_in, d_out))
        collect = [layer.collect_weight.detach().T for layer in plan.layers]
        self.collect = torch.stack([pad_to(weight, channels, channels) for weight in collect])  # (L, C, C)
        self.collect_bias = pad_to(block.collect.bias.detach(), channels)
        self.n_dense = sum(layer.d_out for layer in self.layers)  # of all layers, padded
        self.dense_code = sum(layer.d_out << (8 * index) for index, layer in enumerate(self.layers))
        self._prepare_mask_branch(block.spatial_mask, channels)
        self._prepare_attention(block.attention, channels)

    def _prepare_mask_branch(self, branch: nn.Module, channels: int) -> None:
        hidden = branch.full.out_channels
        self.hidden = pad_size(hidden)
        self.pool_w = to_windows(branch.full.weight, channels, self.hidden)
        self.pool_bias = pad_to(branch.full.bias.detach(), self.hidden).repeat(4)
        self.mid_w = to_windows(branch.pooled.weight, self.hidden, self.hidden)
        self.mid_bias = pad_to(branch.pooled.bias.detach(), self.hidden).repeat(4)
        # A pixel is important if its second logit is larger, so the difference of both is enough.
        weight, bias = (tensor.detach().float() for tensor in (branch.logits.weight, branch.logits.bias))
        taps = (weight[:, 1] - weight[:, 0]).permute(1, 2, 0)  # (3, 3, R)
        decide = taps.new_zeros(2, 2, 2, 2, self.hidden)  # from 2x2 pooled pixels to the 2x2 pixels of the first
        for y, x, from_y, from_x in itertools.product(range(2), repeat=4):
            if from_y <= y and from_x <= x:
                decide[y, x, from_y, from_x, :hidden] = taps[1 + y - 2 * from_y, 1 + x - 2 * from_x]
        self.decide_w = decide.reshape(4, 4 * self.hidden)
        self.decide_bias = (bias[1] - bias[0]).reshape(1)

    def _prepare_attention(self, attention: nn.Module, channels: int) -> None:
        squeeze, _, excite, _ = (module for module in attention)
        self.squeezed = triton.next_power_of_2(squeeze.out_channels)
        self.squeeze_w = pad_to(squeeze.weight.detach().flatten(1).float(), self.squeezed, channels)
        self.squeeze_bias = pad_to(squeeze.bias.detach().float(), self.squeezed)
        self.excite_w = pad_to(excite.weight.detach().flatten(1).float(), channels, self.squeezed)
        self.excite_bias = pad_to(excite.bias.detach().float(), channels)


class Counters(NamedTuple):
    """What the programs of a module count.

    important  int32 (N,), important pixels
    finished   int64 (N,), programs of the last layer
    sums       int64 (N, L + 1, C), see `_attention`
    """

    important: torch.Tensor
    finished: torch.Tensor
    sums: torch.Tensor


class FusedResult(NamedTuple):
    """What a forward leaves on the device.

    sr          (N, n_colors, scale height, scale width)
    masks       bool (K, N, 1, height, width), without padding
    important   int32 (K, N), important pixels, padding included
    not_finite  int32 (1,), 1 if the images contain NaN or infinity
    """

    sr: torch.Tensor
    masks: torch.Tensor
    important: torch.Tensor
    not_finite: torch.Tensor


class KernelBuilder(ThreadPoolExecutor):
    """Threads that compile kernels and build their C launchers, for the device of x."""

    def __init__(self, x: torch.Tensor):
        super().__init__(usable_processors())
        self.x = x

    def submit(self, compile_kernel: Callable[[], CompiledKernel]) -> Future[CompiledKernel]:
        return super().submit(self._build, compile_kernel)

    def _build(self, compile_kernel: Callable[[], CompiledKernel]) -> CompiledKernel:
        kernel = compile_kernel()
        with torch.cuda.device_of(self.x):  # each thread has its own current device
            _ = kernel.run  # builds the launcher
        return kernel


class FusedPlan:
    """A compiled SMSR for a GPU. Call with images (N, n_colors, height, width) in 0...rgb_range, any size.

    plan: the plain plan, whose preparation of the weights is used
    """

    def __init__(self, plan: Plan):
        model = self.model = plan.model
        channels = self.channels = pad_size(model.n_feats)
        self.options = {"num_warps": 4 if channels <= 64 else 8}  # so that registers suffice
        self.blocks = [FusedBlock(block, channels) for block in plan.blocks]
        n_blocks, n_colors, scale = len(self.blocks), model.n_colors, model.scale
        first, _, second = model.head
        self.first_k = pad_size(9 * n_colors)
        self.first_w = pad_to(to_taps(first.weight).reshape(9 * n_colors, model.n_feats), self.first_k, channels)
        self.first_bias = pad_to(first.bias.detach(), channels)
        self.mean = model.mean.flatten().contiguous()
        self.head_w, self.head_bias = self._square(second)
        self.fuse_w, self.fuse_bias = self._square(model.collect.fuse)
        reduce = model.collect.reduce.weight.detach()[:, :, 0, 0].T.chunk(n_blocks)  # K of (C, C), inputs first
        self.reduce_w = torch.stack([pad_to(weight, channels, channels) for weight in reduce])
        self.reduce_bias = pad_to(model.collect.reduce.bias.detach(), channels)
        tail, self.tail_k = model.tail.conv, pad_size(n_colors * scale**2)
        self.tail_w = to_windows(tail.weight, channels, self.tail_k)
        self.tail_bias = pad_to(tail.bias.detach(), self.tail_k).repeat(4)
        bicubic = to_windows(bicubic_weights(scale, n_colors), n_colors, self.tail_k)  # (36, n_colors, 4 tail_k)
        bicubic = bicubic.transpose(0, 1).flatten(0, 1).to(model.device)
        self.taps = 16 * triton.cdiv(len(bicubic), 16)
        bicubic = pad_to(bicubic, self.taps, 4 * self.tail_k)
        rounded = bicubic.to(model.tail.conv.weight.dtype)
        self.bicubic = torch.stack([rounded, (bicubic - rounded).to(rounded.dtype)])
        self._compiled: set[tuple] = set()  # variants of the kernels

    def _square(self, conv: nn.Conv2d) -> tuple[torch.Tensor, torch.Tensor]:
        return pad_to(to_taps(conv.weight), self.channels, self.channels), pad_to(conv.bias.detach(), self.channels)

    def supports(self, x: torch.Tensor) -> bool:
        """Whether the plan can run images of this size (N, n_colors, H, W)."""
        per_pixel = max(self.channels, self.model.n_colors * self.model.scale**2)
        return (x.shape[2] + 1) * (x.shape[3] + 1) * per_pixel <= MAX_NUMBERS and len(x) < 2**16

    @property
    def peak_maps(self) -> int:
        """Feature maps in memory at once."""
        return len(self.blocks) + self.n_maps + 2 + triton.cdiv(self.n_dense, self.channels)

    @property
    def n_maps(self) -> int:
        """Outputs of layers that are kept, all but the last; the reconstruction needs two maps."""
        return max(len(self.blocks[0].layers) - 1, 2)

    @property
    def n_dense(self) -> int:
        """Dense channels of all layers of a module, padded, at most."""
        return max(block.n_dense for block in self.blocks)

    def needed_bytes(self, x: torch.Tensor) -> int:
        """The memory of the feature maps of a forward."""
        return self.peak_maps * x.numel() // x.shape[1] * self.channels * x.element_size()

    def executed_macs(self, block: FusedBlock, pixels: int, important: int) -> int:
        """Multiply-adds of the layers of a module for this many pixels, some of them important."""
        square, macs = self.channels**2, 0
        for layer in block.layers:
            macs += important * 10 * square + (pixels - important) * layer.d_out * (9 * layer.d_in + self.channels)
        return macs

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> FusedResult:
        run = _Run(self, x, _launch)
        if run.variant not in self._compiled:
            self.compile(x)
        return self._forward(run)

    @torch.no_grad()
    def compile(self, x: torch.Tensor) -> None:
        """Compile the kernels for such images in several threads; one after the other would take several seconds."""
        run = _Run(self, x, _compile)
        # Not with its own errors, after which it stays active; launching the kernel raises them again.
        with KernelBuilder(x) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            self._forward(run)
        self._compiled.add(run.variant)

    def _forward(self, run: "_Run") -> FusedResult:
        x = run.x
        n, n_colors, height, width = x.shape
        n_blocks, n_layers = len(self.blocks), len(self.blocks[0].layers)
        sizes = [n_blocks * n * (n_layers + 1) * self.channels, n_blocks * n, 1]
        sums, finished, not_finite = x.new_zeros(sum(sizes), dtype=torch.int64).split(sizes)
        sums, finished = sums.view(n_blocks, n, n_layers + 1, -1), finished.view(n_blocks, n)
        not_finite = not_finite.view(torch.int32)[:1]
        factors = x.new_empty(n_blocks, n, self.channels, dtype=torch.float32)
        total = x.new_empty(n_blocks, n, dtype=torch.int32)
        masks = x.new_empty(n_blocks, n, run.height, run.width, dtype=torch.uint8)
        head, scratch = run.new_map(), run.new_map()
        run.first_conv(x, scratch, not_finite)
        run.conv(scratch, self.head_w, self.head_bias, add=None, out=head)
        maps = x.new_empty(self.n_maps, n, run.pixels, self.channels)
        dense = x.new_empty(self.n_dense * n * run.pixels)
        features = x.new_empty(n_blocks, n, run.pixels, self.channels)
        f = head
        for k, block in enumerate(self.blocks):
            run.make_mask(block, f, masks[k], total[k])
            counters = Counters(total[k], finished[k], sums[k])
            run.run_layers(block, f, maps, dense, counters, y=scratch, factor=factors[k])
            run.attend(block, f, dense, masks[k], y=scratch, factor=factors[k], out=features[k])
            f = features[k]
        run.reduce(features, maps[0])
        run.conv(maps[0], self.fuse_w, self.fuse_bias, add=head, out=maps[1])
        sr = x.new_empty(n, n_colors, height * self.model.scale, width * self.model.scale)
        run.reconstruct(maps[1], x, sr)
        masks = masks.view(torch.bool)[:, :, None, :height, :width]
        return FusedResult(sr, masks, total, not_finite)


class FusedEngine:
    """Runs a network by its FusedPlan, in CUDA graphs; what that does not support runs by the plain plan.

    Takes the same images and modes as sparse.Plan. Nothing waits for the device before the cost is read.
    """

    def __init__(self, plan: Plan):
        self.plain, self.fused = plan, None
        self.reported: set[str] = set()
        if plan.model.n_feats > MAX_FEATS:
            self._report(f"the network has more than {MAX_FEATS} features")
        else:
            self.fused = FusedPlan(plan)
            self.graphs = GraphCache(self.fused)
        device = plan.model.device
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        self.largest_graph = MAX_SHARE * memory  # in bytes; without a GPU nothing is captured

    @property
    def peak_maps(self) -> int:
        """Feature maps of model.n_feats channels in memory at its peak, with one for what is smaller."""
        if self.fused is None:
            return self.plain.peak_maps
        return math.ceil((self.fused.peak_maps + 1) * self.fused.channels / self.plain.n_feats)

    def __call__(
        self, x: torch.Tensor, mode: str = "auto", tile: int | None = None
    ) -> tuple[torch.Tensor, Cost | DeferredCost]:
        if self.fused is None or mode not in ("auto", "sparse"):
            return self.plain(x, mode, tile)
        if tile is not None:
            self._report("it runs whole images, not tiles")
            return self.plain(x, mode, tile)
        if not self.fused.supports(x):
            self._report(f"{x.shape[2]}x{x.shape[3]} pixels are too many")
            return self.plain(x, mode, tile)
        try:
            with torch.cuda.device_of(x):  # Triton launches on the current device
                result = FusedResult(*self.graphs(x, may_capture=self.fused.needed_bytes(x) < self.largest_graph))
        except Exception as error:  # Triton fails in many ways; plain operators give the same result
            if is_out_of_memory(error):
                raise
            self._report(f"{type(error).__name__}: {(str(error).strip().splitlines() or ['failed'])[0]}")
            self.fused = None
            return self.plain(x, mode, tile)
        return result.sr, self._defer_cost(x, result)

    def _report(self, problem: str) -> None:
        if problem not in self.reported:
            self.reported.add(problem)
            logger.info(f"fused engine: {problem}; using plain operators, which are slower")

    def _defer_cost(self, x: torch.Tensor, result: FusedResult) -> DeferredCost:
        n, _, height, width = x.shape
        pixels = n * (height + height % 2) * (width + width % 2)
        masks, fused = tuple(result.masks), self.fused
        not_finite, important_pixels = result.not_finite, result.important  # without the images

        def compute():
            if not_finite.item():
                raise InputError("the images contain NaN or infinity; pass finite pixels")
            costs = []
            for k, important in enumerate(important_pixels.sum(1).tolist()):
                block = self.plain.blocks[k]
                executed = block.mask_macs * pixels + fused.executed_macs(fused.blocks[k], pixels, important)
                costs.append(block.cost(pixels, important, executed, masks[k]))
            return self.plain.total_cost(costs, pixels)

        return DeferredCost(compute, masks)


def _launch(kernel, grid, *args, **options):
    kernel[grid](*args, **options)


def _compile(kernel, grid, *args, **options):
    kernel.warmup(*args, grid=grid, **options)


class _Run:
    """One forward: sizes, work memory, and the launch of each kernel, by `_launch` or `_compile`."""

    def __init__(self, plan: FusedPlan, x: torch.Tensor, launch: Callable):
        self.plan, self.x, self.launch = plan, x, launch
        self.n, _, self.image_height, self.image_width = x.shape
        self.height, self.width = self.image_height + self.image_height % 2, self.image_width + self.image_width % 2
        self.pixels = self.height * self.width
        self.pooled_height, self.pooled_width = self.height // 2, self.width // 2
        self.pooled_pixels = self.pixels // 4
        largest, self.stages = TILES[max(plan.channels, 64), x.element_size()]
        self.tile = pick_tile(largest, self.n * self.pixels)
        self.grid = (count_tiles(self.height, self.width, self.tile, kernels.COLUMNS), self.n)
        self.list_grid = (triton.cdiv(self.pixels, self.tile), self.n)
        self.pooled_tile = pick_tile(largest, self.n * self.pooled_pixels)
        pooled_tiles = count_tiles(self.pooled_height, self.pooled_width, self.pooled_tile, kernels.POOLED_COLUMNS)
        self.pooled_grid = (pooled_tiles, self.n)
        exact = x.dtype == torch.float32 and x.is_cuda and not torch.backends.cudnn.allow_tf32
        self.dot = "ieee" if exact else "tf32"
        is_long = self.n * self.pixels * plan.channels > MAX_NUMBERS  # maps: their distance has 64 bits
        self.variant = (x.dtype, self.dot, self.tile, self.pooled_tile, is_long)  # what kernels are compiled for
        self.order, self.bits = (x.new_empty(self.n, self.pixels, dtype=torch.int32) for _ in range(2))

    def new_map(self) -> torch.Tensor:
        return self.x.new_empty(self.n, self.pixels, self.plan.channels)

    def first_conv(self, x, out, not_finite):
        plan = self.plan
        self.launch(
            kernels.first_conv,
            self.grid,
            x,
            plan.mean,
            plan.first_w,
            plan.first_bias,
            out,
            not_finite,
            self.image_height,
            self.image_width,
            *x.stride(),
            self.height,
            self.width,
            COLORS=plan.model.n_colors,
            K=plan.first_k,
            C=plan.channels,
            BM=self.tile,
            DOT=self.dot,
            **plan.options,
        )

    def conv(self, source, w, bias, add, out):
        plan = self.plan
        self.launch(
            kernels.conv3x3,
            self.grid,
            source,
            w,
            bias,
            source if add is None else add,
            out,
            self.height,
            self.width,
            C=plan.channels,
            BM=self.tile,
            STAGES=self.stages,
            ADD=add is not None,
            DOT=self.dot,
            num_warps=8,
        )

    def make_mask(self, block, f, mask, total):
        """Write the mask (N, H, W) of a module, the number of its important pixels, and its kernel map."""
        plan, hidden = self.plan, block.hidden
        pooled = self.x.new_empty(self.n, self.pooled_pixels, hidden)
        counts = self.x.new_empty(self.n, self.pooled_grid[0], dtype=torch.int32)
        self.launch(
            kernels.mask_pool,
            self.pooled_grid,
            f,
            block.pool_w,
            block.pool_bias,
            pooled,
            self.height,
            self.width,
            self.pooled_height,
            self.pooled_width,
            C=plan.channels,
            R=hidden,
            BM=self.pooled_tile,
            STAGES=min(self.stages, 2),  # more programs at once are worth more here
            DOT=self.dot,
            **plan.options,
        )
        self.launch(
            kernels.mask_decide,
            self.pooled_grid,
            pooled,
            block.mid_w,
            block.mid_bias,
            block.decide_w,
            block.decide_bias,
            mask,
            counts,
            self.width,
            self.pooled_height,
            self.pooled_width,
            R=hidden,
            BM=self.pooled_tile,
            STAGES=self.stages,
            DOT=self.dot,
            **plan.options,
        )
        self.launch(
            kernels.kernel_map,
            self.pooled_grid,
            mask,
            counts,
            self.order,
            self.bits,
            total,
            self.height,
            self.width,
            self.pooled_height,
            self.pooled_width,
            BM=self.pooled_tile,
            **plan.options,
        )

    def run_layers(self, block, f, maps, dense, counters, y, factor):
        """Run the layers of a module, collect the important pixels into the map y, and compute the attention.

        dense: room for the maps of the dense channels of all layers, one after the other
        """
        dense_maps = dense[: self.n * self.pixels * block.n_dense].split(
            [self.n * self.pixels * layer.d_out for layer in block.layers]
        )
        source = source_dense = f
        for index, (layer, out_dense) in enumerate(zip(block.layers, dense_maps, strict=True)):
            is_last = index == len(block.layers) - 1
            out = y if is_last else maps[index]
            sources, outs = (source, source_dense), (out, out_dense)
            important_pixels = functools.partial(
                self.important_layer, block, layer, sources, outs, maps, counters, factor=factor, is_last=is_last
            )
            other_pixels = functools.partial(self.dense_layer, layer, source_dense, out_dense, counters, index=index)
            if not layer.d_out:
                important_pixels()
            elif is_last:  # the attention needs all sums
                other_pixels()
                important_pixels()
            else:
                run_both(other_pixels, important_pixels)
            source, source_dense = out, out_dense

    def dense_layer(self, layer, source, out, counters, *, index):
        plan = self.plan
        self.launch(
            kernels.dense_layer,
            self.list_grid,
            source,
            out,
            layer.dense,
            self.order,
            self.bits,
            counters.important,
            counters.sums[:, index],
            self.height,
            self.width,
            counters.sums.stride(0),
            D_IN=layer.d_in,
            D_OUT=layer.d_out,
            BM=self.tile,
            STAGES=self.stages,
            DOT=self.dot,
            **plan.options,
        )

    def important_layer(self, block, layer, sources, outs, maps, counters, *, factor, is_last):
        plan = self.plan
        self.launch(
            kernels.important_layer,
            self.list_grid,
            *sources,
            maps,
            layer.w,
            block.collect,
            block.collect_bias,
            self.order,
            self.bits,
            counters.important,
            *outs,
            counters.sums,
            block.squeeze_w,
            block.squeeze_bias,
            block.excite_w,
            block.excite_bias,
            factor,
            counters.finished,
            self.height,
            self.width,
            maps.stride(0),
            C=plan.channels,
            R=block.squeezed,
            D_IN=layer.d_in,
            D_OUT=0 if is_last else layer.d_out,
            BM=self.tile,
            STAGES=self.stages,
            LAYERS=len(block.layers),
            LAST=is_last,
            DOT=self.dot,
            num_warps=layer_warps(plan.channels, self.tile, is_last),
        )

    def attend(self, block, f, dense, mask, y, factor, out):
        tile = min(self.tile, ATTEND_TILE)
        self.launch(
            kernels.attend,
            (triton.cdiv(self.pixels, tile), self.n),
            f,
            y,
            dense,
            block.collect,
            block.collect_bias,
            mask,
            factor,
            out,
            self.pixels,
            self.n * self.pixels,
            C=self.plan.channels,
            BM=tile,
            LAYERS=len(block.layers),
            DENSE=block.dense_code,
            DOT=self.dot,
            **self.plan.options,
        )

    def reduce(self, features, out):
        plan, pixels = self.plan, self.n * self.pixels
        self.launch(
            kernels.reduce,
            (triton.cdiv(pixels, REDUCE_TILE),),
            features,
            plan.reduce_w,
            plan.reduce_bias,
            out,
            pixels,
            features.stride(0),
            BLOCKS=len(plan.blocks),
            C=plan.channels,
            BM=REDUCE_TILE,
            STAGES=min(self.stages, 3 if plan.channels <= 64 else 2),
            DOT=self.dot,
            **plan.options,
        )

    def reconstruct(self, source, x, sr):
        plan = self.plan
        tile = max(16, min(self.pooled_tile, TAIL_NUMBERS // (4 * plan.tail_k)))
        tiles = count_tiles(self.pooled_height, self.pooled_width, tile, kernels.POOLED_COLUMNS)
        self.launch(
            kernels.reconstruct,
            (tiles, self.n),
            source,
            plan.tail_w,
            plan.tail_bias,
            x,
            plan.bicubic,
            sr,
            self.image_height,
            self.image_width,
            *x.stride(),
            self.height,
            self.width,
            self.pooled_height,
            self.pooled_width,
            COLORS=plan.model.n_colors,
            SCALE=plan.model.scale,
            C=plan.channels,
            CHUNK=max(16, min(plan.channels, TAIL_BYTES // (4 * plan.tail_k * x.element_size()))),
            K=plan.tail_k,
            TAPS=plan.taps,
            BM=tile,
            STAGES=2,
            DOT=self.dot,
            num_warps=8,
        )
