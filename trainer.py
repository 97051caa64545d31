"""Train a network: the schedules, one epoch, fit."""

import contextlib
import itertools
import math
import os
import signal
import statistics
import time
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_value_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import distributed
from evaluation import evaluate, headline
from loss.sparsity import active_shares
from model.inference import build_run
from utility import InputError, logger, peak_memory, synchronize

# ---- schedules, functions of the epoch 1, 2, ... ---------------------------------------------------------------------


def temperature(epoch, tau_min=0.4, tau_epochs=500):
    """tau of the Gumbel-softmax: from 1 down by 1 / tau_epochs an epoch, not below tau_min (paper section 4.1)."""
    return max(1 - (epoch - 1) / tau_epochs, tau_min)


def sparsity_weight(epoch, maximum=0.1, warmup=50):
    """lambda of the sparsity loss: from 0 up to `maximum` over `warmup` epochs (paper section 4.1)."""
    return maximum * min((epoch - 1) / warmup, 1) if warmup else maximum


def learning_rate(epoch, initial=2e-4, decay=(200,), gamma=0.5):
    """Times gamma every so many epochs where `decay` is one number, else at each of its epochs."""
    if len(decay) == 1:
        return initial * gamma ** ((epoch - 1) // decay[0])
    return initial * gamma ** sum(epoch > milestone for milestone in decay)


@dataclass(frozen=True)
class Schedules:
    """The constants of the three schedules."""

    lr: float = 2e-4
    decay: tuple[int, ...] = (200,)
    gamma: float = 0.5
    tau_min: float = 0.4
    tau_epochs: int = 500
    lambda_sparsity: float = 0.1
    lambda_warmup: int = 50

    def at(self, epoch):
        """(learning rate, tau, lambda)"""
        return (
            learning_rate(epoch, self.lr, self.decay, self.gamma),
            temperature(epoch, self.tau_min, self.tau_epochs),
            sparsity_weight(epoch, self.lambda_sparsity, self.lambda_warmup),
        )


# ---- training --------------------------------------------------------------------------------------------------------


def build_optimizer(name, parameters, lr, betas=(0.9, 0.999), epsilon=1e-8, momentum=0.9, weight_decay=0.0):
    """'ADAM', 'SGD' or 'RMSprop'. Raises InputError for any other."""
    if name == "ADAM":
        return torch.optim.Adam(parameters, lr, betas, epsilon, weight_decay, fused=True)
    if name == "SGD":
        return torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, fused=True)
    if name == "RMSprop":
        return torch.optim.RMSprop(parameters, lr, eps=epsilon, weight_decay=weight_decay)
    raise InputError(f"--optimizer {name}: no such optimizer; there are ADAM, SGD, RMSprop")


class TrainingForward(nn.Module):
    """A model as DistributedDataParallel and torch.compile want it: a module whose call is the training forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, tau):
        return self.model.training_forward(x, tau)


class Trainer:
    """Trains a model and keeps what it takes to go on from any epoch, or from the middle of one.

    No step waits for the device (but with RMSprop in float16): what is looked at is summed there, and read every
    `print_every` steps. A step with a loss or gradient that is not finite changes no weights; the device decides that,
    too.

    Where several processes run, each trains on its share of every batch, and that of rank 0 writes.

    Args:
        model: of the package `model`, on its device
        criterion: a loss.Loss, on the same device
        optimizer: of the model's parameters
        loader: of data.build_train_loader
        test_sets: WholeImages, measured after each epoch; the first one tells which epoch is best
        experiment: a utility.Experiment, started
        schedules: Schedules
        seed: of the noise of the masks, with the epoch, the step and the rank
        rgb_range: of the model's input
        gclip: bound of each gradient value; 0: none
        split_batch: parts in which a batch is run, to need less memory
        skip_threshold: a batch whose loss is more than so many times that of the epoch before is skipped
        max_bad_steps: so many skipped batches in a row end the run
        precision: dtype in which convolutions are computed; weights, loss and updates are float32
        compile: compile the training forward and its backward
        ema: decay of an exponential moving average of the weights, measured and kept beside them; 0: none
        print_every: batches between two looks
        keep_all: keep the weights of every epoch
        deadline: where time.monotonic() passes it, the run stops, all saved
        board: a watch.Board, or None
    """

    def __init__(
        self, model, criterion, optimizer, loader, test_sets, experiment, schedules, seed=1, rgb_range=255, gclip=0.0,
        split_batch=1, skip_threshold=1e8, max_bad_steps=50, precision=torch.float32, compile=False, ema=0.0,
        print_every=10, keep_all=False, deadline=math.inf, board=None,
    ):  # fmt: skip
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        self.loader, self.test_sets, self.experiment, self.schedules = loader, test_sets, experiment, schedules
        self.seed, self.rgb_range, self.gclip, self.split_batch = seed, rgb_range, gclip, split_batch
        self.skip_threshold, self.max_bad_steps, self.precision = skip_threshold, max_bad_steps, precision
        self.print_every, self.keep_all, self.deadline, self.board = print_every, keep_all, deadline, board
        self.device = next(model.parameters()).device
        self.forward = TrainingForward(model)
        if compile:
            self.forward.compile(dynamic=False)
        if distributed.world_size() > 1:
            with warnings.catch_warnings():  # PyTorch 2.13 has another name for the option, older ones have not
                warnings.simplefilter("ignore", FutureWarning)
                self.forward = DistributedDataParallel(
                    self.forward, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        # It also skips steps without asking the device, and scales only where float16 needs that.
        half = precision == torch.float16
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=2.0**16 if half else 1.0, enabled=self.device.type != "mps"
        )
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None
        self.history = []  # one dict of numbers for each finished epoch
        self.epoch, self.step = 1, 0  # the epoch in progress and how many of its steps are done
        self.bad = torch.zeros(2, device=self.device)  # skipped steps: in this epoch, and in a row
        self._start_sums()
        self._stop = False

    def fit(self, epochs):
        """Train up to and including the epoch `epochs`. Returns False if it was interrupted before that.

        Raises InputError if nothing but skipped steps come, another process is lost, or files cannot be written.
        """
        with self._stop_on_interrupt(), self._failures_told():
            if self.epoch == 1 and self.step == 0:
                self._save_checkpoint()  # killed from here on, the run can go on
            while self.epoch <= epochs:
                self._train_epoch()
                self._save_checkpoint()
                if self._stop:
                    logger.info(f"stopped in epoch {self.epoch} after {self.step} steps; everything is saved")
                    return False
                self._finish_epoch()
        return True

    def dry_run(self, epochs):
        """Take some steps, run an image of each test set, write nothing, and return lines on sizes, memory and time."""
        batches = itertools.cycle(self.loader)
        seconds = []
        for _ in range(8):
            started = time.perf_counter()
            with self._failures_told():
                self.train_step(*map(self._to_input, next(batches)), *self._schedule_tensors())
            synchronize(self.device)
            seconds.append(time.perf_counter() - started)
        step = statistics.median(seconds[3:])  # the first ones warm up, compile, and start the workers
        per_image = []
        for images in self.test_sets:
            _, lr, _ = images[0]
            self.model.eval()
            started = time.perf_counter()
            self.model.inference(self._to_input(lr[None]))
            synchronize(self.device)
            per_image.append(time.perf_counter() - started)
        evaluation = sum(s * len(images) for s, images in zip(per_image, self.test_sets, strict=True))
        evaluation /= distributed.world_size()
        hours = epochs * (step * self.loader.sampler.steps + evaluation) / 3600
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return [
            f"{type(self.model).__name__}: {count:,} parameters, {self.device}",
            f"a batch: {self.loader.sampler.batch_size} patches of {self._patch_shape()}, "
            f"{self.loader.sampler.steps} batches an epoch, {len(self.loader.dataset)} images",
            f"a step: {step:.3f} s; an evaluation: about {evaluation:.1f} s",
            f"memory: {peak_memory(self.device) / 2**30:.2f} GiB at its peak",
            f"{epochs} epochs: about {hours:.1f} hours",
        ]

    def _patch_shape(self):
        patches = self.loader.dataset
        return f"{patches.patch_size}x{patches.patch_size} pixels, x{patches.scale}"

    def _schedule_tensors(self):
        """tau and lambda of the epoch, as tensors (): numbers would be compiled into the network."""
        _, tau, lambda_ = self.schedules.at(self.epoch)
        return torch.tensor(tau, device=self.device), torch.tensor(lambda_, device=self.device)

    def _train_epoch(self):
        lr, tau, lambda_ = self.schedules.at(self.epoch)
        self.criterion.set_learning_rate(lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sampler = self.loader.sampler
        sampler.epoch, sampler.first_step = self.epoch, self.step
        tensors = self._schedule_tensors()
        self.model.train()
        first_step, started, before = self.step, time.perf_counter(), self.seconds
        with tqdm(
            total=sampler.steps, initial=self.step, desc=f"epoch {self.epoch}", leave=False,
            disable=distributed.is_helper(),
        ) as bar:  # fmt: skip
            for lr_images, hr_images in self._batches():
                self.train_step(self._to_input(lr_images), self._to_input(hr_images), *tensors)
                self.step += 1
                looks = self.step % self.print_every == 0 or self.step == sampler.steps
                if looks:
                    means = self._look()
                    self.seconds = before + time.perf_counter() - started
                    speed = (self.step - first_step) * sampler.batch_size / (self.seconds - before)
                    bar.set_postfix_str(
                        f"loss {means['loss']:.3f}, active {means['active']:.2f}, "
                        f"tau {tau:.2f}, lambda {lambda_:.3f}, {speed:.1f} images/s"
                    )
                bar.update()
                if self._stops(looks):
                    break
        self.seconds = before + time.perf_counter() - started
        if self.sums is not None:
            distributed.average([self.sums])

    def _batches(self):
        try:
            if self.step < self.loader.sampler.steps:
                yield from self.loader
        except InputError as error:
            raise InputError(f"{error}; then {self._way_on()}") from None

    def train_step(self, lr_images, hr_images, tau, lambda_):
        """One step on LR (N, C, P, P) and HR (N, C, sP, sP) in 0...rgb_range; tau and lambda_ tensors ()."""
        torch.manual_seed(self._noise_seed())
        self.optimizer.zero_grad()
        sums = 0
        for last, lr, hr in self._parts(lr_images, hr_images):
            share = len(lr) / len(lr_images)
            with contextlib.nullcontext() if last else self._without_exchange():
                with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                    sr, masks = self.forward(lr, tau)
                loss, losses = self.criterion(sr.float(), hr)
                shares = active_shares(masks) if masks else loss.new_ones(1)
                if masks:
                    loss = loss + lambda_ * shares.mean()
                loss = loss * share
                parts = [part * share for part in losses.values()]
                sums = sums + torch.stack([loss, *parts, *shares * share]).detach()
                if last:  # a gradient of NaN is how to have the step skipped
                    accepted = sums[0] <= self._largest_loss()  # NaN is not
                    loss = loss * torch.where(accepted & sums[0].isfinite(), 1.0, math.nan)
                self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        if self.gclip:
            clip_grad_value_(self.model.parameters(), self.gclip)
        good = norm.isfinite()
        if self.scaler.is_enabled() or good:
            self.scaler.step(self.optimizer)
        self.scaler.update(None if self.precision == torch.float16 else 1.0)
        if self.ema:
            self.ema.update_parameters(self.model)
        self._add_up(list(losses), sums, norm, good)
        self._masks = [m.detach() for m, _ in masks]

    def _noise_seed(self):
        words = np.random.SeedSequence((self.seed, self.epoch, self.step, distributed.rank())).generate_state(1, "u8")
        return int(words[0] >> 1)

    def _parts(self, lr_images, hr_images):
        """(whether it is the last, LR, HR) of each part of a batch."""
        parts = list(zip(lr_images.chunk(self.split_batch), hr_images.chunk(self.split_batch), strict=True))
        return [(part is parts[-1], *part) for part in parts]

    def _without_exchange(self):
        return self.forward.no_sync() if distributed.world_size() > 1 else contextlib.nullcontext()

    def _largest_loss(self):
        losses = (abs(row["loss"]) for row in reversed(self.history))
        return self.skip_threshold * next(filter(math.isfinite, losses), math.inf)

    def _finish_epoch(self):
        lr, tau, lambda_ = self.schedules.at(self.epoch)
        row = {"epoch": self.epoch, "lr": lr, "tau": tau, "lambda": lambda_, **self._means()}
        row |= {"skipped": int(self.bad[0]), "seconds": self.seconds}
        sampler = self.loader.sampler
        logger.info(
            f"epoch {self.epoch}: loss {row['loss']:.4f}, active {row['active']:.3f}, lr {lr:.2e}, tau {tau:.3f}, "
            f"lambda {lambda_:.4f}, {sampler.steps * sampler.batch_size / row['seconds']:.1f} images/s"
        )
        for images in self.test_sets:
            for model, suffix in ((self.model, ""), *([(self.ema.module, "_ema")] if self.ema else [])):
                metrics = evaluate(model, images, build_run(model), self.rgb_range, warm_up=False)
                psnr_name, psnr_mean = headline(metrics)
                row[f"{psnr_name}_{images.name}{suffix}"] = psnr_mean
                row[f"ssim_y_{images.name}{suffix}"] = metrics["ssim_y"]
                row[f"active_share_{images.name}{suffix}"] = metrics["active_share"]
                logger.info(
                    f"  {images.name} x{images.scale}{suffix.replace('_', ', ')}: {psnr_name} {psnr_mean:.3f} dB, "
                    f"ssim_y {metrics['ssim_y']:.4f}, active share {metrics['active_share']:.3f}"
                )
        self.history.append(row | self.mask_histogram)
        if not distributed.is_helper():
            self._keep("", self.model)
            if self.ema:
                self._keep("_ema", self.ema.module)
            self.experiment.write_history(self.history)
            if self.board:
                self.board.show(self.history[-1], self.model, self.test_sets[0], self.rgb_range)
        self.epoch, self.step = self.epoch + 1, 0
        self._start_sums()
        self._save_checkpoint()  # last: killed before this line, the epoch is measured and kept again

    def _keep(self, suffix, model):
        weights = model.state_dict()
        if self._is_best(suffix):
            self.experiment.save_weights(f"best{suffix}", weights)
        if self.keep_all:
            self.experiment.save_weights(f"{self.epoch}{suffix}", weights)
        self.experiment.save_weights(f"latest{suffix}", weights)

    def _is_best(self, suffix):
        name = next(key for key in self.history[-1] if key.startswith("psnr")) + suffix
        former = [row[name] for row in self.history[:-1] if not math.isnan(row.get(name, math.nan))]
        return not former or self.history[-1][name] > max(former)

    def _to_input(self, images):
        images = images.to(self.device, non_blocking=True)
        return images.to(torch.float32, memory_format=torch.channels_last) * (self.rgb_range / 255)

    # ---- what is looked at -----------------------------------------------------------------------------------------

    def _start_sums(self):
        self.names = ()  # of the numbers that are summed
        self.sums = None  # over the good steps of this epoch, and last how many these are; on the device
        self.bad[0] = 0
        self._bad_told = 0
        self.seconds = 0.0
        self.mask_histogram = {}  # {"mask_0.3": share of pixels whose m is 0.3 to 0.4, ...} in the last step

    def _add_up(self, losses, sums, norm, good):
        count = len(sums) - 1 - len(losses)
        self.names = ["loss", *(f"loss_{name}" for name in losses), *(f"active_{k + 1}" for k in range(count))]
        self.names.append("grad_norm")
        sums = torch.where(good, torch.cat([sums, torch.stack([norm, torch.ones_like(norm)])]), 0)
        self.sums = sums if self.sums is None else self.sums + sums
        missed = (~good).float()
        self.bad = torch.stack([self.bad[0] + missed, (self.bad[1] + 1) * missed])

    def _look(self):
        """The means up to now; waits for the device. Raises InputError if too many steps in a row were skipped."""
        skipped, in_a_row = (int(number) for number in self.bad.tolist())
        if skipped > self._bad_told:
            logger.warning(
                f"epoch {self.epoch}, step {self.step}: {skipped - self._bad_told} steps skipped, "
                "with a loss or gradient that is not finite, or a loss far off"
            )
            self._bad_told = skipped
        if in_a_row >= self.max_bad_steps:
            raise InputError(
                f"epoch {self.epoch}, step {self.step}: the last {in_a_row} steps were skipped, with a loss or "
                f"gradient not finite or far off (--max_bad_steps {self.max_bad_steps}); the last good checkpoint is "
                f"{self.experiment.checkpoint}: go on from it with --load {self.experiment.name} and a lower --lr"
            )
        if self.step == self.loader.sampler.steps and self._masks:
            self.mask_histogram = mask_histogram(self._masks)
        return self._means()

    def _means(self):
        """Of the steps that were not skipped; NaN if there are none."""
        *values, count = self.sums.tolist() if self.sums is not None else [0]
        means = {name: value / count if count else math.nan for name, value in zip(self.names, values, strict=True)}
        active = [value for name, value in means.items() if name.startswith("active_")]
        return {"loss": math.nan, **means, "active": sum(active) / len(active) if active else math.nan}

    # ---- stopping, and going on later ------------------------------------------------------------------------------

    def _stops(self, looks):
        """Whether to stop after this step: all processes together, which they agree on when they look."""
        if distributed.world_size() == 1 or looks:
            self._stop = distributed.any_rank(self._stop or time.monotonic() > self.deadline)
            return self._stop
        return False

    def _save_checkpoint(self):
        if distributed.is_helper():
            return
        self.experiment.save_checkpoint(
            {
                "model": self.model.state_dict(),
                "ema": self.ema.state_dict() if self.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "optimizer_name": type(self.optimizer).__name__,
                "scaler": self.scaler.state_dict() if self.precision == torch.float16 else None,
                "criterion": self.criterion.learned_state(),
                "epoch": self.epoch,
                "step": self.step,
                "names": self.names,
                "sums": self.sums,
                "bad": self.bad,
                "seconds": self.seconds,
                "mask_histogram": self.mask_histogram,
                "history": self.history,
            }
        )

    def load_state(self, state):
        """Go on from a checkpoint of `experiment.load_checkpoint`; the model holds its weights already."""
        name = type(self.optimizer).__name__
        if state["optimizer_name"] != name:
            raise InputError(f"--optimizer: the run has {state['optimizer_name']}, and goes on with nothing but that")
        asked = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, options in zip(self.optimizer.param_groups, asked, strict=True):
            group.update(options)  # those of the command line, not those of the checkpoint
        try:
            self.criterion.load_learned_state(state["criterion"])
        except KeyError as error:
            raise InputError(f"--loss: the run has no discriminator for {error}; go on with its own loss") from None
        if self.ema and state["ema"]:
            self.ema.load_state_dict(state["ema"])
        if state["scaler"] and self.precision == torch.float16:
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        self.names, self.seconds, self.mask_histogram = state["names"], state["seconds"], state["mask_histogram"]
        self.sums = None if state["sums"] is None else state["sums"].to(self.device)
        self.bad = state["bad"].to(self.device)
        self._bad_told = int(self.bad[0])

    @contextlib.contextmanager
    def _failures_told(self):
        """Within, what ends a run without being a mistake of the program is told in one line, with the way on."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{error.filename or 'a file'}: {error.strerror or error}; mend that, then {self._way_on()}"
            ) from None
        except RuntimeError as error:
            if distributed.is_lost(error):
                raise InputError(f"another process of this training is gone; {self._way_on()}") from None
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                what = str(error).strip().splitlines()[0]
                raise InputError(f"--compile: {what}; install what is missing, or leave --compile out") from None
            raise

    def _way_on(self):
        if self.experiment.checkpoint.exists():
            return f"go on from {self.experiment.checkpoint} with --load {self.experiment.name}"
        return "start again"

    @contextlib.contextmanager
    def _stop_on_interrupt(self):
        """Within, Ctrl-C or SIGTERM lets the step in progress end; Ctrl-C once more acts at once.

        Not so SIGTERM: torchrun hands on that which each process got from the batch system already.
        """
        signals = (signal.SIGINT, signal.SIGTERM)
        former = {number: signal.getsignal(number) for number in signals}

        def stop(*_):
            self._stop = True
            signal.signal(signal.SIGINT, former[signal.SIGINT])
            os.write(2, b"\nstopping after this step or evaluation; Ctrl-C stops at once\n")  # a logger may be busy

        for number in signals:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def mask_histogram(masks):
    """K masks m (N, 1, H, W) -> {"mask_0.3": the share of pixels whose m is 0.3 to 0.4, ...}."""
    m = torch.cat([mask.flatten().float() for mask in masks])
    counts = torch.histc(m, bins=10, min=0, max=1) / m.numel()
    return {f"mask_{index / 10}": value for index, value in enumerate(counts.tolist())}
