"""Programs, devices and files: what every other module builds on."""

import contextlib
import io
import json
import logging
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from files import write_whole
from program import InputError, naming

try:
    import resource
except ImportError:  # on Windows
    resource = None

logger = logging.getLogger("smsr")
TORCHVISION_ADVICE = (
    "install the torchvision that matches this PyTorch: pip install torchvision "
    "--index-url https://download.pytorch.org/whl/<cpu, cu126, ...>"
)
PRECISIONS = {"single": torch.float32, "half": torch.float16, "bf16": torch.bfloat16}


# ---- programs --------------------------------------------------------------------------------------------------------


class Console(logging.Handler):
    """Prints log lines above the progress bars. Raises OSError if standard output cannot be written."""

    def emit(self, record: logging.LogRecord) -> None:
        with naming("standard output"):
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


def log_to_console() -> None:
    """Let a program print its log."""
    logging.basicConfig(handlers=[Console()], format="%(message)s", level=logging.INFO, force=True)


def progress_bar(items: Iterable | None = None, visible: bool = True, **options: Any) -> tqdm:
    """A bar of tqdm, with its `options`, if stderr is a terminal: a file is to hold whole lines only."""
    return tqdm(items, leave=False, disable=None if visible else True, **options)


def in_parallel(function: Callable, items: Sequence, n_threads: int, title: str) -> list:
    """Return [function(item) for item in items], computed in threads with a progress bar. The first error ends it."""
    with ThreadPoolExecutor(max(1, n_threads)) as pool, progress_bar(total=len(items), desc=title) as bar:
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


def pick_device(name: str) -> torch.device:
    """Find a device by name: 'auto' (a GPU if one is available), 'cpu', 'cuda', 'cuda:1' or 'mps'.

    Raises InputError if this machine has no such device.
    """
    if name == "auto":
        for kind, available in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
            if available:
                return torch.device(kind)
        logger.info("no GPU found: running on the CPU")
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # streams and Triton's kernels belong to the current device
    except Exception:  # each kind of device fails in its own way
        raise InputError(f"no such device {name!r} on this machine; use cpu or auto", argument="device") from None
    return device


def has_fast_bf16() -> bool:
    """Whether this processor has instructions for products of bfloat16. True where that is unknown."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    return not is_x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def be_deterministic(wanted: bool = True) -> None:
    """Let PyTorch use algorithms that give the same bits in every run, or any. To be called before a GPU is used."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(wanted)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work, so that timings are valid."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Return how many seconds call() takes on the device."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


_measuring = threading.RLock()
_measurements: dict[Hashable, Any] = {}


def measure_once(key: Hashable, measure: Callable[[], Any]) -> Any:
    """Return the result of measure(), which is called only once per `key`; other threads wait for it."""
    with _measuring:
        if key not in _measurements:
            _measurements[key] = measure()
        return _measurements[key]


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes, on the GPU or in RAM; 0 if the platform does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory(device: torch.device) -> float:
    """Return how many bytes this process can still allocate on a device; inf if the platform does not report it."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf
    return min(free, free_memory_in_cgroup())


def free_memory_in_cgroup(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Return how many bytes the limits of a container or batch job leave (cgroup v2); inf without limits.

    Memory that only caches files counts as free.
    """
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


def remove_unfinished(folder: str | Path, seconds: float = 0.0) -> None:
    """Remove temporary files that killed processes left in a folder if they are older than this many seconds."""
    for left in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # its writer was still alive
            if time.time() - left.stat().st_mtime >= seconds:
                left.unlink()


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON; nan becomes null and infinities become strings, because JSON has neither."""
    write_whole(path, (json.dumps(_to_strict_json(value), indent=1) + "\n").encode())


def _to_strict_json(value):
    if isinstance(value, dict):
        return {key: _to_strict_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_strict_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def save_torch(path: str | Path, value: Any) -> None:
    """Write a value that torch.load can read, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_whole(path, buffer.getvalue())
