import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from model import build_model, load_model, read_weights
from model.weights import write_weights
from program import InputError

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 3 * 2**30  # bytes of memory that no file may make the program exceed


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w.pt"


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def assert_refused(path, message):
    with pytest.raises(InputError, match=message) as error:
        load_model(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


# ---- weights as other programs write them ----------------------------------------------------------------------------

SIZES = {
    "SMSR": {"scale": 2, "n_feats": 8, "n_blocks": 2, "n_layers": 2},
    "EDSR": {"scale": 2, "n_feats": 8, "n_resblocks": 2},
}
WRAPPED = {
    "DataParallel": lambda state: prefixed("module.", state),
    "torch.compile": lambda state: prefixed("_orig_mod.", state),
    "a compiled part": lambda state: {key.replace("head.", "head._orig_mod."): value for key, value in state.items()},
    "both": lambda state: prefixed("module._orig_mod.", state),
    "BasicSR": lambda state: {"params": state},
    "BasicSR with an average": lambda state: {
        "params": {key: value + 1 for key, value in state.items()},
        "params_ema": state,
    },
    "Lightning": lambda state: {
        "epoch": 3,
        "state_dict": prefixed("model.", state) | {"loss.vgg.weight": torch.zeros(2)},
        "callbacks": {"best": [1, None]},
    },
    "Lightning, compiled": lambda state: {"state_dict": prefixed("model._orig_mod.", state)},
    "nested": lambda state: {"model": {"state_dict": prefixed("net_g.", state)}},
    "AveragedModel": lambda state: {"n_averaged": torch.tensor(3), **prefixed("module.", state)},
    "parameters": lambda state: {key: torch.nn.Parameter(value) for key, value in state.items()},
    "float16": lambda state: {key: value.half() for key, value in state.items()},
    "float64": lambda state: {key: value.double() for key, value in state.items()},
    "the same weights twice": lambda state: {"state_dict": state, "best": {key: v[...] for key, v in state.items()}},
}


@pytest.mark.parametrize(("name", "zipped"), [("SMSR", True), ("EDSR", False)])
@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_of_other_programs_load(path, name, kind, zipped):
    model = build_model(name, **SIZES[name])
    if kind == "float16":
        model = model.half().float()
    torch.save(WRAPPED[kind](model.state_dict()), path, _use_new_zipfile_serialization=zipped)
    loaded = load_model(path)
    assert type(loaded) is type(model)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_it_is_logged_which_weights_are_used(path, tiny, caplog):
    caplog.set_level("INFO")
    torch.save({"params": tiny.state_dict(), "params_ema": tiny.state_dict()}, path)
    read_weights(path)
    assert caplog.messages == [f"{path}: using the weights in 'params_ema', not those in 'params'"]


def test_several_networks_in_a_file_are_named(path, tiny):
    torch.save(prefixed("net.", tiny.state_dict()) | prefixed("ema.", tiny.state_dict()), path)
    assert_refused(path, r"contains several networks \(ema\., net\.\); save one of them alone")


def test_the_file_can_be_cut_off_after_it_was_read(path, tiny):
    torch.save(tiny.state_dict(), path)
    state = read_weights(path)
    path.write_bytes(b"")
    assert all(torch.equal(value, state[key]) for key, value in tiny.state_dict().items())


# ---- safetensors -----------------------------------------------------------------------------------------------------


def test_safetensors_round_trip(tmp_path, tiny):
    safetensors = pytest.importorskip("safetensors.torch")
    tiny = tiny.to(memory_format=torch.channels_last).eval()
    write_weights(tmp_path / "w.safetensors", tiny.state_dict())
    assert safetensors.load_file(tmp_path / "w.safetensors").keys() == tiny.state_dict().keys()
    (tmp_path / "w.safetensors").rename(tmp_path / "renamed.pt")
    x = torch.rand(1, 3, 6, 6)
    assert torch.equal(load_model(tmp_path / "renamed.pt")(x), tiny(x))


def test_broken_safetensors_are_refused(tmp_path, tiny):
    pytest.importorskip("safetensors")
    path = tmp_path / "w.safetensors"
    write_weights(path, tiny.state_dict())
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-1], struct.pack("<Q", 2**60) + whole[8:]):
        path.write_bytes(content)
        assert_refused(path, r"cannot be read as weights \(broken or cut off\)")


def test_without_the_package_the_error_says_what_to_install(tmp_path, tiny, monkeypatch):
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for use in (lambda: read_weights(path), lambda: write_weights(path, tiny.state_dict())):
        with pytest.raises(InputError, match=r"w\.safetensors: .* is not installed; pip install safetensors$"):
            use()


# ---- other files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3954911\n",
            "is a Git LFS pointer.*git lfs",
        ),
        (b"\n<!DOCTYPE html><html></html>", "is a web page, not weights; download the file that the page links to"),
        (b"<HTML>", "is a web page"),
        (b"no weights", r"cannot be read as weights \(broken or cut off\); use another file"),
    ],
)
def test_other_files_are_called_what_they_are(path, content, message):
    path.write_bytes(content)
    assert_refused(path, message)


# ---- files built to harm ---------------------------------------------------------------------------------------------


def network_with(key, value):
    state = build_model("SMSR", scale=2, n_feats=8, n_blocks=2, n_layers=2).state_dict()
    return state | {key: value}


def edsr_of_many_steps():
    state = build_model("EDSR", scale=2, n_feats=1, n_resblocks=1).state_dict()
    for step in range(900):
        state |= {f"tail.0.{2 * step}.weight": torch.zeros(4, 1, 3, 3), f"tail.0.{2 * step}.bias": torch.zeros(4)}
    return state


def cyclic():
    state = {"head.0.weight": torch.zeros(8, 3, 3, 3)}
    state["model"] = state
    return state


SPARSE = torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (2**40,))
QUANTIZED = torch.quantize_per_tensor(torch.ones(8), 1, 0, torch.qint8)


HARMFUL = {
    "expanded": (lambda: network_with("head.0.bias", torch.zeros(1).expand(2**30)), "claim more data"),
    "of many features": (lambda: {"head.0.weight": torch.zeros(1).expand(10**9, 3, 3, 3)}, "claim more data"),
    "sparse": (lambda: network_with("head.0.bias", SPARSE), "sparse"),
    "meta": (lambda: network_with("head.0.bias", torch.zeros(2**40, device="meta")), "sparse, quantized, nested or"),
    "quantized": (lambda: network_with("head.0.bias", QUANTIZED), "sparse, quantized"),
    "nested": (
        lambda: network_with("head.0.bias", torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])),
        "nested",
    ),
    "empty": (lambda: network_with("head.0.bias", torch.zeros(0)), r"head\.0\.bias is \(0,\), not \(8,\)"),
    "empty but wide": (
        lambda: network_with("head.0.weight", torch.zeros(10**9, 3, 0, 3)),
        "not weights of SMSR|does not",
    ),
    "complex": (
        lambda: network_with("head.0.bias", torch.zeros(8, dtype=torch.complex64)),
        "head.0.bias is torch.complex64",
    ),
    "keys that are no text": (lambda: network_with(3, torch.zeros(8)), "does not contain a state dict"),
    "of a million blocks": (lambda: network_with("blocks.1000000.collect.bias", torch.zeros(8)), "does not fit SMSR"),
    "of a huge number": (
        lambda: network_with(f"blocks.{'9' * 5000}.collect.bias", torch.zeros(8)),
        "does not fit SMSR",
    ),
    "of a wide collection": (
        lambda: network_with("collect.0.weight", torch.zeros(8, 8000, 1, 1)),
        r"collect\.0\.weight is",
    ),
    "of scale 2^900": (edsr_of_many_steps, "not weights of SMSR"),
    "float64 beyond float32": (
        lambda: network_with("head.0.bias", torch.full((8,), 1e300, dtype=torch.float64)),
        "NaN or inf",
    ),
    "cyclic": (cyclic, "not contain a state dict|does not fit|not weights"),
    "unknown keys": (lambda: network_with("x" * 10**5, torch.zeros(1)), "is unknown"),
    "many unknown keys": (
        lambda: network_with("a", torch.zeros(1)) | {f"k{i}": torch.zeros(1) for i in range(9999)},
        "more;",
    ),
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_tensors_that_no_network_has_are_refused(path, kind):
    make, message = HARMFUL[kind]
    torch.save(make(), path)
    assert_refused(path, message)


def rewritten(path, change):
    """Rewrite a zip archive: change(name, content) -> (content, compression), or None to leave a member out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            content, compression = change(name, content)
            archive.writestr(name, content, compression)


def test_a_compressed_bomb_is_refused_unread(path, tiny):
    torch.save(tiny.state_dict(), path)
    size = 10**8
    rewritten(path, lambda name, data: (bytes(size) if name.endswith("/data/0") else data, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < size / 100
    assert_refused(path, "is compressed, which PyTorch never does")


def test_a_tensor_larger_than_its_bytes_in_the_file_is_not_read(path):
    torch.save({"head.0.weight": torch.zeros(1000)}, path)
    rewritten(path, lambda name, content: (content[:4] if "/data/" in name else content, zipfile.ZIP_STORED))
    assert_refused(path, r"broken or cut off|claim more data|not weights")


PROGRAM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
sys.path.insert(0, sys.argv[1])
from model import load_model
from program import run_program
run_program(lambda: load_model(sys.argv[3]) and 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_small_file_that_claims_gigabytes_needs_no_memory(path, zipped):
    """The size of a storage is changed in the pickle."""
    torch.save({"head.0.weight": torch.zeros(1_000_007)}, path, _use_new_zipfile_serialization=zipped)
    before, after = (b"J" + struct.pack("<i", size) for size in (1_000_007, 2**31 - 1))
    if zipped:
        rewritten(path, lambda name, content: (content.replace(before, after), zipfile.ZIP_STORED))
    else:
        path.write_bytes(path.read_bytes().replace(before, after))
    done = subprocess.run([sys.executable, "-c", PROGRAM, ROOT, str(LIMIT), path], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {path}: ")
    assert done.stderr.count("\n") == 1
