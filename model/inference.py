"""Ways to run any network here.

A `run` takes LR images (N, n_colors, H, W) and returns SR images and their `Work`, as `model.inference` does; each
function here takes one and does the same.
"""

import functools
import operator

import torch

from utility import free_memory, logger


def build_run(model, mode="auto", chop=False, chop_size=256, ensemble=False):
    """A `run` of the model. Images for which memory would not suffice are run in tiles, too, which is logged.

    Args:
        mode: of model.inference
        chop: run all in tiles
        chop_size: low-resolution pixels of a tile's side
        ensemble: run by `self_ensemble`
    """
    told = set()

    def run(x):
        needed = needed_memory(model, x)
        tiles = chop or needed > free_memory(x.device)
        if tiles and not chop and x.shape not in told:
            told.add(x.shape)
            logger.info(
                f"{x.shape[2]}x{x.shape[3]} pixels need about {needed / 2**30:.1f} GiB, more than is free: "
                "run in tiles, as with --chop; the result is the same"
            )
        return model.inference(x, mode, chop_size if tiles else None)

    return functools.partial(self_ensemble, run) if ensemble else run


def self_ensemble(run, x):
    """The mean over the 8 flips and transpositions of x, each undone on the output (EDSR section 3.4)."""
    outputs, works = [], []
    for transpose in (False, True):
        for flips in ((), (2,), (3,), (2, 3)):
            turned = x.transpose(2, 3) if transpose else x
            sr, work = run(turned.flip(flips))
            sr = sr.flip(flips)
            outputs.append(sr.transpose(2, 3) if transpose else sr)
            works.append(work)
    return torch.stack(outputs).mean(0), functools.reduce(operator.add, works)


def needed_memory(model, x):
    """About how many bytes running x (N, C, H, W) in one piece takes at its peak, by what was measured on a CPU."""
    pixels = x.numel() // x.shape[1]
    return model.peak_maps * model.n_feats * pixels * x.element_size()
