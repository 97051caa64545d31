import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from loss import build_loss
from loss.adversarial import (
    ADVERSARIAL_KINDS,
    CLIP,
    Adversarial,
    AdversarialSettings,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)

FAKE, REAL = torch.tensor([[0.3], [-1.2]]), torch.tensor([[0.8], [2.0]])


def softplus_bce(scores, target):
    return F.softplus(-scores if target else scores).mean()  # -log sigmoid(s), -log(1 - sigmoid(s))


def test_losses_equal_the_formulas():
    assert_close = torch.testing.assert_close
    assert_close(discriminator_loss("GAN", FAKE, REAL), softplus_bce(REAL, 1) + softplus_bce(FAKE, 0))
    assert_close(generator_loss("GAN", FAKE, None), softplus_bce(FAKE, 1))
    assert_close(discriminator_loss("LSGAN", FAKE, REAL), ((REAL - 1) ** 2).mean() + (FAKE**2).mean())
    assert_close(generator_loss("LSGAN", FAKE, None), ((FAKE - 1) ** 2).mean())
    for kind in ("WGAN", "WGAN_GP"):
        assert_close(discriminator_loss(kind, FAKE, REAL), FAKE.mean() - REAL.mean())
        assert_close(generator_loss(kind, FAKE, None), -FAKE.mean())
    relative_real, relative_fake = REAL - FAKE.mean(), FAKE - REAL.mean()
    assert_close(
        discriminator_loss("RGAN", FAKE, REAL), (softplus_bce(relative_real, 1) + softplus_bce(relative_fake, 0)) / 2
    )
    assert_close(
        generator_loss("RGAN", FAKE, REAL), (softplus_bce(relative_fake, 1) + softplus_bce(relative_real, 0)) / 2
    )


def test_gradient_penalty_of_a_linear_critic():
    slope = torch.full((3,), 2.0)
    fake, real = torch.rand(2, 3), torch.rand(2, 3)

    def critic(x):
        return (x.flatten(1) * slope).sum(1)

    penalty = gradient_penalty(critic, fake.view(2, 3, 1, 1), real.view(2, 3, 1, 1))
    torch.testing.assert_close(penalty, (slope.norm() - 1) ** 2)


@pytest.mark.parametrize("kind", ADVERSARIAL_KINDS)
def test_a_call_trains_the_discriminator_and_only_images_receive_gradients(kind):
    loss = Adversarial(kind, settings=AdversarialSettings(k=2, lr=1e-3))
    before = copy.deepcopy(loss.discriminator.state_dict())
    sr, hr = (torch.rand(1, 3, 32, 32) * 255).requires_grad_(), torch.rand(1, 3, 32, 32) * 255
    value = loss(sr, hr)
    loss.optimizer.zero_grad()
    value.backward()
    assert value.isfinite()
    assert sr.grad.abs().sum() > 0
    assert all(p.grad is None for p in loss.discriminator.parameters())
    assert any(not torch.equal(v, before[k]) for k, v in loss.discriminator.state_dict().items())
    if kind == "WGAN":
        assert all(p.abs().max() <= CLIP for p in loss.discriminator.parameters())
    has_norm = any(isinstance(layer, torch.nn.BatchNorm2d) for layer in loss.discriminator)
    assert has_norm == (kind != "WGAN_GP")
    assert loss.optimizer.param_groups[0]["betas"] == ((0.0, 0.9) if kind == "WGAN_GP" else (0.9, 0.999))


@pytest.mark.parametrize("kind", ["LSGAN", "WGAN_GP"])
def test_settings_reach_the_optimizer(kind):
    settings = AdversarialSettings(k=3, lr=2e-3, betas=(0.5, 0.6), eps=1e-4, weight_decay=0.1)
    loss = Adversarial(kind, n_colors=1, settings=settings)
    (group,) = loss.optimizer.param_groups
    assert {key: group[key] for key in ("lr", "eps", "weight_decay")} == {"lr": 2e-3, "eps": 1e-4, "weight_decay": 0.1}
    assert group["betas"] == ((0.0, 0.9) if kind == "WGAN_GP" else (0.5, 0.6))
    loss(torch.rand(1, 1, 32, 32), torch.rand(1, 1, 32, 32))
    assert {int(state["step"]) for state in loss.optimizer.state.values()} == {3}
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.k = 1


def test_the_discriminator_learns_to_distinguish_sr_from_hr():
    loss = Adversarial("LSGAN", settings=AdversarialSettings(lr=1e-3))
    sr, hr = torch.zeros(4, 3, 16, 16), torch.rand(4, 3, 16, 16)
    for _ in range(10):
        loss(sr, hr)
    assert loss.discriminator(hr).mean() > loss.discriminator(sr).mean()


def test_training_resumes_from_the_learned_state():
    sr, hr = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    settings = AdversarialSettings(lr=1e-3)
    first = build_loss("L1+0.1*GAN", adversarial=settings)
    first(sr, hr)
    second = build_loss("L1+0.1*GAN", adversarial=settings)
    second.load_learned_state(copy.deepcopy(first.learned_state()))
    for loss in (first, second):
        loss.set_learning_rate(5e-4)
    for _ in range(2):
        torch.testing.assert_close(first(sr, hr)[0], second(sr, hr)[0], rtol=0, atol=0)
    assert first.terms["GAN"].optimizer.param_groups[0]["lr"] == 5e-4
    assert build_loss("L1").learned_state() == {}
