"""The sparsity loss (eq. 6 of the paper)."""

from collections.abc import Iterable

import torch


def active_shares(masks: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The share of the work of the sparse convolutions that is done, per block. Their mean is the sparsity loss.

    The share is the mean of m (1 - c) + c over layers, channels and pixels. Since m does not depend on the channel
    and c does not depend on the pixel, the mean factorizes and no tensor of that size is built.

    Args:
        masks: K pairs of a spatial mask m (N, 1, H, W) and a channel mask c (1, C, L), both in 0...1

    Returns:
        (K,) in 0...1
    """
    return torch.stack([m.float().mean() * (1 - c.mean()) + c.mean() for m, c in masks])
