"""The folder of a run, experiment/<name>: options, checkpoint, weights, console log, lock."""

import contextlib
import logging
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import schema
from loading import load_json, load_tensors
from program import InputError, naming
from utility import logger, remove_unfinished, save_torch, write_json

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

RELEASED = "released"  # the folder of weights that no run may overwrite
RUN_FILES = (  # what a training writes to its folder
    *("options.json", "checkpoint.pt", "log.txt", "log.csv", "loss.png", "psnr.png", "active_share.png", "density.png"),
    *(f"model/model_{which}.pt" for which in ("best", "best_ema", "latest", "latest_ema", "[0-9]*")),
    *("masks.png", "tensorboard/events.out.tfevents.*"),
)
OPTIONS_START = b'{\n "changed": '  # of what `write_options` writes
LOG_LINE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")

_locks: set[int] = set()  # descriptors of folders that this process has locked


def _release_locks():
    for descriptor in _locks:
        os.close(descriptor)


if fcntl:  # a forked process would hold the locks too, and may outlive a killed parent
    os.register_at_fork(after_in_child=_release_locks)


# What a checkpoint holds, apart from the shapes of its tensors, see `Trainer.load_state`.
COUNT, ANY_TENSORS = schema.integer(0), schema.mapping(rest=schema.tensor())
CHECKPOINT = schema.mapping(
    {
        "model": ANY_TENSORS,
        "ema": schema.optional(ANY_TENSORS),
        "optimizer": schema.mapping(rest=schema.anything),
        "optimizer_name": schema.text,
        "scaler": schema.optional(
            schema.mapping(
                {
                    "scale": schema.number(0),
                    "growth_factor": schema.number(0),
                    "backoff_factor": schema.number(0),
                    "growth_interval": COUNT,
                    "_growth_tracker": COUNT,
                }
            )
        ),
        "criterion": schema.mapping(rest=schema.mapping(rest=schema.anything)),
        "epoch": schema.integer(1),
        "step": COUNT,
        "names": schema.list_of(schema.text),
        "sums": schema.optional(schema.tensor()),
        "bad": schema.tensor((2,), finite=True),
        "seconds": schema.number(0),
        "mask_histogram": schema.mapping(rest=schema.number()),
        "history": schema.list_of(
            schema.mapping({"epoch": schema.integer(1), "loss": schema.number()}, rest=schema.number())
        ),
    },
    optional={"collapsed_masks": schema.mapping(rest=schema.mapping(rest=COUNT))},  # not in version 0.1.0
    rest=schema.anything,
)
OPTIONS = schema.mapping({"options": schema.mapping(rest=schema.anything)}, rest=schema.anything)


class Experiment:
    """The folder of a run, experiment/<name>:

    options.json              the options it was started with
    log.txt, log.csv          the console log; one row per epoch
    loss.png, psnr.png, active_share.png, density.png, masks.png
    tensorboard/              the same numbers and images, with --tensorboard
    checkpoint.pt             everything needed to resume
    model/                    only weights: model_latest.pt, model_best.pt, model_<epoch>.pt
    results-<set>-x<scale>/   the results of a test

    Raises InputError if the name is not a valid folder name.
    """

    def __init__(self, name: str, root: str | Path = "experiment", argument: str = "save"):
        if not re.fullmatch(r"[\w.+-]+", name) or set(name) == {"."}:
            raise InputError(f"{name!r} is not a valid run name; use letters, digits and . _ + -", argument=argument)
        self.name = name
        self.folder = Path(root) / name
        released = (Path(root) / RELEASED).resolve()
        if name == RELEASED or released in (self.folder.resolve(), *self.folder.resolve().parents):
            raise InputError(f"{name!r} is the folder of the released weights; choose another name", argument=argument)
        self.checkpoint_path = self.folder / "checkpoint.pt"
        self.options_path = self.folder / "options.json"
        self._locked: os.stat_result | None = None  # the folder, while this process holds its lock

    def files(self) -> list[Path]:
        """The files of the run. Results of tests, and files that users put into the folder, do not belong to it."""
        return [path for pattern in RUN_FILES for path in sorted(self.folder.glob(pattern))]

    def exists(self) -> bool:
        """Whether the folder holds files that a run may not replace: those before a first checkpoint do not count."""
        return not all(_is_expendable(path) for path in self.files())

    def create(self, reset: bool = False) -> None:
        """Make the folder. Raises InputError if it already contains a run, unless `reset`: then that is deleted.

        The folder itself stays: it may be a symbolic link or a mount point.
        """
        if self.exists() and not reset:
            raise InputError(f"{self.folder}: already contains a run; choose another name")
        for path in self.files():
            path.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)

    def results_folder(self, set_name: str, scale: int) -> Path:
        """The folder of the results of a test."""
        return self.folder / f"results-{set_name}-x{scale}"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training in this folder. Raises InputError if one already does."""
        with contextlib.ExitStack() as stack:
            if fcntl and self.folder.is_dir():
                folder = os.open(self.folder, os.O_RDONLY)
                _locks.add(folder)
                stack.callback(os.close, folder)
                stack.callback(_locks.remove, folder)
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the end of the process releases it
                except BlockingIOError:
                    raise InputError(
                        f"{self.folder}: another process is training there; wait for it or stop it"
                    ) from None
                except OSError:  # a file system without locks
                    pass
                else:
                    for written in (self.folder, self.folder / "model"):
                        remove_unfinished(written)
            self._locked = self.folder.stat() if self.folder.is_dir() else None
            try:
                yield
            finally:
                self._locked = None

    def _check_folder(self):
        """Raise InputError if another folder, or none, has taken the place of the locked one: it is not to be written.

        Otherwise a run whose folder was deleted would leave a part of its files, or mix them with another run's.
        """
        if self._locked is None:
            return
        try:
            is_same = os.path.samestat(self._locked, self.folder.stat())
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise InputError(f"{self.folder}: was deleted or moved while the run was writing to it; start it again")

    @contextlib.contextmanager
    def log_file(self) -> Iterator[None]:
        """Copy the console log to log.txt."""
        handler = LogFile(self.folder / "log.txt")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            handler.close()

    def weights_path(self, which: str | int) -> Path:
        """The weights file of `which`: 'best', 'latest' or an epoch."""
        return self.folder / "model" / f"model_{which}.pt"

    def save_weights(self, which: str | int, state_dict: dict[str, torch.Tensor]) -> None:
        self._check_folder()
        # CPU tensors load without a GPU and without map_location.
        save_torch(self.weights_path(which), {name: tensor.cpu() for name, tensor in state_dict.items()})

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        self._check_folder()
        save_torch(self.checkpoint_path, state)

    def load_checkpoint(self) -> dict[str, Any]:
        """Read checkpoint.pt, as `trainer.Trainer.state` wrote it. Raises InputError if it is missing or broken."""
        if not self.checkpoint_path.is_file():
            advice = self._advice() if self.folder.is_dir() else "check the name of the run"
            raise InputError(f"{self.checkpoint_path} does not exist; {advice}", argument="load")
        state = load_tensors(self.checkpoint_path, self._advice(), argument="load")
        self.check_checkpoint(state, CHECKPOINT)
        return state

    def check_checkpoint(self, state: dict[str, Any], wanted: schema.Schema) -> None:
        """Raise InputError unless the content of checkpoint.pt fits a schema."""
        schema.check(state, wanted, self.checkpoint_path, self._advice(), argument="load")

    def load_options(self) -> dict[str, Any]:
        """Read the options that the run was started with. Raises InputError if they are missing or broken."""
        if not self.folder.is_dir():
            raise InputError(f"{self.folder} does not exist; check the name of the run", argument="load")
        content = load_json(self.options_path, self._advice(), argument="load")
        schema.check(content, OPTIONS, self.options_path, self._advice(), argument="load")
        return content["options"]

    def _advice(self):
        return f"start another run from the weights in {self.folder / 'model'}"


class LogFile(logging.Handler):
    """Appends log lines to a file. Raises OSError if that fails; a FileHandler prints a traceback and goes on."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.file = path.open("ab", buffering=0)  # closing it has nothing left to write, and cannot fail

    def emit(self, record: logging.LogRecord) -> None:
        with naming(self.path):
            self.file.write(f"{self.format(record)}\n".encode(errors="backslashreplace"))  # names may not be UTF-8

    def close(self) -> None:
        self.file.close()
        super().close()


def _is_expendable(path):
    """Whether a run wrote this file before its first checkpoint, so that a new run may replace it."""
    if path.name not in ("log.txt", "options.json"):
        return path.parent.name == "tensorboard"
    with open(path, "rb") as file:
        start = file.read(32)
    return not start or bool(LOG_LINE.match(start)) if path.name == "log.txt" else start.startswith(OPTIONS_START)


def write_options(path: Path, options: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Write the options of a run, which of them differ from the defaults, and the versions it ran on."""
    changed = {key: value for key, value in options.items() if value != defaults[key]}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    write_json(path, {"changed": changed, "options": options, "versions": versions})
