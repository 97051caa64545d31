"""Look for mistakes in a set before it is trained on: `prepare_data.py check`."""

from collections import Counter

import numpy as np

from data.benchmark import check_sizes, match
from data.image import image_kind, image_size, list_images, read_image
from data.resize import crop_to_multiple, downscale
from utility import InputError, in_parallel

IDENTICAL, DIFFERENCE = 0.99, 2  # of LR images that MATLAB, or another true to it, made


def main(args):
    """Print what is in the set and what is wrong with it. Returns the exit code: 1 if anything is."""
    pairs, wrong = _pair_up(args.folder, args.scale)
    if not pairs and not wrong:
        raise InputError(f"{args.folder}: no images there")
    facts = in_parallel(lambda pair: _look(*pair, args.scale), pairs, args.n_threads, args.folder.name)
    wrong += [fact["wrong"] for fact in facts if "wrong" in fact]
    facts = [fact for fact in facts if "values" in fact]
    print(f"{args.folder} at x{args.scale}: {len(pairs)} pairs")
    if facts:
        kinds = Counter(kind for fact in facts for kind in fact["kinds"])
        print(f"files: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}")
        sizes = [fact["size"] for fact in facts]
        (h, w), (greatest_h, greatest_w) = min(sizes, key=min), max(sizes, key=max)
        print(f"HR images: from {h}x{w} to {greatest_h}x{greatest_w} pixels")
        share = sum(fact["identical"] for fact in facts) / sum(fact["values"] for fact in facts)
        farthest = max(fact["farthest"] for fact in facts)
        print(f"LR images: {share:.2%} of the values are those of MATLAB's bicubic, the farthest is off by {farthest}")
    for problem in wrong:
        print(f"wrong: {problem}")
    print(f"{len(wrong) or 'nothing'} wrong")
    return 1 if wrong else 0


def _pair_up(root, scale):
    """[(HR path, LR path)], and a line for each image that is alone."""
    pairs, wrong = [], []
    for hr_folder, lr_folder in _folders(root, scale):
        matched, hr_alone, lr_alone = match(list_images(hr_folder), list_images(lr_folder), scale)
        pairs += matched.values()
        wrong += [f"{hr}: has no LR image in {lr_folder}" for hr in hr_alone]
        wrong += [f"{lr}: has no HR image in {hr_folder}" for lr in lr_alone]
    return pairs, wrong


def _look(hr, lr, scale):
    """Facts of a pair of files, and what is wrong with it, if anything."""
    try:
        check_sizes(hr, lr, scale)
        expected = downscale(crop_to_multiple(read_image(hr), scale), scale)
        difference = np.abs(expected - read_image(lr).astype(int))
        fact = {"kinds": [image_kind(hr), image_kind(lr)], "size": image_size(hr)}
    except InputError as error:
        return {"wrong": str(error)}
    identical, farthest = int((difference == 0).sum()), int(difference.max())
    fact |= {"values": difference.size, "identical": identical, "farthest": farthest}
    if identical < IDENTICAL * difference.size or farthest > DIFFERENCE:
        fact["wrong"] = (
            f"{lr}: is not MATLAB's bicubic of {hr}: {identical / difference.size:.1%} of the values are the same, "
            f"the farthest is off by {farthest}"
        )
    return fact


def _folders(root, scale):
    """[(HR folder, LR folder)], of DIV2K as it is published or of any other set. Raises InputError."""
    if (root / "HR").is_dir():
        return [(root / "HR", root / "LR_bicubic" / f"X{scale}")]
    folders = [
        (root / f"DIV2K_{part}_HR", root / f"DIV2K_{part}_LR_bicubic" / f"X{scale}")
        for part in ("train", "valid")
        if (root / f"DIV2K_{part}_HR").is_dir()
    ]
    if not folders:
        raise InputError(f"{root}: is no set: there is neither an HR folder nor DIV2K_train_HR")
    return folders
