import copy
import json

import pytest
import torch

from loss import build_loss
from model.smsr import SMSR
from tools.benchmark import main
from tools.benchmark_train import Baseline, branches
from trainer import Schedules, Trainer, build_optimizer


def test_written_out_branches_are_the_module():
    block = SMSR(2, n_feats=8, n_blocks=1, n_layers=3).blocks[0].train()
    x = torch.randn(2, 8, 6, 8)
    m, c = block.sample_masks(x, 0.7)
    torch.testing.assert_close(branches(block, x, m, c), block(x, m, c), rtol=1e-4, atol=1e-5)


def test_the_baseline_takes_the_step_of_the_trainer(monkeypatch):
    monkeypatch.setattr("model.smsr.gumbel_softmax", lambda logits, tau, dim: (logits / tau).softmax(dim))
    model = SMSR(2, n_feats=8, n_blocks=2, n_layers=2).train()
    lr, hr = torch.rand(2, 3, 8, 10) * 255, torch.rand(2, 3, 16, 20) * 255
    baseline = Baseline(copy.deepcopy(model))
    said = baseline.step(lr, hr, 0.7, 0.1)
    trainer = Trainer(
        model, build_loss("1*L1"), build_optimizer("ADAM", model.parameters(), 2e-4), None, [], None, Schedules()
    )
    trainer.train_step(lr, hr, torch.tensor(0.7), torch.tensor(0.1))
    assert said == pytest.approx(trainer._means()["loss"], rel=1e-5)
    for ours, theirs in zip(model.parameters(), baseline.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_steps_are_timed(tmp_path, capsys):
    out = tmp_path / "out.json"
    line = "train --baseline --precision single bf16 --batch_size 2 --patch_size 8 --repeats 1 --device cpu --json"
    main([*line.split(), str(out)])
    report = json.loads(out.read_text())
    assert list(report["steps"]) == ["baseline", "single", "bf16"]
    assert report["steps"]["baseline"]["speedup"] == 1
    for row in report["steps"].values():
        assert row["images_per_second"] == pytest.approx(2 / row["step_ms"] * 1e3)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step", "baseline", "single", "bf16"]
