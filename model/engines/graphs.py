"""CUDA graphs: replay all kernels of a forward with a single launch."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

MAX_GRAPHS = 4  # shapes kept
MAX_SHARE = 0.25  # of the memory of the device that a graph may need


def run_both(first: Callable[[], None], second: Callable[[], None]) -> None:
    """Call two functions that launch kernels which do not depend on each other: side by side in a graph being captured.

    Outside of a graph they run in turn: switching streams would take longer than it saves.
    """
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        first()
        second()
        return
    stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        first()
    second()
    stream.wait_stream(side)


class CudaGraph:
    """A function of one tensor, captured for tensors like `example`. A call returns tensors that nobody overwrites."""

    def __init__(self, function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], example: torch.Tensor):
        self.input = example.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(self.input)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.input.copy_(x)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)


class GraphCache:
    """Calls a function directly for the first tensor of a shape, captures it for the second, and then replays it.

    Args:
        function: of one tensor; returns a tuple of tensors, without waiting for the device
        capture: makes a replayable function from a function and an example
        size: graphs kept; the one that was not used for the longest time is dropped
    """

    def __init__(
        self,
        function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
        capture: Callable[..., Callable[[torch.Tensor], tuple[torch.Tensor, ...]]] = CudaGraph,
        size: int = MAX_GRAPHS,
    ):
        self.function, self.capture, self.size = function, capture, size
        self.graphs: OrderedDict[Any, Callable | None] = OrderedDict()  # None: seen once
        self._lock = threading.Lock()  # a graph has a single input buffer

    def __call__(self, x: torch.Tensor, may_capture: bool = True) -> tuple[torch.Tensor, ...]:
        """Run the function on x; without `may_capture` a new graph is not made."""
        key = x.shape, x.stride(), x.dtype, x.device
        with self._lock:
            graph = self.graphs.pop(key, False)
            if graph is None and may_capture:
                graph = self.capture(self.function, x)
            self.graphs[key] = graph or None
            while len(self.graphs) > self.size:
                self.graphs.popitem(last=False)
            return graph(x) if graph else self.function(x)
