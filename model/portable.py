"""Networks as graphs that other runtimes can run: one forward of plain operators, of any height and width.

`tools/export_onnx.py` exports them. They give what `model.inference` gives, to rounding. The sparse graph skips the
same work by the same plan as sparse.py, in operators that runtimes are quick at.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.edsr import EDSR
from model.sparse import Plan, neighbourhoods, to_image, to_matrix, to_rows

PIXELS = ("uint8", "float")
MODES = ("sparse", "dense")
ROWS = 1024  # important pixels that a sparse graph convolves at a time


def build_portable(model, mode, pixels="uint8"):
    """The `Portable` of an SMSR, or of an EDSR, which is dense."""
    network = PortableEDSR if isinstance(model, EDSR) else {"sparse": PortableSparse, "dense": PortableDense}[mode]
    return network(model, pixels).eval()


class _Block(nn.Module):
    """A sparse mask module and the weights of its `BlockPlan`.

    Features (N, C, H, W) -> features (N, C, H, W) and the mask (N, 1, H, W).
    """

    def __init__(self, plan):
        super().__init__()
        self.block, self.layers = plan.block, plan.layers
        for index, layer in enumerate(plan.layers):
            self.register_buffer(f"thin_{index}", layer.thin.detach())  # (n_out, n_in, 3, 3)

    def thin(self, index, image):
        """Dense channels from dense channels everywhere: (N, n_in, H, W) -> (N, n_out, H, W)."""
        layer = self.layers[index]
        if layer.n_in == 0:
            return image.new_zeros(image.shape[0], layer.n_out, *image.shape[2:])
        return F.relu(F.conv2d(image, self.get_buffer(f"thin_{index}"), padding=1))


class DenseBlock(_Block):
    """Everything is convolved, then what the masks deny is multiplied by zero."""

    def __init__(self, plan):
        super().__init__(plan)
        for index, layer in enumerate(plan.layers):
            self.register_buffer(f"full_{index}", layer.weight.detach())  # (C, C, 3, 3)
            self.register_buffer(f"collect_{index}", layer.collect_weight[:, :, None, None])  # (C, C, 1, 1)

    def forward(self, f):
        mask = self.block.hard_spatial_mask(f)
        allowed = mask.to(f.dtype)
        g, y = f, None
        for index, layer in enumerate(self.layers):
            full = F.relu(F.conv2d(g, self.get_buffer(f"full_{index}"), padding=1))
            dense, sparse = full[:, : layer.n_out], full[:, layer.n_out :] * allowed
            if layer.n_out and not layer.all_dense:
                dense = dense * allowed + self.thin(index, g[:, : layer.n_in]) * (1 - allowed)
            g = torch.cat([dense, sparse], 1) if layer.n_out else sparse
            y = _added(y, g, self.get_buffer(f"collect_{index}"), self.block.collect.bias)
        return f + self.block.attention(y), mask


class SparseBlock(_Block):
    """Masked work is skipped. One image at a time."""

    def __init__(self, plan):
        super().__init__(plan)
        for index, layer in enumerate(plan.layers):
            self.register_buffer(f"full_{index}", to_matrix(layer.weight.detach()).T.contiguous())  # (9 C, C)
            self.register_buffer(f"collect_{index}", layer.collect_weight.T.contiguous())  # (C, C), inputs first
        self.register_buffer("collect_dense", plan.dense_weights.T.contiguous())  # (D, C)
        self.register_buffer("identity", torch.eye(len(layer.weight)).to(layer.weight))  # (C, C)

    def forward(self, image):
        shape, f, bias = (1, *image.shape[2:]), to_rows(image), self.block.collect.bias  # f: (P, C)
        pixels, channels = f.shape
        mask = self.block.hard_spatial_mask(image)
        pixel = mask.flatten().nonzero()[:, 0]  # (M,)
        # So many that parts of at most ROWS, as long as each other, hold them all; those that are too many are pixel 0.
        count = pixel.shape[0]
        parts = count // ROWS + 1
        padded = (count // parts + 1) * parts
        around = neighbourhoods(mask[:, 0], torch.cat([pixel, pixel.new_zeros(padded - count)])).flatten()  # (9 M',)

        # What layers gather from, after the first: important pixels, the rim, a row of zeros for what lies outside.
        important = mask.flatten() > 0
        on_rim = (F.max_pool2d(mask.float(), 3, stride=1, padding=1) > mask).flatten()
        rim = on_rim.nonzero()[:, 0]  # (R,)
        order = important.long().cumsum(0) - 1  # 0...M - 1
        last = padded + rim.shape[0]
        place = torch.where(important, order, torch.where(on_rim, padded + on_rim.long().cumsum(0) - 1, last))
        in_packed = torch.cat([place, place.new_ones(1) * last]).index_select(0, around)
        outside = f.new_zeros(1, channels)
        source, rows = torch.cat([f, outside]), around
        thin, thins, collected = image, [], bias
        for index, layer in enumerate(self.layers):
            neighbours = source.index_select(0, rows).view(-1, 9 * channels)
            full = F.relu(neighbours @ self.get_buffer(f"full_{index}"))  # (M', C)
            collected = torch.addmm(collected, full, self.get_buffer(f"collect_{index}"))
            if layer.n_out:
                thin = self.thin(index, thin)  # (1, n_out, H, W)
                thins.append(thin)
            if index == len(self.layers) - 1:
                break
            rows = in_packed
            if not layer.n_out:
                source = torch.cat([full, outside.expand(rim.shape[0] + 1, channels)])
                continue
            # A product with the identity turns and widens: ONNX Runtime shares it among threads, not a transposition.
            wide = thin[0].flatten(1).index_select(1, rim).T @ self.identity[: layer.n_out]  # (R, C)
            source = torch.cat([full, wide, outside])
            if not layer.all_dense:
                thin = to_image(to_rows(thin).index_put((pixel,), full[:count, : layer.n_out]), shape)
        if thins:
            y = torch.addmm(bias, torch.cat(thins, 1)[0].flatten(1).T, self.collect_dense)  # (P, C)
        else:
            y = bias.expand(pixels, channels)
        y = y.index_put((pixel,), collected[:count])
        ones = torch.ones(1, y.shape[0], device=y.device)
        pooled = (ones @ y.float() / y.shape[0]).to(y.dtype)  # ONNX Runtime takes five times as long for y.mean(0)
        factors = self.block.attention.weights(pooled[:, :, None, None])[:, :, 0, 0]
        return to_image(f + y * factors, shape), mask


class Portable(nn.Module):
    """A network whose images are (N, H, W, n_colors) in 0...255, as readers of image files give them.

    Args:
        model: of the package `model`, in eval mode, with an rgb_range of 255
        pixels: "uint8": whole numbers go in and out; "float": those of the model's precision, not clamped

    Returns SR images (N, scale H, scale W, n_colors) and the masks of an SMSR, uint8 (N, K, H, W), 1 where important.
    """

    multiple = 1  # of which the network wants height and width

    def __init__(self, model, pixels="uint8"):
        super().__init__()
        self.model, self.pixels, self.scale = model, pixels, model.scale

    def forward(self, image):
        height, width = image.shape[1:3]
        x = image.permute(0, 3, 1, 2).to(self.model.mean.dtype) - self.model.mean
        x = _replicated(x, 0, height % self.multiple, width % self.multiple)
        sr, masks = self.run(x)
        sr = (sr + self.model.mean)[..., : height * self.scale, : width * self.scale].permute(0, 2, 3, 1)
        if self.pixels == "uint8":
            sr = sr.clamp(0, 255).round().to(torch.uint8)
        if not masks:
            return sr
        return sr, torch.cat(masks, 1)[..., :height, :width].to(torch.uint8)


class PortableEDSR(Portable):
    """EDSR."""

    def run(self, x):
        head = self.model.head(x)
        return self.model.tail(head + self.model.body(head)), ()


class PortableSMSR(Portable):
    """What both forms of an SMSR share; they differ in their modules, of the class `block_class`."""

    multiple = 2

    def __init__(self, model, pixels="uint8"):
        super().__init__(model, pixels)
        self.blocks = nn.ModuleList(self.block_class(plan) for plan in Plan(model).blocks)
        for k, weight in enumerate(model.collect[0].weight.detach().chunk(len(self.blocks), 1)):
            self.register_buffer(f"collect_{k}", weight.contiguous())  # (C, C, 1, 1)
        self.register_buffer("bicubic", bicubic_weights(model.scale, model.mean.shape[1]).to(model.mean))

    def run(self, x):
        head = f = self.model.head(x)
        total, masks = None, []
        for k, block in enumerate(self.blocks):
            f, mask = block(f)
            masks.append(mask)
            total = _added(total, f, self.get_buffer(f"collect_{k}"), self.model.collect[0].bias)
        return self.reconstruct(head + self.model.collect[2](F.relu(total)), x), masks

    def reconstruct(self, f, x):
        """Features (N, C, H, W) and the input less its mean -> SR less the mean (N, n_colors, scale H, scale W)."""
        upscaled = F.conv2d(_replicated(x, 2, 2, 2), self.bicubic)
        return self.model.tail[1](self.model.tail[0](f) + upscaled)


class PortableDense(PortableSMSR):
    """Of any number of images."""

    block_class = DenseBlock


class PortableSparse(PortableSMSR):
    """Of one image at a time."""

    block_class = SparseBlock


def _added(total, x, weight, bias):
    """total + the convolution of x, or that with its bias if there is no total yet.

    ONNX Runtime adds convolutions up in their own layout, but not a convolution and a vector.
    """
    return F.conv2d(x, weight, bias) if total is None else total + F.conv2d(x, weight)


def bicubic_weights(scale, n_colors):
    """Bicubic upscaling as a convolution 5x5 before a shuffle of pixels: (n_colors scale^2, n_colors, 5, 5)."""
    points = torch.eye(25).view(25, 1, 5, 5)  # what each of the pixels around the middle one adds to its s x s
    spread = F.interpolate(points, scale_factor=scale, mode="bicubic", align_corners=False)
    middle = slice(2 * scale, 3 * scale)
    kernel = spread[:, 0, middle, middle].reshape(5, 5, -1).permute(2, 0, 1)  # (s^2, 5, 5)
    weights = torch.zeros(n_colors, scale**2, n_colors, 5, 5)
    for color in range(n_colors):
        weights[color, :, color] = kernel
    return weights.flatten(0, 1)


def _replicated(x, before, below, right):
    """x (N, C, H, W) with its outermost lines again: `before` of them above and to the left, others below and right."""
    lines, columns = (torch.arange(-before, x.shape[d] + more, device=x.device) for d, more in ((2, below), (3, right)))
    x = x.index_select(2, lines.clamp(min=0).clamp(max=x.shape[2] - 1))
    return x.index_select(3, columns.clamp(min=0).clamp(max=x.shape[3] - 1))
