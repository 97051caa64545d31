"""Train a network: the schedules, one epoch, fit."""

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import distributed
import schema
from checkpoint import Experiment
from data.device import DeviceLoader
from data.srdata import PatchLoader, WholeImages
from evaluation import evaluate, headline, mask_densities
from model.inference import build_predictor
from model.network import Network
from program import InputError
from recovery import report_failures, resume_hint, stop_on_interrupt
from summary import (
    MaskMonitor,
    Row,
    RunningMeans,
    TensorBoard,
    comparable,
    find_collapsed,
    mask_histogram,
    write_curves,
    write_history,
)
from training_step import TrainingStep
from utility import logger, peak_memory, progress_bar, synchronize

# ---- schedules, functions of the epoch 1, 2, ... ---------------------------------------------------------------------


def temperature(epoch: int, tau_min: float = 0.4, tau_epochs: int = 500) -> float:
    """tau of the Gumbel-softmax: from 1 down by 1 / tau_epochs per epoch, to tau_min (paper section 4.1)."""
    return max(1 - (epoch - 1) / tau_epochs, tau_min)


def sparsity_weight(epoch: int, maximum: float = 0.1, warmup: int = 50) -> float:
    """lambda of the sparsity loss: from 0 up to `maximum` over `warmup` epochs (paper section 4.1)."""
    return maximum * min((epoch - 1) / warmup, 1) if warmup else maximum


def learning_rate(epoch: int, initial: float = 2e-4, decay: Sequence[int] = (200,), gamma: float = 0.5) -> float:
    """Multiplied by gamma every N epochs if `decay` is a single number N, else after each of its epochs."""
    if len(decay) == 1:
        return initial * gamma ** ((epoch - 1) // decay[0])
    return initial * gamma ** sum(epoch > milestone for milestone in decay)


def cosine_learning_rate(epoch: int, initial: float = 2e-4, epochs: int = 1000) -> float:
    """From `initial` to a hundredth of it in the last epoch, along half a cosine (SGDR, equation 5)."""
    return initial * (0.01 + 0.99 * (1 + math.cos(math.pi * (epoch - 1) / max(epochs - 1, 1))) / 2)


@dataclass(frozen=True)
class Schedules:
    """The constants of the three schedules.

    The learning rate falls in steps, by decay and gamma, or along a cosine over the epochs of the run.
    """

    lr: float = 2e-4
    schedule: str = "steps"  # or "cosine"
    decay: Sequence[int] = (200,)
    gamma: float = 0.5
    epochs: int = 1000
    tau_min: float = 0.4
    tau_epochs: int = 500
    lambda_sparsity: float = 0.1
    lambda_warmup: int = 50
    unmasked_epochs: int = 0  # the first epochs, which train without masks; tau and lambda begin after them

    def at(self, epoch: int) -> tuple[float, float, float]:
        """Learning rate, tau and lambda."""
        masked_epoch = max(epoch - self.unmasked_epochs, 1)
        if self.schedule == "cosine":
            lr = cosine_learning_rate(epoch, self.lr, self.epochs)
        else:
            lr = learning_rate(epoch, self.lr, self.decay, self.gamma)
        return (
            lr,
            temperature(masked_epoch, self.tau_min, self.tau_epochs),
            sparsity_weight(masked_epoch, self.lambda_sparsity, self.lambda_warmup) if self.has_masks(epoch) else 0.0,
        )

    def has_masks(self, epoch: int) -> bool:
        """Whether an epoch trains with masks."""
        return epoch > self.unmasked_epochs


# ---- masks that have collapsed ---------------------------------------------------------------------------------------


def revive_masks(model: Network, test_sets: Sequence[WholeImages], origin: str | Path) -> str:
    """Give each module whose mask is empty, or full, on every image the mask of the nearest module without this fault.

    The features that modules add to are the same, so a mask of one selects similar pixels in another. Of two modules
    that are equally near, the former is taken. Returns what was done, in words. Raises InputError, naming the weights'
    file `origin`, if all masks have collapsed.
    """
    metrics = [evaluate(model, images, build_predictor(model), warm_up=False) for images in test_sets]
    model.train()  # evaluating leaves the network in eval mode
    collapsed = find_collapsed(np.concatenate([mask_densities(of_set) for of_set in metrics]))
    alive = np.flatnonzero(~collapsed)
    if not alive.size:
        raise InputError(f"{origin}: all masks are empty or full; use other weights", argument="revive_masks")
    copies = []
    for target in np.flatnonzero(collapsed):
        source = alive[np.abs(alive - target).argmin()]
        model.copy_mask(int(source), int(target))
        copies.append(f"module {target + 1} starts with the mask of module {source + 1}")
    return "; ".join(copies) or "no mask is empty or full on every image"


# ---- training --------------------------------------------------------------------------------------------------------

CURVES_EVERY = 60  # seconds at least, except at the end: drawing them takes more than one
BAR_FORMAT = "{desc} |{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"  # fits 80 columns
WHY_SKIPPED = "because their loss or gradient was not finite or their loss was too large"


@dataclass(frozen=True)
class TrainSettings:
    """How a training runs, apart from its step, data and schedules."""

    seed: int = 1  # of the noise of the masks, with the epoch, the step and the rank
    skip_threshold: float = 1e8  # a batch whose loss exceeds this many times the previous epoch's is skipped
    max_bad_steps: int = 50  # abort after this many skipped batches in a row
    print_every: int = 10  # steps between two updates of the displayed numbers
    keep_all: bool = False  # keep the weights of every epoch
    deadline: float = math.inf  # when time.monotonic() passes it, the run saves everything and stops


class Forecast:
    """Logs how long an epoch takes, once and while it still begins, if that is long. A user may not want to wait.

    Args:
        steps: per epoch
    """

    LONG = 600  # seconds
    FIRST, LAST = 1, 3  # between the ends of these steps time is measured; the first one compiles and starts workers

    def __init__(self, device: torch.device, steps: int):
        self.device, self.steps = device, steps
        self.done, self.started = 0, 0.0

    def add_step(self) -> None:
        """Count a step that was taken."""
        self.done += 1
        if self.done not in (self.FIRST, self.LAST):
            return
        synchronize(self.device)
        if self.done == self.FIRST:
            self.started = time.perf_counter()
            return
        seconds = (time.perf_counter() - self.started) / (self.LAST - self.FIRST)
        if seconds * self.steps >= self.LONG:
            logger.info(
                f"an epoch takes about {_duration(seconds * self.steps)}: {self.steps} steps of {seconds:.3g} s; "
                "a lower test_every makes epochs shorter"
            )


def _duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"


class Trainer:
    """Runs the steps of a training, and saves everything needed to resume at any epoch or in the middle of one.

    With several processes each trains on its part of every batch, and the main process writes the files.

    Args:
        training_step: one step, with the network
        loader: from data.build_train_loader
        test_sets: evaluated after each epoch; the first one selects the best epoch
        experiment: the folder of the run, which exists
        tensorboard: None: not written
    """

    def __init__(
        self,
        training_step: TrainingStep,
        loader: PatchLoader | DeviceLoader,
        test_sets: Sequence[WholeImages],
        experiment: Experiment,
        schedules: Schedules,
        settings: TrainSettings,
        tensorboard: TensorBoard | None = None,
    ):
        self.training_step, self.model = training_step, training_step.model
        self.loader, self.test_sets, self.experiment = loader, test_sets, experiment
        self.schedules, self.settings, self.tensorboard = schedules, settings, tensorboard
        self.history: list[Row] = []  # the numbers of each finished epoch
        self.epoch, self.step = 1, 0  # the epoch in progress and how many of its steps are done
        self.means = RunningMeans(self.model.device)
        self.seconds, self.mask_histogram = 0.0, {}  # of the epoch in progress; of its last step
        self.mask_monitor = MaskMonitor()
        self.curves_due = time.monotonic() + CURVES_EVERY
        self.forecast = Forecast(device=self.model.device, steps=loader.sampler.steps)

    def fit(self, epochs: int) -> bool:
        """Train up to and including the epoch `epochs`. Returns False if the run was stopped before.

        Raises InputError if too many steps are skipped, another process dies, or files cannot be written.
        """
        with stop_on_interrupt() as stop, report_failures(self.experiment):
            if self.epoch == 1 and self.step == 0:
                self._save_checkpoint()  # killed from here on, the run can be resumed
            while self.epoch <= epochs:
                stopped = self._train_epoch(stop)
                self._save_checkpoint()
                if stopped:
                    self._draw_curves()
                    logger.info(f"stopped in epoch {self.epoch} after step {self.step}; everything is saved")
                    return False
                self._finish_epoch()
                if self.epoch > epochs or time.monotonic() > self.curves_due:
                    self._draw_curves()
        return True

    def _train_epoch(self, stop):
        """Run the remaining steps of the epoch; returns whether to stop the run."""
        lr, _, _ = self.schedules.at(self.epoch)
        self.training_step.set_learning_rate(lr)
        self.loader.sampler.epoch, self.loader.sampler.first_step = self.epoch, self.step
        self.model.train()
        started, stopped = time.perf_counter() - self.seconds, False
        with self._progress_bar() as bar:
            for lr_images, hr_images in self._batches():
                result = self.run_step(lr_images, hr_images)
                self.means.add(result.names, result.values, result.is_good)
                self.step += 1
                self.forecast.add_step()
                is_last = self.step == self.loader.sampler.steps
                is_logging_step = is_last or self.step % self.settings.print_every == 0
                if is_logging_step:
                    self._log_step(bar, started)
                if is_last and result.masks:
                    self.mask_histogram = mask_histogram(result.masks)
                bar.update()
                if distributed.world_size() == 1 or is_logging_step:  # several processes agree when they log
                    stopped = distributed.any_rank(stop.requested or time.monotonic() > self.settings.deadline)
                if stopped:
                    break
        self.seconds = time.perf_counter() - started
        self.means.average_over_processes()
        return stopped

    def run_step(self, lr_images, hr_images):
        """One step on LR (N, P, P, C) and HR (N, sP, sP, C) images, uint8; returns its StepResult."""
        _, *values = self.schedules.at(self.epoch)
        losses = (abs(row["loss"]) for row in reversed(self.history))
        largest_loss = self.settings.skip_threshold * next(filter(math.isfinite, losses), math.inf)
        # As tensors: numbers would be compiled into the network. From torch.full: torch.tensor waits for the device.
        tau, lambda_, largest_loss = (
            torch.full((), value, device=self.model.device) for value in (*values, largest_loss)
        )
        words = np.random.SeedSequence((self.settings.seed, self.epoch, self.step, distributed.rank()))
        return self.training_step(
            self.model.to_input(lr_images),
            self.model.to_input(hr_images),
            tau=tau if self._has_masks else None,
            lambda_=lambda_,
            largest_loss=largest_loss,
            noise_seed=int(words.generate_state(1, "u8")[0] >> 1),
        )

    @property
    def _has_masks(self):
        """Whether the epoch in progress trains with masks."""
        return self.schedules.has_masks(self.epoch)

    def _progress_bar(self):
        steps = self.loader.sampler.steps
        visible = distributed.is_main_process()
        options = {"total": steps, "initial": self.step, "desc": f"epoch {self.epoch}", "bar_format": BAR_FORMAT}
        return progress_bar(visible=visible, **options)

    def _batches(self):
        with self._hint_to_resume():
            if self.step < self.loader.sampler.steps:
                yield from self.loader

    @contextlib.contextmanager
    def _hint_to_resume(self):
        """Add to the mistakes in images how the run is resumed once they are corrected."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{error}; then {resume_hint(self.experiment)}", error.argument) from None

    def _log_step(self, bar, started):
        """Display the means so far, which waits for the device. Raises InputError after too many skipped steps."""
        place = f"epoch {self.epoch}, step {self.step}"
        newly_skipped, in_a_row = self.means.skipped_steps()
        if newly_skipped:
            logger.warning(f"{place}: {newly_skipped} steps skipped, {WHY_SKIPPED}")
        if in_a_row >= self.settings.max_bad_steps:
            raise InputError(
                f"{place}: the last {in_a_row} steps were skipped, {WHY_SKIPPED}; "
                f"lower it and {resume_hint(self.experiment)}",
                argument="lr",
            )
        means = self.means.means()
        speed = self.step * self.loader.sampler.batch_size / (time.perf_counter() - started)
        bar.set_postfix_str(f"loss {means['loss']:.4g}, active {means['active']:.2f}, {speed:.3g} images/s")

    def _finish_epoch(self):
        """Evaluate, and write weights and log.csv."""
        lr, tau, lambda_ = self.schedules.at(self.epoch)
        row = {"epoch": self.epoch, "lr": lr, "tau": tau, "lambda": lambda_, **self.means.means()}
        row |= {"skipped": int(self.means.skipped[0]), "seconds": self.seconds}
        logger.info(
            f"epoch {self.epoch}: loss {row['loss']:.4g}, active {row['active']:.2f}, lr {lr:.2g}, tau {tau:.2f}, "
            f"lambda {lambda_:.2g}, {self.seconds:.0f} s"
        )
        self.history.append(row | self._evaluate() | self.mask_histogram)
        if distributed.is_main_process():
            for suffix, model in self._networks():
                self._save_weights(suffix, model)
            write_history(self.experiment.folder, self.history)
            if self.tensorboard:
                self.tensorboard.write(self.history[-1], self.model, self.test_sets[0])
        self.epoch, self.step = self.epoch + 1, 0
        self.means.start_epoch()
        self.seconds, self.mask_histogram = 0.0, {}
        self._save_checkpoint()  # last: killed before this line, the epoch is evaluated and saved again

    def _draw_curves(self):
        if distributed.is_main_process() and self.history:
            write_curves(self.experiment.folder, self.history)
        self.curves_due = time.monotonic() + CURVES_EVERY

    def _networks(self):
        """The network and, if it is kept, its moving average, each with the suffix of its files and columns."""
        ema = self.training_step.ema
        return [("", self.model)] + ([("_ema", ema.module)] if ema else [])

    def _evaluate(self):
        """The columns of log.csv that the test sets fill. Warns of masks that stay empty or full on all of them."""
        row, densities = {}, []
        for images, (suffix, model) in itertools.product(self.test_sets, self._networks()):
            with self._hint_to_resume():
                metrics = evaluate(model, images, build_predictor(model), warm_up=False)
            psnr_name, psnr_mean = headline(metrics)
            row[f"{psnr_name}_{images.name}{suffix}"] = psnr_mean
            row[f"ssim_y_{images.name}{suffix}"] = metrics["ssim_y"]
            row[f"active_share_{images.name}{suffix}"] = metrics["active_share"]
            of_images = mask_densities(metrics)
            for k, density in enumerate(of_images.mean(0).tolist()):
                row[f"density_{k + 1}_{images.name}{suffix}"] = density
            if model is self.model:
                densities.append(of_images)
            logger.info(
                f"  {images.name} x{images.scale}{suffix.replace('_', ', ')}: {psnr_name} {psnr_mean:.3f} dB, "
                f"ssim_y {metrics['ssim_y']:.4f}, active share {metrics['active_share']:.3f}"
            )
            model.train()  # also frees what evaluating has allocated
        _, _, lambda_ = self.schedules.at(self.epoch)
        is_warmed_up = lambda_ == self.schedules.lambda_sparsity > 0
        self.mask_monitor.check(self.epoch, np.concatenate(densities), may_be_full=not is_warmed_up)
        return row

    def _save_weights(self, suffix, model):
        weights = model.state_dict()
        if self._is_best(suffix):
            self.experiment.save_weights(f"best{suffix}", weights)
        if self.settings.keep_all:
            self.experiment.save_weights(f"{self.epoch}{suffix}", weights)
        self.experiment.save_weights(f"latest{suffix}", weights)

    def _is_best(self, suffix):
        """Whether the last epoch is the best so far."""
        *rivals, last = comparable(self.history)
        name = next(key for key in last if key.startswith("psnr")) + suffix
        return all(last[name] > row[name] for row in rivals if not math.isnan(row.get(name, math.nan)))

    def _save_checkpoint(self):
        if distributed.is_main_process():
            self.experiment.save_checkpoint(self.state())

    def state(self) -> dict[str, Any]:
        """Everything needed to resume: the content of checkpoint.pt."""
        return {
            **self.training_step.state(),
            "epoch": self.epoch,
            "step": self.step,
            **self.means.state(),
            "seconds": self.seconds,
            "mask_histogram": self.mask_histogram,
            "collapsed_masks": self.mask_monitor.epochs,
            "history": self.history,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint (`Experiment.load_checkpoint`); the model has its weights already.

        Raises InputError if the checkpoint is broken or does not fit the optimizer or the loss.
        """
        self.training_step.load_state(state, self.experiment.checkpoint_path)
        sums = schema.optional(schema.tensor((len(state["names"]) + 1,)))
        self.experiment.check_checkpoint(state, schema.mapping({"sums": sums}, rest=schema.anything))
        self.means.load_state(state)
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        self.seconds, self.mask_histogram = state["seconds"], state["mask_histogram"]
        self.mask_monitor.epochs = state.get("collapsed_masks", {})  # version 0.1.0 did not count them


def dry_run(trainer: Trainer, epochs: int) -> list[str]:
    """Run a few steps and an image of each test set, write nothing, and return lines on sizes, memory and time."""
    model, sampler, patches = trainer.model, trainer.loader.sampler, trainer.loader.dataset
    remaining = range(trainer.epoch, epochs + 1)
    steps = {
        kind: _seconds_of_a_step(trainer, next(same_kind))
        for kind, same_kind in itertools.groupby(remaining, trainer.schedules.has_masks)
    }
    evaluation = sum(_seconds_to_evaluate(model, images) for images in trainer.test_sets)
    seconds = sum(steps[trainer.schedules.has_masks(epoch)] * sampler.steps + evaluation for epoch in remaining)
    of_kinds = ", ".join(f"{step:.3f} s{'' if has_masks else ' without masks'}" for has_masks, step in steps.items())
    side = patches.patch_size
    return [
        f"{type(model).__name__}: {model.n_parameters:,} parameters, {model.device}",
        f"per batch: {sampler.batch_size} patches of {side}x{side} pixels, x{model.scale}",
        f"per epoch: {sampler.steps} batches, cut from {len(patches)} images",
        f"time per step: {of_kinds}, per evaluation: about {evaluation:.1f} s",
        f"peak memory: {peak_memory(model.device) / 2**30:.2f} GiB",
        f"remaining epochs: {len(remaining)}, about {_duration(seconds)}",
    ]


def _seconds_of_a_step(trainer, epoch):
    """The time of a step as it runs in an epoch."""
    batches, seconds = itertools.cycle(trainer.loader), []
    trainer.epoch = epoch
    for _ in range(8):
        started = time.perf_counter()
        with report_failures(trainer.experiment):
            trainer.run_step(*next(batches))
        synchronize(trainer.model.device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[3:])  # the first steps warm up, compile, and start the workers


def _seconds_to_evaluate(model, images):
    """An estimate from the first image of the set."""
    _, lr, _ = images[0]
    model.eval()
    x = model.to_input(lr[None])
    model.inference(x)  # the first call also compiles the network
    started = time.perf_counter()
    model.inference(x)
    synchronize(model.device)
    return (time.perf_counter() - started) * len(images) / distributed.world_size()
