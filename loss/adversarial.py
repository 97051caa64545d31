"""The adversarial losses of EDSR: a discriminator is trained together with the network."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import get_total_norm

import distributed
import schema

ADVERSARIAL_KINDS = ("GAN", "WGAN", "WGAN_GP", "LSGAN", "RGAN")
CLIP = 1.0  # WGAN clips the weights of its critic to -CLIP...CLIP
PENALTY = 10.0  # weight of the gradient penalty of WGAN_GP


@dataclass(frozen=True)
class AdversarialSettings:
    """How a discriminator is trained: its steps per call, and its Adam optimizer."""

    k: int = 1  # steps of the discriminator per call
    lr: float = 1e-4  # learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # WGAN_GP uses those of its paper instead, 0 and 0.9
    eps: float = 1e-8
    weight_decay: float = 0.0


class Discriminator(nn.Sequential):
    """Images (N, n_colors, H, W) in 0...rgb_range, H and W at least 32 -> one score per image (N, 1).

    The architecture is that of SRGAN (fig. 4). Set `normalize` to False for losses that use the gradient of each
    sample (WGAN_GP): batch normalization mixes the samples of a batch.
    """

    def __init__(self, n_colors: int = 3, n_feats: int = 64, normalize: bool = True):
        layers, channels = [], n_colors
        for depth in range(8):  # every second convolution halves the resolution, and the one after it doubles the width
            width = n_feats * 2 ** (depth // 2)
            layers.append(nn.Conv2d(channels, width, 3, stride=1 + depth % 2, padding=1, bias=not normalize))
            if normalize:
                layers.append(nn.BatchNorm2d(width, track_running_stats=False))
            layers.append(nn.LeakyReLU(0.2))
            channels = width
        layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten()]
        layers += [nn.Linear(channels * 16, 1024), nn.LeakyReLU(0.2), nn.Linear(1024, 1)]
        super().__init__(*layers)


class Adversarial(nn.Module):
    """A call trains the discriminator for k steps on (sr, hr) and returns the loss of the generator.

    Steps with a gradient that is not finite are skipped.

    GAN      Goodfellow et al. 2014, the non-saturating form
    WGAN     Arjovsky et al. 2017
    WGAN_GP  Gulrajani et al. 2017
    LSGAN    Mao et al. 2017
    RGAN     Jolicoeur-Martineau 2018, the relativistic average form

    Args:
        kind: one of ADVERSARIAL_KINDS
        n_colors: channels of the images
        settings: None: the defaults
    """

    def __init__(self, kind: str, n_colors: int = 3, settings: AdversarialSettings | None = None):
        super().__init__()
        settings = settings or AdversarialSettings()
        self.kind, self.k = kind, settings.k
        self.discriminator = Discriminator(n_colors, normalize=kind != "WGAN_GP")
        self.optimizer = torch.optim.Adam(
            self.discriminator.parameters(),
            lr=settings.lr,
            betas=(0.0, 0.9) if kind == "WGAN_GP" else settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def forward(self, sr: torch.Tensor, hr: torch.Tensor) -> torch.Tensor:
        """sr, hr (N, n_colors, H, W) in 0...rgb_range -> the loss of the generator (). Only sr gets a gradient."""
        self.discriminator.requires_grad_(True)
        for _ in range(self.k):
            self._train_step(sr.detach(), hr)
        self.discriminator.requires_grad_(False)  # the generator's gradient passes through but is not accumulated here
        real = self.discriminator(hr) if self.kind == "RGAN" else None
        return generator_loss(self.kind, self.discriminator(sr), real)

    def set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def get_extra_state(self) -> dict:
        """The state of the optimizer; PyTorch adds it to the state dict of this module."""
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict) -> None:
        self.optimizer.load_state_dict(state)

    def state_schema(self) -> schema.Schema:
        """What `load_state_dict` accepts."""
        weights = {key: value for key, value in self.state_dict().items() if isinstance(value, torch.Tensor)}
        return schema.tensors_like(weights, finite=True, _extra_state=schema.optimizer_like(self.optimizer))

    def _train_step(self, sr, hr):
        """One step of the discriminator."""
        self.optimizer.zero_grad()
        self._discriminator_loss(sr, hr).backward()
        gradients = [parameter.grad for parameter in self.discriminator.parameters()]
        distributed.average(gradients)
        # GradScaler uses found_inf as well: if it is 1, the fused step does nothing. No synchronization is needed.
        self.optimizer.found_inf = (~get_total_norm(gradients).isfinite()).float()
        self.optimizer.step()
        if self.kind == "WGAN":
            with torch.no_grad():
                for parameter in self.discriminator.parameters():
                    parameter.clamp_(-CLIP, CLIP)

    def _discriminator_loss(self, sr, hr):
        loss = discriminator_loss(self.kind, self.discriminator(sr), self.discriminator(hr))
        if self.kind == "WGAN_GP":
            loss = loss + PENALTY * gradient_penalty(self.discriminator, sr, hr)
        return loss


def discriminator_loss(kind: str, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Scores of SR and HR images, both (N, 1) -> the loss of the discriminator (), without the penalty of WGAN_GP."""
    if kind == "GAN":
        return _bce(real, 1) + _bce(fake, 0)
    if kind == "LSGAN":
        return ((real - 1) ** 2).mean() + (fake**2).mean()
    if kind == "RGAN":
        return (_bce(real - fake.mean(), 1) + _bce(fake - real.mean(), 0)) / 2
    return fake.mean() - real.mean()


def generator_loss(kind: str, fake: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Scores of SR and HR images, both (N, 1) -> the loss of the generator (). Only RGAN needs the HR scores."""
    if kind == "GAN":
        return _bce(fake, 1)
    if kind == "LSGAN":
        return ((fake - 1) ** 2).mean()
    if kind == "RGAN":
        return (_bce(fake - real.mean(), 1) + _bce(real - fake.mean(), 0)) / 2
    return -fake.mean()


def gradient_penalty(
    discriminator: Callable[[torch.Tensor], torch.Tensor], fake: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """Mean of (|gradient| - 1)^2 at a random point between each fake and its real image, both (N, C, H, W)."""
    between = torch.rand(len(real), 1, 1, 1, device=real.device)
    mixed = (between * fake + (1 - between) * real).requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(mixed).sum(), mixed, create_graph=True)
    return ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()


def _bce(scores, target):
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, target))
