import copy
import dataclasses
import functools
import itertools
import math
import multiprocessing
import random
import re
import shutil
import signal
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from checkpoint import Experiment
from data import DataSettings, PatchSettings, build_test_sets, build_train_loader
from loss import build_loss
from model.smsr import SMSR
from program import InputError
from trainer import (
    BAR_FORMAT,
    Forecast,
    Schedules,
    Trainer,
    TrainSettings,
    dry_run,
    learning_rate,
    sparsity_weight,
    temperature,
)
from training_step import OptimizerSettings, StepSettings, TrainingStep, build_optimizer
from utility import be_deterministic

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


@given(epochs=st.integers(2, 50), initial=st.floats(1e-6, 1))
def test_a_cosine_is_that_of_pytorch(epochs, initial):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=initial)
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs - 1, eta_min=initial / 100)
    schedules = Schedules(lr=initial, schedule="cosine", epochs=epochs)
    for epoch in range(1, epochs + 1):
        assert schedules.at(epoch)[0] == pytest.approx(expected.get_last_lr()[0])
        optimizer.step()
        expected.step()
    assert Schedules(lr=initial, schedule="cosine", epochs=1).at(1)[0] == initial


def test_schedules_combine_the_three():
    schedules = Schedules(
        lr=1.0, decay=(3,), gamma=0.1, tau_min=0.7, tau_epochs=10, lambda_sparsity=0.6, lambda_warmup=3
    )
    assert [schedules.at(epoch) for epoch in (1, 2, 4, 9)] == [
        pytest.approx(expected) for expected in ((1, 1, 0), (1, 0.9, 0.2), (0.1, 0.7, 0.6), (0.01, 0.7, 0.6))
    ]


def test_tau_and_lambda_begin_after_the_epochs_without_masks():
    schedules = Schedules(lr=1.0, decay=(3,), gamma=0.1)
    later = dataclasses.replace(schedules, unmasked_epochs=4)
    assert [later.at(epoch) for epoch in (1, 4)] == [(1.0, 1, 0), (pytest.approx(0.1), 1, 0)]
    assert [later.at(epoch)[1:] for epoch in range(5, 99)] == [schedules.at(epoch - 4)[1:] for epoch in range(5, 99)]
    assert dataclasses.replace(later, lambda_warmup=0).at(4)[2] == 0
    assert not later.has_masks(4)
    assert later.has_masks(5)


# ---- training --------------------------------------------------------------------------------------------------------

STEPS = 3  # per epoch


def build_trainer(
    data, folder, name="run", seed=1, loss="1*L1", n_threads=0, batch_size=4, rgb_range=255, ext="sep", **settings
):
    """A small but complete training. `settings` are fields of StepSettings and TrainSettings."""
    torch.manual_seed(seed)
    model = SMSR(2, n_feats=8, n_blocks=2, n_layers=2, rgb_range=rgb_range)
    step_names = {field.name for field in dataclasses.fields(StepSettings)}
    step_settings = StepSettings(**{key: value for key, value in settings.items() if key in step_names})
    train_settings = TrainSettings(**{key: value for key, value in settings.items() if key not in step_names})
    optimizer = build_optimizer(model.parameters(), OptimizerSettings(lr=1e-3))
    data_settings = DataSettings(str(data), data_range=[(1, 3), (4, 4)])
    patches = PatchSettings(patch_size=8, ext=ext, batch_size=batch_size, steps=STEPS, n_threads=n_threads)
    return Trainer(
        TrainingStep(model, build_loss(loss, rgb_range=rgb_range), optimizer, step_settings),
        loader=build_train_loader(["Tiny"], data_settings, patches),
        test_sets=build_test_sets(["Tiny"], data_settings),
        experiment=Experiment(name, folder),
        schedules=Schedules(lr=1e-3, decay=(1,), tau_epochs=4, lambda_warmup=2),
        settings=train_settings,
    )


@pytest.fixture
def build(make_set, tmp_path):
    """`build_trainer` with runs in tmp_path."""
    return functools.partial(build_trainer, make_set(count=4), tmp_path / "experiment")


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def resume(build, **options):
    """A trainer as in a new process: other random numbers, everything else from the checkpoint."""
    fresh = build(seed=99, **options)
    state = fresh.experiment.load_checkpoint()
    fresh.model.load_state_dict(state["model"])
    fresh.load_state(state)
    return fresh


def without_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def wrap_steps(trainer, after):
    """Call after(result) after each step."""
    run_step = trainer.run_step

    def wrapped(*images):
        result = run_step(*images)
        after(result)
        return result

    trainer.run_step = wrapped


def spy_on_forward(trainer):
    """The list to which every forward pass of the training adds its LR images and temperature."""
    seen = []
    forward = trainer.model.training_forward
    trainer.model.training_forward = lambda lr, tau: (seen.append((lr, tau and float(tau))), forward(lr, tau))[1]
    return seen


# ---- epochs without masks --------------------------------------------------------------------------------------------


def test_the_first_epochs_train_without_masks(build):
    trainer = build()
    trainer.schedules = Schedules(unmasked_epochs=2, tau_epochs=10)
    seen, before = spy_on_forward(trainer), copy.deepcopy(trainer.model.blocks)
    assert trainer.fit(2)
    for block, former in zip(trainer.model.blocks, before, strict=True):
        assert not torch.equal(block.convs[0].weight, former.convs[0].weight)
        assert torch.equal(block.channel_logits, former.channel_logits)
        torch.testing.assert_close(block.spatial_mask.state_dict(), former.spatial_mask.state_dict(), rtol=0, atol=0)
    trainer.history[1]["psnr_rgb_Tiny"] = 99.0  # better than any with masks
    assert trainer.fit(3)
    folder = trainer.experiment.folder / "model"
    assert (folder / "model_best.pt").read_bytes() == (folder / "model_latest.pt").read_bytes()
    assert trainer.fit(4)
    assert [tau for _, tau in seen] == [None] * 2 * STEPS + [
        pytest.approx(tau) for tau in [1.0] * STEPS + [0.9] * STEPS
    ]
    assert not torch.equal(trainer.model.blocks[0].channel_logits, before[0].channel_logits)
    assert [row["active_1"] for row in trainer.history[:2]] == [1, 1]
    assert all(0 < row["active_share_Tiny"] < 1 for row in trainer.history)  # validation is with masks
    assert all(0 < row["density_2"] < 1 for row in trainer.history[2:])


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ("1*L1", {}),
        ("1*L1+0.1*GAN", {}),
        ("1*L1", {"precision": torch.float16, "ema": 0.5, "split_batch": 2}),
    ],
)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(build, loss, settings):
    whole = build("whole", loss=loss, **settings)
    assert whole.fit(2)
    half = build("half", loss=loss, **settings)
    assert half.fit(1)
    other = resume(build, name="half", loss=loss, **settings)
    assert (other.epoch, other.step) == (2, 0)
    assert other.fit(2)
    assert torch.equal(weights(other), weights(whole))
    assert without_seconds(other.history) == without_seconds(whole.history)
    for path in (whole.experiment.folder / "model").iterdir():
        state = torch.load(path, weights_only=True)
        resumed = torch.load(other.experiment.folder / "model" / path.name, weights_only=True)
        assert state.keys() == resumed.keys()
        assert all(torch.equal(resumed[key], value) for key, value in state.items())


@pytest.fixture
def one_thread():
    """Sums are rounded in the same way only if the same number of threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_on(data, folder, started):
    """What a process does that will be killed."""
    torch.set_num_threads(1)
    build = functools.partial(build_trainer, data, folder)
    trainer = build()
    trainer.experiment.folder.mkdir(parents=True, exist_ok=True)
    if trainer.experiment.checkpoint_path.exists():
        trainer = resume(build)
    with trainer.experiment.lock():
        started.set()
        trainer.fit(10**6)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no kill -9")
def test_a_run_killed_repeatedly_resumes_from_its_last_checkpoint(build, one_thread):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer", "data", "loss", "matplotlib.backends.backend_agg", "torch._dynamo"])
    data, folder = build.args
    experiment = Experiment("run", folder)
    rng = random.Random(0)
    reached = (1, 0)
    for attempt in range(8):
        started = context.Event()
        process = context.Process(target=train_on, args=(data, folder, started))
        process.start()
        assert started.wait(60)
        while attempt % 4 == 3 and experiment.load_checkpoint()["epoch"] == reached[0]:
            assert process.is_alive()
            time.sleep(0.01)  # let it finish an epoch now and then
        time.sleep(rng.uniform(0, 0.8))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL  # it did not end by an error of its own
        if experiment.checkpoint_path.exists():
            state = experiment.load_checkpoint()
            assert (state["epoch"], state["step"]) >= reached
            reached = (state["epoch"], state["step"])
            assert len(state["history"]) == state["epoch"] - 1
        for path in experiment.folder.glob("model/*.pt"):
            torch.load(path, weights_only=True)
    epochs = reached[0]
    last = resume(build)
    with last.experiment.lock():
        assert not list(last.experiment.folder.rglob("*.tmp"))
        last.fit(epochs)
    whole = build("whole")
    whole.fit(epochs)
    assert torch.equal(weights(last), weights(whole))
    assert without_seconds(last.history) == without_seconds(whole.history)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_run_is_saved_and_resumes_as_if_uninterrupted(build, stop_after, interruptible):
    whole = build("whole")
    whole.fit(2)
    stopped = build("stopped")
    wrap_steps(stopped, lambda _: signal.raise_signal(signal.SIGINT) if stopped.step + 1 == stop_after else None)
    before = signal.getsignal(signal.SIGINT)
    assert not stopped.fit(2)
    assert signal.getsignal(signal.SIGINT) is before
    assert (stopped.epoch, stopped.step) == (1, stop_after)
    other = resume(build, name="stopped")
    assert (other.epoch, other.step) == (1, stop_after)
    assert other.fit(2)
    assert torch.equal(weights(other), weights(whole))
    assert without_seconds(other.history) == without_seconds(whole.history)


@pytest.mark.parametrize("exts", [("sep", "device"), ("device", "sep"), ("device", "device")])
def test_a_run_can_resume_with_its_images_elsewhere(build, exts, interruptible):
    whole = build("whole", split_batch=2)
    whole.fit(2)
    stopped = build("stopped", split_batch=2, ext=exts[0])
    wrap_steps(stopped, lambda _: signal.raise_signal(signal.SIGINT) if stopped.step == 1 else None)
    assert not stopped.fit(2)
    other = resume(build, name="stopped", split_batch=2, ext=exts[1])
    assert (other.epoch, other.step) == (1, 2)
    assert other.fit(2)
    assert torch.equal(weights(other), weights(whole))
    assert without_seconds(other.history) == without_seconds(whole.history)


def test_a_second_interrupt_acts_at_once(build, interruptible):
    trainer = build()
    trainer.run_step = lambda *args: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_can_resume_from_its_very_start(build):
    trainer = build()
    trainer.run_step = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.fit(1)
    assert resume(build).fit(1)


def test_a_deadline_stops_with_everything_saved(build):
    trainer = build(deadline=0.0)
    assert not trainer.fit(1)
    assert (trainer.epoch, trainer.step) == (1, 1)
    assert resume(build).step == 1


def test_a_checkpoint_has_the_entries_of_version_0_1_0(build):
    trainer = build(ema=0.5)
    trainer.fit(1)
    state = trainer.experiment.load_checkpoint()
    assert state.keys() == {
        *("model", "ema", "optimizer", "optimizer_name", "scaler", "criterion", "epoch", "step"),
        *("names", "sums", "bad", "seconds", "mask_histogram", "history"),
        "collapsed_masks",  # it ignored entries that it did not know
    }
    assert (state["epoch"], state["step"], state["optimizer_name"]) == (2, 0, "Adam")
    assert (state["sums"], state["bad"].tolist(), state["seconds"], state["mask_histogram"]) == (None, [0, 0], 0, {})
    assert state["history"] == trainer.history
    trainer = build("stopped", deadline=0.0)
    trainer.fit(1)
    state = trainer.experiment.load_checkpoint()
    assert state["names"] == ["loss", "loss_L1", "active_1", "active_2", "density_1", "density_2", "grad_norm"]
    assert state["sums"].shape == (8,)  # of the named values, and the number of good steps
    assert state["sums"][-1] == 1


def test_a_run_of_version_0_1_0_resumes(build):
    """It wrote no settings of the network into a checkpoint, and no densities of the masks."""
    whole = build("whole", ema=0.5, rgb_range=1)
    whole.fit(2)
    old = build("old", ema=0.5, rgb_range=1)
    old.fit(1)
    state = old.experiment.load_checkpoint()
    del state["model"]["rgb_range"], state["ema"]["module.rgb_range"], state["collapsed_masks"]
    state["history"] = [{key: row[key] for key in row if not key.startswith("density")} for row in state["history"]]
    old.experiment.save_checkpoint(state)
    other = resume(build, name="old", ema=0.5, rgb_range=1)
    other.fit(2)
    assert torch.equal(weights(other), weights(whole))
    assert without_seconds(other.history[1:]) == without_seconds(whole.history[1:])
    assert "module.rgb_range" in other.experiment.load_checkpoint()["ema"]


def test_another_optimizer_or_loss_cannot_resume(build):
    trainer = build("run", loss="L1")
    trainer.fit(1)
    with pytest.raises(InputError, match="no discriminator for 'GAN'") as caught:
        resume(build, loss="L1+GAN")
    assert caught.value.argument == "loss"
    fresh = build()
    fresh.training_step.optimizer = build_optimizer(fresh.model.parameters(), OptimizerSettings("SGD"))
    with pytest.raises(InputError, match="the run uses Adam and cannot resume with SGD") as caught:
        fresh.load_state(trainer.experiment.load_checkpoint())
    assert caught.value.argument == "optimizer"


# ---- the files of a run ----------------------------------------------------------------------------------------------


@pytest.mark.curves
def test_the_files_and_numbers_of_a_run(build):
    trainer = build(keep_all=True)
    trainer.fit(2)
    folder = trainer.experiment.folder
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        *("checkpoint.pt", "log.csv", "loss.png", "psnr.png", "active_share.png", "density.png", "masks.png"),
        *(f"model/model_{which}.pt" for which in ("best", "latest", 1, 2)),
    }
    assert [row["epoch"] for row in trainer.history] == [1, 2]
    assert [row["tau"] for row in trainer.history] == [1, 0.75]
    assert [row["lambda"] for row in trainer.history] == [0, 0.05]
    assert [row["lr"] for row in trainer.history] == [1e-3, 5e-4]
    assert [row["skipped"] for row in trainer.history] == [0, 0]


def test_the_columns_of_the_log_keep_their_order(build):
    trainer = build(ema=0.5)
    trainer.fit(1)
    header = (trainer.experiment.folder / "log.csv").read_text().splitlines()[0].split(",")
    assert header == [
        *("epoch", "lr", "tau", "lambda", "loss", "loss_L1", "active_1", "active_2", "density_1", "density_2"),
        *("grad_norm", "active", "skipped", "seconds"),
        *("psnr_rgb_Tiny", "ssim_y_Tiny", "active_share_Tiny", "density_1_Tiny", "density_2_Tiny"),
        *("psnr_rgb_Tiny_ema", "ssim_y_Tiny_ema", "active_share_Tiny_ema", "density_1_Tiny_ema", "density_2_Tiny_ema"),
        *(f"mask_{index / 10}" for index in range(10)),
    ]


def test_an_epoch_reports_the_means_of_its_steps(build):
    trainer = build()
    results = []
    wrap_steps(trainer, results.append)
    trainer.fit(2)
    for row, first in zip(trainer.history, (0, STEPS), strict=True):
        values = torch.stack([result.values for result in results[first : first + STEPS]]).mean(0)
        expected = dict(zip(results[0].names, values.tolist(), strict=True))
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert row["active"] == pytest.approx((row["active_1"] + row["active_2"]) / 2)
        masks = torch.cat([m.flatten() for m in results[first + STEPS - 1].masks])
        histogram = torch.histc(masks, bins=10, min=0, max=1) / len(masks)
        assert [row[f"mask_{index / 10}"] for index in range(10)] == pytest.approx(histogram.tolist())


def test_an_epoch_reports_the_mask_densities_of_the_test_sets(build):
    trainer = build(ema=0.9)
    trainer.fit(1)
    for suffix, model in (("", trainer.model), ("_ema", trainer.training_step.ema.module)):
        (images,) = trainer.test_sets
        densities = [model.eval().inference(model.to_input(lr[None]))[1].mask_density for _, lr, _ in images]
        columns = [trainer.history[0][f"density_{k}_Tiny{suffix}"] for k in (1, 2)]
        assert columns == pytest.approx(torch.tensor(densities).mean(0).tolist())


def force_mask(trainer, k, logit):
    """Make the spatial mask of module k (from 1) full for a large `logit`, empty for a negative one."""
    branch = trainer.model.blocks[k - 1].spatial_mask.logits
    branch.weight.data.zero_()
    branch.bias.data.copy_(torch.tensor([-logit, logit]))


def collapses(caplog):
    return [record.getMessage() for record in caplog.records if "the masks of" in record.getMessage()]


def test_a_module_whose_mask_stays_empty_is_reported_once(build, caplog):
    trainer = build()
    force_mask(trainer, 2, -1e3)
    trainer.fit(1)
    assert collapses(caplog) == []
    other = resume(build)
    other.fit(3)
    (line,) = collapses(caplog)
    assert line.startswith("epoch 2: the masks of these modules have been empty on every validation image")
    assert ": 2; start another run from" in line
    resume(build).fit(4)
    assert collapses(caplog) == [line]
    assert trainer.history[0]["density_2"] == trainer.history[0]["density_2_Tiny"] == 0


def test_a_module_whose_mask_stays_full_is_reported_after_the_warm_up(build, caplog):
    trainer = build()
    for k in (1, 2):
        force_mask(trainer, k, 1e3)
    trainer.fit(3)  # lambda reaches its maximum in epoch 3
    assert collapses(caplog) == []
    trainer.fit(5)
    (line,) = collapses(caplog)
    assert line.startswith("epoch 4: the masks of these modules have been full on every validation image")
    assert ": 1, 2; raise" in line


def test_full_masks_are_expected_without_a_sparsity_loss(build, caplog):
    trainer = build()
    trainer.schedules = Schedules(lr=1e-3, lambda_sparsity=0)
    force_mask(trainer, 1, 1e3)
    trainer.fit(3)
    assert collapses(caplog) == []


def test_the_seconds_of_an_epoch_include_the_wait_for_the_device(build):
    trainer = build()
    read = trainer.means.skipped_steps
    trainer.means.skipped_steps = lambda: (time.sleep(0.5), read())[1]  # reading a number is what waits
    trainer.fit(1)
    assert trainer.history[0]["seconds"] >= 0.5


def test_the_seconds_of_an_epoch_include_those_before_an_interruption(build):
    trainer = build(deadline=0.0)
    wrap_steps(trainer, lambda _: time.sleep(0.5))
    trainer.fit(1)
    other = resume(build)
    assert other.seconds >= 0.5
    other.fit(1)
    assert other.history[0]["seconds"] >= 0.5


@pytest.mark.parametrize("values", [[30.0, 32.0, 31.0, 32.0], [math.nan, 30.0, math.nan, 29.0]])
def test_the_best_epoch_is_the_one_of_the_highest_psnr(build, monkeypatch, values):
    trainer = build(keep_all=True)
    trainer.schedules = Schedules(lambda_warmup=0)
    values = iter(values)
    monkeypatch.setattr("trainer.headline", lambda metrics: ("psnr_rgb", next(values)))
    trainer.fit(4)
    best, second = (torch.load(trainer.experiment.weights_path(which), weights_only=True) for which in ("best", 2))
    assert all(torch.equal(best[key], second[key]) for key in best)


def test_the_moving_average_of_the_weights(build):
    average = None

    def update(trainer):
        nonlocal average
        average = weights(trainer).clone() if average is None else (average + weights(trainer)) / 2

    trainer = build(ema=0.5)
    wrap_steps(trainer, lambda _: update(trainer))
    trainer.fit(1)
    other = resume(build, ema=0.5)
    wrap_steps(other, lambda _: update(other))
    other.fit(2)
    kept = torch.load(other.experiment.weights_path("latest_ema"), weights_only=True)
    kept = torch.cat([kept[name].flatten() for name, _ in other.model.named_parameters()])
    torch.testing.assert_close(kept, average)
    row = other.history[-1]
    assert row["psnr_rgb_Tiny_ema"] != row["psnr_rgb_Tiny"]
    assert other.experiment.weights_path("best_ema").exists()


# ---- steps -----------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss(build):
    trainer = build()
    trainer.schedules = Schedules(lr=1e-2)
    trainer.fit(10)
    assert trainer.history[-1]["loss"] < 0.9 * trainer.history[0]["loss"]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_low_precision_trains_as_well_within_noise(build, precision):
    losses = []
    for dtype in (torch.float32, precision):
        trainer = build("run", precision=dtype)
        trainer.schedules = Schedules(lr=1e-2)
        trainer.fit(6)
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        losses.append(trainer.history[-1]["loss"])
        shutil.rmtree(trainer.experiment.folder)
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_steps_follow_the_schedules(build, monkeypatch):
    trainer = build(loss="L1+GAN")
    seen, call = [], TrainingStep.__call__

    def spy(step, *images, tau, lambda_, **options):
        groups = step.optimizer.param_groups + step.criterion.terms["GAN"].optimizer.param_groups
        seen.append((float(tau), float(lambda_), *(group["lr"] for group in groups)))
        return call(step, *images, tau=tau, lambda_=lambda_, **options)

    monkeypatch.setattr(TrainingStep, "__call__", spy)
    forwards = spy_on_forward(trainer)
    trainer.fit(2)
    first, second = (1.0, 0.0, 1e-3, 1e-3), (0.75, 0.05, 5e-4, 5e-4)
    assert seen == [pytest.approx(first)] * STEPS + [pytest.approx(second)] * STEPS
    assert [tau for _, tau in forwards] == [1.0] * STEPS + [0.75] * STEPS


def test_every_step_sees_other_patches(build):
    trainer = build()
    seen = spy_on_forward(trainer)
    trainer.fit(2)
    assert len({lr.numpy().tobytes() for lr, _ in seen}) == 2 * STEPS


@pytest.mark.parametrize("rgb_range", [1, 255])
def test_the_network_gets_images_in_its_own_range(build, rgb_range):
    trainer = build(rgb_range=rgb_range)
    seen = spy_on_forward(trainer)
    trainer.fit(1)
    assert rgb_range / 2 < max(lr.max() for lr, _ in seen) <= rgb_range


def record_options(trainer):
    """What run_step passes on as keyword arguments, without taking a step."""
    trainer.training_step = lambda lr, hr, **options: options
    return trainer.run_step(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(1, 16, 16, 3, dtype=torch.uint8))


def test_the_noise_depends_on_seed_epoch_step_and_rank_alone(build, monkeypatch):
    global_seeds = itertools.count()

    def noise_seed(**place):
        trainer = build(seed=next(global_seeds))  # the global random state has no influence
        trainer.settings = TrainSettings(seed=place.pop("seed", 1))
        for name, value in place.items():
            setattr(trainer, name, value)
        return record_options(trainer)["noise_seed"]

    seeds = [noise_seed(), noise_seed(seed=2), noise_seed(epoch=2), noise_seed(step=1)]
    assert seeds == [noise_seed(), noise_seed(seed=2), noise_seed(epoch=2), noise_seed(step=1)]
    monkeypatch.setattr("distributed.rank", lambda: 1)
    seeds.append(noise_seed())
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch.manual_seed accepts


@pytest.mark.parametrize(
    ("losses", "largest"),
    [
        ([], math.inf),
        ([3.0], 30),
        ([4.0, 3.0], 30),
        ([3.0, math.nan, math.inf], 30),
        ([-3.0], 30),
        ([math.nan], math.inf),
    ],
)
def test_the_largest_loss_is_relative_to_the_last_finite_one(build, losses, largest):
    trainer = build(skip_threshold=10)
    trainer.history = [{"loss": loss} for loss in losses]
    assert record_options(trainer)["largest_loss"] == largest


class NoReading(TorchDispatchMode):
    """Forbids what waits for the device: to read a number from a tensor, or to copy one to the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)
        return function(*args, **kwargs or {})


def test_steps_between_two_updates_of_the_display_do_not_wait_for_the_device(build):
    trainer = build()
    trainer.fit(1)
    batch = next(iter(trainer.loader))
    with NoReading():
        for _ in range(2):
            result = trainer.run_step(*batch)
            trainer.means.add(result.names, result.values, result.is_good)
    assert trainer.means.sums[-1] == 2
    for waiting in (lambda: float(trainer.means.sums[-1]), lambda: torch.tensor(0.5)):
        with pytest.raises(AssertionError), NoReading():
            waiting()


class Launches(NoReading):
    """Counts what starts a kernel, too."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return super().__torch_dispatch__(function, types, args, kwargs)


def test_around_a_step_in_a_graph_few_kernels_are_launched(build):
    trainer = build()
    trainer.fit(1)
    batch = next(iter(trainer.loader))
    step = trainer.run_step(*batch)
    trainer.training_step._run = lambda *inputs: (step.values, step.is_good, *step.masks)  # a graph is one launch
    with Launches() as launches:
        for _ in range(2):
            result = trainer.run_step(*batch)
            trainer.means.add(result.names, result.values, result.is_good)
    assert launches.count <= 2 * 25


# ---- skipped steps ---------------------------------------------------------------------------------------------------


def disturb(trainer, place, factor):
    """Multiply the SR images of the step at `place`, (epoch, step), by a factor."""
    forward = trainer.model.training_forward

    def disturbed(lr, tau):
        sr, masks = forward(lr, tau)
        return sr * (factor if (trainer.epoch, trainer.step) == place else 1), masks

    trainer.model.training_forward = disturbed


@pytest.mark.parametrize("settings", [{}, {"precision": torch.float16}, {"split_batch": 2}, {"gclip": 1.0}])
@pytest.mark.parametrize("factor", [1e7, math.nan, math.inf])
def test_a_bad_batch_is_skipped_counted_and_logged(build, factor, settings, caplog):
    trainer = build(**{"skip_threshold": 10, "print_every": 1} | settings)
    trainer.fit(1)
    disturb(trainer, (2, 1), factor)
    caplog.clear()
    results, kept, states = [], [], []
    wrap_steps(trainer, results.append)
    wrap_steps(trainer, lambda _: kept.append(weights(trainer)))
    wrap_steps(trainer, lambda _: states.append(str(trainer.training_step.optimizer.state_dict())))
    trainer.fit(2)
    assert [bool(result.is_good) for result in results] == [True, False, True]
    assert torch.equal(kept[1], kept[0])
    assert states[1] == states[0]
    assert not torch.equal(kept[2], kept[1])
    skips = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(skips) == 1
    assert skips[0].startswith("epoch 2, step 2: 1 steps skipped, because")
    row = trainer.history[1]
    assert row["skipped"] == 1
    expected = (results[0].values + results[2].values) / 2
    assert [row[name] for name in results[0].names] == pytest.approx(expected.tolist(), rel=1e-5)
    assert trainer.means.skipped.tolist() == [0, 0]


def test_skipped_steps_are_logged_together(build, caplog):
    trainer = build(print_every=STEPS)
    disturb(trainer, (1, 0), math.nan)
    disturb(trainer, (1, 1), math.nan)
    trainer.fit(1)
    assert "epoch 1, step 3: 2 steps skipped" in caplog.text
    assert trainer.history[0]["skipped"] == 2


def test_an_epoch_without_a_good_step_does_not_end_the_run(build):
    trainer = build()
    for step in range(STEPS):
        disturb(trainer, (2, step), math.nan)
    assert trainer.fit(3)
    assert math.isnan(trainer.history[1]["loss"])
    assert [row["skipped"] for row in trainer.history] == [0, STEPS, 0]
    assert math.isfinite(trainer.history[2]["loss"])


def test_too_many_bad_steps_in_a_row_end_the_run(build):
    trainer = build(max_bad_steps=2)
    trainer.fit(1)
    checkpoint = trainer.experiment.checkpoint_path.read_bytes()
    trainer.model.head[0].weight.data[0, 0, 0, 0] = math.nan
    message = r"epoch 2, step 3: the last 3 steps were skipped, .*; lower it and resume with: .* --load run$"
    with pytest.raises(InputError, match=message) as caught:
        trainer.fit(2)
    assert caught.value.argument == "lr"
    assert trainer.experiment.checkpoint_path.read_bytes() == checkpoint


def test_bad_steps_in_a_row_are_counted_across_epochs(build):
    trainer = build(max_bad_steps=2, print_every=1)
    disturb(trainer, (1, 2), math.nan)
    disturb(trainer, (2, 0), math.nan)
    with pytest.raises(InputError, match="epoch 2, step 1: the last 2 steps were skipped"):
        trainer.fit(2)
    assert trainer.history[0]["skipped"] == 1


def test_bad_steps_in_a_row_are_counted_across_an_interruption(build):
    trainer = build(max_bad_steps=2, print_every=1, deadline=0.0)
    disturb(trainer, (1, 0), math.nan)
    trainer.fit(1)
    other = resume(build, max_bad_steps=2, print_every=1)
    disturb(other, (1, 1), math.nan)
    with pytest.raises(InputError, match="epoch 1, step 2: the last 2 steps were skipped"):
        other.fit(1)


# ---- failures and the dry run ----------------------------------------------------------------------------------------


def test_a_failing_disk_is_reported_with_the_command_to_resume(build, monkeypatch):
    trainer = build()
    trainer.fit(1)

    def fail(*_):
        raise OSError(28, "No space left on device", "log.csv")

    monkeypatch.setattr("trainer.write_history", fail)
    with pytest.raises(
        InputError, match=r"^log\.csv: No space left on device; fix it, then resume with: .* --load run$"
    ):
        trainer.fit(2)


def test_a_broken_image_is_reported_with_the_command_to_resume(build, monkeypatch):
    trainer = build()
    trainer.fit(1)

    def fail(*_):
        raise InputError("a.png: broken", "ext")

    monkeypatch.setattr("data.srdata.Patches.__getitem__", fail)
    with pytest.raises(InputError, match=r"^a\.png: broken; then resume with: .* --load run$") as caught:
        trainer.fit(2)
    assert caught.value.argument == "ext"


@pytest.mark.parametrize(("seconds", "drawn"), [(60, [3]), (0, [1, 2, 3])])
def test_curves_are_drawn_now_and_then_and_at_the_end(build, monkeypatch, seconds, drawn):
    found = []
    monkeypatch.setattr("trainer.CURVES_EVERY", seconds)
    monkeypatch.setattr("trainer.write_curves", lambda folder, history: found.append(len(history)))
    build().fit(3)
    assert found == drawn


def test_the_progress_bar_fits_80_columns():
    numbers = "loss 12.34, active 0.75, 12.3 images/s"
    line = tqdm.format_meter(
        130, 1000, 360, ncols=80, prefix="epoch 128", postfix=numbers, ascii=True, bar_format=BAR_FORMAT
    )
    assert len(line) <= 80
    assert line.endswith(f"left, {numbers}]")
    assert len(line.split("|")[1]) >= 5


def test_a_dry_run_reports_what_a_run_costs_and_writes_nothing(build):
    trainer = build("dry")
    lines = dry_run(trainer, 2)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    assert lines[0] == f"SMSR: {parameters:,} parameters, cpu"
    assert lines[1] == "per batch: 4 patches of 8x8 pixels, x2"
    assert lines[2] == "per epoch: 3 batches, cut from 3 images"
    assert lines[3].startswith("time per step: ")
    assert lines[4].startswith("peak memory: ")
    assert lines[-1].startswith("remaining epochs: 2, about 0 minutes")
    assert not trainer.experiment.folder.exists()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "there is not enough memory; use a smaller one, or more parts (split_batch), then resume with"),
        (RuntimeError("CUDA out of memory. Tried"), "there is not enough memory; use a smaller one, or more parts"),
        (
            RuntimeError("CUDA error: unspecified launch failure\nmore"),
            "CUDA error: unspecified launch failure; if the GPU",
        ),
    ],
)
def test_a_lost_device_or_lack_of_memory_is_one_line(build, error, line):
    trainer = build()

    def fail(*_):
        raise error

    trainer.run_step = fail
    with pytest.raises(InputError, match="^" + re.escape(line)) as caught:
        trainer.fit(1)
    assert str(caught.value).endswith("python main.py --load run")
    assert resume(build).fit(1)


def test_a_deterministic_training_needs_no_other_operators(build):
    be_deterministic()
    try:
        assert build().fit(1)
    finally:
        be_deterministic(False)


@pytest.mark.parametrize(
    ("seconds", "line"),
    [
        (0.5, None),
        (0.6, "an epoch takes about 10 minutes: 1000 steps of 0.6 s"),
        (40, "an epoch takes about 11.1 hours: 1000 steps of 40 s"),
        (400, "an epoch takes about 5 days: 1000 steps of 400 s"),
    ],
)
def test_long_epochs_are_announced_once_after_a_few_steps(monkeypatch, caplog, seconds, line):
    now = itertools.count(0, 2 * seconds)  # it is read after the first and after the third step
    monkeypatch.setattr("trainer.time.perf_counter", lambda: next(now))
    forecast = Forecast(torch.device("cpu"), steps=1000)
    with caplog.at_level("INFO", "smsr"):
        for _ in range(10):
            forecast.add_step()
    assert [message.partition(";")[0] for message in caplog.messages] == ([line] if line else [])
