import copy
import json
import math

import pytest
import torch

from model.smsr import SMSR
from tools.benchmark import main
from tools.benchmarks import epochs
from tools.benchmarks.baselines import PlainTraining, block_with_branches
from tools.benchmarks.train import build_step
from training_step import StepSettings


def test_written_out_branches_equal_the_block():
    block = SMSR(2, n_feats=8, n_blocks=1, n_layers=3).blocks[0].train()
    x = torch.randn(2, 8, 6, 8)
    m, c = block.sample_masks(x, 0.7)
    torch.testing.assert_close(block_with_branches(block, x, m, c), block(x, m, c), rtol=1e-4, atol=1e-5)


def test_the_plain_loop_takes_the_same_step_as_main(monkeypatch):
    monkeypatch.setattr("model.smsr.gumbel_softmax", lambda logits, tau, dim: (logits / tau).softmax(dim))
    model = SMSR(2, n_feats=8, n_blocks=2, n_layers=2).train()
    lr, hr = torch.rand(2, 3, 8, 10) * 255, torch.rand(2, 3, 16, 20) * 255
    plain = PlainTraining(copy.deepcopy(model))
    loss = plain.step(lr, hr, 0.7, 0.1)
    step = build_step(model, StepSettings())
    numbers = {"tau": 0.7, "lambda_": 0.1, "largest_loss": math.inf}
    result = step(lr, hr, noise_seed=0, **{name: torch.tensor(value) for name, value in numbers.items()})
    assert loss == pytest.approx(result.values[result.names.index("loss")].item(), rel=1e-5)
    for ours, theirs in zip(model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_steps_are_timed(tmp_path, capsys):
    out = tmp_path / "out.json"
    line = "train --baseline --precision single bf16 --unmasked --batch_size 2 --patch_size 8 --repeats 1 --device cpu"
    main([*line.split(), "--json", str(out)])
    report = json.loads(out.read_text())
    names = ["baseline", "single", "unmasked single", "bf16", "unmasked bf16"]
    assert list(report["steps"]) == names
    assert report["steps"]["baseline"]["speedup"] == 1
    for row in report["steps"].values():
        assert row["images_per_second"] == pytest.approx(2 / row["step_ms"] * 1e3)
    assert [line[:22].rstrip() for line in capsys.readouterr().out.splitlines()] == ["step", *names]


def test_epochs_are_timed(monkeypatch):
    monkeypatch.setattr(epochs, "TRAIN_SIZE", (40, 50))
    monkeypatch.setattr(epochs, "TEST_SIZE", (24, 30))
    monkeypatch.setattr(epochs, "N_TEST_IMAGES", 2)
    row = epochs.measure_epochs(
        StepSettings(),
        torch.device("cpu"),
        batch_size=2,
        patch_size=8,
        steps=3,
        epochs=1,
        n_threads=0,
        model=SMSR(2, n_feats=8, n_blocks=1, n_layers=1),
    )
    assert row["images_per_second"] == pytest.approx(6 / row["epoch_seconds"])
    assert row["loader"] == "PatchLoader"
    assert all(seconds > 0 for seconds in row["evaluation_seconds"])
