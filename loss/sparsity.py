"""The sparsity loss (paper eq. 6)."""

import torch


def active_share(masks):
    """The share of the work of the sparse convolutions that is done: the mean of m (1 - c) + c.

    The mean runs over modules, layers, channels and pixels. As m knows no channel and c no pixel, it factorises:
    nothing of that size is built.

    masks: K pairs of m (N, 1, H, W) and c (1, C, L), in 0...1. Returns a tensor () in 0...1; 1 without masks.
    """
    if not masks:
        return torch.ones(())
    return sum(m.mean() * (1 - c.mean()) + c.mean() for m, c in masks) / len(masks)
