"""One step of a training: forward, losses, backward, update."""

import contextlib
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_value_, get_total_norm
from torch.optim.swa_utils import AveragedModel

import distributed
import schema
from loss import Loss
from loss.sparsity import active_shares
from model.engines.graphs import StepGraph
from model.network import Network
from program import InputError
from utility import logger


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer, and its constants."""

    name: str = "ADAM"  # or SGD, RMSprop
    lr: float = 2e-4
    betas: Sequence[float] = (0.9, 0.999)  # of ADAM
    epsilon: float = 1e-8  # of ADAM and RMSprop
    momentum: float = 0.9  # of SGD
    weight_decay: float = 0.0


def build_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Build the optimizer of some parameters. Raises InputError if none has that name."""
    name, lr, weight_decay = settings.name, settings.lr, settings.weight_decay
    if name == "ADAM":
        betas = tuple(settings.betas)
        return torch.optim.Adam(parameters, lr, betas, settings.epsilon, weight_decay=weight_decay, fused=True)
    if name == "SGD":
        optimizer = torch.optim.SGD(parameters, lr, settings.momentum, weight_decay=weight_decay, fused=True)
        if settings.momentum:  # PyTorch would leave it uninitialized if the first step is skipped
            for parameter in optimizer.param_groups[0]["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    if name == "RMSprop":
        return torch.optim.RMSprop(parameters, lr, eps=settings.epsilon, weight_decay=weight_decay)
    raise InputError(f"no such optimizer {name!r}; there are ADAM, SGD, RMSprop", argument="optimizer")


@dataclass(frozen=True)
class StepSettings:
    """How a step runs."""

    gclip: float = 0.0  # clips each gradient value to +-gclip; 0: off
    split_batch: int = 1  # parts in which a batch runs, to save memory
    precision: torch.dtype = torch.float32  # of the convolutions; weights, losses and updates are float32
    compile: bool = False  # compile forward and backward, and on a GPU replay the step as one CUDA graph
    ema: float = 0.0  # decay of a moving average of the weights; 0: off


@dataclass(frozen=True)
class StepResult:
    """What a step reports, on the device. The next step may overwrite it.

    names    of the K values: "loss", "loss_<term>" ..., "active_<module>" ..., "density_<module>" ..., "grad_norm"
    values   (K,)
    is_good  bool (): the gradient was finite, so the step was not skipped
    masks    soft spatial masks m (N, 1, H, W) of the modules, from the last part of the batch
    """

    names: Sequence[str]
    values: torch.Tensor
    is_good: torch.Tensor
    masks: Sequence[torch.Tensor]


class TrainingForward(nn.Module):
    """A network in the form that DistributedDataParallel and torch.compile need: its call is the training forward."""

    def __init__(self, model: Network):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, tau: torch.Tensor | None) -> tuple[torch.Tensor, list]:
        return self.model.training_forward(x, tau)


class TrainingStep:
    """A call takes one step of a training.

    A step is skipped if its loss or gradient is not finite or its loss is too large. The device decides this, so a step
    does not wait for it, except with RMSprop.

    Args:
        model: on its device
        criterion: on the same device
        optimizer: of the model's parameters
    """

    def __init__(self, model: Network, criterion: Loss, optimizer: torch.optim.Optimizer, settings: StepSettings):
        self.model, self.criterion, self.optimizer, self.settings = model, criterion, optimizer, settings
        self.forward = _build_forward(model, settings.compile)
        # It also skips steps without asking the device, and scales only where float16 needs that.
        self.scaler = torch.amp.GradScaler(
            model.device.type,
            init_scale=2.0**16 if settings.precision == torch.float16 else 1.0,
            enabled=model.device.type != "mps",
        )
        self.ema = AveragedModel(model) if settings.ema else None
        self._written = [*model.parameters(), *(self.ema.module.parameters() if self.ema else ())]
        self._averages = False  # whether the moving average has begun; the first one is the weights
        self._names: Sequence[str] = ()  # of the values that a step reports
        self._is_graphed = settings.compile and model.device.type == "cuda" and self._fits_graph()
        if self._is_graphed:
            self._prepare_optimizer_for_graph()
        self._run, self._runs_masks = None, None  # the step as it runs; whether that is with masks

    def __call__(
        self,
        lr_images: torch.Tensor,
        hr_images: torch.Tensor,
        tau: torch.Tensor | None,
        lambda_: torch.Tensor,
        largest_loss: torch.Tensor,
        noise_seed: int,
    ) -> StepResult:
        """LR (N, C, P, P) and HR (N, C, sP, sP) in 0...rgb_range; tau, lambda_ and largest_loss are tensors ().

        Without a tau, the step runs without masks.
        noise_seed seeds the noise of the masks; a loss above largest_loss skips the step.
        """
        torch.manual_seed(noise_seed)
        has_masks = tau is not None
        if has_masks != self._runs_masks:  # a graph records one kind of step
            self._run = StepGraph(self._take, self.model.device) if self._is_graphed else self._take
            self._runs_masks = has_masks
        inputs = [lr_images, hr_images, lambda_, largest_loss, *([tau] if has_masks else [])]
        values, is_good, *masks = self._run(*inputs)
        if self.ema:
            self.ema.n_averaged += 1
            self._averages = True
        torch.autograd.graph.increment_version(self._written)  # fused optimizers and graphs do not tell that they write
        return StepResult(self._names, values, is_good, masks)

    def set_learning_rate(self, lr: float) -> None:
        self.criterion.set_learning_rate(lr)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):  # a graph reads it
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _fits_graph(self):
        """Whether a CUDA graph can hold the step; if not, logs the reason."""
        reason = None
        if distributed.world_size() > 1:
            reason = "several processes exchange gradients"
        elif isinstance(self.optimizer, torch.optim.RMSprop):
            reason = "RMSprop waits for the device"
        elif self.criterion.learned_state():
            reason = "the loss trains a discriminator"
        if reason:
            logger.info(f"the training step runs without a CUDA graph: {reason}")
        return not reason

    def _prepare_optimizer_for_graph(self):
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        # A graph reads the learning rate from the device, where it can change.
        for group in self.optimizer.param_groups:
            group["lr"] = torch.full((), group["lr"], device=self.model.device)
            if "capturable" in group:
                group["capturable"] = True

    def _take(self, lr_images, hr_images, lambda_, largest_loss, tau=None):
        """The part of a step that a graph can hold: only tensors go in and out."""
        self.optimizer.zero_grad()
        with _fastest_convolutions():
            names, values, masks = self._backward((lr_images, hr_images), tau, lambda_, largest_loss)
        if tau is None:
            for parameter in self.model.mask_parameters():  # with a gradient of 0 an optimizer would move them, too
                parameter.grad = None
        norm = self._update()
        self._names = [*names, "grad_norm"]
        return torch.cat([values, norm[None]]), norm.isfinite(), *masks

    def _backward(self, images, tau, lambda_, largest_loss):
        """Compute the gradients of a batch, part by part."""
        parts = list(zip(*(batch.chunk(self.settings.split_batch) for batch in images), strict=True))
        precision, values = self.settings.precision, 0
        for index, (lr, hr) in enumerate(parts):
            is_last, share = index == len(parts) - 1, len(lr) / len(images[0])
            with contextlib.nullcontext() if is_last else self._without_gradient_exchange():
                with torch.autocast(self.model.device.type, precision, enabled=precision != torch.float32):
                    sr, masks = self.forward(lr, tau)
                loss, losses = self.criterion(sr.float(), hr)
                densities = [m.float().mean() for m, _ in masks]
                active = active_shares(densities, [c for _, c in masks]) if masks else loss.new_ones(1)
                if masks:
                    loss = loss + lambda_ * active.mean()
                values = values + torch.stack([loss, *losses.values(), *active, *densities]).detach() * share
                loss = loss * share
                if is_last:  # a gradient of NaN makes the optimizer skip the step; a loss of NaN is not accepted
                    is_accepted = values[0].isfinite() & (values[0] <= largest_loss)
                    loss = loss * torch.where(is_accepted, 1.0, math.nan)
                self.scaler.scale(loss).backward()
        names = ["loss", *(f"loss_{name}" for name in losses), *(f"active_{k + 1}" for k in range(len(active)))]
        names += [f"density_{k + 1}" for k in range(len(masks))]
        return names, values, [m.detach() for m, _ in masks]

    def _without_gradient_exchange(self):
        return self.forward.no_sync() if distributed.world_size() > 1 else contextlib.nullcontext()

    def _update(self):
        """Let the optimizer take the step unless a gradient is not finite; returns the norm of the gradient, ()."""
        self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if self.settings.gclip:
            clip_grad_value_(self.model.parameters(), self.settings.gclip)
        if self.scaler.is_enabled() or norm.isfinite():
            self.scaler.step(self.optimizer)
        self.scaler.update(None if self.settings.precision == torch.float16 else 1.0)
        if self.ema:
            averages, weights = list(self.ema.module.parameters()), list(self.model.parameters())
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - self.settings.ema if self._averages else 1.0)
        return norm

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint that steps change."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self._optimizer_state(),
            "optimizer_name": type(self.optimizer).__name__,
            "scaler": self.scaler.state_dict() if self.settings.precision == torch.float16 else None,
            "criterion": self.criterion.learned_state(),
        }

    def _optimizer_state(self):
        """The state of the optimizer, with or without a graph in the same form."""
        state = self.optimizer.state_dict()
        for group in state["param_groups"]:
            group["lr"] = float(group["lr"])
            if "capturable" in group:
                group["capturable"] = False
        return state

    def load_state(self, state: dict[str, Any], origin: str | Path = "the checkpoint") -> None:
        """Restore everything but the weights, which the model has already, and the settings of the optimizer.

        Raises InputError if the state, from the file `origin`, has another optimizer, lacks a discriminator of the loss
        or is broken.
        """
        name = type(self.optimizer).__name__
        if state["optimizer_name"] != name:
            raise InputError(
                f"the run uses {state['optimizer_name']} and cannot resume with {name}; leave it out",
                argument="optimizer",
            )
        advice = "start another run from the weights of this one"
        schema.check(state, self._state_schema(), origin, advice, argument="load")
        given = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, options in zip(self.optimizer.param_groups, given, strict=True):
            group.update(options)  # the settings of this call override those in the checkpoint
        try:
            self.criterion.load_learned_state(state["criterion"])
        except KeyError as error:
            raise InputError(f"the run has no discriminator for {error}; keep its own loss", argument="loss") from None
        if self.ema and state["ema"]:
            self.ema.load_state_dict(state["ema"])
            self._averages = bool(self.ema.n_averaged)
        if state["scaler"] and self.settings.precision == torch.float16:
            self.scaler.load_state_dict(state["scaler"])

    def _state_schema(self):
        wanted = {"optimizer": schema.optimizer_like(self.optimizer), "criterion": self.criterion.learned_schema()}
        if self.ema:
            settings = [f"module.{name}" for name in self.model.settings]  # version 0.1.0 did not write them
            averaged = schema.tensors_like(self.ema.state_dict(), may_lack=settings, finite=True)
            wanted["ema"] = schema.optional(averaged)
        return schema.mapping(wanted, rest=schema.anything)


@contextlib.contextmanager
def _fastest_convolutions():
    """Let cuDNN measure which algorithm is fastest, which pays if all images have one size; not if bits must repeat."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _build_forward(model, is_compiled):
    """The training forward, compiled and distributed as asked for."""
    forward = TrainingForward(model)
    if is_compiled:
        forward.compile(dynamic=False)
    if distributed.world_size() > 1:
        with warnings.catch_warnings():  # PyTorch 2.13 renamed this option, and warns
            warnings.simplefilter("ignore", FutureWarning)
            forward = DistributedDataParallel(forward, broadcast_buffers=False, gradient_as_bucket_view=True)
    return forward
