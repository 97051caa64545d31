import functools
import math
import multiprocessing
import random
import shutil
import signal
import time

import pytest
import torch

from data import build_test_sets, build_train_loader
from loss import build_loss
from model.smsr import SMSR
from trainer import Schedules, Trainer, build_optimizer, learning_rate, mask_histogram, sparsity_weight, temperature
from utility import Experiment, InputError

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


def build_trainer(data, folder, name="run", seed=1, loss="1*L1", n_threads=0, batch_size=4, **options):
    """A small but whole training."""
    torch.manual_seed(seed)
    model = SMSR(2, n_feats=8, n_blocks=2, n_layers=2)
    return Trainer(
        model,
        build_loss(loss),
        build_optimizer("ADAM", model.parameters(), 1e-3),
        build_train_loader(
            ["Tiny"], data, 2, [(1, 3), (4, 4)], patch_size=8, batch_size=batch_size, steps=3, n_threads=n_threads
        ),
        build_test_sets(["Tiny"], data, 2, [(1, 3), (4, 4)]),
        Experiment(name, folder),
        Schedules(lr=1e-3, decay=(1,), tau_epochs=4, lambda_warmup=2),
        **options,
    )


@pytest.fixture
def build(make_set, tmp_path):
    """`build_trainer` of runs in tmp_path."""
    return functools.partial(build_trainer, make_set(count=4), tmp_path / "experiment")


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def resumed(build, **options):
    """A new process, as it were: other random states, everything from the checkpoint."""
    fresh = build(seed=99, **options)
    state = fresh.experiment.load_checkpoint()
    fresh.model.load_state_dict(state["model"])
    fresh.load_state(state)
    return fresh


def without_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


@pytest.mark.parametrize("loss", ["1*L1", "1*L1+0.1*GAN"])
def test_one_and_one_epoch_are_bit_for_bit_two(build, loss):
    whole = build("whole", loss=loss)
    assert whole.fit(2)
    half = build("half", loss=loss)
    half.fit(1)
    other = resumed(build, name="half", loss=loss)
    assert other.epoch == 2
    other.fit(2)
    assert torch.equal(weights(other), weights(whole))
    assert without_seconds(other.history) == without_seconds(whole.history)


@pytest.fixture
def one_thread():
    """Sums are rounded alike only where as many threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_on(data, folder, started):
    """What a process does that is going to be killed."""
    torch.set_num_threads(1)
    build = functools.partial(build_trainer, data, folder)
    trainer = build()
    trainer.experiment.folder.mkdir(parents=True, exist_ok=True)
    if trainer.experiment.checkpoint.exists():
        trainer = resumed(build)
    with trainer.experiment.alone():
        started.set()
        trainer.fit(10**6)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no kill -9")
def test_killed_twenty_times_a_run_goes_on_from_its_last_checkpoint(build, one_thread):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer", "data", "loss", "matplotlib.backends.backend_agg", "torch._dynamo"])
    data, folder = build.args
    experiment = Experiment("run", folder)
    rng = random.Random(0)
    reached = (1, 0)
    for attempt in range(20):
        started = context.Event()
        process = context.Process(target=train_on, args=(data, folder, started))
        process.start()
        assert started.wait(60)
        while attempt % 4 == 3 and experiment.load_checkpoint()["epoch"] == reached[0]:
            assert process.is_alive()
            time.sleep(0.01)  # let it get ahead now and then
        time.sleep(rng.uniform(0, 0.8))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL  # not of an error of its own
        if experiment.checkpoint.exists():
            state = experiment.load_checkpoint()
            assert (state["epoch"], state["step"]) >= reached
            reached = (state["epoch"], state["step"])
            assert len(state["history"]) == state["epoch"] - 1
        for path in experiment.folder.glob("model/*.pt"):
            torch.load(path, weights_only=True)
    epochs = reached[0]
    last = resumed(build)
    with last.experiment.alone():
        assert not list(last.experiment.folder.rglob("*.tmp"))
        last.fit(epochs)
    whole = build("whole")
    whole.fit(epochs)
    assert torch.equal(weights(last), weights(whole))
    assert without_seconds(last.history) == without_seconds(whole.history)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupt_saves_and_the_run_goes_on_as_if_it_had_not_been(build, stop_after, interruptible):
    whole = build("whole")
    whole.fit(2)
    stopped = build("stopped")
    train_step = stopped.train_step

    def interrupted_step(*args):
        train_step(*args)
        if stopped.step + 1 == stop_after:
            signal.raise_signal(signal.SIGINT)

    stopped.train_step = interrupted_step
    before = signal.getsignal(signal.SIGINT)
    assert not stopped.fit(2)
    assert signal.getsignal(signal.SIGINT) is before
    assert (stopped.epoch, stopped.step) == (1, stop_after)
    other = resumed(build, name="stopped")
    assert other.fit(2)
    assert torch.equal(weights(other), weights(whole))
    assert other.history[0]["loss"] == whole.history[0]["loss"]


def test_a_second_interrupt_acts_at_once(build, interruptible):
    trainer = build()
    trainer.train_step = lambda *args: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(1)


def test_what_a_run_leaves(build):
    trainer = build(keep_all=True)
    trainer.fit(2)
    folder = trainer.experiment.folder
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left == {
        "checkpoint.pt", "log.csv", "loss.png", "psnr.png", "active_share.png", "masks.png",
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
    trainer.model.training_forward = lambda lr, tau: (seen.append((lr, float(tau))), forward(lr, tau))[1]
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


@pytest.mark.parametrize("values", [[30.0, 32.0, 31.0, 32.0], [math.nan, 30.0, math.nan, 29.0]])
def test_the_best_epoch_is_the_one_of_the_highest_psnr(build, monkeypatch, values):
    trainer = build(keep_all=True)
    values = iter(values)
    monkeypatch.setattr("trainer.headline", lambda metrics: ("psnr_rgb", next(values)))
    trainer.fit(4)
    best, second = (torch.load(trainer.experiment.weights_path(which), weights_only=True) for which in ("best", 2))
    assert all(torch.equal(best[key], second[key]) for key in best)


def test_a_run_can_go_on_from_its_very_start(build):
    trainer = build()
    trainer.train_step = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.fit(1)
    assert resumed(build).fit(1)


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
        hr = lr.repeat_interleave(2, 2).repeat_interleave(2, 3)
        trainer.train_step(lr, hr, torch.tensor(1.0), torch.tensor(0.1))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
        means = trainer._means()
        assert len(seen) == split
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-3, atol=1e-5)
    assert means["loss"] == pytest.approx(means["loss_L1"] + 0.1 * means["active"], rel=1e-5)
    assert means["active"] == pytest.approx((means["active_1"] + means["active_2"]) / 2)
    assert means["grad_norm"] == pytest.approx(gradients[0].norm().item(), rel=1e-3)


def test_gradients_are_clipped(build, monkeypatch):
    trainer = build(gclip=1e-3)
    seen = []
    monkeypatch.setattr(
        trainer.optimizer, "step", lambda: seen.append(max(p.grad.abs().max() for p in trainer.model.parameters()))
    )
    trainer.fit(1)
    assert all(value <= 1e-3 for value in seen)
    assert len(seen) == 3


def step_on(trainer, value):
    lr = torch.full((2, 3, 8, 8), value)
    trainer.train_step(lr, torch.zeros(2, 3, 16, 16), torch.tensor(1.0), torch.tensor(0.1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": torch.float16},
        {"split_batch": 2},
        {"gclip": 1.0},
    ],
)
@pytest.mark.parametrize("bad", [1e7, math.nan, math.inf])
def test_a_batch_far_off_is_skipped_counted_and_told(build, bad, options, caplog):
    trainer = build(**{"skip_threshold": 10} | options)
    trainer.fit(1)
    before, state = weights(trainer).clone(), str(trainer.optimizer.state_dict())
    step_on(trainer, bad)
    assert torch.equal(weights(trainer), before)
    assert str(trainer.optimizer.state_dict()) == state
    trainer._look()
    assert "1 steps skipped" in caplog.text
    assert math.isnan(trainer._means()["loss"])
    step_on(trainer, 100.0)
    assert not torch.equal(weights(trainer), before)
    assert trainer.bad.tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["GAN", "WGAN", "WGAN_GP", "LSGAN", "RGAN"])
def test_a_batch_that_is_not_finite_leaves_the_discriminator_as_it_was(build, kind):
    trainer = build(loss=f"1*L1+0.1*{kind}")
    (term,) = trainer.criterion._learning().values()
    step = torch.zeros(2, 3, 16, 16), torch.rand(2, 3, 32, 32) * 255, torch.tensor(1.0), torch.tensor(0.1)
    trainer.train_step(*step)
    before = {key: value.clone() for key, value in term.discriminator.state_dict().items()}
    state = str(term.optimizer.state_dict())
    trainer.train_step(torch.full_like(step[0], math.nan), *step[1:])
    assert all(torch.equal(value, before[key]) for key, value in term.discriminator.state_dict().items())
    assert str(term.optimizer.state_dict()) == state
    trainer.train_step(*step)
    assert trainer.bad.tolist() == [1, 0]


def test_an_epoch_without_a_good_step_does_not_end_the_run_for_good(build):
    trainer = build()
    trainer.fit(1)
    trainer.history.append(trainer.history[0] | {"loss": math.nan})
    step_on(trainer, 100.0)
    assert trainer.bad.tolist() == [0, 0]


def test_the_loss_scale_of_float16_does_not_come_from_another_precision(build):
    build(precision=torch.bfloat16).fit(1)
    assert resumed(build, precision=torch.float16).scaler.get_scale() == 2.0**16


def test_nothing_but_bad_steps_end_the_run(build):
    trainer = build(max_bad_steps=2)
    trainer.fit(1)
    checkpoint = trainer.experiment.checkpoint.read_bytes()
    trainer.model.head[0].weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match=r"epoch 2, step 3: the last 3 steps .* --load run and a lower --lr"):
        trainer.fit(2)
    assert trainer.experiment.checkpoint.read_bytes() == checkpoint


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


def test_noise_depends_on_seed_epoch_step_and_rank_alone(build, monkeypatch):
    trainer = build()
    seeds = {trainer._noise_seed()}
    for name, value in (("seed", 2), ("epoch", 2), ("step", 1)):
        before = getattr(trainer, name)
        setattr(trainer, name, value)
        seeds.add(trainer._noise_seed())
        setattr(trainer, name, before)
    monkeypatch.setattr("distributed.rank", lambda: 1)
    seeds.add(trainer._noise_seed())
    assert len(seeds) == 5


def test_the_moving_average_of_the_weights(build):
    average = None

    def spied(trainer):
        step = trainer.train_step

        def train_step(*args):
            nonlocal average
            step(*args)
            average = weights(trainer).clone() if average is None else (average + weights(trainer)) / 2

        trainer.train_step = train_step
        return trainer

    trainer = spied(build(ema=0.5))
    trainer.fit(1)
    trainer = spied(resumed(build, ema=0.5))
    trainer.fit(2)
    kept = torch.load(trainer.experiment.weights_path("latest_ema"), weights_only=True)
    kept = torch.cat([kept[name].flatten() for name, _ in trainer.model.named_parameters()])
    torch.testing.assert_close(kept, average)
    row = trainer.history[-1]
    assert row["psnr_rgb_Tiny_ema"] != row["psnr_rgb_Tiny"]
    assert trainer.experiment.weights_path("best_ema").exists()


def test_a_deadline_stops_with_everything_saved(build):
    trainer = build(deadline=0.0)
    assert not trainer.fit(1)
    assert (trainer.epoch, trainer.step) == (1, 1)
    assert resumed(build).step == 1


def test_mask_histogram():
    masks = [torch.full((1, 1, 2, 2), 0.05), torch.tensor([0.0, 1.0, 0.95, 0.55]).view(1, 1, 2, 2)]
    histogram = mask_histogram(masks)
    assert list(histogram) == [f"mask_{index / 10}" for index in range(10)]
    assert [histogram[f"mask_{edge}"] for edge in (0.0, 0.5, 0.9)] == [5 / 8, 1 / 8, 2 / 8]


def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(build):
    trainer = build("dry")
    lines = trainer.dry_run(2)
    assert "patches of 8x8 pixels, x2, 3 batches an epoch" in lines[1]
    assert lines[-1].startswith("2 epochs: about 0.0 hours")
    assert not trainer.experiment.folder.exists()


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


@needs_compiler
def test_a_compiled_training_gives_the_same_gradient(build, monkeypatch):
    monkeypatch.setattr("model.smsr.gumbel_softmax", lambda logits, tau, dim: (logits / tau).softmax(dim))
    gradients = []
    for compiled in (False, True):
        trainer = build(compile=compiled)
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
        trainer.model.train()
        for tau in (1.0, 0.5):
            lr = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
            trainer.train_step(lr, torch.zeros(4, 3, 16, 16), torch.tensor(tau), torch.tensor(0.1))
            gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[3], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(gradients[0], gradients[1])


@needs_compiler
def test_compiled_16_bit_gradients_stay_finite(build, monkeypatch):
    monkeypatch.setattr("model.smsr.gumbel_softmax", lambda logits, tau, dim: (logits / tau).softmax(dim))
    model = SMSR(2, n_blocks=1).train()
    lr = torch.rand(2, 3, 16, 16) * 255
    gradients = []
    for compiled in (False, True):
        trainer = Trainer(
            model, build_loss("1*L1"), build_optimizer("SGD", model.parameters(), 1e-30), None, [], None, Schedules(),
            precision=torch.bfloat16, compile=compiled,
        )  # fmt: skip
        trainer.train_step(lr, torch.zeros(2, 3, 32, 32), torch.tensor(0.7), torch.tensor(0.1))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[1].isfinite().all()
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


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
        resumed(build, loss="L1+GAN")
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
