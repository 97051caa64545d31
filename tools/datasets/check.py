"""Look for problems in a set before training on it: `prepare_data.py check`."""

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from data.image import image_kind, image_size, list_images, read_image
from data.imageset import check_sizes, match
from data.resize import crop_to_multiple, downscale
from program import InputError
from utility import in_parallel

# LR images made by MATLAB, or by a faithful reimplementation, reach these values.
MIN_IDENTICAL = 0.99  # share of the values that equal ours
MAX_DIFFERENCE = 2  # of 255


@dataclass(frozen=True)
class PairFacts:
    """What is known about a pair of files. Without `n_values`, the files could not be compared."""

    problem: str = ""  # "" if there is none
    kinds: tuple[str, ...] = ()  # of the two files, e.g. "PNG RGB"
    hr_size: tuple[int, int] = (0, 0)  # height, width
    n_values: int = 0  # of the LR image
    n_identical: int = 0  # values that equal MATLAB's bicubic
    max_difference: int = 0  # from MATLAB's bicubic


def run(args: argparse.Namespace) -> int:
    """Describe the set in `args.folder` and list its problems. Returns the exit code: 1 if there are any.

    Raises InputError if the folder does not contain a set, or the set is empty.
    """
    pairs, problems = _pair_up(args.folder, args.scale)
    if not pairs and not problems:
        raise InputError(f"{args.folder}: no images found; pass the folder of a set")
    facts = in_parallel(lambda pair: _inspect(*pair, args.scale), pairs, args.n_threads, args.folder.name)
    problems += [fact.problem for fact in facts if fact.problem]
    print(f"{args.folder} at x{args.scale}: {len(pairs)} pair{'s' * (len(pairs) != 1)}")
    _print_summary([fact for fact in facts if fact.n_values])
    for problem in problems:
        print(f"problem: {problem}")
    print(f"{len(problems) or 'no'} problem{'s' * (len(problems) != 1)} found")
    return 1 if problems else 0


def _print_summary(facts: list[PairFacts]) -> None:
    if not facts:
        return
    kinds = Counter(kind for fact in facts for kind in fact.kinds)
    print(f"files: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}")
    sizes = [fact.hr_size for fact in facts]
    (height, width), (max_height, max_width) = min(sizes, key=min), max(sizes, key=max)
    print(f"HR images: {height}x{width} to {max_height}x{max_width} pixels")
    share = sum(fact.n_identical for fact in facts) / sum(fact.n_values for fact in facts)
    difference = max(fact.max_difference for fact in facts)
    print(f"LR images: {share:.2%} of the values equal MATLAB's bicubic; the largest difference is {difference}")


def _pair_up(root: Path, scale: int) -> tuple[list[tuple[Path, Path]], list[str]]:
    """[(HR path, LR path)], and a line for each image without a partner."""
    pairs, problems = [], []
    for hr_folder, lr_folder in _folders(root, scale):
        matched, hr_alone, lr_alone = match(list_images(hr_folder), list_images(lr_folder), scale)
        pairs += matched.values()
        problems += [f"{hr}: has no LR image in {lr_folder}" for hr in hr_alone]
        problems += [f"{lr}: has no HR image in {hr_folder}" for lr in lr_alone]
    return pairs, problems


def _inspect(hr: Path, lr: Path, scale: int) -> PairFacts:
    """Compare the LR image of a pair with MATLAB's bicubic of its HR image."""
    try:
        check_sizes(hr, lr, scale)
        differences = difference(read_image(hr), read_image(lr), scale)
        kinds, hr_size = (image_kind(hr), image_kind(lr)), image_size(hr)
    except InputError as error:
        return PairFacts(problem=str(error))
    n_identical, max_difference = int((differences == 0).sum()), int(differences.max())
    problem = ""
    if not is_bicubic(differences):
        problem = (
            f"{lr}: differs from MATLAB's bicubic of {hr}: {n_identical / differences.size:.1%} of the values "
            f"are equal, the largest difference is {max_difference}"
        )
    return PairFacts(
        problem=problem,
        kinds=kinds,
        hr_size=hr_size,
        n_values=differences.size,
        n_identical=n_identical,
        max_difference=max_difference,
    )


def difference(hr: np.ndarray, lr: np.ndarray, scale: int) -> np.ndarray:
    """How far the values of an LR image are from MATLAB's bicubic of its HR image; 255 everywhere if the sizes differ.

    Both images are uint8 (H, W, C), and so is the result, with the shape of the LR image.
    """
    expected = downscale(crop_to_multiple(hr, scale), scale)
    if expected.shape != lr.shape:
        return np.full_like(lr, 255)
    return cv2.absdiff(expected, lr)


def is_bicubic(differences: np.ndarray) -> bool:
    """Whether MATLAB, or a faithful reimplementation, made an LR image with these differences."""
    return bool((differences == 0).mean() >= MIN_IDENTICAL and differences.max() <= MAX_DIFFERENCE)


def _folders(root: Path, scale: int) -> list[tuple[Path, Path]]:
    """[(HR folder, LR folder)] of DIV2K in its published layout or of any other set. Raises InputError."""
    if (root / "HR").is_dir():
        return [(root / "HR", root / "LR_bicubic" / f"X{scale}")]
    folders = [
        (root / f"DIV2K_{part}_HR", root / f"DIV2K_{part}_LR_bicubic" / f"X{scale}")
        for part in ("train", "valid")
        if (root / f"DIV2K_{part}_HR").is_dir()
    ]
    if not folders:
        raise InputError(f"{root}: not an image set; pass a folder that contains HR or DIV2K_train_HR")
    return folders
