"""The sparsity loss (paper eq. 6)."""

import torch


def active_shares(masks):
    """The share of the work of the sparse convolutions that is done, module by module; their mean is the loss.

    It is the mean of m (1 - c) + c over layers, channels and pixels. As m knows no channel and c no pixel, it
    factorises: nothing of that size is built.

    masks: K pairs of m (N, 1, H, W) and c (1, C, L), in 0...1. Returns a tensor (K,) in 0...1.
    """
    return torch.stack([m.float().mean() * (1 - c.mean()) + c.mean() for m, c in masks])
