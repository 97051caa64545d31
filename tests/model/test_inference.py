import pytest
import torch
import torch.nn.functional as F

from model.edsr import EDSR
from model.inference import build_predictor, needed_memory, self_ensemble
from model.network import Cost


def nearest(x):
    return F.interpolate(x, scale_factor=2), Cost(x.shape[2] * x.shape[3], 1, 2, 3, (3,), 4.0)


def test_self_ensemble_of_an_equivariant_function_is_that_function():
    x = torch.rand(2, 3, 5, 7)
    sr, cost = self_ensemble(nearest, x)
    torch.testing.assert_close(sr, nearest(x)[0])
    assert cost == Cost(8 * 35, 8, 16, 24, (24,), 32.0)


def test_self_ensemble_sees_all_eight_orientations_and_undoes_them():
    seen = []

    def mark_first_pixel(x):
        seen.append(x.flatten().tolist())
        sr = torch.zeros_like(x)
        sr[..., 0, 0] = 8
        return sr, Cost(1, 0, 0, 0)

    sr, _ = self_ensemble(mark_first_pixel, torch.arange(4.0).view(1, 1, 2, 2))
    assert len({tuple(values) for values in seen}) == 8
    assert torch.equal(sr, torch.full((1, 1, 2, 2), 2.0))  # each corner comes first in two of the eight orientations


@pytest.fixture
def calls(monkeypatch, tiny):
    """The modes and tiles with which the network `tiny` is run, one pair per call."""
    calls, inference = [], tiny.inference

    def record(x, mode, tile):
        calls.append((mode, tile))
        return inference(x, mode, tile)

    monkeypatch.setattr(tiny, "inference", record)
    return calls


def test_a_predictor_is_the_inference_of_the_network(tiny, calls):
    x = torch.rand(1, 3, 6, 5) * 255
    sr, cost = build_predictor(tiny.eval(), mode="dense")(x)
    assert calls == [("dense", None)]
    expected, expected_cost = tiny.inference(x, "dense", None)
    assert torch.equal(sr, expected)
    assert cost == expected_cost


def test_every_image_is_tiled_if_asked(tiny, calls, caplog):
    with caplog.at_level("INFO", logger="smsr"):
        build_predictor(tiny.eval(), chop=True, chop_size=150)(torch.rand(1, 3, 6, 5))
    assert calls == [("auto", 150)]
    assert not caplog.messages  # the user knows


def test_images_that_do_not_fit_in_memory_are_tiled_and_this_is_logged_once(tiny, calls, caplog, monkeypatch):
    small, large = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 20, 10)
    monkeypatch.setattr("model.inference.free_memory", lambda device: needed_memory(tiny, large) - 1)
    predict = build_predictor(tiny.eval(), chop_size=100)
    with caplog.at_level("INFO", logger="smsr"):
        for x in (small, large, large):
            predict(x)
    assert calls == [("auto", None), ("auto", 100), ("auto", 100)]
    assert len(caplog.messages) == 1
    assert "20x10 pixels" in caplog.messages[0]
    assert "tiles (chop)" in caplog.messages[0]


def test_a_predictor_may_be_an_ensemble(tiny):
    x = torch.rand(1, 3, 6, 5) * 255
    sr, cost = build_predictor(tiny.eval(), mode="dense", ensemble=True)(x)
    expected, expected_cost = self_ensemble(lambda x: tiny.inference(x, "dense"), x)
    assert torch.equal(sr, expected)
    assert cost == expected_cost


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_needed_memory_counts_the_feature_maps(tiny, dtype):
    x = torch.zeros(2, 3, 5, 7, dtype=dtype)
    for model, maps in ((tiny, 8), (EDSR(3, n_feats=8, n_resblocks=1), 3 * 9 + 1)):
        assert needed_memory(model, x) == maps * 8 * 2 * 5 * 7 * dtype.itemsize
