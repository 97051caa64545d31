"""Networks with chosen masks, for tests of inference."""

import torch


def with_density(block, x, density):
    """Shift the mask branch so that this share of the pixels of x is important."""
    with torch.no_grad():
        logits = block.spatial_mask(x)
        margin = (logits[:, 1] - logits[:, 0]).flatten().sort().values
        important = round(density * len(margin))
        if important == 0:
            cut = margin[-1] + 1
        elif important == len(margin):
            cut = margin[0] - 1
        else:
            cut = margin[len(margin) - important - 1 : len(margin) - important + 1].mean()
        block.spatial_mask.logits.bias[0] += cut


def with_dense_channels(block, counts):
    """Make random channels dense, `counts` of them in the first layers."""
    with torch.no_grad():
        for layer, count in enumerate(counts):
            dense = torch.randperm(block.channel_logits.shape[1])[:count]
            block.channel_logits[0, :, layer] = torch.tensor([0.0, 1.0])
            block.channel_logits[0, dense, layer] = torch.tensor([1.0, 0.0])
