"""Losses by name: '1*L1+0.1*VGG54' -> a module."""

import math

from torch import nn

from loss import adversarial, vgg
from utility import InputError

NAMES = ("L1", "MSE", *vgg.CUTS, *adversarial.KINDS)
SMALLEST = {"VGG22": 2, "VGG54": 16, **dict.fromkeys(adversarial.KINDS, 32)}  # side of an HR patch


class Loss(nn.Module):
    """A weighted sum of losses of (SR, HR), both (N, C, H, W) in 0...rgb_range.

    A call returns the sum, to differentiate, and {name: the weighted part}, detached, to look at.
    """

    def __init__(self, terms):
        """terms: {name: (weight, module)}"""
        super().__init__()
        self.weights = {name: weight for name, (weight, _) in terms.items()}
        self.terms = nn.ModuleDict({name: module for name, (_, module) in terms.items()})

    def forward(self, sr, hr):
        parts = {name: self.weights[name] * term(sr, hr) for name, term in self.terms.items()}
        return sum(parts.values()), {name: part.detach() for name, part in parts.items()}

    def set_learning_rate(self, lr):
        """Of the discriminators, if there are any: they follow the schedule of the network."""
        for term in self._learning().values():
            term.set_learning_rate(lr)

    def learned_state(self):
        """What training changes, to save it: discriminators and their optimizers, not the weights of VGG."""
        return {name: term.state_dict() for name, term in self._learning().items()}

    def load_learned_state(self, state):
        for name, term in self._learning().items():
            term.load_state_dict(state[name])

    def _learning(self):
        return {name: term for name, term in self.terms.items() if isinstance(term, adversarial.Adversarial)}


def build_loss(text, n_colors=3, rgb_range=255, vgg_weights=None, hr_size=None, **adversarial_options):
    """'1*L1+0.1*VGG54' -> Loss. A name without a number weighs 1.

    Args:
        text: names of NAMES, weighted and added
        vgg_weights: see vgg.VGG
        hr_size: side of the HR patches, to refuse what is too small for a loss; None: not known
        adversarial_options: see adversarial.Adversarial

    Raises:
        InputError: an unknown or repeated name, a weight that is no number, patches that are too small, VGG without
            torchvision
    """
    terms = {}
    for term in text.split("+"):
        weight, star, name = term.strip().rpartition("*")
        if name not in NAMES:
            raise InputError(f"--loss {text}: no such loss {name!r}; there are {', '.join(NAMES)}")
        if name in terms:
            raise InputError(f"--loss {text}: {name} stands in it twice")
        try:
            weight = float(weight) if star else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise InputError(f"--loss {text}: the weight of {name} is no number")
        if name in vgg.CUTS and n_colors != 3:
            raise InputError(f"--loss {text}: {name} looks at RGB images; --n_colors {n_colors} has none")
        if hr_size is not None and hr_size < SMALLEST.get(name, 1):
            raise InputError(
                f"--loss {text}: {name} needs HR patches of {SMALLEST[name]} pixels, --patch_size gives {hr_size}"
            )
        if name == "L1":
            module = nn.L1Loss()
        elif name == "MSE":
            module = nn.MSELoss()
        elif name in vgg.CUTS:
            module = vgg.VGG(name, rgb_range, vgg_weights)
        else:
            module = adversarial.Adversarial(name, n_colors, **adversarial_options)
        terms[name] = (weight, module)
    return Loss(terms)
