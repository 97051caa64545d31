"""Files that appear whole, and a record of what results were made from. Nothing here needs PyTorch."""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from program import InputError, naming

MAX_NAME_BYTES = 255  # of a file, in the file systems in use


def write_whole(path: str | Path, content: bytes) -> None:
    """Write bytes to a temporary file next to `path`, then rename it: readers see the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # short, because names have at most 255 bytes
    try:
        with naming(path):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def overwritten(inputs: Iterable[str | Path | None], outputs: Iterable[Path]) -> list[str | Path]:
    """The inputs that are among the files to write or delete, also through symbolic links; empty ones are no files."""
    written = {place for path in outputs for place in _places(path)}
    return [path for path in inputs if path and _places(Path(path)) & written]


def check_outputs(outputs: Iterable[Path], inputs: Iterable[str | Path | None], argument: str) -> None:
    """Raise InputError if one of the files to write or delete is one of those that the same call reads."""
    for path in overwritten(inputs, outputs):
        raise InputError(f"would overwrite {path}, which this call reads; choose another name", argument)


def check_replaced(path: Path, mark: bytes, argument: str) -> None:
    """Raise InputError if a file to write exists and lacks the mark that all files of its kind hold."""
    if path.exists() and mark not in path.read_bytes():
        raise InputError(f"{path}: already exists and is something else; choose another name", argument)


def _places(path):
    """Where a file lies, and where it would be replaced: not the same if it is a symbolic link."""
    return {path.resolve(), path.parent.resolve() / path.name}


def check_name(name: str, source: str | Path) -> None:
    """Raise InputError if the name of a file that is made from `source` is too long."""
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        raise InputError(f"{source}: the name of its result would be too long; rename it")


def digest(paths: Iterable[Path], settings: bytes) -> str:
    """A key of everything that a result is made from: the content of files, and some settings.

    It is "" if a file cannot be read; whoever reads it next reports that.
    """
    key = hashlib.sha256(settings)
    try:
        for path in paths:
            content = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    content.update(block)
            key.update(content.digest())
    except OSError:
        return ""
    return key.hexdigest()


class Results:
    """The results in a folder, and what each was made from: no call repeats or replaces what another one has done.

    A result consists of files and has a name. Its record is a file in the hidden folder .finished, written before the
    files of the result, which appear whole: the result is finished if all files that its record names exist.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def find(self, name: str, made_from: str, files: Iterable[str]) -> Any | None:
        """The facts recorded about a result that was made from `made_from`; None if one of its files is missing."""
        record = self._read(name)
        is_finished = record["made_from"] == made_from and all(
            record["files"].get(file) == made_from and (self.folder / file).is_file() for file in files
        )
        return record["facts"] if is_finished else None

    def check(self, name: str, made_from: str, files: Iterable[str], advice: str) -> None:
        """Raise InputError if one of the files exists and was not made from `made_from`.

        Nothing is made from a key "": then there is nothing to lose.
        """
        made = self._read(name)["files"]
        for file in files if made_from else ():
            if os.path.lexists(self.folder / file) and made.get(file) != made_from:
                raise InputError(
                    f"{self.folder / file}: already exists, made from another input, or with other weights or options; "
                    f"{advice}"
                )

    def files(self, name: str, files: Iterable[str]) -> list[Path]:
        """The given files of a result, and those that earlier calls made for it."""
        return [self.folder / file for file in sorted({*files, *self._read(name)["files"]})]

    def remove(self, name: str, files: Iterable[str]) -> None:
        """Remove the files of a result, as `files` returns them, and its record."""
        for path in (*self.files(name, files), self._record(name)):
            path.unlink(missing_ok=True)

    def record(self, name: str, made_from: str, files: Iterable[str], facts: Any) -> None:
        """Record what a result is made from, and facts (as JSON holds them), before its files are written."""
        made = self._read(name)["files"] | dict.fromkeys(files, made_from)
        content = json.dumps({"made_from": made_from, "files": made, "facts": facts})
        write_whole(self._record(name), content.encode())

    def _record(self, name):
        # Names of images are as long as names of files may be.
        return self.folder / ".finished" / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.json"

    def _read(self, name):
        """The record of a result; an empty one if it is missing or damaged."""
        with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
            record = json.loads(self._record(name).read_bytes())
            files = {file: key for file, key in record["files"].items() if Path(file).name == file}
            return {"made_from": record["made_from"], "files": files, "facts": record["facts"]}
        return {"made_from": None, "files": {}, "facts": None}
