import pytest
import torch

from model import engines
from model.smsr import SMSR
from model.sparse import Plan
from program import InputError
from utility import logger


@pytest.fixture
def model():
    return SMSR(2, n_feats=16, n_blocks=1, n_layers=1).eval()


@torch.no_grad()
def plain(model, x):
    return Plan(model)(x)[0]


def test_the_plain_engine_can_be_chosen(model):
    model.use_engine("plain")
    x = torch.rand(1, 3, 6, 7) * 255
    assert torch.equal(model.inference(x)[0], plain(model, x))


def test_a_change_of_the_engine_takes_effect_in_the_next_call(model):
    x = torch.rand(1, 3, 6, 7)
    model.inference(x)
    model.use_engine("fused")
    with pytest.raises(InputError, match=r"^fused cannot run here \(it runs on NVIDIA GPUs only\)") as error:
        model.inference(x)
    assert error.value.argument == "engine"
    for name in ("auto", "plain"):
        model.use_engine(name)
        model.inference(x)
        assert model.engine == engines.name_of(model._engine)
    assert model.engine == "plain"


def test_where_the_fastest_engine_cannot_run_plain_operators_do_and_one_line_says_why(model, monkeypatch, caplog):
    logger.setLevel("INFO")
    engines._report.cache_clear()
    monkeypatch.setitem(engines.FASTEST, "cpu", "fused")
    x = torch.rand(1, 3, 6, 7)
    for _ in range(2):
        assert torch.equal(model.inference(x)[0], plain(model, x))
    assert [record.message for record in caplog.records] == [
        "fused engine: it runs on NVIDIA GPUs only; using plain operators, which are slower"
    ]
