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


class Prefetcher:
    """Copies batches of CPU tensors to a CUDA device, with neither the caller nor the device waiting for a copy.

    A thread takes the batches, pins them and copies them on a stream of its own. For other devices the batches are
    passed on as they are, without a thread.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # one: each has its own memory

    def __call__(self, batches: Iterator[Sequence[torch.Tensor]]) -> Iterator[Sequence[torch.Tensor]]:
        """Yield the batches on the device. Raises what `batches` raises."""
        if self.stream is None:
            yield from batches
            return
        with contextlib.closing(run_ahead(self._copies(batches), BATCHES_AHEAD)) as copies:
            for tensors, copied in copies:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(copied)
                for tensor in tensors:
                    tensor.record_stream(stream)  # else a later copy could reuse its memory while it is still read
                yield tensors

    def _copies(self, batches):
        """Start to copy each batch; yields the copies with the event that they are complete."""
        for batch in batches:
            with torch.cuda.stream(self.stream):  # also selects the device, which is a setting of each thread
                tensors = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in batch]
                copied = self.stream.record_event()
            yield tensors, copied
