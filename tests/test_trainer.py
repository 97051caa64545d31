import math
import signal

import numpy as np
import pytest
import torch

from data import build_test_sets, build_train_loader
from loss import build_loss
from model.smsr import SMSR
from trainer import (
    Schedules,
    Trainer,
    build_optimizer,
    compare,
    evaluate,
    learning_rate,
    sparsity_weight,
    table,
    temperature,
)
from utility import Experiment, InputError, psnr

# ---- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epoch", "tau"), [(1, 1.0), (2, 0.998), (251, 0.5), (301, 0.4), (302, 0.4), (1000, 0.4)])
def test_temperature_anneals_as_in_the_paper(epoch, tau):
    assert temperature(epoch) == pytest.approx(tau)
    assert temperature(epoch, tau_min=1) == 1


@pytest.mark.parametrize(("epoch", "weight"), [(1, 0), (2, 0.002), (26, 0.05), (51, 0.1), (1000, 0.1)])
def test_sparsity_weight_warms_up_as_in_the_paper(epoch, weight):
    assert sparsity_weight(epoch) == pytest.approx(weight)
    assert sparsity_weight(epoch, warmup=0) == 0.1


@pytest.mark.parametrize(("epoch", "halvings"), [(1, 0), (200, 0), (201, 1), (400, 1), (401, 2), (1000, 4)])
def test_learning_rate_halves_every_200_epochs(epoch, halvings):
    assert learning_rate(epoch) == 2e-4 / 2**halvings


def test_learning_rate_at_milestones():
    rates = [learning_rate(epoch, 1.0, [2, 4], 0.1) for epoch in range(1, 7)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.fixture
def interruptible():
    """Ctrl-C as it is at a terminal, also where the tests run in the background and inherit that it is ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def build(make_set, tmp_path):
    """A small but whole training: the trainer of a run in tmp_path."""
    root = make_set(count=4)
    schedules = Schedules(lr=1e-3, decay=(1,), tau_epochs=4, lambda_warmup=2)

    def make(name="run", seed=1, loss="1*L1", n_threads=0, batch_size=4, **options):
        torch.manual_seed(seed)
        model = SMSR(2, n_feats=8, n_blocks=2, n_layers=2)
        loader = build_train_loader(
            ["Tiny"], root, 2, [(1, 3), (4, 4)], patch_size=8, batch_size=batch_size, iterations=3, n_threads=n_threads
        )
        return Trainer(
            model,
            build_loss(loss),
            build_optimizer("ADAM", model.parameters(), 1e-3),
            loader,
            build_test_sets(["Tiny"], root, 2, [(1, 3), (4, 4)]),
            Experiment(name, tmp_path / "experiment"),
            schedules,
            **options,
        )

    return make


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def resumed(build, trainer, **options):
    """A new process, as it were: other random states, everything from the checkpoint."""
    state = trainer.experiment.load_checkpoint()
    fresh = build(seed=99, **options)
    fresh.model.load_state_dict(state["model"])
    fresh.load_state(state)
    return fresh


@pytest.mark.parametrize("loss", ["1*L1", "1*L1+0.1*GAN"])
def test_one_and_one_epoch_are_bit_for_bit_two(build, loss):
    whole = build("whole", loss=loss)
    assert whole.fit(2)
    half = build("half", loss=loss)
    half.fit(1)
    other = resumed(build, half, name="half", loss=loss)
    assert other.epoch == 2
    other.fit(2)
    assert torch.equal(weights(other), weights(whole))
    for ours, theirs in zip(other.history, whole.history, strict=True):
        assert {k: v for k, v in ours.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupt_saves_and_the_run_goes_on_as_if_it_had_not_been(build, stop_after, interruptible):
    whole = build("whole")
    whole.fit(2)
    stopped = build("stopped")
    train_step = stopped._train_step

    def interrupted_step(*args):
        train_step(*args)
        if stopped.step + 1 == stop_after:
            signal.raise_signal(signal.SIGINT)

    stopped._train_step = interrupted_step
    before = signal.getsignal(signal.SIGINT)
    assert not stopped.fit(2)
    assert signal.getsignal(signal.SIGINT) is before
    assert (stopped.epoch, stopped.step) == (1, stop_after)
    other = resumed(build, stopped, name="stopped")
    assert other.fit(2)
    assert torch.equal(weights(other), weights(whole))
    assert other.history[0]["loss"] == whole.history[0]["loss"]


def test_a_second_interrupt_acts_at_once(build, interruptible):
    trainer = build()
    trainer._train_step = lambda *args: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(1)


def test_what_a_run_leaves(build):
    trainer = build(keep_all=True)
    trainer.fit(2)
    folder = trainer.experiment.folder
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left == {
        "checkpoint.pt", "log.csv", "loss.png", "psnr.png", "active_share.png",
        "model/model_best.pt", "model/model_latest.pt", "model/model_1.pt", "model/model_2.pt",
    }  # fmt: skip
    assert [row["epoch"] for row in trainer.history] == [1, 2]
    assert [row["tau"] for row in trainer.history] == [1, 0.75]
    assert [row["lambda"] for row in trainer.history] == [0, 0.05]
    assert [row["lr"] for row in trainer.history] == [1e-3, 5e-4]
    best = max(trainer.history, key=lambda row: row["psnr_rgb_Tiny"])["epoch"]
    kept = torch.load(trainer.experiment.weights_path("best"), weights_only=True)
    expected = torch.load(trainer.experiment.weights_path(best), weights_only=True)
    assert all(torch.equal(kept[key], expected[key]) for key in expected)


def test_training_uses_the_temperature_of_the_schedule(build):
    trainer = build()
    seen = spy_on_forward(trainer)
    trainer.fit(2)
    assert [tau for _, tau in seen] == [1.0] * 3 + [0.75] * 3


def spy_on_forward(trainer):
    seen = []
    forward = trainer.model.training_forward
    trainer.model.training_forward = lambda lr, tau: (seen.append((lr, tau)), forward(lr, tau))[1]
    return seen


def test_every_epoch_sees_patches_of_its_own(build):
    trainer = build()
    seen = spy_on_forward(trainer)
    trainer.fit(2)
    assert len({lr.numpy().tobytes() for lr, _ in seen}) == 6


@pytest.mark.parametrize("rgb_range", [1, 255])
def test_the_network_sees_the_range_it_was_made_for(build, rgb_range):
    trainer = build(rgb_range=rgb_range)
    seen = spy_on_forward(trainer)
    trainer.fit(1)
    assert rgb_range / 2 < max(lr.max() for lr, _ in seen) <= rgb_range


def test_discriminators_follow_the_learning_rate(build):
    trainer = build(loss="L1+GAN")
    trainer.fit(2)
    assert trainer.criterion.terms["GAN"].optimizer.param_groups[0]["lr"] == 5e-4


def test_the_best_epoch_is_the_one_of_the_highest_psnr(build, monkeypatch):
    trainer = build(keep_all=True)
    values = iter([30.0, 32.0, 31.0, 32.0])
    monkeypatch.setattr("trainer.headline", lambda metrics: ("psnr_rgb", next(values)))
    trainer.fit(4)
    best, second = (torch.load(trainer.experiment.weights_path(which), weights_only=True) for which in ("best", 2))
    assert all(torch.equal(best[key], second[key]) for key in best)


def test_a_run_can_go_on_from_its_very_start(build):
    trainer = build()
    trainer._train_step = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.fit(1)
    assert resumed(build, trainer).fit(1)


def test_training_lowers_the_loss(build):
    trainer = build()
    trainer.schedules = Schedules(lr=1e-2)
    trainer.fit(10)
    assert trainer.history[-1]["loss"] < 0.9 * trainer.history[0]["loss"]


def test_split_batch_gives_the_gradient_of_the_whole(build, monkeypatch):
    gradients = []
    for split in (1, 2, 3):
        trainer = build(split_batch=split)
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
        # masks without noise, so that the parts of a batch see what the whole sees
        monkeypatch.setattr("model.smsr.gumbel_softmax", lambda logits, tau, dim: (logits / tau).softmax(dim))
        trainer.model.train()
        seen = spy_on_forward(trainer)
        lr = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
        trainer._train_step(lr, lr.repeat_interleave(2, 2).repeat_interleave(2, 3), 1.0, 0.1)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
        losses = trainer.totals["loss"]
        assert len(seen) == split
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-3, atol=1e-5)
    assert losses == pytest.approx(trainer.totals["loss_L1"] + 0.1 * trainer.totals["active"], rel=1e-5)


def test_gradients_are_clipped(build, monkeypatch):
    trainer = build(gclip=1e-3)
    seen = []
    monkeypatch.setattr(
        trainer.optimizer, "step", lambda: seen.append(max(p.grad.abs().max() for p in trainer.model.parameters()))
    )
    trainer.fit(1)
    assert all(value <= 1e-3 for value in seen)
    assert len(seen) == 3


@pytest.mark.parametrize("bad", [1e6, math.nan, math.inf])
def test_a_batch_far_off_is_skipped(build, bad, caplog):
    trainer = build(skip_threshold=10)
    trainer.fit(1)
    before = weights(trainer).clone()
    lr = torch.full((2, 3, 8, 8), bad)
    trainer._train_step(lr, torch.zeros(2, 3, 16, 16), 1.0, 0.1)
    assert torch.equal(weights(trainer), before)
    assert "batch skipped" in caplog.text
    assert trainer.totals == {}


def test_optimizers():
    parameter = torch.nn.Parameter(torch.zeros(1))
    for name, kind in (("ADAM", torch.optim.Adam), ("SGD", torch.optim.SGD), ("RMSprop", torch.optim.RMSprop)):
        optimizer = build_optimizer(name, [parameter], 0.1, (0.5, 0.6), 1e-3, 0.7, 0.01)
        assert type(optimizer) is kind
        assert optimizer.param_groups[0]["weight_decay"] == 0.01
    with pytest.raises(InputError, match="ADAM, SGD, RMSprop"):
        build_optimizer("LION", [parameter], 0.1)


def test_another_optimizer_or_loss_cannot_go_on(build):
    trainer = build("run", loss="L1")
    trainer.fit(1)
    with pytest.raises(InputError, match="--loss"):
        resumed(build, trainer, loss="L1+GAN")
    fresh = build()
    fresh.optimizer = build_optimizer("SGD", fresh.model.parameters(), 0.1)
    with pytest.raises(InputError, match="the run has Adam"):
        fresh.load_state(trainer.experiment.load_checkpoint())


def test_options_of_the_optimizer_are_those_asked_for(build):
    trainer = build()
    trainer.fit(1)
    fresh = build()
    fresh.optimizer = build_optimizer("ADAM", fresh.model.parameters(), 0.1, weight_decay=0.5)
    fresh.load_state(trainer.experiment.load_checkpoint())
    assert fresh.optimizer.param_groups[0]["weight_decay"] == 0.5


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_benchmark_sets_are_measured_on_luma_and_others_on_rgb_too():
    rng = np.random.default_rng(0)
    sr, hr = rng.integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    y = [image @ np.array([65.738, 129.057, 25.064]) / 256 + 16 for image in (sr, hr)]
    assert compare(sr, hr, 2)["psnr_y"] == pytest.approx(psnr(y[0][2:-2, 2:-2], y[1][2:-2, 2:-2]))
    assert "psnr_rgb" not in compare(sr, hr, 2)
    assert compare(sr, hr, 2, rgb=True)["psnr_rgb"] == pytest.approx(psnr(sr[8:-8, 8:-8], hr[8:-8, 8:-8]))
    assert compare(hr, hr, 2)["psnr_y"] == math.inf


def test_evaluate_reports_as_documented(make_set, tiny):
    (images,) = build_test_sets(["Tiny"], make_set(benchmark=True), 2)
    saved = {}
    metrics = evaluate(tiny, images, save=saved.__setitem__)
    assert list(metrics) == [
        "dataset", "scale", "model", "psnr_y", "ssim_y", "n_images", "seconds_per_image", "gmacs", "gmacs_dense",
        "gmacs_run", "gmacs_at_1280x720", "gmacs_dense_at_1280x720", "active_share", "images",
    ]  # fmt: skip
    assert (metrics["dataset"], metrics["scale"], metrics["model"], metrics["n_images"]) == ("Tiny", 2, "SMSR", 3)
    row = metrics["images"][1]
    assert {"name", "lr_shape", "psnr_y", "ssim_y", "seconds", "mask_density"} <= row.keys()
    assert row["lr_shape"] == [20, 24]
    assert len(row["mask_density"]) == 2
    assert metrics["psnr_y"] == pytest.approx(np.mean([row["psnr_y"] for row in metrics["images"]]))
    assert metrics["gmacs_dense"] == pytest.approx(tiny.inference(images[0][1][None].float())[1].macs_dense / 1e9)
    assert metrics["gmacs_at_1280x720"] == pytest.approx(metrics["gmacs"] / (20 * 24) * (1280 * 720 / 4))
    _, lr, hr = images[1]
    sr = tiny(lr[None].float())[0].clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(saved["img1"], sr)
    assert row["psnr_y"] == pytest.approx(compare(sr, hr, 2)["psnr_y"])
    lines = table(metrics)
    assert len(lines) == 5
    assert lines[-1].split()[:2] == ["mean", f"{metrics['psnr_y']:.2f}"]


def test_images_without_hr_are_run_and_not_measured(make_set, tiny):
    folder = make_set() / "Tiny/LR_bicubic/X2"
    (images,) = build_test_sets(["demo"], "", 2, dir_demo=str(folder))
    metrics = evaluate(tiny, images)
    assert "nan" not in " ".join(table(metrics))
    assert math.isnan(metrics["psnr_y"])
    assert metrics["n_images"] == 3
