"""Batches that are loaded and copied to a GPU while it still computes on earlier ones."""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

BATCHES_AHEAD = 4  # enough to outlast a hiccup of the worker processes; a batch of the paper has 2.2 MB
_END = object()


def run_ahead(items: Iterator[Any], count: int) -> Iterator[Any]:
    """Yield the items of an iterator that runs in a thread, up to `count` items ahead.

    What the iterator raises is raised here, after the items before it. Closing waits for the item in progress.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="run_ahead")
    try:
        pending = deque(pool.submit(next, items, _END) for _ in range(count))
        while (item := pending.popleft().result()) is not _END:
            pending.append(pool.submit(next, items, _END))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def copy_ahead(batches: Iterator[Sequence[torch.Tensor]], device: torch.device) -> Iterator[Sequence[torch.Tensor]]:
    """Yield batches of CPU tensors on a CUDA device, with neither the caller nor the device waiting for a copy.

    A thread takes the batches, pins them and copies them on a stream of its own. For other devices the batches are
    passed on as they are, without a thread.
    """
    if device.type != "cuda":
        yield from batches
        return
    with contextlib.closing(run_ahead(_copies(batches, torch.cuda.Stream(device)), BATCHES_AHEAD)) as copies:
        for tensors, copied in copies:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(copied)
            for tensor in tensors:
                tensor.record_stream(stream)  # or the next copy could overwrite it while the stream still reads it
            yield tensors


def _copies(batches, stream):
    """Start to copy each batch on the stream; yields the copies with the event that they are complete."""
    for batch in batches:
        with torch.cuda.stream(stream):  # also selects the device, which is a setting of each thread
            tensors = [tensor.pin_memory().to(stream.device, non_blocking=True) for tensor in batch]
            copied = stream.record_event()
        yield tensors, copied
