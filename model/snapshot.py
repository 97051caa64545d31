"""Notice that the weights of a network have changed since it was compiled."""

import torch
from torch import nn


class Snapshot:
    """The parameters of a network as they are now; `matches` tells whether they still are the same.

    On a CPU they are compared by value. On a GPU that would wait for it in every call. There a change is noticed by
    PyTorch's count of the operations in place; a change through `.data` or by a fused optimizer is not counted.
    """

    def __init__(self, network: nn.Module):
        self._members = [
            (members, name, member)
            for module in network.modules()
            for members in (module._modules, module._parameters)
            for name, member in members.items()
        ]
        self._weights = [(weight, _fingerprint(weight)) for weight in network.parameters()]

    def matches(self) -> bool:
        """Whether the network consists of the same parameters, with the same values."""
        if any(members.get(name) is not member for members, name, member in self._members):
            return False
        return all(_is_unchanged(weight, before) for weight, before in self._weights)


def _fingerprint(weight: torch.Tensor) -> torch.Tensor | tuple:
    if not weight.is_cuda:
        return weight.detach().clone()
    return weight.data_ptr(), None if weight.is_inference() else weight._version


def _is_unchanged(weight: torch.Tensor, before: torch.Tensor | tuple) -> bool:
    if weight.is_cuda or isinstance(before, tuple):
        return _fingerprint(weight) == before
    return weight.dtype == before.dtype and torch.equal(weight, before)
