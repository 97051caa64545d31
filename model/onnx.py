"""Networks as ONNX graphs, which run without PyTorch.

`build_graph_module` turns a network into a module with a single forward of plain operators, for images of any height
and width. `export` converts that module to ONNX. Its results equal those of `model.inference` up to rounding. The
sparse graph follows the same plan as sparse.py and skips the same work, with operators that are fast in ONNX Runtime.

Only `export` needs the packages onnx and onnxscript.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model.common import bicubic_weights
from model.edsr import EDSR
from model.network import Network
from model.sparse import BlockPlan, LayerPlan, Plan, find_neighbors, to_image, to_matrix, to_rows
from program import InputError

if TYPE_CHECKING:
    import onnx

PIXELS = ("uint8", "float")
GRAPH_MODES = ("sparse", "dense")
GATHER_ROWS = 1024  # neighborhoods that a sparse graph gathers at a time, so that the product finds them in the cache
OPSET = 18


# ---- sparse mask modules ---------------------------------------------------------------------------------------------


class GraphBlock(nn.Module):
    """A sparse mask module, with the weights of its plan as buffers.

    Features (N, C, H, W) -> features (N, C, H, W) and the mask, bool (N, 1, H, W).
    """

    def __init__(self, plan: BlockPlan):
        super().__init__()
        self.block, self.layers = plan.block, plan.layers
        for index, layer in enumerate(plan.layers):
            self.register_buffer(f"thin_{index}", layer.thin.detach())  # (n_out, n_in, 3, 3)

    def run_thin(self, index: int, image: torch.Tensor) -> torch.Tensor:
        """Dense channels from dense channels everywhere: (N, n_in, H, W) -> (N, n_out, H, W)."""
        layer = self.layers[index]
        if layer.n_in == 0:
            return image.new_zeros(image.shape[0], layer.n_out, *image.shape[2:])
        return F.relu(F.conv2d(image, self.get_buffer(f"thin_{index}"), padding=1))


class MaskedDenseBlock(GraphBlock):
    """Convolves everything, then zeroes what the masks rule out."""

    def __init__(self, plan: BlockPlan):
        super().__init__(plan)
        for index, layer in enumerate(plan.layers):
            self.register_buffer(f"full_{index}", layer.weight.detach())  # (C, C, 3, 3)
            self.register_buffer(f"collect_{index}", layer.collect_weight[:, :, None, None])  # (C, C, 1, 1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = self.block.hard_spatial_mask(image)
        important = mask.to(image.dtype)
        f, y = image, None
        for index, layer in enumerate(self.layers):
            full = F.relu(F.conv2d(f, self.get_buffer(f"full_{index}"), padding=1))
            dense, sparse = full[:, : layer.n_out], full[:, layer.n_out :] * important
            if layer.n_out and not layer.inputs_all_dense:
                dense = dense * important + self.run_thin(index, f[:, : layer.n_in]) * (1 - important)
            f = torch.cat([dense, sparse], 1) if layer.n_out else sparse
            y = _accumulate_conv(y, f, self.get_buffer(f"collect_{index}"), self.block.collect.bias)
        return image + self.block.attention(y), mask


class SparseBlock(GraphBlock):
    """Skips the masked work; takes one image at a time."""

    def __init__(self, plan: BlockPlan):
        super().__init__(plan)
        for index, layer in enumerate(plan.layers):
            self.register_buffer(f"full_{index}", to_matrix(layer.weight.detach()).T.contiguous())  # (9 C, C)
            self.register_buffer(f"collect_{index}", layer.collect_weight.T.contiguous())  # (C, C), inputs first
        self.register_buffer("collect_dense", plan.dense_weights.T.contiguous())  # (D, C)
        self.register_buffer("identity", torch.eye(len(layer.weight)).to(layer.weight))  # (C, C)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        f, bias = to_rows(image), self.block.collect.bias  # f: (P, C)
        mask = self.block.hard_spatial_mask(image)
        kernel_map = build_kernel_map(mask)
        collected, dense_features = self._run_layers(image, f, kernel_map)
        if dense_features:
            y = torch.addmm(bias, torch.cat(dense_features, 1)[0].flatten(1).T, self.collect_dense)  # (P, C)
        else:
            y = bias.expand(*f.shape)
        y = y.index_put((kernel_map.pixel,), collected[: kernel_map.pixel.shape[0]])
        ones = torch.ones(1, y.shape[0], device=y.device)
        pooled = (ones @ y.float() / y.shape[0]).to(y.dtype)  # ONNX Runtime takes five times as long for y.mean(0)
        factors = self.block.attention.factors(pooled[:, :, None, None])[:, :, 0, 0]
        return to_image(f + y * factors, (1, *image.shape[2:])), mask

    def _run_layers(self, image, f, kernel_map):
        """Run all layers on an image (1, C, H, W), whose rows are f (P, C).

        Returns the 1x1 collection of all features at important pixels (M', C), and a list of the dense features of
        each layer that has any (1, n_out, H, W).
        """
        count, channels = kernel_map.pixel.shape[0], image.shape[1]
        zero_row = f.new_zeros(1, channels)
        source, rows = torch.cat([f, zero_row]), kernel_map.neighbors
        thin, dense_features, collected = image, [], self.block.collect.bias
        for index, layer in enumerate(self.layers):
            gathered = source.index_select(0, rows).view(-1, 9 * channels)
            full = F.relu(gathered @ self.get_buffer(f"full_{index}"))  # (M', 9 C) @ (9 C, C) -> (M', C)
            collected = torch.addmm(collected, full, self.get_buffer(f"collect_{index}"))
            if layer.n_out:
                thin = self.run_thin(index, thin)
                dense_features.append(thin)
            if index == len(self.layers) - 1:
                break
            source = self._gather_source(layer, full=full, thin=thin, rim=kernel_map.rim, zero_row=zero_row)
            rows = kernel_map.neighbor_rows
            if layer.n_out and not layer.inputs_all_dense:
                dense = to_rows(thin).index_put((kernel_map.pixel,), full[:count, : layer.n_out])
                thin = to_image(dense, (1, *image.shape[2:]))
        return collected, dense_features

    def _gather_source(self, layer: LayerPlan, *, full, thin, rim, zero_row):
        """The rows that the next layer gathers from: important pixels (M'), the rim (R) and a zero row."""
        if not layer.n_out:
            return torch.cat([full, zero_row.expand(rim.shape[0] + 1, zero_row.shape[1])])
        # Multiplying by the identity transposes and widens to C channels. ONNX Runtime runs that on all threads, unlike
        # a transposition.
        rim_features = thin[0].flatten(1).index_select(1, rim).T @ self.identity[: layer.n_out]  # (R, C)
        return torch.cat([full, rim_features, zero_row])


class GraphKernelMap(NamedTuple):
    """Which features the layers of a sparse block gather, see sparse.KernelMap.

    The M important pixels are padded to M' with pixel 0, so that they split into equal parts of at most GATHER_ROWS.

    pixel             (M,) the important pixels, of 0...P - 1
    rim               (R,) pixels that are not important but next to an important one
    neighbors         (9 M',) the pixels around each important pixel and itself; P outside the image
    neighbor_rows  (9 M',) the same as rows of: important pixels (M'), the rim (R), a zero row
    """

    pixel: torch.Tensor
    rim: torch.Tensor
    neighbors: torch.Tensor
    neighbor_rows: torch.Tensor


def build_kernel_map(mask: torch.Tensor) -> GraphKernelMap:
    """The kernel map of a mask, bool (1, 1, H, W)."""
    pixel = mask.flatten().nonzero()[:, 0]
    count = pixel.shape[0]
    parts = count // GATHER_ROWS + 1
    padded = (count // parts + 1) * parts
    neighbors = find_neighbors(mask[:, 0], torch.cat([pixel, pixel.new_zeros(padded - count)])).flatten()
    is_important = mask.flatten() > 0
    is_rim = (F.max_pool2d(mask.float(), 3, stride=1, padding=1) > mask).flatten()
    rim = is_rim.nonzero()[:, 0]
    important_row = is_important.long().cumsum(0) - 1
    zero_row = padded + rim.shape[0]
    rim_row = padded + is_rim.long().cumsum(0) - 1
    row_of_pixel = torch.where(is_important, important_row, torch.where(is_rim, rim_row, zero_row))
    row_of_pixel = torch.cat([row_of_pixel, row_of_pixel.new_ones(1) * zero_row])  # (P + 1,)
    return GraphKernelMap(pixel, rim, neighbors, row_of_pixel.index_select(0, neighbors))


# ---- networks --------------------------------------------------------------------------------------------------------


class GraphNetwork(nn.Module):
    """A network with images (N, H, W, n_colors) in 0...255, the layout of image files.

    Returns SR images (N, scale H, scale W, n_colors) and the masks of an SMSR, uint8 (N, K, H, W), 1 where important.

    Args:
        model: a network in eval mode
        pixels: of input and output; "uint8", or "float": the precision of the model, not clamped
    """

    pads_to_even = False  # whether the network takes images of even height and width only
    one_image = False  # whether N is 1
    outputs = ("sr",)

    def __init__(self, model: Network, pixels: str = "uint8"):
        super().__init__()
        self.model, self.pixels = model, pixels
        self.factor = float(model.rgb_range) / 255  # from 0...255 to the value range of the network

    def forward(self, image: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        height, width = image.shape[1:3]
        scale = self.model.scale
        x = self._to_input(image) - self.model.mean
        x = _replicate_edges(x, before=0, below=height % 2 * self.pads_to_even, right=width % 2 * self.pads_to_even)
        sr, masks = self.run_network(x)
        sr = self._to_output((sr + self.model.mean)[..., : height * scale, : width * scale])
        if not masks:
            return sr
        return sr, torch.cat(masks, 1)[..., :height, :width].to(torch.uint8)

    def run_network(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """LR images without their mean -> SR images without it, and the masks of all modules, bool (N, 1, H, W)."""
        raise NotImplementedError

    def _to_input(self, image):
        x = image.permute(0, 3, 1, 2)
        if self.factor != 1:
            x = x.float() * self.factor
        return x.to(self.model.dtype)

    def _to_output(self, sr):
        image = sr.permute(0, 2, 3, 1)
        if self.factor != 1:
            image = image.float() / self.factor
        if self.pixels == "uint8":
            return image.clamp(0, 255).round().to(torch.uint8)
        return image.to(self.model.dtype)


class EDSRGraph(GraphNetwork):
    """An EDSR, for any number of images."""

    def run_network(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        head = self.model.head(x)
        return self.model.tail(head + self.model.body(head)), []


class SMSRGraph(GraphNetwork):
    """What both graphs of an SMSR share; they differ in the class of their blocks."""

    pads_to_even = True
    outputs = ("sr", "masks")
    block_class: type[GraphBlock]

    def __init__(self, model: Network, pixels: str = "uint8"):
        super().__init__(model, pixels)
        self.blocks = nn.ModuleList(self.block_class(plan) for plan in Plan(model).blocks)
        for k, weight in enumerate(model.collect.reduce.weight.detach().chunk(len(self.blocks), 1)):
            self.register_buffer(f"reduce_{k}", weight.contiguous())  # (C, C, 1, 1)
        self.register_buffer("bicubic", bicubic_weights(model.scale, model.n_colors).to(model.mean))

    def run_network(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        head = f = self.model.head(x)
        total, masks = None, []
        for k, block in enumerate(self.blocks):
            f, mask = block(f)
            masks.append(mask)
            total = _accumulate_conv(total, f, self.get_buffer(f"reduce_{k}"), self.model.collect.reduce.bias)
        return self._reconstruct(head + self.model.collect.fuse(F.relu(total)), x), masks

    def _reconstruct(self, f, x):
        """Features (N, C, H, W) and the input without its mean -> SR without its mean."""
        upscaled = F.conv2d(_replicate_edges(x, before=2, below=2, right=2), self.bicubic)
        return self.model.tail.shuffle(self.model.tail.conv(f) + upscaled)


class MaskedDenseGraph(SMSRGraph):
    """An SMSR that computes everything and then applies the masks, for any number of images."""

    block_class = MaskedDenseBlock


class SparseGraph(SMSRGraph):
    """An SMSR that skips the masked work, for one image at a time."""

    block_class = SparseBlock
    one_image = True


def build_graph_module(model: Network, mode: str = "sparse", pixels: str = "uint8") -> GraphNetwork:
    """The graph module of a network, in eval mode. Raises InputError if the network has no such mode.

    Args:
        model: an SMSR or an EDSR, in eval mode and on the CPU; an EDSR has only the mode "dense"
        mode: one of GRAPH_MODES; "dense" computes everything and then applies the masks
        pixels: one of PIXELS, see GraphNetwork
    """
    name = type(model).__name__
    graphs = {"dense": EDSRGraph} if isinstance(model, EDSR) else {"sparse": SparseGraph, "dense": MaskedDenseGraph}
    if mode not in graphs:
        raise InputError(f"{name} has no graph of mode {mode!r}; use one of {', '.join(graphs)}", argument="mode")
    return graphs[mode](model, pixels).eval()


def _accumulate_conv(total, x, weight, bias):
    """total + the convolution of x; if total is None, the convolution of x with its bias.

    ONNX Runtime adds convolutions in their own memory layout, but not a convolution and a vector.
    """
    return F.conv2d(x, weight, bias) if total is None else total + F.conv2d(x, weight)


def _replicate_edges(x, *, before, below, right):
    """x (N, C, H, W) with its edges repeated: `before` times at the top and on the left, and below and on the right."""
    rows, columns = (torch.arange(-before, x.shape[d] + more, device=x.device) for d, more in ((2, below), (3, right)))
    x = x.index_select(2, rows.clamp(min=0).clamp(max=x.shape[2] - 1))
    return x.index_select(3, columns.clamp(min=0).clamp(max=x.shape[3] - 1))


# ---- export ----------------------------------------------------------------------------------------------------------


def export(model: Network, mode: str = "sparse", pixels: str = "uint8", masks: bool = False) -> "onnx.ModelProto":
    """Convert a network to ONNX, using only operators of the standard set.

    The graph takes `image` (N, H, W, n_colors) in 0...255 and returns `sr` (N, scale H, scale W, n_colors) in the same
    range and, if asked for, `masks`, uint8 (N, K, H, W). N is 1 in a sparse graph.

    Args:
        model, mode, pixels: see build_graph_module
        masks: whether the masks are a second output

    Raises InputError if onnx or onnxscript is not installed, or if the network has no such mode or no masks.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  PyTorch's exporter needs it
    except ImportError:
        raise InputError("onnx or onnxscript is not installed; pip install -r requirements-deploy.txt") from None
    module = build_graph_module(model, mode, pixels)
    has_masks = "masks" in module.outputs
    if masks and not has_masks:
        raise InputError(f"{type(model).__name__} has no masks; export it without them", argument="masks")
    proto = _convert(module)
    if mode == "sparse":
        _split_gathers(proto.graph)
    if has_masks and not masks:
        del proto.graph.output[1]
    _name_sizes(proto.graph, model.scale)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _convert(module: GraphNetwork) -> "onnx.ModelProto":
    """Convert a graph module with PyTorch's exporter; height and width are free, and N unless it is 1."""
    dtype = torch.uint8 if module.pixels == "uint8" else module.model.dtype
    example = torch.zeros(1 if module.one_image else 2, 18, 22, module.model.n_colors, dtype=dtype)
    free = torch.export.Dim.DYNAMIC
    sizes = {1: free, 2: free} if module.one_image else {0: free, 1: free, 2: free}
    with _silence_exporter():
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(module.outputs),
            dynamic_shapes=(sizes,),
            verbose=False,
        )
    return program.model_proto


@contextlib.contextmanager
def _silence_exporter() -> Iterator[None]:
    """Hide the warnings, log messages and prints about deprecated parts of the exporter itself."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _name_sizes(graph: "onnx.GraphProto", scale: int) -> None:
    """Name the free sizes; the exporter's own expressions differ from version to version."""
    names = {"image": ("N", "H", "W"), "sr": ("N", f"{scale}*H", f"{scale}*W"), "masks": ("N", None, "H", "W")}
    for value in (*graph.input, *graph.output):
        for size, name in zip(value.type.tensor_type.shape.dim, names[value.name], strict=False):
            if name and not size.HasField("dim_value"):
                size.dim_param = name


# ---- gathering in parts ----------------------------------------------------------------------------------------------
# A sparse graph gathers and multiplies at most GATHER_ROWS neighborhoods at a time, so that they stay in the cache.
# PyTorch 2.13 cannot export a loop whose length is known only at run time. So this is done to the exported graph: each
# chain of Gather, Reshape, MatMul and Relu becomes the body of a Scan over parts of its indices.


@dataclass(frozen=True)
class _Chain:
    """The nodes Gather, Reshape, MatMul and Relu that compute one layer at the important pixels."""

    gather: "onnx.NodeProto"
    reshape: "onnx.NodeProto"
    matmul: "onnx.NodeProto"
    relu: "onnx.NodeProto"

    @property
    def indices(self) -> str:
        return self.gather.input[1]

    @property
    def output(self) -> str:
        return self.relu.output[0]


def _split_gathers(graph: "onnx.GraphProto") -> None:
    """Replace every chain by a Scan; chains with the same indices share their parts."""
    _add_constant(graph, "longest_part", [9 * GATHER_ROWS])
    _add_constant(graph, "longest_part_less_1", [9 * GATHER_ROWS - 1])
    _add_constant(graph, "rest", [-1])
    weights = {tensor.name: tensor for tensor in graph.initializer}
    already_split = set()
    for chain in _find_chains(graph):
        nodes = [] if chain.indices in already_split else _split_indices(chain.indices)
        already_split.add(chain.indices)
        weight = weights[chain.matmul.input[1]]  # (9 C, C)
        _add_constant(graph, f"{chain.output}_shape", [-1, weight.dims[1]])
        _replace(graph, chain, nodes + _scan(chain, weight))


def _add_constant(graph: "onnx.GraphProto", name: str, values: list[int]) -> None:
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.array(values), name))


def _find_chains(graph: "onnx.GraphProto") -> list[_Chain]:
    producers = {name: node for node in graph.node for name in node.output}
    consumers = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    chains = []
    for matmul in (node for node in graph.node if node.op_type == "MatMul"):
        reshape = producers.get(matmul.input[0])
        gather = producers.get(reshape.input[0]) if reshape is not None and reshape.op_type == "Reshape" else None
        if gather is not None and gather.op_type == "Gather":
            (relu,) = consumers[matmul.output[0]]
            chains.append(_Chain(gather, reshape, matmul, relu))
    return chains


def _split_indices(indices: str) -> list["onnx.NodeProto"]:
    """Nodes that reshape indices (9 M',) to `<indices>_parts` (parts, 9 M' / parts)."""
    from onnx import helper

    return [
        helper.make_node("Shape", [indices], [f"{indices}_size"]),
        helper.make_node("Add", [f"{indices}_size", "longest_part_less_1"], [f"{indices}_rounded_up"]),
        helper.make_node("Div", [f"{indices}_rounded_up", "longest_part"], [f"{indices}_count"]),
        helper.make_node("Concat", [f"{indices}_count", "rest"], [f"{indices}_shape"], axis=0),
        helper.make_node("Reshape", [indices, f"{indices}_shape"], [f"{indices}_parts"]),
    ]


def _scan(chain: _Chain, weight: "onnx.TensorProto") -> list["onnx.NodeProto"]:
    """Nodes that run a chain on each part of its indices and join the results (M', C) under the chain's name."""
    from onnx import TensorProto, helper

    name, (source, _), (_, row_shape) = chain.output, chain.gather.input, chain.reshape.input
    body = helper.make_graph(
        nodes=[
            helper.make_node("Gather", [source, f"{name}_neighbors"], [f"{name}_gathered"], axis=0),
            helper.make_node("Reshape", [f"{name}_gathered", row_shape], [f"{name}_rows"]),
            helper.make_node("MatMul", [f"{name}_rows", weight.name], [f"{name}_product"]),
            helper.make_node("Relu", [f"{name}_product"], [f"{name}_part"]),
        ],
        name=f"{name}_body",
        inputs=[helper.make_tensor_value_info(f"{name}_neighbors", TensorProto.INT64, [None])],
        outputs=[helper.make_tensor_value_info(f"{name}_part", weight.data_type, [None, weight.dims[1]])],
    )
    return [
        helper.make_node("Scan", [f"{chain.indices}_parts"], [f"{name}_stacked"], body=body, num_scan_inputs=1),
        helper.make_node("Reshape", [f"{name}_stacked", f"{name}_shape"], [name]),
    ]


def _replace(graph: "onnx.GraphProto", chain: _Chain, nodes: list["onnx.NodeProto"]) -> None:
    """Put nodes in the place of a chain's Relu, the last one of its nodes."""
    old = (chain.gather, chain.reshape, chain.matmul, chain.relu)
    place = list(graph.node).index(chain.relu) - (len(old) - 1)
    for node in old:
        graph.node.remove(node)
    for offset, node in enumerate(nodes):
        graph.node.insert(place + offset, node)
