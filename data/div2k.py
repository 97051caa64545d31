"""DIV2K, either in its published layout or in the layout of any other set (HR, LR_bicubic/X<s>)."""

from pathlib import Path

from data import imageset
from data.imageset import ImageSet
from program import InputError


def find(root: Path, scale: int) -> ImageSet:
    """All DIV2K images in `root`, training and validation images together (0001 to 0900 if complete).

    Raises InputError if there are none, or as `imageset.pair_up` does.
    """
    if (root / "HR").is_dir():
        return imageset.find(root, "DIV2K", scale, benchmark=False)
    pairs = {}
    for part in ("train", "valid"):
        hr_folder = root / f"DIV2K_{part}_HR"
        if hr_folder.is_dir():
            lr_folder = root / f"DIV2K_{part}_LR_bicubic" / f"X{scale}"
            remedy = how_to_download(root.parent, scale)
            pairs.update(imageset.pair_up(hr_folder, lr_folder, scale, remedy))
    if not pairs:
        raise InputError(f"{root}: holds neither DIV2K_train_HR nor HR; {how_to_download(root.parent, scale)}")
    return ImageSet("DIV2K", root, dict(sorted(pairs.items())))


def how_to_download(dir_data: Path, scale: int) -> str:
    """What to do if DIV2K, or a part of it, is missing in the folder of the sets: a clause for error messages."""
    command = imageset.prepare_command("download", "DIV2K", "--scales", scale, "--out", dir_data)
    return f"download DIV2K with: {command}"
