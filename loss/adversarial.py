"""Adversarial losses of EDSR: a discriminator is trained beside the network."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import get_total_norm

import distributed

KINDS = ("GAN", "WGAN", "WGAN_GP", "LSGAN", "RGAN")
CLIP = 1.0  # bound of WGAN's critic weights
PENALTY = 10.0  # weight of WGAN_GP's gradient penalty


class Discriminator(nn.Sequential):
    """Images (N, n_colors, H, W) in 0...rgb_range, H and W >= 32 -> one score each (N, 1) (SRGAN fig. 4).

    Without batch normalisation where the loss looks at each sample's own gradient (WGAN_GP).
    """

    def __init__(self, n_colors=3, n_feats=64, normalize=True):
        layers, channels = [], n_colors
        for depth in range(8):  # every other convolution halves the resolution, the one before widens
            width = n_feats * 2 ** (depth // 2)
            layers.append(nn.Conv2d(channels, width, 3, stride=1 + depth % 2, padding=1, bias=not normalize))
            if normalize:
                layers.append(nn.BatchNorm2d(width, track_running_stats=False))
            layers.append(nn.LeakyReLU(0.2))
            channels = width
        super().__init__(
            *layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(channels * 16, 1024), nn.LeakyReLU(0.2),
            nn.Linear(1024, 1),
        )  # fmt: skip


class Adversarial(nn.Module):
    """A call trains the discriminator for `k` steps on (sr, hr) and returns the loss of the generator.

    A step whose gradient is not finite is not taken.

    GAN      Goodfellow et al. 2014, the non-saturating form
    WGAN     Arjovsky et al. 2017
    WGAN_GP  Gulrajani et al. 2017
    LSGAN    Mao et al. 2017
    RGAN     Jolicoeur-Martineau 2018, the relativistic average form

    Args:
        kind: one of KINDS
        k: steps of the discriminator a call
        lr, betas, eps, weight_decay: of its Adam; WGAN_GP takes the betas of its paper, 0 and 0.9
    """

    def __init__(self, kind, n_colors=3, k=1, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__()
        self.kind, self.k = kind, k
        self.discriminator = Discriminator(n_colors, normalize=kind != "WGAN_GP")
        betas = (0.0, 0.9) if kind == "WGAN_GP" else betas
        self.optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )

    def forward(self, sr, hr):
        """sr and hr (N, n_colors, H, W), gradients in sr alone -> the loss of the generator ()."""
        self.discriminator.requires_grad_(True)
        for _ in range(self.k):
            self.optimizer.zero_grad()
            self._discriminator_loss(sr.detach(), hr).backward()
            gradients = [parameter.grad for parameter in self.discriminator.parameters()]
            distributed.average(gradients)
            # As a GradScaler does it: where this is 1 the fused step changes nothing, and no one waits for the device.
            self.optimizer.found_inf = (~get_total_norm(gradients).isfinite()).float()
            self.optimizer.step()
            if self.kind == "WGAN":
                with torch.no_grad():
                    for parameter in self.discriminator.parameters():
                        parameter.clamp_(-CLIP, CLIP)
        self.discriminator.requires_grad_(False)  # the generator's gradient passes through it and leaves none in it
        real = self.discriminator(hr) if self.kind == "RGAN" else None
        return generator_loss(self.kind, self.discriminator(sr), real)

    def _discriminator_loss(self, sr, hr):
        loss = discriminator_loss(self.kind, self.discriminator(sr), self.discriminator(hr))
        if self.kind == "WGAN_GP":
            loss = loss + PENALTY * gradient_penalty(self.discriminator, sr, hr)
        return loss

    def set_learning_rate(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def get_extra_state(self):
        return self.optimizer.state_dict()

    def set_extra_state(self, state):
        self.optimizer.load_state_dict(state)


def discriminator_loss(kind, fake, real):
    """The loss of the discriminator given its scores (N, 1) of SR and HR images; without the penalty of WGAN_GP."""
    if kind == "GAN":
        return _bce(real, 1) + _bce(fake, 0)
    if kind == "LSGAN":
        return ((real - 1) ** 2).mean() + (fake**2).mean()
    if kind == "RGAN":
        return (_bce(real - fake.mean(), 1) + _bce(fake - real.mean(), 0)) / 2
    return fake.mean() - real.mean()


def generator_loss(kind, fake, real):
    """The loss of the generator given the discriminator's scores (N, 1) of SR images, and of HR images for RGAN."""
    if kind == "GAN":
        return _bce(fake, 1)
    if kind == "LSGAN":
        return ((fake - 1) ** 2).mean()
    if kind == "RGAN":
        return (_bce(fake - real.mean(), 1) + _bce(real - fake.mean(), 0)) / 2
    return -fake.mean()


def gradient_penalty(discriminator, fake, real):
    """Mean of (|gradient| - 1)^2 at a random point between each fake and its real image."""
    between = torch.rand(len(real), 1, 1, 1, device=real.device)
    mixed = (between * fake + (1 - between) * real).requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(mixed).sum(), mixed, create_graph=True)
    return ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()


def _bce(scores, target):
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, target))
