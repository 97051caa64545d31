"""Losses by name: '1*L1+0.1*VGG54' -> a module."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import schema
from loss.adversarial import ADVERSARIAL_KINDS, Adversarial, AdversarialSettings
from loss.vgg import VGG, VGG_LAYERS
from program import InputError

LOSS_NAMES = ("L1", "MSE", *VGG_LAYERS, *ADVERSARIAL_KINDS)
MIN_HR_SIZE = {"VGG22": 2, "VGG54": 16, **dict.fromkeys(ADVERSARIAL_KINDS, 32)}  # height and width of HR patches


class Loss(nn.Module):
    """A weighted sum of losses between SR and HR, both (N, C, H, W) in 0...rgb_range.

    A call returns the sum (), to differentiate, and {name: weighted loss ()}, detached, to report.
    """

    def __init__(self, terms: Mapping[str, tuple[float, nn.Module]]):
        """terms: {name: (weight, module)}"""
        super().__init__()
        self.weights = {name: weight for name, (weight, _) in terms.items()}
        self.terms = nn.ModuleDict({name: module for name, (_, module) in terms.items()})

    def forward(self, sr: torch.Tensor, hr: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        parts = {name: self.weights[name] * term(sr, hr) for name, term in self.terms.items()}
        return sum(parts.values()), {name: part.detach() for name, part in parts.items()}

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of all discriminators, which follow the schedule of the network."""
        for term in self._trained_terms().values():
            term.set_learning_rate(lr)

    def learned_state(self) -> dict[str, dict]:
        """Everything that training changes: the discriminators and their optimizers, but not the weights of VGG."""
        return {name: term.state_dict() for name, term in self._trained_terms().items()}

    def load_learned_state(self, state: Mapping[str, dict]) -> None:
        """Load what `learned_state` returned."""
        for name, term in self._trained_terms().items():
            term.load_state_dict(state[name])

    def learned_schema(self) -> schema.Schema:
        """What `load_learned_state` accepts; other losses are ignored, and missing ones are a KeyError there."""
        terms = {name: term.state_schema() for name, term in self._trained_terms().items()}
        return schema.mapping(optional=terms, rest=schema.anything)

    def _trained_terms(self):
        return {name: term for name, term in self.terms.items() if isinstance(term, Adversarial)}


def build_loss(
    text: str,
    n_colors: int = 3,
    rgb_range: float = 255,
    vgg_weights: str | Path | None = None,
    hr_size: int | None = None,
    adversarial: AdversarialSettings | None = None,
) -> Loss:
    """Build a weighted sum of losses, e.g. '1*L1+0.1*VGG54'.

    Args:
        text: terms WEIGHT*NAME joined by +, each NAME from LOSS_NAMES; a NAME alone has weight 1
        n_colors: channels of the images
        rgb_range: largest value of the images
        vgg_weights: file of VGG19 weights, see vgg.VGG
        hr_size: height and width of the HR patches, to refuse losses that need larger ones; None: unknown
        adversarial: settings of the adversarial losses; None: the defaults

    Raises:
        InputError: an unknown or repeated name, an invalid weight, images that do not suit a loss, or VGG without
            torchvision or weights
    """
    terms = {}
    for name, weight in parse_terms(text).items():
        _check_images(name, n_colors, hr_size)
        if name in VGG_LAYERS:
            module = VGG(name, rgb_range, vgg_weights)
        elif name in ADVERSARIAL_KINDS:
            module = Adversarial(name, n_colors, adversarial)
        else:
            module = {"L1": nn.L1Loss, "MSE": nn.MSELoss}[name]()
        terms[name] = (weight, module)
    return Loss(terms)


def _check_images(name, n_colors, hr_size):
    """Raise InputError if a loss cannot compare HR patches of this size and number of colors."""
    if name in VGG_LAYERS and n_colors != 3:
        raise InputError(
            f"{name} needs RGB images, but these have n_colors {n_colors}; use another loss", argument="loss"
        )
    if hr_size is not None and hr_size < MIN_HR_SIZE.get(name, 1):
        raise InputError(
            f"{name} needs HR patches of at least {MIN_HR_SIZE[name]} pixels per side, but they have {hr_size}; "
            "use larger patches or another loss",
            argument="loss",
        )


def parse_terms(text: str) -> dict[str, float]:
    """'1*L1+0.1*VGG54' -> {'L1': 1.0, 'VGG54': 0.1}. Raises InputError."""
    weights = {}
    for term in text.split("+"):
        weight, star, name = term.strip().rpartition("*")
        if name not in LOSS_NAMES:
            raise InputError(f"no such loss {name!r} in {text!r}; there are {', '.join(LOSS_NAMES)}", argument="loss")
        if name in weights:
            raise InputError(f"{text!r} contains {name} twice; add up the weights", argument="loss")
        try:
            weights[name] = float(weight) if star else 1.0
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise InputError(
                f"{weight!r} in {text!r} is not a valid weight of {name}; write a number, e.g. 0.1*{name}",
                argument="loss",
            )
    return weights
