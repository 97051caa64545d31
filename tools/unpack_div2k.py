"""Unpack DIV2K as it is published: `prepare_data.py div2k`."""

import argparse
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from utility import InputError, in_parallel, write_whole

# HR images are named 0001.png, LR images 0001x2.png. Archives contain the folders below, possibly inside others.
MEMBER = re.compile(r"(?:^|/)(DIV2K_(train|valid)_(?:HR|LR_bicubic/X\d+)/\d{4}(?:x\d+)?\.png)$")
N_PUBLISHED = {"train": 800, "valid": 100}


def run(args: argparse.Namespace) -> None:
    """Write <out>/DIV2K from all archives and folders in `args.archive_dir`, and print the number of images per folder.

    Raises InputError if the folder contains no part of DIV2K, or an archive is damaged.
    """
    members = _find_members(args.archive_dir)
    if not members:
        raise InputError(
            f"--archive_dir {args.archive_dir}: contains neither DIV2K_train_HR.zip nor any other part of DIV2K; "
            f"download the archives to this folder"
        )
    root = args.out / "DIV2K"

    def unpack(member):
        target, (size, read) = member
        path = root / target
        if not path.exists() or path.stat().st_size != size:
            write_whole(path, read())

    in_parallel(unpack, list(members.items()), args.n_threads, "DIV2K")
    counts = Counter(target.rpartition("/")[0] for target in members)
    for folder, count in sorted(counts.items()):
        print(f"{folder}: {count} of {N_PUBLISHED[MEMBER.search(f'{folder}/0001.png')[2]]} images")
    print(f"{root}: ready; use it with --dir_data {args.out} --data_train DIV2K")


def _find_members(folder: Path) -> dict[str, tuple[int, Callable[[], bytes]]]:
    """{path relative to DIV2K: (size in bytes, function that reads the file)}. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"--archive_dir {folder}: no such folder; pass the folder of the archives")
    members = {}
    for archive in sorted(folder.glob("DIV2K*.zip")):
        try:
            for info in zipfile.ZipFile(archive).infolist():
                if found := MEMBER.search(info.filename):
                    members[found[1]] = info.file_size, _reader(archive, info.filename)
        except (zipfile.BadZipFile, OSError):
            raise InputError(f"{archive}: not a complete zip file; download it again") from None
    for path in sorted(folder.glob("DIV2K_*/**/*.png")):
        if found := MEMBER.search(path.as_posix()):
            members[found[1]] = path.stat().st_size, path.read_bytes
    return members


def _reader(archive: Path, name: str) -> Callable[[], bytes]:
    def read():
        try:
            with zipfile.ZipFile(archive) as file:  # a handle per call, because threads cannot share one
                return file.read(name)
        except (zipfile.BadZipFile, zlib.error):
            raise InputError(f"{archive}: {name} inside it is damaged; download it again") from None

    return read
