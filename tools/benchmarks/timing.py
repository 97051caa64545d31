"""Measure time and memory of calls on one device in a way that makes them comparable."""

import ctypes
import gc
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from utility import seconds_of


def say(line: str) -> None:
    """Print what a benchmark is doing, which takes a while, beside its results on standard output."""
    print(line, file=sys.stderr, flush=True)


def timed(calls: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median time of each call in milliseconds, under the same names.

    Each call runs twice as a warm-up. Then the calls take turns, `repeats` rounds in all, so that a change in the
    speed of the machine affects all of them alike. Every second round runs in reverse order, so that no call always
    follows the same one.
    """
    for call in calls.values():
        call()
        call()
    seconds = {name: [] for name in calls}
    for repeat in range(repeats):
        names = list(calls) if repeat % 2 == 0 else list(calls)[::-1]
        for name in names:
            seconds[name].append(seconds_of(calls[name], device))
    return {name: statistics.median(values) * 1e3 for name, values in seconds.items()}


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Largest amount of memory in MiB that call() occupies at once, in addition to what is occupied before it.

    On a CPU this works only on Linux; elsewhere the result is None.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise the call would reuse freed memory, and its use would be invisible
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of this process
    except (OSError, AttributeError, TypeError):
        return None
    before = _process_memory_kib("VmRSS")
    call()
    return (_process_memory_kib("VmHWM") - before) / 2**10


def _process_memory_kib(field: str) -> int:
    """A memory size of this process as Linux reports it: VmRSS is the current one, VmHWM the peak."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
