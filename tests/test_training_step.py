import copy
import dataclasses
import io
import math
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loss import build_loss
from model.edsr import EDSR
from model.smsr import SMSR
from program import InputError
from schema import OPTIMIZER_STATE
from training_step import OptimizerSettings, StepResult, StepSettings, TrainingStep, build_optimizer
from utility import logger

N_MODULES = 2  # of the network of `build_step`


def build_step(loss="1*L1", optimizer=OptimizerSettings(lr=1e-3), seed=1, model=None, **settings):  # noqa: B008 - frozen
    """The step of a small network."""
    torch.manual_seed(seed)
    model = model or SMSR(scale=2, n_feats=8, n_blocks=N_MODULES, n_layers=2).train()
    return TrainingStep(
        model, build_loss(loss), build_optimizer(model.parameters(), optimizer), StepSettings(**settings)
    )


def random_batch(n_images=4, size=8, seed=0):
    """LR images (N, 3, size, size) and HR images of twice the size, of which they are related."""
    lr = torch.rand(n_images, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 255
    return lr, lr.repeat_interleave(2, 2).repeat_interleave(2, 3)


def take(step, lr, hr, tau=1.0, lambda_=0.1, noise_seed=0, largest_loss=math.inf):
    numbers = {"tau": tau, "lambda_": lambda_, "largest_loss": largest_loss}
    tensors = {name: None if value is None else torch.tensor(float(value)) for name, value in numbers.items()}
    return step(lr, hr, noise_seed=noise_seed, **tensors)


def take_good(step, lr, hr, **options):
    """Take steps until one is good: in float16 the first ones are skipped, until the scale of the loss fits."""
    for _ in range(20):
        result = take(step, lr, hr, **options)
        if result.is_good:
            return result
    raise AssertionError("all steps were skipped")


def weights(step):
    return torch.cat([p.detach().flatten() for p in step.model.parameters()])


def gradient(step):
    return torch.cat([p.grad.flatten() for p in step.model.parameters()])


def spy_on_forward(model):
    """The list to which every forward pass adds its number of images."""
    seen, forward = [], model.training_forward
    model.training_forward = lambda lr, tau: (seen.append(len(lr)), forward(lr, tau))[1]
    return seen


def assert_identical(found, expected):
    """Nested containers of tensors and numbers agree in every bit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def through_a_file(state):
    """A state as it returns from checkpoint.pt."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resume(step, state, **changed):
    """A step in another process: other random numbers, and everything that `state` holds."""
    fresh = build_step(seed=99, **changed)
    state = through_a_file(state)
    fresh.model.load_state_dict(state["model"])
    fresh.load_state(state)
    return fresh


@pytest.fixture
def without_noise(monkeypatch):
    """Masks without noise, so that different computations of a step see the same masks."""
    monkeypatch.setattr("model.smsr.gumbel_softmax", lambda logits, tau, dim: (logits / tau).softmax(dim))


# ---- one step --------------------------------------------------------------------------------------------------------

PLAIN_OPTIMIZERS = {
    "ADAM": lambda parameters: torch.optim.Adam(parameters, 1e-3, (0.8, 0.9), 1e-6, weight_decay=0.01, foreach=False),
    "SGD": lambda parameters: torch.optim.SGD(parameters, 1e-3, 0.7, weight_decay=0.01, foreach=False),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, 1e-3, eps=1e-6, weight_decay=0.01, foreach=False),
}


@pytest.mark.parametrize("name", PLAIN_OPTIMIZERS)
def test_steps_equal_plain_autograd(name):
    settings = OptimizerSettings(name, 1e-3, betas=(0.8, 0.9), epsilon=1e-6, momentum=0.7, weight_decay=0.01)
    step = build_step("0.5*L1+0.02*MSE", settings)
    plain = copy.deepcopy(step.model)
    optimizer = PLAIN_OPTIMIZERS[name](plain.parameters())
    for number in range(3):
        lr, hr = random_batch(seed=number)
        result = take(step, lr, hr, tau=0.7, lambda_=30.0, noise_seed=number)

        torch.manual_seed(number)
        sr, masks = plain.training_forward(lr, 0.7)
        l1, mse = 0.5 * (sr - hr).abs().mean(), 0.02 * ((sr - hr) ** 2).mean()
        # The share of the work that is done: m (N, 1, H, W) and c (1, C, L) -> a mean over (N, C, L, H, W).
        m_and_c = [(m[:, :, None], c[..., None, None]) for m, c in masks]
        active = [(m * (1 - c) + c).mean() for m, c in m_and_c]
        loss = l1 + mse + 30.0 * (active[0] + active[1]) / 2
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([(p.grad**2).sum() for p in plain.parameters()]).sum().sqrt()
        expected = torch.stack([loss, l1, mse, *active, *(m.mean() for m, _ in masks), norm])
        torch.testing.assert_close(result.values, expected.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close([*result.masks], [m.detach() for m, _ in masks], rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(step.model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
            theirs.grad.copy_(ours.grad)  # Adam would enlarge the rounding of gradients near 0
        optimizer.step()
        for ours, theirs in zip(step.model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_result_names_its_values():
    result = take(build_step("L1+0.1*MSE"), *random_batch())
    assert isinstance(result, StepResult)
    assert result.names == [
        *("loss", "loss_L1", "loss_MSE", "active_1", "active_2", "density_1", "density_2", "grad_norm")
    ]
    assert result.values.shape == (len(result.names),)
    assert result.values.dtype == torch.float32
    assert result.values.isfinite().all()
    assert not result.values.requires_grad
    assert (result.is_good.shape, result.is_good.dtype, bool(result.is_good)) == ((), torch.bool, True)
    assert [m.shape for m in result.masks] == [(4, 1, 8, 8)] * N_MODULES
    assert not any(m.requires_grad for m in result.masks)
    assert all(m.min() >= 0 and m.max() <= 1 for m in result.masks)
    values = dict(zip(result.names, result.values.tolist(), strict=True))
    mean_active = (values["active_1"] + values["active_2"]) / 2
    assert values["loss"] == pytest.approx(values["loss_L1"] + values["loss_MSE"] + 0.1 * mean_active, rel=1e-5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.masks = ()


def test_a_network_without_masks_is_fully_active():
    step = build_step(model=EDSR(scale=2, n_feats=8, n_resblocks=1).train())
    result = take(step, *random_batch(), lambda_=1e6)
    assert result.names == ["loss", "loss_L1", "active_1", "grad_norm"]
    assert result.values[0] == result.values[1]
    assert result.values[2] == 1
    assert result.masks == []


def test_the_noise_of_the_masks_depends_on_its_seed_alone():
    batch = random_batch()
    masks = {}
    for order in ((5, 6), (6, 5)):
        for noise_seed in order:
            result = take(build_step(), *batch, noise_seed=noise_seed)
            masks.setdefault(noise_seed, result.masks)
            assert_identical(result.masks, masks[noise_seed])
    assert not torch.equal(masks[5][0], masks[6][0])


def test_the_temperature_reaches_the_masks():
    hard, soft = (take(build_step(), *random_batch(), tau=tau).masks[0] for tau in (0.01, 10.0))
    assert ((hard < 0.01) | (hard > 0.99)).float().mean() > 0.9
    assert ((soft > 0.1) & (soft < 0.9)).all()


class NoReading(TorchDispatchMode):
    """Forbids what waits for the device: to read a number from a tensor, or to copy one to the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["ADAM", "SGD"])
@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ("L1", {}),
        ("L1+GAN", {}),
        ("L1", {"gclip": 1.0, "split_batch": 2}),
        ("L1", {"precision": torch.float16}),
        ("L1", {"ema": 0.5}),
    ],
)
def test_a_step_does_not_wait_for_the_device(name, loss, settings):
    step = build_step(loss, OptimizerSettings(name), **settings)
    batch = random_batch(size=16)
    take(step, *batch)  # the first step also builds the state of the optimizer
    tau, lambda_, largest_loss = torch.tensor(1.0), torch.tensor(0.1), torch.tensor(1e9)
    with NoReading():
        step(*batch, tau=tau, lambda_=lambda_, noise_seed=0, largest_loss=largest_loss)


# ---- parts of a batch, clipping, precision ---------------------------------------------------------------------------


def test_split_batch_gives_the_gradient_of_the_whole(without_noise, monkeypatch):
    gradients = []
    for split in (1, 2, 3):
        step = build_step(split_batch=split)
        monkeypatch.setattr(step.optimizer, "step", lambda: None)
        seen = spy_on_forward(step.model)
        result = take(step, *random_batch(6))
        gradients.append(gradient(step))
        assert seen == [6 // split] * split
        assert [len(m) for m in result.masks] == [6 // split] * N_MODULES
        means = dict(zip(result.names, result.values.tolist(), strict=True))
        active = (means["active_1"] + means["active_2"]) / 2
        assert means["loss"] == pytest.approx(means["loss_L1"] + 0.1 * active, rel=1e-5)
        assert means["grad_norm"] == pytest.approx(gradients[0].norm().item(), rel=1e-3)
        if split == 1:
            whole = result
        torch.testing.assert_close(result.values, whole.values, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-3, atol=1e-5)


def test_gradients_are_clipped(monkeypatch):
    step = build_step(gclip=1e-3)
    seen = []
    monkeypatch.setattr(step.optimizer, "step", lambda: seen.append(gradient(step)))
    for seed in range(3):
        result = take(step, *random_batch(seed=seed))
        assert result.values[-1] > seen[-1].norm()  # grad_norm is that of the whole gradient
    assert len(seen) == 3
    assert all(values.abs().max() <= 1e-3 for values in seen)


def test_the_learning_rate_is_that_of_the_network_and_the_discriminators():
    step = build_step("L1+GAN")
    step.set_learning_rate(0.125)
    discriminator = step.criterion.terms["GAN"].optimizer
    assert [group["lr"] for group in step.optimizer.param_groups + discriminator.param_groups] == [0.125, 0.125]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_low_precision_is_that_of_the_convolutions_alone(precision):
    step = build_step(optimizer=OptimizerSettings(lr=0.0), precision=precision)
    seen = set()
    step.model.head[0].register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
    result = take_good(step, *random_batch())
    assert seen == {precision}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in step.model.parameters())
    assert result.values.dtype == torch.float32
    exact = take(build_step(), *random_batch())
    torch.testing.assert_close(result.values, exact.values, rtol=0.05, atol=0.01)


# ---- skipped steps ---------------------------------------------------------------------------------------------------


def state_of(optimizer):
    """A copy of everything that a step of an optimizer changes."""
    return copy.deepcopy(optimizer.state_dict()["state"])


@pytest.mark.parametrize("bad", [1e7, math.nan, math.inf])
@pytest.mark.parametrize("name", ["ADAM", "SGD", "RMSprop"])
@pytest.mark.parametrize("settings", [{}, {"precision": torch.float16}, {"split_batch": 2}, {"gclip": 1.0}])
def test_a_bad_batch_changes_nothing(bad, name, settings):
    step = build_step(optimizer=OptimizerSettings(name, 1e-3), **settings)
    lr, hr = random_batch()
    take_good(step, lr, hr, largest_loss=1e5)
    before, state = weights(step), state_of(step.optimizer)
    assert not take(step, torch.full_like(lr, bad), hr, largest_loss=1e5).is_good
    assert torch.equal(weights(step), before)
    assert_identical(state_of(step.optimizer), state)
    take_good(step, lr, hr, largest_loss=1e5)
    assert not torch.equal(weights(step), before)


@pytest.mark.parametrize("name", ["ADAM", "SGD", "RMSprop"])
def test_a_bad_first_batch_leaves_no_trace(name):
    lr, hr = random_batch()
    step, other = (build_step(optimizer=OptimizerSettings(name, 1e-3)) for _ in range(2))
    for _ in range(3):
        assert not take(step, torch.full_like(lr, math.nan), hr).is_good
    for seed in range(2):
        assert take(step, lr, hr, noise_seed=seed).is_good
        assert take(other, lr, hr, noise_seed=seed).is_good
    assert torch.equal(weights(step), weights(other))
    assert_identical(state_of(step.optimizer), state_of(other.optimizer))


def test_one_bad_image_skips_the_whole_batch():
    step = build_step(split_batch=4)
    before = weights(step)
    lr, hr = random_batch()
    lr[1, 2, 3, 4] = math.nan
    assert not take(step, lr, hr).is_good
    assert torch.equal(weights(step), before)


def test_a_loss_is_bad_if_it_exceeds_the_largest():
    lr, hr = random_batch()
    loss = take(build_step(), lr, hr).values[0].item()
    for largest_loss, is_good in ((loss, True), (math.inf, True), (loss * (1 - 1e-6), False), (0.0, False)):
        assert bool(take(build_step(), lr, hr, largest_loss=largest_loss).is_good) == is_good


@pytest.mark.parametrize("name", ["ADAM", "SGD", "RMSprop"])
def test_bad_batches_are_skipped_without_a_scaler(name):
    """MPS has none."""
    step = build_step(optimizer=OptimizerSettings(name, 1e-3))
    step.scaler = torch.amp.GradScaler("cpu", enabled=False)
    lr, hr = random_batch()
    assert take(step, lr, hr).is_good
    before, state = weights(step), state_of(step.optimizer)
    assert not take(step, torch.full_like(lr, math.nan), hr).is_good
    assert torch.equal(weights(step), before)
    assert_identical(state_of(step.optimizer), state)
    assert take(step, lr, hr).is_good
    assert not torch.equal(weights(step), before)


@pytest.mark.parametrize("kind", ["GAN", "WGAN", "WGAN_GP", "LSGAN", "RGAN"])
def test_a_batch_that_is_not_finite_leaves_the_discriminator_as_it_was(kind):
    step = build_step(f"1*L1+0.1*{kind}")
    term = step.criterion.terms[kind]
    lr, hr = torch.zeros(2, 3, 16, 16), torch.rand(2, 3, 32, 32) * 255
    assert take(step, lr, hr).is_good
    before, state = copy.deepcopy(term.discriminator.state_dict()), state_of(term.optimizer)
    assert not take(step, torch.full_like(lr, math.nan), hr).is_good
    assert_identical(term.discriminator.state_dict(), before)
    assert_identical(state_of(term.optimizer), state)
    assert take(step, lr, hr).is_good
    assert any(not torch.equal(value, before[key]) for key, value in term.discriminator.state_dict().items())


# ---- compilation -----------------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


@needs_compiler
def test_a_compiled_step_gives_the_same_gradient(without_noise, monkeypatch):
    gradients = []
    for compiled in (False, True):
        step = build_step(compile=compiled)
        monkeypatch.setattr(step.optimizer, "step", lambda: None)
        for tau in (1.0, 0.5):
            lr, hr = random_batch()
            take(step, lr, torch.zeros_like(hr), tau=tau)
            gradients.append(gradient(step))
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[3], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(gradients[0], gradients[1])


@needs_compiler
def test_compiled_16_bit_gradients_stay_finite(without_noise):
    model = SMSR(2, n_blocks=1).train()
    lr, hr = torch.rand(2, 3, 16, 16) * 255, torch.zeros(2, 3, 32, 32)
    gradients = []
    for compiled in (False, True):
        step = build_step(
            optimizer=OptimizerSettings("SGD", 1e-30), model=model, precision=torch.bfloat16, compile=compiled
        )
        take(step, lr, hr, tau=0.7)
        gradients.append(gradient(step))
    assert gradients[1].isfinite().all()
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


# ---- optimizers ------------------------------------------------------------------------------------------------------


def test_optimizers():
    parameter = torch.nn.Parameter(torch.zeros(1))
    own = {
        "ADAM": (torch.optim.Adam, {"betas": (0.5, 0.6), "eps": 1e-3}),
        "SGD": (torch.optim.SGD, {"momentum": 0.7}),
        "RMSprop": (torch.optim.RMSprop, {"eps": 1e-3}),
    }
    for name, (kind, expected) in own.items():
        settings = OptimizerSettings(name, 0.1, betas=[0.5, 0.6], epsilon=1e-3, momentum=0.7, weight_decay=0.01)
        optimizer = build_optimizer([parameter], settings)
        assert type(optimizer) is kind
        (group,) = optimizer.param_groups
        expected |= {"lr": 0.1, "weight_decay": 0.01}
        assert {key: group[key] for key in expected} == expected
    with pytest.raises(InputError, match="no such optimizer 'LION'; there are ADAM, SGD, RMSprop") as caught:
        build_optimizer([parameter], OptimizerSettings("LION"))
    assert caught.value.argument == "optimizer"


# ---- moving average --------------------------------------------------------------------------------------------------


def test_the_moving_average_of_the_weights():
    step, average = build_step(ema=0.75), None
    for seed in range(4):
        take(step, *random_batch(seed=seed))
        average = weights(step) if average is None else 0.75 * average + 0.25 * weights(step)
    kept = torch.cat([p.detach().flatten() for p in step.ema.module.parameters()])
    torch.testing.assert_close(kept, average)
    assert not torch.allclose(kept, weights(step), rtol=1e-4, atol=0)
    assert build_step().ema is None


@pytest.mark.parametrize("network", [SMSR, EDSR])
def test_a_moving_average_without_the_settings_of_the_network_loads(network):
    """Version 0.1.0 wrote no settings into a checkpoint: module.rgb_range, and module.res_scale of EDSR."""

    def build():
        model = network(scale=2, n_feats=8, rgb_range=1, **({"res_scale": 0.5} if network is EDSR else {}))
        return build_step(model=model.train(), ema=0.5)

    step, batch = build(), [images / 255 for images in random_batch()]
    for _ in range(2):
        take(step, *batch)
    state = step.state()
    assert {f"module.{name}" for name in network.settings} <= state["ema"].keys()
    old = {**state, "model": dict(state["model"]), "ema": dict(state["ema"])}
    for name in network.settings:
        del old["model"][name], old["ema"][f"module.{name}"]
    old = through_a_file(old)
    resumed = build()
    resumed.model.load_state_dict(old["model"])
    resumed.load_state(old)
    assert_identical(resumed.ema.state_dict(), step.ema.state_dict())
    assert_identical(resumed.model.state_dict(), step.model.state_dict())
    for model in (resumed.model, resumed.ema.module):
        assert model.rgb_range == 1
        torch.testing.assert_close(model.mean, step.model.mean)
    take(step, *batch)
    take(resumed, *batch)
    assert_identical(resumed.ema.state_dict(), step.ema.state_dict())


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ADAM", "SGD", "RMSprop"])
@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ("L1", {}),
        ("L1", {"ema": 0.5, "split_batch": 2, "gclip": 1.0}),
        ("L1", {"precision": torch.float16}),
        ("L1", {"precision": torch.bfloat16}),
        ("L1+0.1*GAN", {}),
    ],
)
def test_a_resumed_step_is_bit_identical(name, loss, settings):
    options = {"loss": loss, "optimizer": OptimizerSettings(name, 1e-5), **settings}
    batches = [random_batch(size=16, seed=seed) for seed in range(4)]
    step = build_step(**options)
    for seed, batch in enumerate(batches[:2]):
        take_good(step, *batch, noise_seed=seed)
    resumed = resume(step, step.state(), **options)
    for seed, batch in enumerate(batches[2:], 2):
        whole = take(step, *batch, noise_seed=seed)
        again = take(resumed, *batch, noise_seed=seed)
        assert again.names == whole.names
        assert_identical((again.values, again.is_good, again.masks), (whole.values, whole.is_good, whole.masks))
    state, expected = resumed.state(), step.state()
    assert state.keys() == expected.keys() == {"model", "ema", "optimizer", "optimizer_name", "scaler", "criterion"}
    for key in ("model", "ema", "scaler"):
        assert (state[key] is None) == (expected[key] is None)
        if expected[key] is not None:
            assert_identical(state[key], expected[key])
    assert_identical(state["optimizer"]["state"], expected["optimizer"]["state"])
    assert state["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    assert state["criterion"].keys() == expected["criterion"].keys()
    for ours, theirs in zip(state["criterion"].values(), expected["criterion"].values(), strict=True):
        assert_identical(ours.pop("_extra_state")["state"], theirs.pop("_extra_state")["state"])
        assert_identical(ours, theirs)


def test_the_loss_scale_of_float16_does_not_come_from_another_precision():
    other = build_step(precision=torch.bfloat16)
    take(other, *random_batch())
    assert resume(other, other.state(), precision=torch.float16).scaler.get_scale() == 2.0**16
    step = build_step(precision=torch.float16)
    take(step, *random_batch())
    step.scaler.update(128.0)
    resumed = resume(step, step.state(), precision=torch.float16)
    assert resumed.scaler.get_scale() == 128
    assert resume(step, step.state(), precision=torch.bfloat16).scaler.get_scale() == 1


def test_another_optimizer_or_loss_cannot_resume():
    step = build_step("L1")
    take(step, *random_batch())
    with pytest.raises(InputError, match=r"the run has no discriminator for 'GAN'; keep its own loss") as caught:
        resume(step, step.state(), loss="L1+GAN")
    assert caught.value.argument == "loss"
    with pytest.raises(InputError, match="the run uses Adam and cannot resume with SGD") as caught:
        resume(step, step.state(), optimizer=OptimizerSettings("SGD"))
    assert caught.value.argument == "optimizer"


def test_the_settings_of_the_optimizer_override_those_of_the_checkpoint():
    step = build_step()
    take(step, *random_batch())
    settings = OptimizerSettings("ADAM", 0.1, betas=(0.5, 0.6), epsilon=1e-3, weight_decay=0.5)
    resumed = resume(step, step.state(), optimizer=settings)
    (group,) = resumed.optimizer.param_groups
    expected = {"lr": 0.1, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.5}
    assert {key: group[key] for key in expected} == expected
    assert_identical(state_of(resumed.optimizer), state_of(step.optimizer))


def test_a_moving_average_can_be_switched_on_and_off_when_resuming():
    step = build_step(ema=0.5)
    take(step, *random_batch())
    assert resume(step, step.state()).state()["ema"] is None
    plain = build_step()
    take(plain, *random_batch())
    resumed = resume(plain, plain.state(), ema=0.5)
    take(resumed, *random_batch())
    kept = torch.cat([p.detach().flatten() for p in resumed.ema.module.parameters()])
    assert torch.equal(kept, weights(resumed))  # an average over one step


def without(state, *keys):
    """A nested state without one of its entries."""
    key, *rest = keys
    if rest:
        return state | {key: without(state[key], *rest)}
    return {name: value for name, value in state.items() if name != key}


def changed(state, value, *keys):
    """A nested state with another value of one entry."""
    key, *rest = keys
    return state | {key: changed(state[key], value, *rest) if rest else value}


@pytest.mark.parametrize("name", ["ADAM", "SGD", "RMSprop"])
def test_a_state_of_another_shape_or_kind_is_refused_and_named(name):
    settings = {"optimizer": OptimizerSettings(name), "ema": 0.5, "loss": "L1+GAN"}
    step, fresh = build_step(**settings), build_step(**settings)
    take(step, *random_batch(size=16))
    state = step.state()
    (key, *_) = OPTIMIZER_STATE[type(step.optimizer).__name__]
    group = state["optimizer"]["param_groups"][0]
    for broken, problem in (
        (changed(state, {"other": 1}, "optimizer", "state", 0), f"optimizer.state.0.{key} is missing"),
        (changed(state, torch.zeros(3), "optimizer", "state", 0, key), rf"optimizer.state.0.{key} is \(3,\), not"),
        (changed(state, "text", "optimizer", "state", 0), "optimizer.state.0 is 'text', not a mapping"),
        (changed(state, {}, "optimizer", "state", 999), "optimizer.state.999 is unknown"),
        (changed(state, [group, group], "optimizer", "param_groups"), "optimizer.param_groups is .*, not a list of 1"),
        (changed(state, [{"params": [0]}], "optimizer", "param_groups"), "optimizer.param_groups.0.params is"),
        (without(state, "ema", "n_averaged"), "ema.n_averaged is missing"),
        (changed(state, torch.tensor(math.nan), "ema", "module.rgb_range"), "ema.module.rgb_range contains NaN"),
        (without(state, "criterion", "GAN", "_extra_state"), "criterion.GAN._extra_state is missing"),
        (
            changed(state, 1, "criterion", "GAN", "discriminator.0.weight"),
            "criterion.GAN.discriminator.0.weight is int",
        ),
    ):
        with pytest.raises(InputError, match=f"^checkpoint.pt: {problem}.*; start another run from the") as caught:
            fresh.load_state(broken, "checkpoint.pt")
        assert caught.value.argument == "load"


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


def record(function, inputs, stream):
    """Stands in for graphs.capture, which needs a GPU: runs nothing before the first replay."""
    results = []

    def replay():
        results[:] = function(*inputs)

    return replay, results


@pytest.fixture
def graphed(monkeypatch):
    """Builds steps that run as a graph would."""
    monkeypatch.setattr("model.engines.graphs.capture", record)

    def build(**settings):
        step = build_step(**settings)
        step._is_graphed = step._fits_graph()
        if step._is_graphed:
            step._prepare_optimizer_for_graph()
        return step

    return build


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema": 0.75},
        {"gclip": 0.01, "split_batch": 2},
        {"precision": torch.bfloat16},
        {"precision": torch.float16},
        {"optimizer": OptimizerSettings("SGD", 1e-4, weight_decay=0.1)},
    ],
)
def test_a_graph_takes_the_same_steps(graphed, settings):
    states = []
    for step in (build_step(**settings), graphed(**settings)):
        for index in range(8):
            step.set_learning_rate(2.0**-10 if index < 5 else 2.0**-13)  # exact in float32, too
            lr, hr = random_batch(seed=index)
            bad = torch.full_like(lr, math.nan) if index == 5 else lr  # a skipped step
            take(step, bad, hr, tau=1 - index / 10, lambda_=index / 10, noise_seed=index)
        states.append(step.state())
    assert states[0]["optimizer"]["param_groups"] == states[1]["optimizer"]["param_groups"]
    for name in ("model", "ema", "optimizer", "scaler"):
        assert_identical(states[1][name], states[0][name])


def test_steps_with_masks_follow_steps_without_them_in_a_graph(graphed):
    states = []
    for step in (build_step(), graphed()):
        step.set_learning_rate(2.0**-10)  # exact in float32, too
        for index in range(12):
            take(step, *random_batch(seed=index), tau=None if index < 6 else 0.7, noise_seed=index)
        states.append(step.state())
    assert_identical(states[1]["model"], states[0]["model"])


def test_steps_without_masks_do_not_move_them():
    settings = {"optimizer": OptimizerSettings(weight_decay=0.1), "ema": 0.5}
    step = build_step(**settings)
    before, others = copy.deepcopy(step.model.mask_parameters()), step.model.head[0].weight.clone()
    for index in range(3):
        take(step, *random_batch(seed=index), tau=None)
    assert_identical(step.model.mask_parameters(), before)
    assert not torch.equal(step.model.head[0].weight, others)
    resumed = resume(step, step.state(), **settings)
    for masked in (step, resumed):
        take(masked, *random_batch(), tau=0.7)
    assert not torch.equal(resumed.model.blocks[0].channel_logits, before[-1])
    for name in ("model", "ema", "optimizer"):
        assert_identical(resumed.state()[name], step.state()[name])


def test_a_loss_above_its_limit_is_skipped_in_a_graph_too(graphed):
    step = graphed()
    accepted = [bool(take(step, *random_batch(), largest_loss=limit).is_good) for limit in (1e9, 1e9, 1e9, 1e9, 0, 1e9)]
    assert accepted == [True, True, True, True, False, True]


@pytest.mark.parametrize("optimizer", ["ADAM", "SGD", "RMSprop"])
def test_changes_of_the_weights_are_noticed(graphed, optimizer):
    step = graphed(ema=0.5, optimizer=OptimizerSettings(optimizer))
    models = (step.model, step.ema.module)
    for _ in range(6):
        versions = [[p._version for p in model.parameters()] for model in models]
        take(step, *random_batch())
        for model, before in zip(models, versions, strict=True):
            assert all(p._version > version for p, version in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"optimizer": OptimizerSettings("RMSprop")}, "RMSprop waits for the device"),
        ({"loss": "L1+GAN"}, "the loss trains a discriminator"),
    ],
)
def test_what_a_graph_cannot_hold_runs_without_one(graphed, settings, reason, caplog):
    logger.setLevel("INFO")
    step = graphed(**settings)
    take(step, *random_batch(size=16))
    assert step._run == step._take
    assert [record.message for record in caplog.records] == [f"the training step runs without a CUDA graph: {reason}"]


def test_a_step_that_cannot_be_captured_is_reported(graphed, monkeypatch):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr("model.engines.graphs.capture", fail)
    step = graphed()
    for _ in range(3):
        take(step, *random_batch())
    with pytest.raises(
        InputError, match=r"cannot become a CUDA graph \(operation not permitted .* capturing\)"
    ) as error:
        take(step, *random_batch())
    assert error.value.argument == "compile"


def test_batches_of_another_size_run_without_the_graph(graphed):
    states, optimizer = [], OptimizerSettings(lr=2.0**-10)  # exact in float32, too
    for step in (build_step(optimizer=optimizer), graphed(optimizer=optimizer)):
        for index in range(7):
            take(step, *random_batch(n_images=2 if index == 5 else 4, seed=index), noise_seed=index)
        states.append(step.state())
    assert_identical(states[1]["model"], states[0]["model"])
