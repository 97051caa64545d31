"""Where the files of a paired set lie: <root>/HR/<name>.png and <root>/LR_bicubic/X<s>/<name>[x<s>].png."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from data.image import image_size, list_images
from utility import InputError


@dataclass(frozen=True)
class ImageSet:
    """A set of images on the disk.

    name       as it was asked for
    root       its folder; the cache lies in <root>/bin
    pairs      {image name: (HR path, LR path)}; HR is None where there is none
    benchmark  whether it is measured by the protocol of benchmark sets
    """

    name: str
    root: Path
    pairs: dict
    benchmark: bool = False


def pair_up(hr_folder, lr_folder, scale, maker):
    """{name: (HR path, LR path)} of two folders. `maker` is the command that makes the LR images.

    Raises InputError where an image is alone or a size does not fit the scale.
    """
    hr_images = list_images(hr_folder)
    if not lr_folder.is_dir():
        raise InputError(f"{lr_folder}: the LR images at x{scale} are missing; make them with: {maker}")
    pairs, hr_alone, lr_alone = match(hr_images, list_images(lr_folder), scale)
    if hr_alone:
        raise InputError(f"{hr_alone[0]}: has no LR image in {lr_folder}; make it with: {maker}")
    if lr_alone:
        raise InputError(f"{lr_alone[0]}: has no HR image in {hr_folder}; remove one or add the other")
    for hr, lr in pairs.values():
        check_sizes(hr, lr, scale)
    return pairs


def match(hr_images, lr_images, scale):
    """{name: path} of HR and of LR images -> {name: (HR path, LR path)}, HR paths that are alone, LR paths alone."""
    pairs, hr_alone, left = {}, [], dict(lr_images)
    for name, hr in hr_images.items():
        lr = next((left.pop(lr_name) for lr_name in lr_names(name, scale, hr_images) if lr_name in left), None)
        if lr is None:
            hr_alone.append(hr)
        else:
            pairs[name] = (hr, lr)
    return pairs, hr_alone, list(left.values())


def lr_names(name, scale, hr_names):
    """The names that the LR image of an HR image may have, unless another HR image has them."""
    suffixed = f"{name}x{scale}"
    return [name] if suffixed in hr_names else [name, suffixed]


def check_sizes(hr, lr, scale):
    """InputError unless LR is HR / scale, rounded down, on both sides."""
    hr_size, lr_size = image_size(hr), image_size(lr)
    if tuple(length // scale for length in hr_size) != lr_size:
        (h, w), (lr_h, lr_w) = hr_size, lr_size
        raise InputError(
            f"{lr}: {lr_h}x{lr_w} pixels are not {hr} ({h}x{w}) at x{scale}; make the LR images anew for this scale"
        )


def find(root, name, scale, benchmark):
    """The set in <root>, whose HR images lie in <root>/HR. Raises InputError."""
    out = root.parent.parent if benchmark else root.parent
    kind = "benchmark" if benchmark else "train"
    where = ["--hr", str(root / "HR"), "--name", name, "--scales", str(scale), "--out", str(out)]
    maker = shlex.join(["python", "tools/prepare_data.py", kind, *where])
    pairs = pair_up(root / "HR", root / "LR_bicubic" / f"X{scale}", scale, maker)
    return ImageSet(name, root, pairs, benchmark)
