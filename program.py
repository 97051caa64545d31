"""How every program here starts and ends: what launched it, one-line errors, exit codes. Nothing here needs PyTorch."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

INTERRUPTED = 130  # exit code after Ctrl-C
CLOSED_PIPE = 141  # exit code if nobody reads the output any more, as in `| head -1`: that of a program in C
MAX_SHOWN = 20  # failed images of a batch that are named
LAUNCHER_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")


class InputError(Exception):
    """A user's mistake, described in one line: what is wrong and what to do.

    argument: name of the setting at fault, which the command line shows as its flag; None if the message names a file
    """

    def __init__(self, message: str, argument: str | None = None):
        super().__init__(message)
        self.argument = argument

    def __str__(self) -> str:
        return shorten(super().__str__())

    def for_command_line(self) -> str:
        """The message, with the flag of the argument at fault in front of it."""
        return f"--{self.argument}: {self}" if self.argument else str(self)


def shorten(text: str, length: int = 600) -> str:
    """A text in one line of at most about `length` characters: the middle is cut out, the advice at the end stays."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length * 2 // 3]} … {line[-length // 3 :]}"


def run_program(main: Callable[[], int | None], memory_hint: str = "use smaller images") -> None:
    """Run `main()` and exit with what it returns; report a user's mistake in one line, with exit code 2.

    memory_hint: what to do if memory runs out
    """
    sys.stdout, sys.stderr = (_usable(stream) for stream in (sys.stdout, sys.stderr))
    try:
        code = _run_and_flush(main)
    except InputError as error:
        code = _complain(error.for_command_line(), 2)
    except OSError as error:
        if error.errno is None:
            raise
        is_closed_pipe = isinstance(error, BrokenPipeError)
        line = shorten(f"{error.filename or 'standard output, or a file'}: {error.strerror}; {_advice(error)}")
        code = CLOSED_PIPE if is_closed_pipe else _complain(line, 2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code = _complain(f"out of memory; {memory_hint}", 2)
    except KeyboardInterrupt:
        code = _complain("interrupted", INTERRUPTED, kind="")
    finally:
        for stream in (sys.stdout, sys.stderr):
            _discard_unwritten(stream)
    sys.exit(code)


def _advice(error):
    """What to do about an OSError."""
    advice = {
        errno.ENOSPC: "free some disk space",
        errno.EDQUOT: "free some disk space",
        errno.EACCES: "check its permissions",
        errno.EPERM: "check its permissions",
        errno.EROFS: "write to another folder",
        errno.ENAMETOOLONG: "use a shorter name",
    }
    return advice.get(error.errno, "check the path")


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """Add the name of a file to an OSError raised while writing it: that of a full disk has none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _usable(stream: TextIO | None) -> TextIO:
    """A stream that prints every text: names and signs that its encoding lacks are escaped. None: it was closed."""
    if stream is None:
        return open(os.devnull, "w")
    with contextlib.suppress(AttributeError):  # replaced by an object that is not a text file
        stream.reconfigure(errors="backslashreplace")
    return stream


def _run_and_flush(main):
    """What main() returns or exits with, once all it printed is written. Raises OSError if that fails."""
    try:
        code = main()
    except SystemExit as exited:
        code = exited.code
    with naming("standard output"):
        sys.stdout.flush()
    return code


def _complain(line, code, kind="error: "):
    with contextlib.suppress(OSError):  # stderr may be closed too
        print(f"{kind}{line}", file=sys.stderr, flush=True)
    return code


def _discard_unwritten(stream):
    """Let Python not try again, when it exits, to write what could not be written."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def report_batch(messages: Sequence[str], count: int) -> int:
    """Print why some of `count` images failed. Returns the exit code: 1 if any did. Raises InputError if all did."""
    if not messages:
        return 0
    *others, last = messages[:MAX_SHOWN]
    if len(messages) < count:
        print(f"error: {len(messages)} of {count} images failed, the others are done", file=sys.stderr)
    elif len(messages) > MAX_SHOWN:
        print(f"error: all {count} images failed, the first of them are", file=sys.stderr)
    for message in others:
        print(f"error: {message}", file=sys.stderr)
    if len(messages) == count:
        raise InputError(last)
    print(f"error: {last}", file=sys.stderr)
    return 1


def launched_processes() -> int:
    """How many processes torchrun or another launcher started, this one included; 1 without a launcher.

    Clusters set some of a launcher's variables in jobs that no launcher starts; only all of them count. Raises
    InputError if they contradict each other.
    """
    values = [os.environ.get(name, "") for name in LAUNCHER_VARIABLES]
    if not all(values):
        return 1
    try:
        n_processes, rank, local_rank, port = map(int, values[:4])
        if 0 <= local_rank <= rank < n_processes and 0 < port < 2**16:
            return n_processes
    except ValueError:  # not a number
        pass
    found = ", ".join(f"{name}={value}" for name, value in zip(LAUNCHER_VARIABLES, values, strict=True))
    raise InputError(f"{found}: not as a launcher sets them; start with torchrun, or unset WORLD_SIZE")


def usable_processors() -> int:
    """How many processors this process may use: a container or batch job is often given some of them only."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_out_of_memory(error: Exception) -> bool:
    """Whether a MemoryError or RuntimeError means that memory ran out; on a CPU PyTorch raises a plain RuntimeError."""
    phrases = ("out of memory", "not enough memory", "allocate memory", "memory object", "bad_alloc")
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in phrases)
