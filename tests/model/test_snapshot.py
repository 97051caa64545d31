import copy

import pytest
import torch
from torch import nn

from model.snapshot import Snapshot


@pytest.fixture
def network():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))


def change_in_place(network):
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0] += 1


def change_through_data(network):
    network[0].weight.data[0, 0, 0, 0] += 1


def replace_a_parameter(network):
    network[0].weight = nn.Parameter(network[0].weight.detach().clone())


def replace_a_module(network):
    network[1][1] = copy.deepcopy(network[1][1])


def change_the_precision(network):
    network.half()


def load(network):
    network.load_state_dict({name: value + 1 for name, value in network.state_dict().items()})


CHANGES = [change_in_place, change_through_data, replace_a_parameter, replace_a_module, change_the_precision, load]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(network, change):
    snapshot = Snapshot(network)
    assert snapshot.matches()
    change(network)
    assert not snapshot.matches()
    assert Snapshot(network).matches()


def test_the_same_values_again_are_no_change(network):
    snapshot = Snapshot(network)
    network.load_state_dict(copy.deepcopy(network.state_dict()))
    network(torch.rand(1, 2, 3, 5)).sum().backward()
    assert snapshot.matches()


class OnGpu(nn.Parameter):
    """A parameter that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("change", [change_in_place, replace_a_parameter, replace_a_module, change_the_precision, load])
def test_on_a_gpu_changes_are_noticed_without_reading_values(network, change, monkeypatch):
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            module._parameters[name] = OnGpu(parameter.detach())
    monkeypatch.setattr(torch, "equal", None)
    snapshot = Snapshot(network)
    assert snapshot.matches()
    change(network)
    assert not snapshot.matches()


def test_a_network_is_compiled_again_after_training(tiny):
    x = torch.rand(1, 3, 6, 6)
    tiny.eval()
    tiny(x)
    engine = tiny._engine
    tiny(x)
    assert tiny._engine is engine
    tiny.train().eval()
    tiny(x)
    assert tiny._engine is not engine
