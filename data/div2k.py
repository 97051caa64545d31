"""Where the files of DIV2K lie: as published, or as any other set (HR, LR_bicubic/X<s>)."""

from data import benchmark
from data.benchmark import ImageSet
from utility import InputError


def find(root, scale):
    """Images 0001 to 0900 or as many as are there, training and validation together. Raises InputError."""
    if (root / "HR").is_dir():
        return benchmark.find(root, "DIV2K", scale, benchmark=False)
    pairs = {}
    for part in ("train", "valid"):
        hr_folder = root / f"DIV2K_{part}_HR"
        if hr_folder.is_dir():
            lr_folder = root / f"DIV2K_{part}_LR_bicubic" / f"X{scale}"
            maker = f"unpacking DIV2K_{part}_LR_bicubic_X{scale}.zip in {root}"
            pairs.update(benchmark.pair_up(hr_folder, lr_folder, scale, maker))
    if not pairs:
        raise InputError(f"{root}: holds neither DIV2K_train_HR nor HR; unpack DIV2K there or set --dir_data")
    return ImageSet("DIV2K", root, dict(sorted(pairs.items())))
