"""Ways to run any network here: self-ensemble and tiles (--self_ensemble, --chop).

A `run` takes LR images (N, n_colors, H, W) and returns SR images and their `Work`, as `model.inference` does; each
function here takes one and does the same.
"""

import functools
import itertools
import operator

import torch


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


def chop(run, x, scale, tile=256, overlap=16):
    """Run x in overlapping tiles of at most `tile` low-resolution pixels a side, so that memory stays bounded.

    Each output pixel comes from the tile in which it lies farthest from a cut. What a network gathers from the whole
    image (SMSR's channel attention) then comes from the tile alone, so the result differs slightly from an uncut one.

    Raises ValueError if `tile` is not larger than twice the overlap.
    """
    if tile <= 2 * overlap:
        raise ValueError(f"a tile of {tile} pixels leaves nothing between two overlaps of {overlap}")
    height, width = x.shape[-2:]
    output, works = None, []
    for top, bottom, keep_top, keep_bottom in _tiles(height, tile, overlap):
        for left, right, keep_left, keep_right in _tiles(width, tile, overlap):
            sr, work = run(x[..., top:bottom, left:right])
            works.append(work)
            if output is None:
                output = sr.new_empty(*sr.shape[:2], height * scale, width * scale)
            output[..., keep_top * scale : keep_bottom * scale, keep_left * scale : keep_right * scale] = sr[
                ...,
                (keep_top - top) * scale : (keep_bottom - top) * scale,
                (keep_left - left) * scale : (keep_right - left) * scale,
            ]
    return output, functools.reduce(operator.add, works)


def _tiles(length, tile, overlap):
    """Cut 0...length into (start, stop, keep from, keep to); what is kept covers every place once."""
    if length <= tile:
        return [(0, length, 0, length)]
    step = tile - 2 * overlap
    starts = [*range(0, length - tile, step), length - tile]
    keeps = [0, *(start + overlap for start in starts[1:]), length]
    return [(start, start + tile, *keep) for start, keep in zip(starts, itertools.pairwise(keeps), strict=True)]
