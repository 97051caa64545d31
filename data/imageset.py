"""Paired sets of images: <root>/HR/<name>.png and <root>/LR_bicubic/X<s>/<name>[x<s>].png."""

import shlex
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

from data.image import image_size, list_images
from program import InputError


@dataclass(frozen=True)
class ImageSet:
    """The files of a set of images."""

    name: str  # as the user gave it
    root: Path  # the folder of the set; the cache is in <root>/bin
    pairs: dict[str, tuple[Path | None, Path]]  # {image name: (HR path, LR path)}; without an HR image its path is None
    benchmark: bool = False  # whether the protocol of benchmark sets applies (Y channel, narrow border)

    @property
    def has_hr(self) -> bool:
        """Whether every image has an HR image. True for an empty set."""
        return all(hr is not None for hr, _ in self.pairs.values())


def find(root: Path, name: str, scale: int, benchmark: bool) -> ImageSet:
    """Find the pairs of the set in `root`, whose HR images are in <root>/HR. Raises InputError as `pair_up` does."""
    kind, out = ("benchmark", root.parent.parent) if benchmark else ("train", root.parent)
    options = ["--hr", root / "HR", "--name", name, "--scales", scale, "--out", out]
    remedy = "make them with: " + prepare_command(kind, *options)
    pairs = pair_up(root / "HR", root / "LR_bicubic" / f"X{scale}", scale, remedy)
    return ImageSet(name, root, pairs, benchmark)


def prepare_command(*arguments: object) -> str:
    """The command line of prepare_data.py with these arguments, for error messages."""
    return shlex.join(["python", "tools/prepare_data.py", *map(str, arguments)])


def pair_up(hr_folder: Path, lr_folder: Path, scale: int, remedy: str) -> dict[str, tuple[Path, Path]]:
    """Pair the images of two folders: {name: (HR path, LR path)}, in the order of the names.

    Args:
        remedy: how to obtain missing LR images, as an imperative sentence for error messages

    Raises:
        InputError: an image has no partner, or the sizes of a pair do not fit the scale; broken files are not reported
    """
    hr_images = list_images(hr_folder)
    if not lr_folder.is_dir():
        raise InputError(f"{lr_folder}: the LR images at x{scale} are missing; {remedy}")
    pairs, without_lr, without_hr = match(hr_images, list_images(lr_folder), scale)
    if without_lr:
        raise InputError(f"{without_lr[0]}: has no LR image in {lr_folder}; {remedy}")
    if without_hr:
        raise InputError(f"{without_hr[0]}: has no HR image in {hr_folder}; remove it or add the HR image")
    for hr, lr in pairs.values():
        try:
            sizes = image_size(hr), image_size(lr)
        except InputError:  # one broken file does not spoil a set: whoever reads the images reports it
            continue
        _check_fit(hr, lr, sizes, scale)
    return pairs


def match(
    hr_images: Mapping[str, Path], lr_images: Mapping[str, Path], scale: int
) -> tuple[dict[str, tuple[Path, Path]], list[Path], list[Path]]:
    """Match HR and LR images, each given as {name: path}, by name.

    Returns:
        {name: (HR path, LR path)}, the HR paths without an LR image, the LR paths without an HR image
    """
    pairs, without_lr, remaining = {}, [], dict(lr_images)
    for name, hr in hr_images.items():
        candidates = (lr_name for lr_name in lr_names(name, scale, hr_images) if lr_name in remaining)
        lr_name = next(candidates, None)
        if lr_name is None:
            without_lr.append(hr)
        else:
            pairs[name] = (hr, remaining.pop(lr_name))
    return pairs, without_lr, list(remaining.values())


def lr_names(name: str, scale: int, hr_names: Container[str]) -> list[str]:
    """The names that the LR image of the HR image `name` may have: <name> and <name>x<s>.

    The second name is excluded if it is the name of another HR image.
    """
    suffixed = f"{name}x{scale}"
    return [name] if suffixed in hr_names else [name, suffixed]


def check_sizes(hr: Path, lr: Path, scale: int) -> None:
    """Raise InputError unless the LR image has the height and width of the HR image / scale, rounded down.

    Also raises InputError if a file cannot be read.
    """
    _check_fit(hr, lr, (image_size(hr), image_size(lr)), scale)


def _check_fit(hr, lr, sizes, scale):
    hr_size, lr_size = sizes
    if tuple(length // scale for length in hr_size) != lr_size:
        (h, w), (lr_h, lr_w) = hr_size, lr_size
        raise InputError(
            f"{lr}: {lr_h}x{lr_w} pixels do not fit {hr} ({h}x{w}) at x{scale}; make the LR images again for this scale"
        )
