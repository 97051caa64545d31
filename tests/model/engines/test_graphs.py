import pytest
import torch

from model.engines.graphs import GraphCache


class Recorded:
    """Stands in for a CUDA graph: a CPU cannot capture one."""

    made = 0

    def __init__(self, function, example, memory):
        type(self).made += 1
        self.function = function
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return self.function(x)


@pytest.fixture
def cache():
    Recorded.made = 0
    return GraphCache(lambda x: (x + 1, x * 2), capture=Recorded, size=2)


def images(side):
    return torch.zeros(1, 3, side, side)


def test_the_second_tensor_of_a_shape_is_captured_and_later_ones_replay_it(cache):
    for calls in range(5):
        total, product = cache(torch.full((1, 3, 4, 4), float(calls)))
        assert torch.equal(total, torch.full((1, 3, 4, 4), calls + 1.0))
        assert torch.equal(product, torch.full((1, 3, 4, 4), calls * 2.0))
        assert Recorded.made == (calls > 0)
    (graph,) = cache.graphs.values()
    assert graph.calls == 4


def test_shapes_layouts_and_dtypes_have_graphs_of_their_own(cache):
    cache.size = 9
    for x in (images(4), images(5), images(4).half(), images(4).to(memory_format=torch.channels_last)):
        cache(x)
        cache(x)
    assert Recorded.made == 4


def test_the_shape_that_was_not_used_for_the_longest_time_is_dropped(cache):
    for side in (4, 4, 5, 5, 4, 6, 6):  # 5 is dropped when 6 comes
        cache(images(side))
    assert [key[0][2] for key in cache.graphs] == [4, 6]
    cache(images(5))
    assert Recorded.made == 3  # 5 is seen for the first time again


def test_shapes_seen_once_drop_no_graph(cache):
    for side in (4, 4, 5, 6, 7, 8):
        cache(images(side))
    assert [key[0][2] for key in cache.graphs] == [4]


def test_nothing_is_captured_where_memory_is_short(cache):
    for _ in range(3):
        cache(images(4), may_capture=False)
    assert Recorded.made == 0
    cache(images(4))
    assert Recorded.made == 1
