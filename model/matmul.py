"""Products of many rows with one matrix, by the PyTorch operator that is fastest on this machine.

A CPU has three candidates: `F.linear`, which runs in MKL or OpenBLAS for float32; a 1x1 convolution, which runs in
oneDNN, or with a single thread in MKL or OpenBLAS; and the linear operator of compiled graphs, which runs in oneDNN
with prepacked weights if PyTorch was built with it. They are measured once per dtype and number of threads.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from utility import measure_once, seconds_of

MEASURED_ROWS = 1024  # rows of the products that are measured, and that prepacked weights are laid out for
Matmul = Callable[[torch.Tensor], torch.Tensor]


def build_matmul(weight: torch.Tensor, bias: torch.Tensor | None = None, relu: bool = False) -> Matmul:
    """Build a function of rows (M, K) that returns rows @ weight.T + bias, (M, C'), with a ReLU if `relu`.

    weight: (C', K); bias: (C',) or None
    """
    builder = _linear if weight.device.type != "cpu" or not weight.numel() else fastest_builder(weight.dtype)
    return builder(weight.detach().contiguous(), bias, relu)


def _linear(weight, bias, relu):
    def multiply(rows):
        result = F.linear(rows, weight, bias)
        return result.relu_() if relu else result

    return multiply


def _convolution(weight, bias, relu):
    weight = weight[:, :, None, None]  # (C', K, 1, 1)

    def multiply(rows):
        image = rows.view(1, 1, *rows.shape).permute(0, 3, 1, 2)  # (1, K, 1, M), channels-last
        result = F.conv2d(image, weight, bias).permute(0, 2, 3, 1).view(len(rows), -1)
        return result.relu_() if relu else result

    return multiply


def _packed_linear(weight, bias, relu):
    weight = torch.ops.mkldnn._reorder_linear_weight(weight, MEASURED_ROWS)
    linear_pointwise, activation = torch.ops.mkldnn._linear_pointwise, "relu" if relu else "none"

    def multiply(rows):
        return linear_pointwise(rows, weight, bias, activation, [], None)

    return multiply


def fastest_builder(dtype: torch.dtype) -> Callable[..., Matmul]:
    """The builder of the fastest product for rows of this dtype on the CPU with the current number of threads."""
    return measure_once(("matmul", dtype, torch.get_num_threads()), lambda: _measure_builders(dtype))


@torch.no_grad()
def _measure_builders(dtype):
    rows, weight = torch.full((MEASURED_ROWS, 576), 0.5, dtype=dtype), torch.full((64, 576), 0.5, dtype=dtype)
    seconds = {}
    for builder in (_linear, _convolution, _packed_linear):
        try:
            multiply = builder(weight, None, False)
            seconds[builder] = min(seconds_of(functools.partial(multiply, rows), rows.device) for _ in range(9))
        except (AttributeError, RuntimeError):  # PyTorch was built without it, or it does not take this dtype
            pass
    return min(seconds, key=seconds.get)
