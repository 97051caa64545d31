"""Layouts of weights that several engines share."""

import torch
import torch.nn.functional as F


def pad_to(tensor: torch.Tensor, *sizes: int) -> torch.Tensor:
    """Append zeros until the last axes have these sizes."""
    missing = [size - have for size, have in zip(sizes, tensor.shape[-len(sizes) :], strict=True)]
    return F.pad(tensor, [pad for amount in reversed(missing) for pad in (0, amount)]).contiguous()


def to_taps(weight: torch.Tensor) -> torch.Tensor:
    """Weights of a convolution (C', C, 3, 3) -> (9, C, C')."""
    return weight.detach().permute(2, 3, 1, 0).flatten(0, 1)
