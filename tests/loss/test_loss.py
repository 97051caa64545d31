import pytest
import torch

from loss import build_loss
from utility import InputError


def test_terms_are_weighted_and_added():
    sr, hr = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    total, parts = build_loss("2*L1+0.5*MSE")(sr, hr)
    torch.testing.assert_close(parts["L1"], 2 * (sr - hr).abs().mean())
    torch.testing.assert_close(parts["MSE"], 0.5 * ((sr - hr) ** 2).mean())
    torch.testing.assert_close(total, parts["L1"] + parts["MSE"])


def test_a_name_alone_weighs_one():
    assert build_loss("L1").weights == {"L1": 1.0}
    assert build_loss(" 1e-2*L1 + MSE").weights == {"L1": 0.01, "MSE": 1.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("L2", "no such loss 'L2'; there are L1, MSE, VGG22"),
        ("1*L1+", "no such loss ''"),
        ("x*L1", "weight of L1 is no number"),
        ("nan*L1", "weight of L1 is no number"),
        ("1*L1+2*L1", "twice"),
        ("", "no such loss"),
    ],
)
def test_mistakes_are_named(text, said):
    with pytest.raises(InputError, match=said.replace("*", r"\*")):
        build_loss(text)


@pytest.mark.parametrize("name", ["VGG54", "GAN"])
def test_patches_must_not_be_too_small(name):
    with pytest.raises(InputError, match=f"{name} needs HR patches"):
        build_loss(name, hr_size=8)


def test_vgg_is_for_rgb():
    with pytest.raises(InputError, match="n_colors 1"):
        build_loss("VGG54", n_colors=1)
