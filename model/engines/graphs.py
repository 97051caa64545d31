"""CUDA graphs: launch all kernels of a forward, or of a training step, at once."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from program import InputError, is_out_of_memory

MAX_GRAPHS = 4  # shapes kept
MAX_SHARE = 0.25  # of the memory of the device that a graph may need
WARM_UP = 3  # steps before a training step is captured: by then everything is compiled, measured and allocated

Tensors = tuple[torch.Tensor, ...]


def capture(
    function: Callable[..., Tensors], inputs: Sequence[torch.Tensor], stream: Any, pool: Any = None
) -> tuple[Callable[[], None], Tensors]:
    """Record the kernels of function(*inputs), without running them. Returns how to run them, and their results.

    They always read from these inputs, and overwrite these results.

    Args:
        stream: where they are recorded
        pool: memory that graphs share which never run at once; None: new memory
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may load data in the meantime.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
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
    stream = torch.cuda.current_stream()
    side = _side_stream(stream.device)
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        first()
    second()
    stream.wait_stream(side)


@functools.cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


class GraphMemory:
    """Memory that graphs share. So only one of them runs at a time: each waits for the event `done` of the last one."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()
        self.done = torch.cuda.Event()


class CudaGraph:
    """A function of one tensor, captured for tensors like `example`. A call returns tensors that nobody overwrites."""

    def __init__(
        self, function: Callable[[torch.Tensor], Tensors], example: torch.Tensor, memory: GraphMemory | None = None
    ):
        self.memory = memory or GraphMemory()
        with torch.inference_mode(False):  # else it could not be written to outside of that mode
            self.input = example.clone()
        function(self.input)  # compiles what a tensor with these strides needs, which a capture cannot do
        stream = torch.cuda.Stream(example.device)
        self.replay, self.results = capture(function, [self.input], stream, self.memory.pool)

    def __call__(self, x: torch.Tensor) -> Tensors:
        torch.cuda.current_stream().wait_event(self.memory.done)  # the last call may have come from another stream
        self.input.copy_(x)
        self.replay()
        results = tuple(result.clone() for result in self.results)
        self.memory.done.record()
        return results


class GraphCache:
    """Calls a function directly for the first tensor of a shape, captures it for the second, and then replays it.

    All graphs share their memory, so calls wait for each other.

    Args:
        function: of one tensor; returns a tuple of tensors, without waiting for the device
        capture: makes a replayable function from a function, an example and a GraphMemory
        size: graphs kept; the one that was not used for the longest time is dropped
    """

    def __init__(
        self,
        function: Callable[[torch.Tensor], Tensors],
        capture: Callable[..., Callable[[torch.Tensor], Tensors]] = CudaGraph,
        size: int = MAX_GRAPHS,
    ):
        self.function, self.capture, self.size = function, capture, size
        self.memory = GraphMemory() if torch.cuda.is_available() else None
        self.graphs: OrderedDict[Any, Callable] = OrderedDict()
        self._seen: set[Any] = set()
        self._lock = threading.Lock()  # a graph has a single input buffer

    def __call__(self, x: torch.Tensor, may_capture: bool = True) -> Tensors:
        """Run the function on x; without `may_capture` a new graph is not made."""
        key = x.shape, x.stride(), x.dtype, x.device, torch.backends.cudnn.allow_tf32
        with self._lock:
            graph = self.graphs.pop(key, None)
            if graph is None and may_capture and key in self._seen:
                graph = self.capture(self.function, x, self.memory)
            if graph is None:
                self._seen.add(key)
                return self.function(x)
            self.graphs[key] = graph
            if len(self.graphs) > self.size:
                self._seen.discard(self.graphs.popitem(last=False)[0])
            return graph(x)


class StepGraph:
    """A training step, captured after a few calls and replayed from then on, for inputs of one shape.

    A call returns what the step returns; the next call overwrites it. Random numbers depend on the seed as they do
    without a graph.

    Args:
        step: a function of tensors that never waits for the device

    Raises InputError if the step cannot be captured.
    """

    def __init__(self, step: Callable[..., Tensors], device: torch.device):
        self.step = step
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # of the warm-up and the capture
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
        self.inputs = [tensor.clone() for tensor in inputs]
        try:
            self.replay, self.results = capture(self.step, self.inputs, self.stream)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            problem = str(error).strip().splitlines()[0]
            raise InputError(f"the step cannot become a CUDA graph ({problem}); leave it out", "compile") from None

    def _run_on_stream(self, inputs):
        if self.stream is None:
            return self.step(*inputs)
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = self.step(*inputs)
        current.wait_stream(self.stream)
        return results
