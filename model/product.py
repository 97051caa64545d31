"""Products of many rows with one matrix, by whichever of PyTorch's operators is the quickest on this machine.

Which one that is differs. On a CPU `F.linear` of float32 runs in MKL or OpenBLAS, a 1x1 convolution in oneDNN (but in
the former, with one thread), and the operator that compiled graphs use for linear layers in oneDNN with its weights
packed in advance, where PyTorch was built with it. So it is measured, once a dtype and number of threads.
"""

import functools

import torch
import torch.nn.functional as F

from utility import measured_once, seconds_of

ROWS = 1024  # rows of the products that are measured, and that packed weights are arranged for


def build_product(weight, bias=None, relu=False):
    """A function of rows (M, K) that returns rows @ weight.T + bias, (M, C'), without its negative values if `relu`.

    weight: (C', K), bias: (C',) or None
    """
    way = _linear if weight.device.type != "cpu" or not weight.numel() else quickest(weight.dtype)
    return way(weight.detach().contiguous(), bias, relu)


def _linear(weight, bias, relu):
    def run(rows):
        result = F.linear(rows, weight, bias)
        return result.relu_() if relu else result

    return run


def _convolution(weight, bias, relu):
    weight = weight[:, :, None, None]  # (C', K, 1, 1)

    def run(rows):
        image = rows.view(1, 1, *rows.shape).permute(0, 3, 1, 2)  # (1, K, 1, M), channels-last
        result = F.conv2d(image, weight, bias).permute(0, 2, 3, 1).view(len(rows), -1)
        return result.relu_() if relu else result

    return run


def _packed_linear(weight, bias, relu):
    weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    multiply, activation = torch.ops.mkldnn._linear_pointwise, "relu" if relu else "none"

    def run(rows):
        return multiply(rows, weight, bias, activation, [], None)

    return run


def quickest(dtype):
    """The quickest of these ways for rows of this dtype on the CPU, with as many threads as there are now."""
    return measured_once(("product", dtype, torch.get_num_threads()), lambda: _measured(dtype))


@torch.no_grad()
def _measured(dtype):
    rows, weight = torch.full((ROWS, 576), 0.5, dtype=dtype), torch.full((64, 576), 0.5, dtype=dtype)
    seconds = {}
    for way in (_linear, _convolution, _packed_linear):
        try:
            run = way(weight, None, False)
            seconds[way] = min(seconds_of(functools.partial(run, rows), rows.device) for _ in range(9))
        except (AttributeError, RuntimeError):  # PyTorch was built without it, or it does not take this dtype
            pass
    return min(seconds, key=seconds.get)
