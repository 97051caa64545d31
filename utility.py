"""What every part leans on: errors, logging, devices, files, and the folder of an experiment."""

import contextlib
import csv
import io
import json
import logging
import math
import os
import platform
import re
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import pictures

try:
    import fcntl
    import resource
except ImportError:  # on Windows
    fcntl = resource = None

logger = logging.getLogger("smsr")
INTERRUPTED = 130  # exit code after Ctrl-C


class InputError(Exception):
    """A user's mistake, told in one line: the file or flag, what was found, what to do."""

    def __str__(self):
        # A data loader's worker hands its error on with the whole traceback in front of the message.
        return super().__str__().strip().rpartition("InputError: ")[2]


def run_program(main):
    """Run `main()` and exit with what it returns; a user's mistake is one line and exit code 2."""
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            "error: out of memory; smaller --batch_size, --patch_size or --n_feats, or --chop, need less",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def is_out_of_memory(error):
    """Whether this is what a MemoryError says; on a CPU PyTorch raises a plain RuntimeError."""
    said = ("out of memory", "not enough memory", "allocate memory", "memory object", "bad_alloc")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def in_parallel(function, items, n_threads, title):
    """[function(item) for item in items], in threads, with a progress bar of images. The first error ends it."""
    with ThreadPoolExecutor(max(1, n_threads)) as pool, tqdm(total=len(items), desc=title, leave=False) as bar:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


# ---- devices ---------------------------------------------------------------------------------------------------------


def pick_device(name):
    """'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1', 'mps' -> torch.device. Raises InputError."""
    if name == "auto":
        for kind, present in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
            if present:
                return torch.device(kind)
        logger.info("no GPU found: running on the CPU")
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception:  # each kind of device fails in a way of its own
        raise InputError(f"--device {name}: there is no such device here; use --device cpu or auto") from None
    return device


def synchronize(device):
    """Wait until the device has done all it was given, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(run, device):
    """How long run() takes on the device."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


_measuring = threading.RLock()
_measured = {}


def measured_once(key, measure):
    """The result of measure(), which is called for the first of its `key` alone; other threads wait for it."""
    with _measuring:
        if key not in _measured:
            _measured[key] = measure()
        return _measured[key]


def peak_memory(device):
    """The most memory this process had at a time, in bytes: that of the GPU, else its own; 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory(device):
    """Bytes that a process can still have on a device; inf where nobody tells."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf
    return min(free, free_in_cgroup())


def free_in_cgroup(root=Path("/sys/fs/cgroup"), own=Path("/proc/self/cgroup")):
    """What the limits of a container or a batch job leave (cgroup v2); what files fill of it can be had, too."""
    free = math.inf
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = own.read_text().splitlines()
        group = root / next(line for line in lines if line.startswith("0::"))[3:].lstrip("/")
        for folder in (group, *group.parents):
            if (folder / "memory.max").is_file() and (limit := (folder / "memory.max").read_text().strip()) != "max":
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / "memory.current").read_text()) - int(counts["inactive_file"])
                free = min(free, int(limit) - used)
    return free


# ---- files -----------------------------------------------------------------------------------------------------------


def write_whole(path, content):
    """Write bytes beside `path`, then rename: whoever looks finds the old file or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        error.filename = str(path)  # which a full disk does not name
        raise
    finally:
        beside.unlink(missing_ok=True)


def remove_unfinished(folder, seconds=0.0):
    """Remove what killed processes left of `write_whole` in a folder, as long as it is older than so many seconds."""
    for left in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # its writer was not dead
            if time.time() - left.stat().st_mtime >= seconds:
                left.unlink()


def write_json(path, value):
    write_whole(path, (json.dumps(_strict(value), indent=1) + "\n").encode())


def _strict(value):
    """JSON has no inf and no nan: they become "inf" and null."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def save_torch(path, value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_whole(path, buffer.getvalue())


_locks = set()  # descriptors of folders that this process has locked


def _let_go_of_locks():
    for descriptor in _locks:
        os.close(descriptor)


if fcntl:  # else a process that is forked holds them, too, and outlives the one that was killed
    os.register_at_fork(after_in_child=_let_go_of_locks)


class Experiment:
    """The folder of a run, experiment/<name>:

    options.json              what it was started with
    log.txt, log.csv          what was said; one line of numbers an epoch
    loss.png, psnr.png, active_share.png, masks.png
    tensorboard/              the same and images, with --tensorboard
    checkpoint.pt             all that is needed to continue
    model/                    weights alone: model_latest.pt, model_best.pt, model_<epoch>.pt
    results-<set>-x<scale>/   of a test
    """

    def __init__(self, name, root="experiment"):
        if not re.fullmatch(r"[\w.+-]+", name) or set(name) == {"."}:
            raise InputError(f"{name!r} names no run: give --save or --load letters, digits and . _ + -")
        self.name = name
        self.folder = Path(root) / name
        self.checkpoint = self.folder / "checkpoint.pt"

    def check_start(self, reset, keep=""):
        """InputError where `start` would overwrite a run, or delete the file `keep` with it."""
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            return
        if not reset:
            go_on = f"--load {self.name} goes on with it, " if self.checkpoint.exists() else ""
            raise InputError(
                f"--save {self.name}: {self.folder} holds a run already; {go_on}--reset deletes it, "
                f"another --save leaves it alone"
            )
        if keep and self.folder.resolve() in Path(keep).resolve().parents:
            raise InputError(f"--reset would delete {keep}, which --pre_train asks for; choose another --save")

    @contextlib.contextmanager
    def alone(self):
        """Within, no other process may train in this folder, if it exists. Raises InputError if one does already."""
        with contextlib.ExitStack() as stack:
            if fcntl and self.folder.is_dir():
                folder = os.open(self.folder, os.O_RDONLY)
                _locks.add(folder)
                stack.callback(os.close, folder)
                stack.callback(_locks.remove, folder)
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the process ends, however it does
                except BlockingIOError:
                    raise InputError(
                        f"{self.folder}: another process is training there; wait for it, or stop it"
                    ) from None
                except OSError:  # a file system without locks
                    pass
                else:
                    for written in (self.folder, self.folder / "model"):
                        remove_unfinished(written)
            yield

    def start(self, reset=False):
        """Make the folder, empty. Raises InputError if there is something in it, unless `reset`."""
        self.check_start(reset)
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)

    def start_results(self, set_name, scale, reset=False):
        """The folder of a test; empty on `reset`."""
        folder = self.folder / f"results-{set_name}-x{scale}"
        if reset and folder.is_dir():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextlib.contextmanager
    def logging(self):
        """Within, what is logged goes to log.txt as well."""
        handler = logging.FileHandler(self.folder / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            handler.close()

    def weights_path(self, which):
        """`which`: 'best', 'latest' or an epoch."""
        return self.folder / "model" / f"model_{which}.pt"

    def save_weights(self, which, state_dict):
        save_torch(self.weights_path(which), state_dict)

    def save_checkpoint(self, state):
        save_torch(self.checkpoint, state)

    def load_checkpoint(self):
        path = self.checkpoint
        if not path.is_file():
            raise InputError(f"--load {self.name}: there is no {path}, so no run to continue; start one with --save")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # a broken file may raise nearly anything
            state = None
        if not isinstance(state, dict) or not {"model", "optimizer", "epoch"} <= state.keys():
            raise InputError(
                f"--load {self.name}: {path} is no checkpoint of a run, or broken; start another run from its weights: "
                f"--save OTHER --pre_train {self.weights_path('latest')}"
            )
        return state

    def load_options(self):
        if not self.folder.is_dir():
            raise InputError(f"--load {self.name}: there is no run in {self.folder}; start one with --save")
        path = self.folder / "options.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))["options"])
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"--load {self.name}: {path} is not there or broken, so its options are unknown") from None

    def write_history(self, history):
        """log.csv and the curves, from one dict of numbers an epoch."""
        columns = list(dict.fromkeys(key for row in history for key in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in history)
        write_whole(self.folder / "log.csv", text.getvalue().encode())
        for file, label, prefix in (
            ("loss.png", "loss", "loss"),
            ("psnr.png", "PSNR (dB)", "psnr"),
            ("active_share.png", "active share", "active"),
        ):
            write_whole(
                self.folder / file, pictures.curves(history, [key for key in columns if key.startswith(prefix)], label)
            )
        bins = [key for key in columns if key.startswith("mask_")]
        if bins:
            write_whole(self.folder / "masks.png", pictures.mask_curves(history, bins))


def write_options(path, options, defaults):
    """What a run was started with, what of it differs from the defaults, and the versions it ran on."""
    changed = {key: value for key, value in options.items() if value != defaults[key]}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    write_json(path, {"changed": changed, "options": options, "versions": versions})
