"""The native engine: SMSR on a CPU by native.cpp, which skips the masked work without gathering anything.

It computes what sparse.Plan computes, in float32, from the same preparation of the weights: channels of a layer in the
order dense, then sparse. This module prepares what native.cpp reads, allocates all its memory, and calls it strip by
strip. docs/sparse-inference.md explains the method.
"""

import ctypes
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from model.common import check_finite, pad_to_multiple
from model.engines.build import BuildError, load_library
from model.engines.weights import pad_to, to_taps
from model.network import Cost
from model.sparse import BlockPlan, LayerPlan, Plan, Workspace
from model.tiling import Tile, split_into_tiles

MAX_FEATS = 128  # more do not fit in the cache
CHANNELS = 16  # native.cpp takes multiples of this
TAPS = 16  # nine numbers per pixel of the transposed convolution, padded
SMALLEST_STRIP = 180  # side of a strip whose maps are small enough not to matter
STRIPS = 3  # strips of a larger image: fewer need more memory than the plain engine, more compute more rows twice
WINOGRAD = 4  # products per output, input and output channel that F(2x2, 3x3) needs instead of 9
CACHE_LINE = 64
PANEL = CACHE_LINE // 4  # columns of a matrix that are stored together

# ---- the structures of native.cpp, field by field --------------------------------------------------------------------

Pointer, Int = ctypes.c_void_p, ctypes.c_int64


def _fields(kind: type, *names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names]


class Layer(ctypes.Structure):
    _fields_ = (*_fields(Pointer, "full", "thin", "collect"), *_fields(Int, "n_in", "n_out"))


class Module(ctypes.Structure):
    _fields_ = (
        *_fields(Pointer, "first", "first_bias", "mid", "mid_bias", "up", "up_bias"),
        *_fields(Pointer, "collect_bias", "squeeze", "squeeze_bias", "excite", "excite_bias", "reduce"),
        *_fields(Int, "hidden"),
        *_fields(ctypes.POINTER(Layer), "layers"),
    )


class Net(ctypes.Structure):
    _fields_ = (
        *_fields(Pointer, "first", "first_bias", "head", "head_bias"),
        *_fields(Pointer, "reduce_bias", "fuse", "fuse_bias", "tail", "tail_bias"),
        *_fields(Int, "n_modules", "n_layers", "n_colors", "scale"),
        *_fields(ctypes.POINTER(Module), "modules"),
    )


class Call(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.POINTER(Net), "net"),
        *_fields(Int, "height", "width", "strip_rows", "keep_head", "threads"),
        *_fields(Pointer, "run_parallel", "workspace", "image", "sr"),
    )


FUNCTIONS = {  # name: (result, arguments)
    "smsr_vector": (Int, []),
    "smsr_workspace": (Int, [ctypes.POINTER(Call)]),
    "smsr_head": (None, [ctypes.POINTER(Call)]),
    "smsr_module": (None, [ctypes.POINTER(Call), Int, Int, Int, Pointer, ctypes.POINTER(Int)]),
    "smsr_attend": (None, [ctypes.POINTER(Call), Int]),
    "smsr_reconstruct": (None, [ctypes.POINTER(Call)]),
}


# ---- weights ---------------------------------------------------------------------------------------------------------


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def to_winograd(weight: torch.Tensor) -> torch.Tensor:
    """Weights of a convolution (C', C, 3, 3) -> the 16 matrices (16, C, C') of Winograd's F(2x2, 3x3)."""
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    return torch.einsum("ay,oiyx,bx->abio", g, weight.detach().double(), g).flatten(0, 1)


def to_panels(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (M, K, N) -> (N / PANEL, M, K, PANEL), in the order in which they are read; N is padded."""
    columns = round_up(matrices.shape[2], PANEL)
    return pad_to(matrices, columns).unflatten(2, (columns // PANEL, PANEL)).permute(2, 0, 1, 3)


def branch_size(plan: Plan) -> int:
    """The number of channels of the mask branches, padded."""
    return round_up(max(block.spatial_mask.full.out_channels for block in plan.model.blocks), CHANNELS)


def find_pool() -> int:
    """The address of the function that runs another one in the threads of PyTorch's OpenMP pool; raises BuildError."""
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, Pointer).value
    except (AttributeError, OSError):
        raise BuildError("this build of PyTorch has no OpenMP threads") from None


def _check_shape(tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise BuildError(f"cannot run weights of the shape {tuple(tensor.shape)} instead of {shape}")


class NativeWeights:
    """The weights of an SMSR in the layout of native.cpp, as the structure `net`.

    plan: the plain plan, whose preparation of the weights is used
    vector: to a multiple of this, numbers of dense channels are padded
    masked: whether masks are applied; without them, every pixel and every channel is computed
    """

    def __init__(self, plan: Plan, vector: int, masked: bool = True):
        self.n_feats, self.branch, self.vector = plan.n_feats, branch_size(plan), vector
        self.kept = []  # what the structures point to
        self.net = self._pack_net(plan, masked)

    def _pack(self, tensor: torch.Tensor, *shape: int) -> int:
        """The address of a float32 copy that lives as long as these weights. Raises BuildError for another shape."""
        _check_shape(tensor, shape)
        copy = tensor.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        self.kept.append(copy)
        return copy.data_ptr()

    def _pack_matrices(self, tensor: torch.Tensor, *shape: int) -> int:
        """Matrices (M, K, N) or one (K, N) of this shape, as panels."""
        _check_shape(tensor, shape)
        panels = to_panels(tensor.detach().reshape(math.prod(shape[:-2]), *shape[-2:]))
        return self._pack(panels, *panels.shape)

    def _pack_array(self, kind: type[ctypes.Structure], items: list[ctypes.Structure]) -> ctypes.Array:
        self.kept.append((kind * len(items))(*items))
        return self.kept[-1]

    def _wide(self, n: int) -> int:
        return round_up(n, self.vector)

    def _pack_net(self, plan: Plan, masked: bool) -> Net:
        model, pack, matrices, c = plan.model, self._pack, self._pack_matrices, self.n_feats
        if len({len(block.layers) for block in plan.blocks}) != 1:
            raise BuildError("cannot run modules with different numbers of layers")
        first, _, second = model.head
        reduce = model.collect.reduce.weight[:, :, 0, 0].T.chunk(len(plan.blocks))  # K of (C, C), inputs first
        modules = [self._pack_module(block, part, masked) for block, part in zip(plan.blocks, reduce, strict=True)]
        net = Net(
            first=matrices(first.weight.permute(1, 2, 3, 0), model.n_colors, 3, 3, c),
            first_bias=pack(first.bias, c),
            head=matrices(to_winograd(second.weight), 16, c, c),
            head_bias=pack(second.bias, c),
            reduce_bias=pack(model.collect.reduce.bias, c),
            fuse=matrices(to_winograd(model.collect.fuse.weight), 16, c, c),
            fuse_bias=pack(model.collect.fuse.bias, c),
            n_modules=len(modules),
            n_layers=len(plan.blocks[0].layers),
            n_colors=model.n_colors,
            scale=model.scale,
            modules=self._pack_array(Module, modules),
        )
        self._pack_tail(net, model.tail.conv)
        return net

    def _pack_tail(self, net: Net, conv: nn.Conv2d) -> None:
        outputs = net.n_colors * net.scale**2
        parts = [to_panels(to_winograd(part)).flatten() for part in conv.weight.split(self.n_feats)]
        net.tail = self._pack(torch.cat(parts), 16 * self.n_feats * round_up(outputs, PANEL))
        net.tail_bias = self._pack(pad_to(conv.bias, self._wide(outputs)), self._wide(outputs))

    def _pack_module(self, plan: BlockPlan, reduce: torch.Tensor, masked: bool) -> Module:
        block, pack, c = plan.block, self._pack, self.n_feats
        squeeze, _, excite, _ = block.attention
        hidden = squeeze.out_channels
        skip = self._wide(plan.layers[0].n_out) if masked else 0  # channels that come with the mask branch
        layers = [self._pack_layer(layer, 0 if index else skip, masked) for index, layer in enumerate(plan.layers)]
        module = Module(
            collect_bias=pack(block.collect.bias, c),
            squeeze=pack(squeeze.weight[..., 0, 0], hidden, c),
            squeeze_bias=pack(squeeze.bias, hidden),
            excite=pack(excite.weight[..., 0, 0], c, hidden),
            excite_bias=pack(excite.bias, c),
            reduce=self._pack_matrices(reduce, c, c),
            hidden=hidden,
            layers=self._pack_array(Layer, layers),
        )
        if masked:
            self._pack_mask_branch(module, block.spatial_mask, plan.layers[0].weight[:skip])
        return module

    def _pack_mask_branch(self, module: Module, branch: nn.Module, dense: torch.Tensor) -> None:
        """dense: the weights (C', C, 3, 3) of the first layer that are multiplied together with the mask branch."""
        pack, matrices, r = self._pack, self._pack_matrices, self.branch
        first = torch.cat([pad_to(to_winograd(branch.full.weight), r), to_winograd(dense)], 2)
        # A pixel is important if its second logit is larger, so the difference of both is enough.
        logits, bias = branch.logits.weight.detach(), branch.logits.bias.detach()  # (R, 2, 3, 3), (2,)
        module.first = matrices(first, 16, self.n_feats, r + len(dense))
        module.first_bias = pack(pad_to(branch.full.bias, r), r)
        module.mid = matrices(pad_to(to_taps(branch.pooled.weight), r, r), 9, r, r)
        module.mid_bias = pack(pad_to(branch.pooled.bias, r), r)
        module.up = matrices(pad_to((logits[:, 1] - logits[:, 0]).flatten(1), r, TAPS), r, TAPS)
        module.up_bias = pack(bias[1:] - bias[:1], 1)

    def _pack_layer(self, plan: LayerPlan, skip: int, masked: bool) -> Layer:
        matrices, c = self._pack_matrices, self.n_feats
        n_in, n_out = (plan.n_in, plan.n_out) if masked else (c, 0)
        return Layer(
            full=matrices(to_winograd(plan.weight[skip:]), 16, c, c - skip),
            thin=matrices(to_taps(plan.weight[:n_out, :n_in]), 9, n_in, n_out),
            collect=matrices(plan.collect_weight.T, c, c),
            n_in=n_in,
            n_out=n_out,
        )


class NativeResult(NamedTuple):
    """The results of a forward pass.

    sr         (N, n_colors, scale height, scale width)
    masks      bool (K, N, H, W), with the padding to an even height and width
    important  of each module, the important pixels
    executed   of each module, the multiply-adds executed
    """

    sr: torch.Tensor
    masks: torch.Tensor
    important: list[int]
    executed: list[int]


class NativePlan:
    """A compiled SMSR that native.cpp runs. plan and masked are described in `NativeWeights`.

    Raises BuildError for a network of another size, and if the library cannot be built or loaded.
    """

    def __init__(self, plan: Plan, masked: bool = True):
        if plan.n_feats % CHANNELS or plan.n_feats > MAX_FEATS:
            sizes = f"networks with a multiple of {CHANNELS} features up to {MAX_FEATS}"
            raise BuildError(f"runs {sizes}, not {plan.n_feats}")
        self.model, self.run_parallel = plan.model, find_pool()
        self.library = load_library(SMSR_FEATURES=plan.n_feats, SMSR_MASK_FEATURES=branch_size(plan))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self.weights = NativeWeights(plan, self.library.smsr_vector(), masked)
        self.net = self.weights.net
        self._workspaces = []  # those that no call is using

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, tile: int | None = None) -> NativeResult:
        """Run images x (N, n_colors, H, W) in 0...rgb_range, float32, finite; tile is that of sparse.Plan."""
        model, n, (height, width) = self.model, len(x), x.shape[-2:]
        x = pad_to_multiple(x - model.mean, 2).contiguous()
        with torch.autocast("cpu", enabled=False):
            sr = model.upsample(x).contiguous()  # the network is added to it
        masks = torch.empty(self.net.n_modules, n, *x.shape[2:], dtype=torch.bool)
        counts = torch.zeros(self.net.n_modules, 2, dtype=torch.int64)
        workspace = self._workspaces.pop() if self._workspaces else Workspace()  # each thread has its own
        try:
            for index in range(n):
                call, tiles = self._prepare(x[index], sr[index], tile, workspace)
                self._run(call, tiles, masks[:, index], counts)
        finally:
            self._workspaces.append(workspace)
        sr = sr[..., : height * model.scale, : width * model.scale]
        return NativeResult(sr, masks, *counts.T.tolist())

    def _prepare(self, image: torch.Tensor, sr: torch.Tensor, tile: int | None, workspace: Workspace):
        """The arguments of native.cpp for an image, and the strips of its modules."""
        _, height, width = image.shape
        side = max(SMALLEST_STRIP, math.isqrt(height * width // STRIPS))
        tiles = split_into_tiles(1, height, width, tile or side)
        call = Call(
            net=ctypes.pointer(self.net),
            height=height,
            width=width,
            strip_rows=max(strip.bottom - strip.top for strip in tiles),
            keep_head=tile is None,
            threads=torch.get_num_threads(),
            run_parallel=self.run_parallel,
            image=image.data_ptr(),
            sr=sr.data_ptr(),
        )
        size = self.library.smsr_workspace(call) + CACHE_LINE
        memory = workspace.rows("native", round_up(size, 4) // 4, 1, image)
        call.workspace = round_up(memory.data_ptr(), CACHE_LINE)
        return call, tiles

    def _run(self, call: Call, tiles: list[Tile], masks: torch.Tensor, counts: torch.Tensor) -> None:
        """Run an image. masks (K, H, W) are written; counts (K, 2) are increased. Ctrl-C is noticed between strips."""
        library, strip_counts = self.library, (Int * 2)()
        library.smsr_head(call)
        for index, mask in enumerate(masks):
            for tile in tiles:
                library.smsr_module(call, index, tile.top, tile.bottom, mask.data_ptr(), strip_counts)
                counts[index] += torch.tensor(list(strip_counts))
            library.smsr_attend(call, index)
        library.smsr_reconstruct(call)

    def fixed_macs(self, keep_head: bool) -> int:
        """Multiply-adds per pixel outside of the modules."""
        model = self.model
        square, tail = model.n_feats**2, model.n_feats * model.tail.conv.out_channels
        head = model.head[0].weight.numel() + WINOGRAD * square
        return head * (1 if keep_head else 2) + square * (len(model.blocks) + WINOGRAD) + WINOGRAD * tail


class NativeEngine:
    """Runs a network by its NativePlan; what that does not support runs by the plain plan.

    Takes the same images and modes as sparse.Plan. Raises BuildError as NativePlan does.
    """

    peak_maps = Plan.peak_maps

    def __init__(self, plan: Plan):
        self.plain, self.native = plan, NativePlan(plan)

    def __call__(self, x: torch.Tensor, mode: str = "auto", tile: int | None = None) -> tuple[torch.Tensor, Cost]:
        if mode not in ("auto", "sparse") or x.dtype != torch.float32 or not x.is_cpu:
            return self.plain(x, mode, tile)
        check_finite(x)
        result = self.native(x, tile)
        return result.sr, self._cost(result, x.shape[-2:], keep_head=tile is None)

    def _cost(self, result: NativeResult, size: torch.Size, keep_head: bool) -> Cost:
        height, width = size
        pixels = result.masks[0].numel()
        costs = [
            block.cost(pixels, important, executed, mask[:, None, :height, :width])
            for block, mask, important, executed in zip(
                self.plain.blocks, result.masks, result.important, result.executed, strict=True
            )
        ]
        fixed = self.native.fixed_macs(keep_head) * pixels
        return replace(self.plain.total_cost(costs, pixels), macs_run=fixed + sum(result.executed))
