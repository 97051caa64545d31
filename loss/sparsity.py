"""The sparsity loss (eq. 6 of the paper)."""

from collections.abc import Iterable

import torch


def active_shares(densities: Iterable[torch.Tensor], channel_masks: Iterable[torch.Tensor]) -> torch.Tensor:
    """The share of the work of the sparse convolutions that is done, per block. Their mean is the sparsity loss.

    The share is the mean of m (1 - c) + c over layers, channels and pixels. Since m does not depend on the channel
    and c does not depend on the pixel, the mean factorizes and no tensor of that size is built.

    Args:
        densities: (K,) or K of (), the mean of each spatial mask m, in 0...1
        channel_masks: K of c (1, C, L), in 0...1

    Returns:
        (K,) in 0...1
    """
    pairs = zip(densities, channel_masks, strict=True)
    return torch.stack([density * (1 - c.mean()) + c.mean() for density, c in pairs])
