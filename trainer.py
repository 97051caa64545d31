"""Train a network and measure it: the schedules, one epoch, fit, evaluate."""

import contextlib
import math
import os
import signal
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from loss.sparsity import active_share
from utility import (
    InputError,
    is_out_of_memory,
    logger,
    luma,
    psnr,
    quantize,
    random_state,
    set_random_state,
    shave,
    ssim,
    synchronize,
)

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
        return torch.optim.Adam(parameters, lr, betas, epsilon, weight_decay)
    if name == "SGD":
        return torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay)
    if name == "RMSprop":
        return torch.optim.RMSprop(parameters, lr, eps=epsilon, weight_decay=weight_decay)
    raise InputError(f"--optimizer {name}: no such optimizer; there are ADAM, SGD, RMSprop")


class Trainer:
    """Trains a model and keeps what it takes to go on from any epoch, or from the middle of one.

    Args:
        model: of the package `model`, on its device
        criterion: a loss.Loss, on the same device
        optimizer: of the model's parameters
        loader: of data.build_train_loader
        test_sets: WholeImages, measured after each epoch; the first one tells which epoch is best
        experiment: a utility.Experiment, started
        schedules: Schedules
        rgb_range: of the model's input
        gclip: bound of each gradient value; 0: none
        split_batch: parts in which a batch is run, to need less memory
        skip_threshold: a batch whose loss is more than so many times that of the epoch before is skipped
        print_every: batches between two updates of the progress bar
        keep_all: keep the weights of every epoch
    """

    def __init__(
        self, model, criterion, optimizer, loader, test_sets, experiment, schedules, rgb_range=255, gclip=0.0,
        split_batch=1, skip_threshold=1e8, print_every=10, keep_all=False,
    ):  # fmt: skip
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        self.loader, self.test_sets, self.experiment, self.schedules = loader, test_sets, experiment, schedules
        self.rgb_range, self.gclip, self.split_batch = rgb_range, gclip, split_batch
        self.skip_threshold, self.print_every, self.keep_all = skip_threshold, print_every, keep_all
        self.device = next(model.parameters()).device
        self.steps_per_epoch = loader.sampler.draws // loader.batch_size
        self.history = []  # one dict of numbers for each finished epoch
        self.epoch, self.step = 1, 0  # the epoch in progress and how many of its steps are done
        self.totals = {}  # sums over those steps
        self._stop = False

    def fit(self, epochs):
        """Train up to and including the epoch `epochs`. Returns False if it was interrupted before that."""
        with self._stop_on_interrupt():
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

    def _train_epoch(self):
        lr, tau, lambda_ = self.schedules.at(self.epoch)
        self.criterion.set_learning_rate(lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sampler, batch_size = self.loader.sampler, self.loader.batch_size
        sampler.epoch, sampler.first_draw = self.epoch, self.step * batch_size
        self.model.train()
        first_step, started, before = self.step, time.perf_counter(), self.totals.get("seconds", 0.0)
        with tqdm(total=self.steps_per_epoch, initial=self.step, desc=f"epoch {self.epoch}", leave=False) as bar:
            for lr_images, hr_images in self.loader:
                self._train_step(self._to_input(lr_images), self._to_input(hr_images), tau, lambda_)
                self.step += 1
                self.totals["seconds"] = before + time.perf_counter() - started
                bar.update()
                if self.step % self.print_every == 0:
                    means = self._means()
                    speed = (self.step - first_step) * batch_size / (self.totals["seconds"] - before)
                    bar.set_postfix_str(
                        f"loss {means['loss']:.3f}, active {means['active']:.2f}, "
                        f"tau {tau:.2f}, lambda {lambda_:.3f}, {speed:.1f} images/s"
                    )
                if self._stop:
                    break

    def _train_step(self, lr_images, hr_images, tau, lambda_):
        self.optimizer.zero_grad()
        parts = []
        for lr, hr in zip(lr_images.chunk(self.split_batch), hr_images.chunk(self.split_batch), strict=True):
            sr, masks = self.model.training_forward(lr, tau)
            loss, losses = self.criterion(sr, hr)
            active = active_share(masks)
            share = len(lr) / len(lr_images)
            loss = (loss + lambda_ * active) * share
            loss.backward()
            losses = {f"loss_{name}": value * share for name, value in losses.items()}
            parts.append({"loss": loss.detach(), "active": active.detach() * share} | losses)
        means = {name: sum(float(part[name]) for part in parts) for name in parts[0]}
        last = self.history[-1]["loss"] if self.history else math.inf
        if not math.isfinite(means["loss"]) or means["loss"] > self.skip_threshold * abs(last):
            logger.warning(f"epoch {self.epoch}, step {self.step + 1}: loss {means['loss']:.3g}, batch skipped")
            return
        if self.gclip:
            torch.nn.utils.clip_grad_value_(self.model.parameters(), self.gclip)
        self.optimizer.step()
        for name, value in {**means, "batches": 1}.items():
            self.totals[name] = self.totals.get(name, 0.0) + value

    def _finish_epoch(self):
        lr, tau, lambda_ = self.schedules.at(self.epoch)
        row = {"epoch": self.epoch, "lr": lr, "tau": tau, "lambda": lambda_, **self._means()}
        row["seconds"] = self.totals["seconds"]
        logger.info(
            f"epoch {self.epoch}: loss {row['loss']:.4f}, active {row['active']:.3f}, lr {lr:.2e}, tau {tau:.3f}, "
            f"lambda {lambda_:.4f}, {self.steps_per_epoch * self.loader.batch_size / row['seconds']:.1f} images/s"
        )
        for images in self.test_sets:
            metrics = evaluate(self.model, images, rgb_range=self.rgb_range, warm_up=False)
            psnr_name, psnr_mean = headline(metrics)
            row[f"{psnr_name}_{images.name}"] = psnr_mean
            row[f"ssim_y_{images.name}"] = metrics["ssim_y"]
            row[f"active_share_{images.name}"] = metrics["active_share"]
            logger.info(
                f"  {images.name} x{images.scale}: {psnr_name} {psnr_mean:.3f} dB, ssim_y {metrics['ssim_y']:.4f}, "
                f"active share {metrics['active_share']:.3f}"
            )
        self.history.append(row)
        weights = self.model.state_dict()
        if self._is_best():
            self.experiment.save_weights("best", weights)
        if self.keep_all:
            self.experiment.save_weights(self.epoch, weights)
        self.experiment.save_weights("latest", weights)
        self.experiment.write_history(self.history)
        self.epoch, self.step, self.totals = self.epoch + 1, 0, {}
        self._save_checkpoint()  # last: killed before this line, the epoch is measured and kept again

    def _is_best(self):
        column = next(key for key in self.history[-1] if key.startswith("psnr"))
        return all(self.history[-1][column] > row.get(column, -math.inf) for row in self.history[:-1])

    def _means(self):
        count = self.totals.get("batches", 0)
        names = [name for name in self.totals if name not in ("batches", "seconds")]
        return {name: self.totals[name] / count for name in names} if count else {"loss": math.nan, "active": math.nan}

    def _to_input(self, images):
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return images.float() * (self.rgb_range / 255)

    # ---- going on later --------------------------------------------------------------------------------------------

    def _save_checkpoint(self):
        self.experiment.save_checkpoint(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "optimizer_name": type(self.optimizer).__name__,
                "criterion": self.criterion.learned_state(),
                "epoch": self.epoch,
                "step": self.step,
                "totals": self.totals,
                "history": self.history,
                "random": random_state(),
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
        self.epoch, self.step = state["epoch"], state["step"]
        self.totals, self.history = state["totals"], state["history"]
        set_random_state(state["random"])

    @contextlib.contextmanager
    def _stop_on_interrupt(self):
        """Within, the first Ctrl-C or SIGTERM lets the step in progress end; a second one acts at once."""
        signals = (signal.SIGINT, signal.SIGTERM)
        former = {number: signal.getsignal(number) for number in signals}

        def restore():
            for number, handler in former.items():
                signal.signal(number, handler)

        def stop(*_):
            self._stop = True
            restore()
            os.write(2, b"\nstopping after this step or evaluation; once more stops at once\n")  # a logger may be busy

        for number in signals:
            signal.signal(number, stop)
        try:
            yield
        finally:
            restore()


# ---- measuring -------------------------------------------------------------------------------------------------------


def evaluate(model, images, run=None, rgb_range=255, save=None, warm_up=True):
    """Run a model over a WholeImages set.

    Benchmark sets are measured on Y, `scale` border pixels shaved; other sets on RGB too, `scale + 6` shaved.

    Args:
        run: LR (1, C, H, W) -> SR and Work, see model/inference.py; None: model.inference
        save: called with (name, SR uint8 (H, W, C)) for each image
        warm_up: run the first image once before the clock starts

    Returns:
        the dict of metrics.json; without HR images its PSNR and SSIM are nan
    """
    model.eval()
    run = run or model.inference
    parameter = next(model.parameters())
    rows, works = [], []
    with tqdm(range(len(images)), desc=images.name, unit="image", leave=False) as progress:
        for index in progress:
            name, lr, hr = images[index]
            x = lr[None].to(parameter.device, parameter.dtype) * (rgb_range / 255)
            try:
                if warm_up and index == 0:
                    run(x)
                synchronize(parameter.device)
                started = time.perf_counter()
                sr, work = run(x)
                synchronize(parameter.device)
                seconds = time.perf_counter() - started
                sr = quantize(sr[0], rgb_range)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                height, width = x.shape[2:]
                raise InputError(
                    f"{name}: not enough memory for an image of {height}x{width} pixels; "
                    "add --chop, or with it a smaller --chop_size"
                ) from None
            if save:
                save(name, sr)
            works.append(work)
            rows.append(
                {"name": name, "lr_shape": list(lr.shape[1:])}
                | compare(sr, hr, images.scale, rgb=not images.benchmark)
                | {"seconds": seconds, "mask_density": work.mask_density, "active_share": work.active_share}
            )

    def mean(values):
        return sum(values) / len(rows)

    measured = [key for key in rows[0] if key.startswith(("psnr", "ssim"))]
    return (
        {"dataset": images.name, "scale": images.scale, "model": type(model).__name__}
        | {key: mean(row[key] for row in rows) for key in measured}
        | {
            "n_images": len(rows),
            "seconds_per_image": mean(row["seconds"] for row in rows),
            "gmacs": mean(work.macs for work in works) / 1e9,
            "gmacs_dense": mean(work.macs_dense for work in works) / 1e9,
            "gmacs_run": mean(work.macs_run for work in works) / 1e9,
            "gmacs_at_1280x720": at_1280x720(works, "macs", images.scale),
            "gmacs_dense_at_1280x720": at_1280x720(works, "macs_dense", images.scale),
            "active_share": mean(work.active_share for work in works),
            "images": rows,
        }
    )


def at_1280x720(works, count, scale):
    """The named count of `Work`, in 1e9, of an output of 1280 x 720 pixels, on which the paper counts them."""
    pixels = sum(work.pixels for work in works)
    return sum(getattr(work, count) for work in works) / pixels * (1280 * 720 / scale**2) / 1e9


def compare(sr, hr, scale, rgb=False):
    """PSNR and SSIM of uint8 images (H, W, C), by the protocol of benchmark sets and, if `rgb`, that of DIV2K."""
    if hr is None:
        return {"psnr_y": math.nan, "ssim_y": math.nan}
    sr_y, hr_y = shave(luma(sr), scale), shave(luma(hr), scale)
    measured = {"psnr_y": psnr(sr_y, hr_y), "ssim_y": ssim(sr_y, hr_y)}
    if rgb:
        measured["psnr_rgb"] = psnr(shave(sr, scale + 6), shave(hr, scale + 6))
    return measured


def headline(metrics):
    """(name, value) of the PSNR that a set is known by: on RGB where the protocol says so, else on Y."""
    name = "psnr_rgb" if "psnr_rgb" in metrics else "psnr_y"
    return name, metrics[name]


def table(metrics):
    """The lines of `evaluate`'s result, image by image and mean; PSNR and SSIM where there were HR images."""
    columns = {"active_share": ("active", ".3f"), "seconds": ("seconds", ".3f")}
    psnr_name, psnr_mean = headline(metrics)
    if not math.isnan(psnr_mean):
        columns = {psnr_name: (psnr_name, ".2f"), "ssim_y": ("ssim_y", ".4f")} | columns
    rows = [*metrics["images"], metrics | {"name": "mean", "seconds": metrics["seconds_per_image"]}]
    width = max(len(metrics["dataset"]), *(len(row["name"]) for row in rows))
    lines = [f"{metrics['dataset']:{width}}" + "".join(f"  {title:>8}" for title, _ in columns.values())]
    for row in rows:
        numbers = "".join(f"  {format(row[key], form):>8}" for key, (_, form) in columns.items())
        lines.append(f"{row['name']:{width}}{numbers}")
    return lines
