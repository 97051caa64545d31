"""Take DIV2K as it is published: `prepare_data.py div2k`."""

import re
import zipfile
import zlib
from collections import Counter

from utility import InputError, in_parallel, write_whole

# HR images are 0001.png, LR images 0001x2.png; the archives hold the folders that are looked for.
MEMBER = re.compile(r"(?:^|/)(DIV2K_(train|valid)_(?:HR|LR_bicubic/X\d+)/\d{4}(?:x\d+)?\.png)$")
IMAGES = {"train": 800, "valid": 100}


def main(args):
    """Write <out>/DIV2K from all archives and folders in --archive_dir; say what of it is there. Raises InputError."""
    members = _members(args.archive_dir)
    if not members:
        raise InputError(f"--archive_dir {args.archive_dir}: holds no DIV2K_train_HR.zip, nor any other part of DIV2K")
    root = args.out / "DIV2K"

    def unpack(member):
        target, (size, read) = member
        path = root / target
        if not path.exists() or path.stat().st_size != size:
            write_whole(path, read())

    in_parallel(unpack, list(members.items()), args.n_threads, "DIV2K")
    counts = Counter(target.rpartition("/")[0] for target in members)
    for folder, count in sorted(counts.items()):
        whole = IMAGES[MEMBER.search(f"{folder}/0001.png")[2]]
        print(f"{folder}: {count} images" + f"; {whole} are published" * (count != whole))
    print(f"{root}: ready; use it with --dir_data {args.out} and the name DIV2K")


def _members(folder):
    """{path below DIV2K: (bytes, function that reads them)}"""
    if not folder.is_dir():
        raise InputError(f"--archive_dir {folder}: no such folder")
    members = {}
    for archive in sorted(folder.glob("DIV2K*.zip")):
        try:
            for info in zipfile.ZipFile(archive).infolist():
                if found := MEMBER.search(info.filename):
                    members[found[1]] = info.file_size, _reader(archive, info.filename)
        except (zipfile.BadZipFile, OSError):
            raise InputError(f"{archive}: is no whole archive; fetch it again") from None
    for path in sorted(folder.glob("DIV2K_*/**/*.png")):
        if found := MEMBER.search(path.as_posix()):
            members[found[1]] = path.stat().st_size, path.read_bytes
    return members


def _reader(archive, name):
    def read():
        try:
            with zipfile.ZipFile(archive) as file:  # one a thread
                return file.read(name)
        except (zipfile.BadZipFile, zlib.error):
            raise InputError(f"{archive}: {name} in it is broken; fetch it again") from None

    return read
