import itertools

import pytest
import torch

from model.smsr import SMSR
from program import InputError
from tools import benchmark
from tools.benchmarks import epochs, gpu
from tools.benchmarks.gpu import check_all, check_results, check_training, measure_training, with_dense_channels
from training_step import TrainingStep


@pytest.fixture(autouse=True)
def restore_settings():
    """What the checks change in their own processes."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture
def model():
    return SMSR(2, n_feats=16, n_blocks=1, n_layers=2).eval()


@pytest.fixture
def few_cases(monkeypatch):
    monkeypatch.setattr(gpu, "SPLITS", ((), (0, 16)))
    monkeypatch.setattr(gpu, "PRECISIONS", {"exact": torch.float32, "half": torch.float16})
    monkeypatch.setattr(gpu, "CHECKED_SIZES", ((7, 9), (8, 11)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_one_line():
    with pytest.raises(InputError, match=r"^gpu: no CUDA device is available; run it"):
        benchmark.main(["gpu"])


def test_all_checks_run(model, few_cases):
    checks = check_all(model, torch.device("cpu"), engine="plain", compiled=False)
    assert [(check.get("split"), check.get("density"), check.get("precision")) for check in checks] == [
        *[(None, None, None)] * 2,  # of the training
        *(((), density, "exact") for density in (0.0, 0.3, 1.0)),
        *(((), density, "half") for density in (0.0, 0.3, 1.0)),
        *(((0, 16), density, "half") for density in (0.0, 0.3, 1.0)),
        *(((), density, "half") for density in (0.0, 0.3, 1.0)),  # of the second size
    ]
    assert all(check["right"] for check in checks)


def test_wrong_results_are_found(model, monkeypatch):
    inference = SMSR.inference

    def wrong(self, x, mode="auto", tile=None):
        sr, cost = inference(self, x, mode, tile)
        return sr + 1, cost

    monkeypatch.setattr(SMSR, "inference", wrong)
    checks = check_results(model, torch.device("cpu"), (), "exact", size=(7, 9), engine="plain")
    assert [check["right"] for check in checks] == [False] * 3


def test_channel_splits(model):
    changed = with_dense_channels(model, (0, 16))
    assert changed.blocks[0].hard_channel_mask().sum(0).tolist() == [0, 16]
    unchanged = with_dense_channels(model, ())
    assert torch.equal(unchanged.blocks[0].hard_channel_mask(), model.blocks[0].hard_channel_mask())
    x = torch.rand(1, 3, 6, 6)
    assert torch.equal(unchanged(x), model(x))


def test_trainings_are_compared(monkeypatch):
    names = ["resumed", "without a graph"]
    device = torch.device("cpu")
    assert check_training(device, compiled=False) == [{"training": name, "right": True} for name in names]
    build_small_step, seeds = gpu.build_small_step, itertools.count()

    def differ(*args):
        step = build_small_step(*args)
        step.model.head[0].bias.data += next(seeds)
        return step

    monkeypatch.setattr(gpu, "build_small_step", differ)
    monkeypatch.setattr(TrainingStep, "load_state", lambda *_: None)
    assert check_training(device, compiled=False) == [{"training": name, "right": False} for name in names]


def test_training_is_measured(monkeypatch):
    for name, value in {"N_IMAGES": 1, "TRAIN_SIZE": (40, 40), "N_TEST_IMAGES": 1, "TEST_SIZE": (40, 40)}.items():
        monkeypatch.setattr(epochs, name, value)
    options = ["--precision", "single", "--batch_size", "1", "--patch_size", "8", "--repeats", "1", "--threads", "1"]
    results = measure_training(torch.device("cpu"), [*options, "--epochs", "1", "--steps", "1"])
    assert results["steps"]["single"]["step_ms"] > 0
    assert results["epochs"]["single"]["epoch_seconds"] > 0
