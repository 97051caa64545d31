"""Ways to run any network: in tiles if memory is short, and as an ensemble of eight orientations.

A `predict` function takes LR images (N, n_colors, H, W) and returns SR images and their `Cost`, as `model.inference`
does.
"""

import functools
import operator

import torch

from model.network import Cost, Network, Predict
from utility import free_memory, logger


def build_predictor(
    model: Network, mode: str = "auto", chop: bool = False, chop_size: int = 256, ensemble: bool = False
) -> Predict:
    """Build a `predict` function. Images that do not fit in memory are tiled, and this is logged.

    Args:
        mode: of model.inference
        chop: tile every image
        chop_size: a tile is a strip of about chop_size x chop_size low-resolution pixels
        ensemble: average eight orientations, see `self_ensemble`
    """
    reported = set()

    def predict(x):
        needed = needed_memory(model, x)
        tiled = chop or needed > free_memory(x.device)
        if tiled and not chop and x.shape not in reported:
            reported.add(x.shape)
            logger.info(
                f"{x.shape[2]}x{x.shape[3]} pixels need about {needed / 2**30:.1f} GiB, more than is free: "
                "processing the image in tiles (chop); the result is the same"
            )
        return model.inference(x, mode, chop_size if tiled else None)

    return functools.partial(self_ensemble, predict) if ensemble else predict


def self_ensemble(predict: Predict, x: torch.Tensor) -> tuple[torch.Tensor, Cost]:
    """Average over the 8 flips and transpositions of x, each undone on the output (EDSR section 3.4)."""
    outputs, costs = [], []
    for transpose in (False, True):
        for flips in ((), (2,), (3,), (2, 3)):
            turned = x.transpose(2, 3) if transpose else x
            sr, cost = predict(turned.flip(flips))
            sr = sr.flip(flips)
            outputs.append(sr.transpose(2, 3) if transpose else sr)
            costs.append(cost)
    return torch.stack(outputs).mean(0), functools.reduce(operator.add, costs)


def needed_memory(model: Network, x: torch.Tensor) -> int:
    """Estimate the peak memory in bytes of running x (N, C, H, W) in one piece, from measurements on a CPU."""
    pixels = x.numel() // x.shape[1]
    return model.peak_maps * model.n_feats * pixels * x.element_size()
