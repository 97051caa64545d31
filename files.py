"""The error that names a user's mistake, and files that appear whole. Nothing here needs PyTorch."""

import os
import secrets
from pathlib import Path


class InputError(Exception):
    """A user's mistake, described in one line: what is wrong and what to do.

    argument: name of the setting at fault, which the command line shows as its flag; None if the message names a file
    """

    def __init__(self, message: str, argument: str | None = None):
        super().__init__(message)
        self.argument = argument

    def __str__(self) -> str:
        # A worker process of a data loader puts its whole traceback in front of the message.
        return shorten(super().__str__().strip().rpartition("InputError: ")[2])

    def for_command_line(self) -> str:
        """The message, with the flag of the argument at fault in front of it."""
        return f"--{self.argument}: {self}" if self.argument else str(self)


def shorten(text: str, length: int = 600) -> str:
    """A text in one line of at most about `length` characters: the middle is cut out, the advice at the end stays."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length * 2 // 3]} … {line[-length // 3 :]}"


def write_whole(path: str | Path, content: bytes) -> None:
    """Write bytes to a temporary file next to `path`, then rename it: readers see the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # short, because names have at most 255 bytes
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # the error of a full disk does not name the file
        raise
    finally:
        temporary.unlink(missing_ok=True)
