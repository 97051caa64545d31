"""CUDA graphs: launch all kernels of a forward, or of a training step, at once."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from utility import logger

MAX_GRAPHS = 4  # shapes kept
MAX_SHARE = 0.25  # of the memory of the device that a graph may need
WARM_UP = 3  # steps before a training step is captured: by then everything is compiled, measured and allocated

Tensors = tuple[torch.Tensor, ...]


def capture(
    function: Callable[..., Tensors], inputs: Sequence[torch.Tensor], stream: Any = None
) -> tuple[Callable[[], None], Tensors]:
    """Record the kernels of function(*inputs), without running them. Returns how to run them, and their results.

    They always read from these inputs, and overwrite these results. stream: where they are recorded; None: a new one
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # other threads may load data
        results = function(*inputs)
    return graph.replay, results


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

    def __init__(self, function: Callable[[torch.Tensor], Tensors], example: torch.Tensor):
        self.input = example.clone()
        self.replay, self.results = capture(function, [self.input])

    def __call__(self, x: torch.Tensor) -> Tensors:
        self.input.copy_(x)
        self.replay()
        return tuple(result.clone() for result in self.results)


class GraphCache:
    """Calls a function directly for the first tensor of a shape, captures it for the second, and then replays it.

    Args:
        function: of one tensor; returns a tuple of tensors, without waiting for the device
        capture: makes a replayable function from a function and an example
        size: graphs kept; the one that was not used for the longest time is dropped
    """

    def __init__(
        self,
        function: Callable[[torch.Tensor], Tensors],
        capture: Callable[..., Callable[[torch.Tensor], Tensors]] = CudaGraph,
        size: int = MAX_GRAPHS,
    ):
        self.function, self.capture, self.size = function, capture, size
        self.graphs: OrderedDict[Any, Callable | None] = OrderedDict()  # None: seen once
        self._lock = threading.Lock()  # a graph has a single input buffer

    def __call__(self, x: torch.Tensor, may_capture: bool = True) -> Tensors:
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


class StepGraph:
    """A training step, captured after a few calls and replayed from then on, for inputs of one shape.

    A call returns what the step returns; the next call overwrites it. Random numbers depend on the seed as they do
    without a graph. If the step cannot be captured, a log line says so and it runs without a graph.

    Args:
        step: a function of tensors that never waits for the device
        prepare: called before the step is captured
    """

    def __init__(self, step: Callable[..., Tensors], prepare: Callable[[], None]):
        self.step, self.prepare = step, prepare
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None  # where it warms up and is captured
        self.calls, self.inputs, self.replay, self.results = 0, None, None, None

    def __call__(self, *inputs: torch.Tensor) -> Tensors:
        self.calls += 1
        if self.calls == WARM_UP + 1:
            self._capture(inputs)
        if self.replay is None or any(a.shape != b.shape for a, b in zip(inputs, self.inputs, strict=True)):
            return self._run_on_stream(inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.replay()
        return self.results

    def _capture(self, inputs):
        try:
            self.prepare()
            self.inputs = [tensor.clone() for tensor in inputs]
            self.replay, self.results = capture(self.step, self.inputs, self.stream)
        except RuntimeError as error:
            logger.info(f"the training step runs without a CUDA graph: {str(error).strip().splitlines()[0]}")

    def _run_on_stream(self, inputs):
        if self.stream is None:
            return self.step(*inputs)
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = self.step(*inputs)
        current.wait_stream(self.stream)
        return results
