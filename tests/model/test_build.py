import pickle

import pytest
import torch

from model import MODELS, build_model, load_model, load_weights, read_weights
from utility import InputError

SIZES = {
    "SMSR": {"scale": 3, "n_feats": 8, "n_blocks": 3, "n_layers": 2, "n_colors": 1},
    "EDSR": {"scale": 4, "n_feats": 8, "n_resblocks": 3, "n_colors": 1},
}


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_read_from_the_weights(name, tmp_path):
    model = build_model(name, **SIZES[name]).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = load_model(tmp_path / "weights.pt")
    x = torch.rand(1, 1, 6, 6)
    assert torch.equal(loaded(x), model(x))
    assert MODELS[name].hyperparameters(model.state_dict()) == SIZES[name]


def test_a_checkpoint_of_a_run_is_as_good_as_its_weights(tmp_path, tiny):
    torch.save({"model": tiny.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pt")
    assert read_weights(tmp_path / "checkpoint.pt").keys() == tiny.state_dict().keys()


def test_published_names_load_whole(shared):
    state = torch.load(shared / "reference/SMSR_X2.pt", map_location="cpu", weights_only=True)
    model = load_model(shared / "reference/SMSR_X2.pt")
    assert len(model.state_dict()) == len(state) - 4  # all but the fixed mean shifts
    ours = model.state_dict()
    assert torch.equal(ours["blocks.2.channel_logits"], state["body.2.body.ch_mask"])
    assert torch.equal(ours["blocks.4.convs.3.weight"], state["body.4.body.body.3.weight"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"scale": 4}, "--scale 2 and not 4"), ({"n_feats": 16}, "--n_feats 8 and not 16"), ({"n_layers": 3}, "n_layers")],
)
def test_weights_of_another_size_are_refused(tiny, asked, said):
    with pytest.raises(InputError, match=said):
        build_model("SMSR", tiny.state_dict(), **asked)


def test_weights_of_another_network_are_refused(tiny):
    with pytest.raises(InputError, match="not those of EDSR"):
        build_model("EDSR", tiny.state_dict())
    with pytest.raises(InputError, match="not those of SMSR"):
        build_model("SMSR", build_model("EDSR", scale=2, n_feats=8, n_resblocks=1).state_dict())


def test_a_mismatch_names_keys_and_shapes_and_loads_nothing(tiny):
    state = tiny.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    broken = {key: value + 1 for key, value in state.items()}
    broken["head.0.bias"] = torch.zeros(5)
    broken["surplus"] = broken.pop("tail.0.bias")
    with pytest.raises(InputError) as error:
        load_weights(tiny, broken)
    assert "head.0.bias is (5,) and not (8,)" in str(error.value)
    assert "tail.0.bias is missing" in str(error.value)
    assert "surplus is unknown" in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in tiny.state_dict().items())


def test_unknown_model_and_size():
    with pytest.raises(InputError, match="SMSR, EDSR"):
        build_model("RCAN", scale=2)
    with pytest.raises(InputError, match="--n_resblocks"):
        build_model("SMSR", scale=2, n_resblocks=3)
    with pytest.raises(InputError, match="by 5"):
        build_model("EDSR", scale=5)


class Code:
    def __reduce__(self):
        return print, ("this must never be printed",)


def test_files_that_are_no_weights(tmp_path, tiny, capsys):
    def refuse(name, said):
        with pytest.raises(InputError, match=said) as error:
            read_weights(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)

    refuse("absent.pt", "no such")
    torch.save(tiny.state_dict(), tmp_path / "cut.pt")
    whole = (tmp_path / "cut.pt").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        refuse("cut.pt", "cut off")
    torch.save({"a": Code()}, tmp_path / "code.pt")
    refuse("code.pt", "holds code")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Code()))
    refuse("pickle.pt", "cannot be read")
    for name, content in (("list.pt", [1]), ("empty.pt", {}), ("numbers.pt", {"a": 1})):
        torch.save(content, tmp_path / name)
        refuse(name, "no state dict")
    assert "never be printed" not in capsys.readouterr().out
