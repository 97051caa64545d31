import re

import pytest
import torch

from loss import build_loss
from program import InputError


def test_terms_are_weighted_and_added():
    sr, hr = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    total, parts = build_loss("2*L1+0.5*MSE")(sr, hr)
    torch.testing.assert_close(parts["L1"], 2 * (sr - hr).abs().mean())
    torch.testing.assert_close(parts["MSE"], 0.5 * ((sr - hr) ** 2).mean())
    torch.testing.assert_close(total, parts["L1"] + parts["MSE"])


def test_the_default_weight_is_1():
    assert build_loss("L1").weights == {"L1": 1.0}
    assert build_loss(" 1e-2*L1 + MSE").weights == {"L1": 0.01, "MSE": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("L2", "no such loss 'L2' in 'L2'; there are L1, MSE, VGG22"),
        ("1*L1+", "no such loss ''"),
        ("x*L1", "'x' in 'x*L1' is not a valid weight of L1; write a number, e.g. 0.1*L1"),
        ("nan*L1", "'nan' in 'nan*L1' is not a valid weight of L1"),
        ("*L1", "'' in '*L1' is not a valid weight of L1"),
        ("1*L1+2*L1", "'1*L1+2*L1' contains L1 twice; add up the weights"),
        ("", "no such loss"),
    ],
)
def test_mistakes_are_reported(text, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        build_loss(text)
    assert error.value.argument == "loss"


@pytest.mark.parametrize(("name", "least"), [("VGG22", 2), ("VGG54", 16), ("GAN", 32)])
def test_patches_must_be_large_enough(name, least):
    with pytest.raises(
        InputError, match=f"{name} needs HR patches of at least {least} pixels per side, .* {least - 1};"
    ) as error:
        build_loss(name, hr_size=least - 1)
    assert error.value.argument == "loss"


def test_patches_of_the_smallest_size_are_accepted():
    assert build_loss("L1", hr_size=1).weights == {"L1": 1.0}
    loss = build_loss("GAN", n_colors=1, hr_size=32)
    assert loss(torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32))[0].isfinite()


def test_vgg_needs_rgb_images():
    with pytest.raises(InputError, match="VGG54 needs RGB images, but these have n_colors 1;"):
        build_loss("VGG54", n_colors=1)
