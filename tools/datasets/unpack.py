"""Unpack published sets into the layout that main.py reads: `prepare_data.py div2k` and `prepare_data.py download`."""

import argparse
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from files import write_whole
from program import InputError
from utility import in_parallel

# Archives contain the folders below, possibly inside others. Nothing else is unpacked, and no name can lead elsewhere.
DIV2K = re.compile(r"(?:^|/)(DIV2K_(?:train|valid)_(?:HR|LR_bicubic/X\d+)/\d{4}(?:x\d+)?\.png)$")
PLAIN = r"[^/\\:.][^/\\:]*"
BENCHMARK = re.compile(rf"(?:^|/)(benchmark/{PLAIN}/(?:HR|LR_bicubic/X\d+)/{PLAIN}\.png)$")
N_PUBLISHED = {"DIV2K_train": 800, "DIV2K_valid": 100, "Set5": 5, "Set14": 14, "B100": 100, "Urban100": 100}
MAX_BYTES = 64 * 2**20  # of an image; the largest published ones have about 10 MiB


@dataclass(frozen=True)
class Member:
    """An image in an archive or in a folder."""

    target: str  # where it belongs, below the folder of the sets
    size: int  # bytes
    origin: Path  # the archive, or the file itself
    read: Callable[[], bytes]

    @property
    def folder(self) -> str:
        return self.target.rpartition("/")[0]


def run(args: argparse.Namespace) -> None:
    """Write <out>/DIV2K from all archives and folders in `args.archive_dir`, and print the number of images per folder.

    Raises InputError if the folder contains no part of DIV2K, or as `find_members` and `unpack` do.
    """
    if not args.archive_dir.is_dir():
        raise InputError(f"--archive_dir {args.archive_dir}: no such folder; pass the folder of the archives")
    members = [member for archive in sorted(args.archive_dir.glob("DIV2K*.zip")) for member in find_members(archive)]
    for path in sorted(args.archive_dir.glob("DIV2K_*/**/*.png")):
        if target := _target(path.as_posix()):
            members.append(Member(target, path.stat().st_size, path, path.read_bytes))
    if not members:
        raise InputError(
            f"--archive_dir {args.archive_dir}: contains neither DIV2K_train_HR.zip nor any other part of DIV2K; "
            f"download the archives to this folder"
        )
    unpack(members, args.out, args.n_threads)
    print(f"{args.out / 'DIV2K'}: ready; use it with --dir_data {args.out} --data_train DIV2K")


def n_published(folder: str) -> int | None:
    """How many images a folder of a published set, such as "benchmark/Set5/HR", has; None if it is unknown."""
    return next((count for name, count in N_PUBLISHED.items() if re.search(rf"(?:^|/){name}[_/]", folder)), None)


def find_members(archive: Path) -> list[Member]:
    """The images in a .zip or .tar file that main.py reads.

    Raises InputError if the archive is incomplete, or holds links, paths that lead out of it, or enormous files.
    """
    try:
        members = _tar_members(archive) if archive.suffix == ".tar" else _zip_members(archive)
    except (zipfile.BadZipFile, tarfile.TarError, OSError):
        kind = archive.suffix.removeprefix(".")
        raise InputError(f"{archive}: not a complete {kind} file; remove it and download it again") from None
    for member in members:
        if member.size > MAX_BYTES:
            raise InputError(f"{archive}: {member.target} inside it has {member.size} bytes; use another archive")
    return members


def unpack(members: Sequence[Member], out: Path, n_threads: int) -> None:
    """Write the images below the folder `out` and print how many each folder has.

    HR images come first, so a set whose unpacking was interrupted lacks LR images, and main.py refuses it. Files that
    are there are kept.

    Raises InputError if a file is there with other content, a member is damaged, or the disk is too small.
    """
    out.mkdir(parents=True, exist_ok=True)
    members = sorted({member.target: member for member in members}.values(), key=lambda member: member.target)
    check_space(out, sum(member.size for member in members if not (out / member.target).exists()))
    for folder, group in groupby(members, key=lambda member: member.folder):
        group = list(group)
        in_parallel(lambda member: _unpack_one(member, out), group, n_threads, folder)
        published = n_published(folder)
        print(f"{out / folder}: {len(group)}" + f" of {published}" * (published is not None) + " images")


def check_space(folder: Path, needed: int) -> None:
    """Raise InputError if the disk of a folder has less room than `needed` bytes."""
    if needed > (free := shutil.disk_usage(folder).free):
        raise InputError(
            f"{folder}: {needed / 1e9:.1f} GB are needed, but only {free / 1e9:.1f} GB are free; make room"
        )


def _unpack_one(member, out):
    path = out / member.target
    if not path.exists():
        write_whole(path, member.read())
    elif path.stat().st_size != member.size or path.read_bytes() != member.read():
        raise InputError(f"{path}: already exists and differs from {member.origin}; remove it to unpack it again")


def _target(name):
    """Where a member of an archive belongs, below the folder of the sets; None if it is not part of a set."""
    if found := DIV2K.search(name):
        return f"DIV2K/{found[1]}"
    found = BENCHMARK.search(name)
    return found and found[1]


def _check_harmless(archive, name, is_link):
    if is_link or name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        what = "is a link" if is_link else "leads out of it"
        raise InputError(f"{archive}: {name!r} inside it {what}, which no published archive has; use another archive")


def _zip_members(archive):
    members = []
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            _check_harmless(archive, info.filename, stat.S_ISLNK(info.external_attr >> 16))
            if target := _target(info.filename):
                members.append(Member(target, info.file_size, archive, _zip_reader(archive, info.filename)))
    return members


def _zip_reader(archive: Path, name: str) -> Callable[[], bytes]:
    def read():
        try:
            with zipfile.ZipFile(archive) as file:  # a handle per call, because threads cannot share one
                return file.read(name)
        except (zipfile.BadZipFile, zlib.error):
            raise InputError(f"{archive}: {name} inside it is damaged; remove it and download it again") from None

    return read


def _tar_members(archive):
    members = []
    with tarfile.open(archive, "r:") as file:
        for info in file:
            _check_harmless(archive, info.name, is_link=not (info.isfile() or info.isdir()) or info.issparse())
            if info.isfile() and (target := _target(info.name)):
                members.append(Member(target, info.size, archive, _tar_reader(archive, info.offset_data, info.size)))
    return members


def _tar_reader(archive: Path, start: int, size: int) -> Callable[[], bytes]:
    def read():
        with open(archive, "rb") as file:  # tarfile would read all headers again
            file.seek(start)
            return file.read(size)

    return read
