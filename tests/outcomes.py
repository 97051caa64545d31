"""Run programs in this process, one after another with limited memory, and tell what a user should not meet.

Good outcomes: the program works, or it ends with one line and exit code 2 (1 if it left something out).
"""

import contextlib
import faulthandler
import io
import os
import random
import re
import resource
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

LIMIT = 3 * 2**30  # bytes of memory
SECONDS = 60  # per program


def copies(folder: Path, kind: str, seed: int, count: int) -> Iterator[tuple[int, random.Random]]:
    """Work in `count` copies of a folder, one after another. Yields the number of the copy and its random numbers."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    for index in range(count):
        with tempfile.TemporaryDirectory() as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            os.chdir(copy)
            yield index, random.Random(f"{kind} {seed} {index}")
            os.chdir(folder)


def find_fault(program: Callable[[], int | None]) -> str | None:
    """What is wrong with the outcome of a program; None if nothing is. Exits if the program takes too long."""
    from program import run_program

    output, errors = io.StringIO(), io.StringIO()
    code = None
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            run_program(program)
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            return f"{type(error).__name__}: {str(error)[:300]}"
        finally:
            faulthandler.cancel_dump_traceback_later()
    lines = [line for line in re.split("[\r\n]+", errors.getvalue()) if line.strip()]
    if code not in (0, 1, 2, None):
        return f"exit code {code}"
    if code == 2 and [line.startswith("error: ") for line in lines] != [False] * (len(lines) - 1) + [True]:
        return f"not one error as the last line: {lines[-3:]}"
    if any(len(line) > 1000 for line in lines):
        return f"a line of {max(map(len, lines))} characters"
    return "code was executed" if Path("executed").exists() else None
