"""SMSR as it is run: a trained network compiled into a plan that skips the masked work (paper section 3.3).

Indices, gathers and matrix products with plain PyTorch operators, no gradient. The plan equals
`SMSR.masked_forward` up to the order of summation.

Features are kept channels-last, as rows of C numbers a pixel, the dense channels of a layer first. Around every
image lies a border of zeros, so that the neighbours of a pixel are rows at fixed distances.
"""

import torch
import torch.nn.functional as F

from model.common import Work, conv_macs

ROWS = 2048  # rows gathered at a time: 2048 x 576 floats stay in the cache


class Plan:
    """A trained SMSR, compiled from its weights as they are now.

    Call with images (N, n_colors, H, W) less their mean, H and W even.

    Returns SR images (N, n_colors, scale H, scale W) and the `Work` they took.
    """

    def __init__(self, model):
        self.model = model
        self.blocks = [BlockPlan(block) for block in model.blocks]
        self.collect_weights = model.collect[0].weight.flatten(1).T.chunk(len(self.blocks))  # K of (C, C)
        self.fixed_macs = conv_macs(model.head) + conv_macs(model.collect) + conv_macs(model.tail)

    def __call__(self, x):
        model = self.model
        head = f = model.head(x)  # (N, C, H, W)
        collected = model.collect[0].bias
        works = []
        for plan, weight in zip(self.blocks, self.collect_weights, strict=True):
            f, work = plan(f)
            works.append(work)
            collected = collected + f.permute(0, 2, 3, 1) @ weight  # (N, H, W, C) @ (C, C)
        f = head + model.collect[1:](collected.permute(0, 3, 1, 2))
        return model.reconstruct(f, x), self._total(works, x.shape[0] * x.shape[2] * x.shape[3])

    def _total(self, works, pixels):
        fixed = self.fixed_macs * pixels
        return Work(
            pixels=pixels,
            macs=fixed + sum(work.macs for work in works),
            macs_dense=fixed + sum(work.macs_dense for work in works),
            important=tuple(count for work in works for count in work.important),
            active=sum(work.active for work in works) / len(works),
        )


class BlockPlan:
    """One sparse mask module."""

    def __init__(self, block):
        self.block = block
        dense = block.hard_channel_mask()  # (C, L)
        collect = block.collect.weight.flatten(1).T.chunk(len(block.convs))  # L of (C, C)
        self.layers = []
        n_in, order_in = dense.shape[0], torch.arange(dense.shape[0], device=dense.device)  # the input is all dense
        for layer, conv in enumerate(block.convs):
            order = torch.argsort(dense[:, layer].int(), descending=True, stable=True)  # dense channels first
            n_out = int(dense[:, layer].sum())
            self.layers.append(LayerPlan(conv.weight[order][:, order_in], collect[layer][order], n_in, n_out))
            n_in, order_in = n_out, order
        self.dense_share = dense.float().mean().item()
        self.macs_dense = conv_macs(block.convs) + conv_macs(block.collect)
        pooled = block.spatial_mask[3:]  # at half the resolution, the transposed convolution included
        transposed = pooled[2].weight.numel()
        self.mask_macs = conv_macs(block.spatial_mask[0]) + (conv_macs(pooled) + transposed) // 4

    def __call__(self, x):
        """Features (N, C, H, W) -> features (N, C, H, W) and the work done."""
        n, _, height, width = x.shape
        mask = self.block.hard_spatial_mask(x)  # (N, 1, H, W)
        rows = F.pad(mask[:, 0], (1, 1, 1, 1)).flatten().nonzero()[:, 0]  # (M,), into the bordered features
        line = width + 2
        offsets = torch.tensor([dy * line + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)], device=x.device)
        neighbours = rows[:, None] + offsets  # (M, 9)
        f = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (N, H + 2, W + 2, C)
        collected = torch.zeros_like(f)
        for layer in self.layers:
            f = layer(f, rows, neighbours)
            layer.collect(f, rows, collected)
        collected = collected[:, 1:-1, 1:-1].permute(0, 3, 1, 2) + self.block.collect.bias.view(1, -1, 1, 1)
        return x + self.block.attention(collected), self._work(n * height * width, len(rows))

    def _work(self, pixels, important):
        executed = sum(layer.macs(pixels, important) for layer in self.layers)
        mask = self.mask_macs * pixels
        share = important + (pixels - important) * self.dense_share
        return Work(pixels, mask + executed, mask + self.macs_dense * pixels, (important,), share)


class LayerPlan:
    """One sparse mask convolution and its share of the collecting 1x1 convolution.

    weight (C, C, 3, 3) and collect (C_in, C_out) with dense channels first: n_in of the inputs, n_out of the outputs.
    """

    def __init__(self, weight, collect, n_in, n_out):
        channels = weight.shape[0]
        self.n_in, self.n_out = n_in, n_out
        self.thin = weight[:n_out, :n_in].contiguous()  # everywhere: dense channels from dense channels
        # At important pixels all the rest: every output, or where all inputs are dense only the sparse ones.
        self.from_output = n_out if n_in == channels else 0
        self.full = weight[self.from_output :].permute(2, 3, 1, 0).flatten(0, 2).contiguous()  # (9C, C'), tap by tap
        self.collect_dense, self.collect_sparse = collect[:n_out], collect[n_out:]

    def __call__(self, f, rows, neighbours):
        """Bordered features (N, H + 2, W + 2, C) -> bordered features.

        rows (M,) are the important pixels, neighbours (M, 9) the rows of the 3x3 pixels around each of them.
        """
        out = torch.zeros_like(f)
        if self.thin.numel():
            dense = F.conv2d(f[..., : self.n_in].permute(0, 3, 1, 2), self.thin)  # the border is the padding
            out[:, 1:-1, 1:-1, : self.n_out] = F.relu(dense).permute(0, 2, 3, 1)
        if self.full.numel():
            channels = f.shape[3]
            source, target = f.view(-1, channels), out.view(-1, channels)[:, self.from_output :]
            for chunk, around in zip(rows.split(ROWS), neighbours.split(ROWS), strict=True):
                gathered = source[around.flatten()].view(-1, 9 * channels)
                target[chunk] = F.relu(gathered @ self.full).to(target.dtype)  # (M, 9C) @ (9C, C') -> (M, C')
        return out

    def collect(self, f, rows, total):
        """Add this layer's output f to the collected features: dense channels everywhere, sparse where they are."""
        channels = f.shape[3]
        if self.n_out:
            total += f[..., : self.n_out] @ self.collect_dense
        if self.n_out < channels:
            source, target = f.view(-1, channels), total.view(-1, channels)
            for chunk in rows.split(ROWS):
                target[chunk] += source[chunk, self.n_out :] @ self.collect_sparse

    def macs(self, pixels, important):
        """Multiply-adds executed for so many pixels, of which so many are important."""
        channels = len(self.collect_dense) + len(self.collect_sparse)
        convolved = pixels * self.thin.numel() + important * self.full.numel()
        collected = pixels * self.n_out + important * (channels - self.n_out)
        return convolved + collected * channels
