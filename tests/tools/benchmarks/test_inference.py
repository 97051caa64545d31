import json
import re
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from model.edsr import EDSR
from model.engines.build import find_compiler
from model.smsr import SMSR
from program import InputError
from tools.benchmark import main
from tools.benchmarks.baselines import Unmasked, with_density
from tools.benchmarks.inference import largest_difference
from tools.benchmarks.timing import peak_mib, timed


@pytest.fixture
def weights(tmp_path, tiny):
    torch.save(tiny.state_dict(), tmp_path / "weights.pt")
    return str(tmp_path / "weights.pt")


def run(weights, *flags):
    main(["--pre_train", weights, "--device", "cpu", "--repeats", "1", *flags])


@torch.no_grad()
def test_the_unmasked_network_equals_the_masked_one_if_all_pixels_are_important():
    model = SMSR(3, n_feats=8, n_blocks=3, n_layers=4).eval()
    x = torch.rand(2, 3, 7, 9) * 255
    for block in model.blocks:
        block.spatial_mask.logits.bias[1] += 1000
    torch.testing.assert_close(Unmasked(model)(x), model.masked_forward(x), atol=1e-3, rtol=0)


@pytest.mark.parametrize("density", [0.0, 0.3, 0.75, 1.0])
def test_masks_are_shifted_to_a_density(density):
    model = SMSR(2, n_feats=32, n_blocks=2).eval()
    x = torch.rand(1, 3, 20, 24) * 255
    shifted = with_density(model, x, density)
    assert shifted.inference(x)[1].mask_density == pytest.approx([density] * 2, abs=2 / x[0, 0].numel())


def test_calls_take_turns_and_every_second_round_is_reversed():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timed(calls, torch.device("cpu"), repeats=3)
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab"
    assert list(times) == ["a", "b"]


@pytest.mark.skipif(sys.platform != "linux", reason="is measured on Linux only")
def test_peak_memory_belongs_to_the_call():
    def allocate():
        torch.ones(64, 2**20, dtype=torch.uint8)

    assert peak_mib(allocate, torch.device("cpu")) == pytest.approx(64, abs=8)
    assert peak_mib(lambda: None, torch.device("cpu")) < 8


def test_the_report_has_the_documented_content(tmp_path, weights, capsys):
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a", (12, 10)), ("b", (9, 15))):
        iio.imwrite(tmp_path / f"images/{name}.png", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    out, figure = tmp_path / "new/out.json", tmp_path / "new/out.png"
    run(weights, "--images", str(tmp_path / "images"), "--batch", "2", "--json", str(out), "--plot", str(figure))
    report = json.loads(out.read_text())
    ratios = ["speedup", "speedup_as_written", "mac_ratio", "efficiency"]
    means = [f"geomean_{ratio}" for ratio in ratios]
    assert list(report) == ["device", "precision", "threads", "torch", "batch", "images", *means]
    assert (report["device"], report["precision"], report["torch"]) == ("cpu", "single", torch.__version__)
    assert [image["name"] for image in report["images"]] == ["a", "b"]
    times = ["unmasked_ms", "as_written_ms", "sparse_ms", "auto_ms", "edsr_ms"]
    memory = ["peak_mib_unmasked", "peak_mib_sparse"]
    for image in report["images"]:
        assert list(image) == ["name", "lr_shape", "mask_density", *times, *ratios, "max_abs_diff", *memory]
        assert image["speedup"] == pytest.approx(image["unmasked_ms"] / image["auto_ms"])
        assert image["speedup_as_written"] == pytest.approx(image["as_written_ms"] / image["auto_ms"])
        assert image["efficiency"] == pytest.approx(image["speedup"] / image["mac_ratio"])
        assert image["max_abs_diff"] < 1e-3
        assert len(image["mask_density"]) == 2
    speedups = [image["speedup"] for image in report["images"]]
    assert report["geomean_speedup"] == pytest.approx(np.prod(speedups) ** 0.5)
    assert iio.imread(figure).shape[2] in (3, 4)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["LR", "image", "size", "density", *times, *ratios]
    assert printed[1].split()[:2] == ["a", "12x10"]
    assert printed[-1].startswith("geometric mean")
    assert len({len(line) for line in printed}) == 1


@pytest.mark.skipif(not find_compiler(), reason="needs a C++ compiler")
def test_the_native_engine_is_compared_with_its_own_kernels(tmp_path, capsys):
    torch.save(SMSR(2, n_feats=16, n_blocks=2, n_layers=2).state_dict(), tmp_path / "w.pt")
    run(str(tmp_path / "w.pt"), "--size", "12x10", "--json", str(tmp_path / "out.json"))
    report = json.loads((tmp_path / "out.json").read_text())
    image = report["images"][0]
    assert image["speedup_unmasked_native"] == pytest.approx(image["unmasked_native_ms"] / image["auto_ms"])
    assert report["geomean_speedup_unmasked_native"] == pytest.approx(image["speedup_unmasked_native"])
    header = capsys.readouterr().out.splitlines()[0].split()
    added = {"plain_ms", "unmasked_native_ms", "speedup_unmasked_native"}
    assert added <= set(header)
    assert added <= image.keys()


def test_one_image_of_a_given_size(weights, capsys):
    run(weights, "--size", "2x1001", "--precision", "bf16")
    assert " 2x1001 " in capsys.readouterr().out


def test_differences_refer_to_pixels_in_0_to_255(monkeypatch):
    model = SMSR(2, n_feats=8, n_blocks=2, rgb_range=1).eval()
    monkeypatch.setattr(model, "masked_forward", lambda x: model.inference(x, "sparse")[0] + 0.5)
    assert largest_difference(model, torch.rand(1, 3, 8, 8)) == pytest.approx(127.5, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--size 360", "--size: '360' is not of the form 360x640"),
        ("--size 0x5", "--size"),
        ("--size 5x5 --images .", "not allowed with"),
        ("--images absent", "absent: no such folder"),
        ("--images empty", "--images empty: contains no images"),
        ("--plot curve.txt", "--plot: 'curve.txt' does not end with .png or .svg or .pdf"),
        ("--repeats 0", "--repeats"),
        ("--pre_train absent.pt", "absent.pt"),
        ("--pre_train edsr.pt", "edsr.pt: .*SMSR"),
        ("--device cuda:9", "--device: .*cuda:9"),
    ],
)
def test_mistakes_are_reported(tmp_path, monkeypatch, weights, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    torch.save(EDSR(2, n_feats=8, n_resblocks=1).state_dict(), "edsr.pt")
    with pytest.raises(InputError) as error:
        run(weights, *flags.split())
    assert re.search(message, error.value.for_command_line())


def test_a_broken_image_is_named_and_the_others_are_timed(tmp_path, weights, capsys):
    for name in ("a.png", "a.bmp"):
        iio.imwrite(tmp_path / name, np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "b.png").write_text("")
    line = ["--pre_train", weights, "--device", "cpu", "--repeats", "1", "--images", str(tmp_path)]
    assert main([*line, "--json", str(tmp_path / "out.json")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {tmp_path / 'b.png'}: not an image")
    assert [row["name"] for row in json.loads((tmp_path / "out.json").read_text())["images"]] == ["a.bmp", "a.png"]
    with pytest.raises(InputError, match="already exists and is something else") as error:
        main([*line, "--plot", str(tmp_path / "a.png")])
    assert error.value.argument == "plot"
