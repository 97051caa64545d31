import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import MODELS, build_model, load_model, load_weights, read_weights
from model.common import DIV2K_RGB_MEAN
from program import InputError

SIZES = {
    "SMSR": {"scale": 3, "n_feats": 8, "n_blocks": 3, "n_layers": 2, "n_colors": 1},
    "EDSR": {"scale": 4, "n_feats": 8, "n_resblocks": 3, "n_colors": 1},
}
RGB_SIZES = {name: sizes | {"n_colors": 3} for name, sizes in SIZES.items()}
DEFAULTS = {"SMSR": {"rgb_range": 255}, "EDSR": {"rgb_range": 255, "res_scale": 1}}
every_network = pytest.mark.parametrize("name", MODELS)


def test_importing_networks_loads_no_plotting_no_video_and_no_command_line():
    code = "import sys; from model import load_model; print(*sys.modules)"
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert {"model", "utility", "torch"} <= loaded
    assert not loaded & {"matplotlib", "cv2", "option", "imageio", "data", "evaluation", "trainer", "visualize"}


# ---- sizes and settings come from the weights ------------------------------------------------------------------------


@every_network
def test_sizes_are_read_from_the_weights(name, tmp_path):
    model = build_model(name, **SIZES[name]).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = load_model(tmp_path / "weights.pt")
    assert type(loaded) is MODELS[name]
    assert not loaded.training
    x = torch.rand(1, 1, 6, 6)
    assert torch.equal(loaded(x), model(x))
    assert MODELS[name].hyperparameters(model.state_dict()) == SIZES[name] | DEFAULTS[name]


SETTINGS = [
    ("SMSR", {"rgb_range": 1}),
    ("SMSR", {"rgb_range": 0.7}),
    ("EDSR", {"rgb_range": 1}),
    ("EDSR", {"res_scale": 0.1}),
    ("EDSR", {"rgb_range": 1, "res_scale": 0.3}),
]


@pytest.mark.parametrize(("name", "given"), SETTINGS)
def test_settings_travel_with_the_weights(name, given, tmp_path):
    model = build_model(name, **SIZES[name], **given).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    x = torch.rand(1, 1, 6, 6)
    expected = model(x)
    assert not torch.allclose(expected, with_settings(model, DEFAULTS[name])(x))
    for arguments in ({}, given, dict.fromkeys(given)):
        loaded = load_model(tmp_path / "weights.pt", **arguments)
        assert torch.equal(loaded(x), expected)
        for key, value in given.items():
            assert getattr(loaded, key).item() == pytest.approx(value)
    assert MODELS[name].hyperparameters(model.state_dict()) == SIZES[name] | DEFAULTS[name] | given


def with_settings(model, given):
    """A network with the parameters of `model` and the given settings."""
    name = type(model).__name__
    other = build_model(name, **SIZES[name], **given).eval()
    other.load_state_dict(without_settings(model))
    return other


def without_settings(model):
    """The weights of `model` as files of version 0.1.0 have them."""
    return {key: value for key, value in model.state_dict().items() if key not in model.settings}


@pytest.mark.parametrize(("name", "given"), SETTINGS)
def test_other_settings_than_those_of_the_weights_are_refused(name, given, tmp_path):
    torch.save(build_model(name, **SIZES[name], **given).state_dict(), tmp_path / "weights.pt")
    for key in given:
        expected = f"weights.pt holds {name} weights for {key} {given[key]:g}, not {DEFAULTS[name][key]}"
        with pytest.raises(InputError, match=re.escape(expected)) as error:
            load_model(tmp_path / "weights.pt", **{key: DEFAULTS[name][key]})
        assert error.value.argument == key
        assert "--" not in str(error.value)


@pytest.mark.parametrize(("name", "given"), [(name, {}) for name in MODELS] + SETTINGS)
def test_weights_without_settings_take_the_given_ones_or_the_defaults(name, given, tmp_path):
    model = build_model(name, **SIZES[name], **given).eval()
    torch.save(without_settings(model), tmp_path / "weights.pt")
    loaded = load_model(tmp_path / "weights.pt", **given)
    x = torch.rand(1, 1, 6, 6)
    assert torch.equal(loaded(x), model(x))
    for key, value in (DEFAULTS[name] | given).items():
        assert getattr(loaded, key).item() == pytest.approx(value)
    assert set(loaded.state_dict()) == set(model.state_dict())  # saved again, they have the settings


# ---- published checkpoints -------------------------------------------------------------------------------------------


def as_published(model, rgb_range):
    """Weights as the original code saves them: the mean is two 1x1 convolutions."""
    shift = torch.tensor(DIV2K_RGB_MEAN) * rgb_range
    shifts = {}
    for part, sign in (("sub_mean", -1), ("add_mean", 1)):
        shifts |= {f"{part}.weight": torch.eye(3).view(3, 3, 1, 1), f"{part}.bias": sign * shift}
    return without_settings(model) | shifts


@every_network
@pytest.mark.parametrize("rgb_range", [1, 255, 1023])
def test_the_value_range_of_published_checkpoints_follows_from_the_mean(name, rgb_range, tmp_path):
    model = build_model(name, **RGB_SIZES[name], rgb_range=rgb_range).eval()
    torch.save(as_published(model, rgb_range), tmp_path / "weights.pt")
    x = torch.rand(1, 3, 6, 6) * rgb_range
    for arguments in ({}, {"rgb_range": rgb_range}):
        loaded = load_model(tmp_path / "weights.pt", **arguments)
        assert float(loaded.rgb_range) == rgb_range
        assert torch.equal(loaded(x), model(x))
    with pytest.raises(InputError, match=f"rgb_range {rgb_range}, not 100") as error:
        load_model(tmp_path / "weights.pt", rgb_range=100)
    assert error.value.argument == "rgb_range"


def test_a_mean_shift_of_another_data_set_implies_no_value_range():
    model = build_model("EDSR", **RGB_SIZES["EDSR"])
    state = as_published(model, 255)
    state["sub_mean.bias"] = -255 * torch.tensor([0.4690, 0.4490, 0.4036])
    assert float(build_model("EDSR", state).rgb_range) == 255
    assert float(build_model("EDSR", state, rgb_range=1).rgb_range) == 1


def test_published_edsr_takes_the_given_res_scale(tmp_path):
    model = build_model("EDSR", **RGB_SIZES["EDSR"], res_scale=0.1).eval()
    torch.save(as_published(model, 255), tmp_path / "weights.pt")
    x = torch.rand(1, 3, 6, 6) * 255
    assert torch.equal(load_model(tmp_path / "weights.pt", res_scale=0.1)(x), model(x))
    assert float(load_model(tmp_path / "weights.pt").res_scale) == 1


def test_published_names_load_completely(shared):
    state = torch.load(shared / "reference/SMSR_X2.pt", map_location="cpu", weights_only=True)
    model = load_model(shared / "reference/SMSR_X2.pt")
    ours = model.state_dict()
    assert len(ours) - len(model.settings) == len(state) - 4  # all but the fixed mean shifts
    assert float(model.rgb_range) == 255
    assert torch.equal(ours["blocks.2.channel_logits"], state["body.2.body.ch_mask"])
    assert torch.equal(ours["blocks.4.convs.3.weight"], state["body.4.body.body.3.weight"])
    with pytest.raises(InputError, match="rgb_range 255, not 1;"):
        load_model(shared / "reference/SMSR_X2.pt", rgb_range=1)


# ---- weights that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"scale": 4}, "the weights holds SMSR weights for scale 2, not 4"),
        ({"n_feats": 16}, "n_feats 8, not 16"),
        ({"n_layers": 3}, "n_layers 2, not 3"),
    ],
)
def test_weights_of_another_size_are_refused(tiny, sizes, message):
    with pytest.raises(InputError, match=message) as error:
        build_model("SMSR", tiny.state_dict(), **sizes)
    assert error.value.argument == next(iter(sizes))


def test_weights_of_another_network_are_refused(tiny):
    with pytest.raises(InputError, match="holds SMSR weights, not EDSR weights; use model SMSR"):
        build_model("EDSR", tiny.state_dict())
    with pytest.raises(InputError, match="holds EDSR weights, not SMSR weights; use model EDSR"):
        build_model("SMSR", build_model("EDSR", scale=2, n_feats=8, n_resblocks=1).state_dict())


@every_network
def test_weights_of_another_scale_are_loaded_except_for_the_tail(name, caplog):
    source = build_model(name, **SIZES[name], rgb_range=1)
    with caplog.at_level("INFO", logger="smsr"):
        model = build_model(name, source.state_dict(), origin="w.pt", transfer=True, scale=2)
    assert caplog.messages == [f"w.pt: these are x{source.scale} weights; loading all but the tail for x2"]
    assert model.scale == 2
    assert float(model.rgb_range) == 1
    old = source.state_dict()
    new = model.state_dict()
    assert all(torch.equal(new[key], old[key]) for key in new if not key.startswith("tail."))
    assert any(not torch.equal(new[key], old[key]) for key in new if key.startswith("tail.") and key in old)
    assert model(torch.rand(1, 1, 4, 4)).shape == (1, 1, 8, 8)


def test_a_mismatch_names_keys_and_shapes_and_loads_nothing(tiny):
    state = tiny.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    broken = {key: value + 1 for key, value in state.items()}
    broken["head.0.bias"] = torch.zeros(5)
    broken["surplus"] = broken.pop("tail.0.bias")
    with pytest.raises(InputError) as error:
        load_weights(tiny, broken)
    assert "head.0.bias is (5,), not (8,)" in str(error.value)
    assert "tail.0.bias is missing" in str(error.value)
    assert "surplus is unknown" in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in tiny.state_dict().items())


@every_network
@pytest.mark.parametrize("key", ["rgb_range", "head.0.bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_in_weights_are_refused(name, key, value):
    state = build_model(name, **SIZES[name]).state_dict()
    state[key] = torch.full_like(state[key], value)
    with pytest.raises(InputError, match=rf"^w\.pt: .*{key} contains NaN or infinity"):
        build_model(name, state, origin="w.pt")


@every_network
@pytest.mark.parametrize("value", [0.0, -255.0])
def test_settings_that_are_not_positive_are_refused(name, value):
    state = build_model(name, **SIZES[name]).state_dict()
    with pytest.raises(InputError, match=r"^w\.pt: .*rgb_range is not positive"):
        build_model(name, state | {"rgb_range": torch.tensor(value)}, origin="w.pt")


@every_network
def test_settings_of_another_shape_are_refused(name):
    state = build_model(name, **SIZES[name]).state_dict()
    with pytest.raises(InputError, match=r"^w\.pt: .*rgb_range is \(2,\), not \(\)"):
        build_model(name, state | {"rgb_range": torch.ones(2)}, origin="w.pt")


def test_unknown_networks_and_parameters_are_refused(tiny, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "weights.pt")
    for build in (lambda: build_model("RCAN", scale=2), lambda: load_model(tmp_path / "weights.pt", "RCAN")):
        with pytest.raises(InputError) as error:
            build()
        assert str(error.value) == "no such network 'RCAN'; there are SMSR, EDSR"
        assert error.value.argument == "model"
    with pytest.raises(InputError, match=r"^SMSR has no parameter 'n_resblocks'; leave it out$") as error:
        build_model("SMSR", scale=2, n_resblocks=3)
    assert error.value.argument == "n_resblocks"
    with pytest.raises(InputError, match="by 5") as error:
        build_model("EDSR", scale=5)
    assert error.value.argument == "scale"


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_a_run_is_as_good_as_its_weights(tmp_path, tiny):
    torch.save({"model": tiny.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pt")
    assert read_weights(tmp_path / "checkpoint.pt").keys() == tiny.state_dict().keys()


class Code:
    def __reduce__(self):
        return print, ("this must never be printed",)


def test_files_that_are_no_weights(tmp_path, tiny, capsys):
    def assert_refused(name, message):
        with pytest.raises(InputError, match=message) as error:
            read_weights(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ")
        assert "\n" not in str(error.value)

    assert_refused("absent.pt", "no such")
    torch.save(tiny.state_dict(), tmp_path / "cut.pt")
    whole = (tmp_path / "cut.pt").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        assert_refused("cut.pt", "cut off")
    torch.save({"a": Code()}, tmp_path / "code.pt")
    assert_refused("code.pt", "contains code")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Code()))
    assert_refused("pickle.pt", "cannot be read")
    for name, content in (("list.pt", [1]), ("empty.pt", {}), ("numbers.pt", {"a": 1})):
        torch.save(content, tmp_path / name)
        assert_refused(name, "not contain a state dict")
    assert "never be printed" not in capsys.readouterr().out
