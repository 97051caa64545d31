import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.image import read_image
from model import build_model, load_model
from model.common import bicubic_weights
from model.onnx import GATHER_ROWS, GRAPH_MODES, PIXELS, build_graph_module, export
from model.smsr import SMSR
from program import InputError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES = [(1, 1), (1, 2), (2, 1), (3, 5), (1, 40), (40, 1), (24, 24), (17, 32), (31, 18)]


def amplify(model):
    """Let the modules and masks of a small SMSR change images by tens of gray levels, so that errors show."""
    with torch.no_grad():
        for block in model.blocks:
            for conv in (*block.convs, block.collect):
                conv.weight.mul_(6)
    return model.eval()


@pytest.fixture
def tiny():
    """With one module: the time to export a network grows with their number."""
    return amplify(SMSR(scale=2, n_feats=8, n_blocks=1, n_layers=2))


def set_masks(model, spatial=(), channels=()):
    """Make the mask of each module full (True) or empty (False), and the channels of each layer dense or sparse."""
    with torch.no_grad():
        for block, full in zip(model.blocks, spatial, strict=False):
            block.spatial_mask.logits.bias.copy_(torch.tensor([-1e4, 1e4] if full else [1e4, -1e4]))
        for block, layers in zip(model.blocks, channels, strict=False):
            dense = torch.tensor(layers).expand(block.channel_logits.shape[1:3]).float()
            block.channel_logits[0, ..., 0], block.channel_logits[0, ..., 1] = dense, 1 - dense
    return model


MASKS = {
    "unchanged": {},
    "empty, full": {"spatial": (False, True)},
    "all dense, all sparse": {"channels": ([True, True], [False, False])},
    "sparse then dense, dense then sparse": {"channels": ([False, True], [True, False])},
}


def start(graph):
    return onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


def run_graph(graph, image):
    return start(graph).run(None, {"image": image})


def run_native(model, images):
    """SR images (N, sH, sW, C) in 0...255 and masks (N, K, H, W) of images (N, H, W, C)."""
    factor = 255 / model.rgb_range.item()
    sr, cost = model.inference(torch.tensor(images).permute(0, 3, 1, 2).float() / factor, "sparse")
    return (sr * factor).permute(0, 2, 3, 1).numpy(), torch.cat(cost.masks, 1).numpy()


def random_images(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("mode", GRAPH_MODES)
def test_exported_and_native_outputs_agree_at_all_sizes(mode, kind):
    model = set_masks(amplify(SMSR(scale=2, n_feats=8, n_blocks=2, n_layers=2)), **MASKS[kind])
    session = start(export(model, mode, "float", masks=True))
    for index, (height, width) in enumerate(SIZES):
        images = random_images(1 if mode == "sparse" else 3, height, width, 3, seed=index)
        sr, masks = session.run(None, {"image": images})
        expected, expected_masks = run_native(model, images)
        assert np.abs(sr - expected).max() < 1e-2
        assert (masks == expected_masks).all()


def test_uint8_images_in_and_out(tiny):
    graph = export(tiny)
    image = random_images(1, 13, 20, 3, dtype=np.uint8)
    (sr,) = run_graph(graph, image)
    assert sr.dtype == np.uint8
    assert np.abs(sr - run_native(tiny, image)[0].clip(0, 255).round()).max() <= 1


@pytest.mark.parametrize(("mode", "pixels"), zip(GRAPH_MODES, PIXELS, strict=True))
def test_half_precision(tiny, mode, pixels):
    image = random_images(1, 13, 20, 3, dtype=np.uint8)
    expected = run_native(tiny, image)[0].clip(0, 255)
    graph = export(tiny.half(), mode, pixels)
    sr = run_graph(graph, image if pixels == "uint8" else image.astype(np.float16))[0].astype(np.float32).clip(0, 255)
    assert np.abs(sr - expected).mean() < 2  # a mask may differ where its two logits are nearly equal


@pytest.mark.parametrize(("mode", "pixels"), zip(GRAPH_MODES, PIXELS, strict=True))
def test_a_network_with_another_value_range(mode, pixels):
    model = amplify(SMSR(scale=2, n_feats=8, n_blocks=1, n_layers=2, rgb_range=1))
    image = random_images(1, 13, 20, 3, dtype=np.uint8)
    graph = export(model, mode, pixels)
    if pixels == "uint8":
        upscaled = model.upscale(image[0])
        (sr,) = run_graph(graph, image)
        assert sr.dtype == np.uint8
        assert np.abs(sr[0].astype(int) - upscaled).max() <= 1
        assert len(np.unique(upscaled)) > 50  # the images fill the range
    else:
        (sr,) = run_graph(graph, image.astype(np.float32))
        assert np.abs(sr - run_native(model, image)[0]).max() < 1e-2


def test_a_half_precision_network_with_another_value_range():
    model = amplify(SMSR(scale=2, n_feats=8, n_blocks=2, n_layers=2, rgb_range=1))
    image = random_images(1, 13, 20, 3, dtype=np.uint8)
    expected = run_native(model, image)[0].clip(0, 255)
    sr, _ = build_graph_module(model.half())(torch.from_numpy(image))
    assert sr.dtype == torch.uint8
    assert np.abs(sr.numpy() - expected).mean() < 2


def test_layers_are_convolved_in_parts(tiny):
    graph = export(set_masks(tiny, spatial=[True]), pixels="float")
    assert sum(node.op_type == "Scan" for node in graph.graph.node) == len(tiny.blocks[0].convs)
    session = start(graph)
    for pixels in (GATHER_ROWS - 2, GATHER_ROWS, GATHER_ROWS + 2, 2 * GATHER_ROWS - 2, 2 * GATHER_ROWS):
        image = random_images(1, 2, pixels // 2, 3)
        assert np.abs(session.run(None, {"image": image})[0] - run_native(tiny, image)[0]).max() < 1e-2


@pytest.mark.parametrize(("n_colors", "rgb_range"), [(1, 255), (3, 255), (3, 1)])
def test_edsr(n_colors, rgb_range):
    model = build_model("EDSR", scale=3, n_feats=8, n_resblocks=2, n_colors=n_colors, rgb_range=rgb_range).eval()
    session = start(export(model, "dense", "float"))
    for index, (height, width) in enumerate(SIZES):
        images = random_images(2, height, width, n_colors, seed=index)
        expected, _ = model.inference(torch.from_numpy(images).permute(0, 3, 1, 2) * (rgb_range / 255))
        expected = (expected * (255 / rgb_range)).permute(0, 2, 3, 1).numpy()
        assert np.abs(session.run(None, {"image": images})[0] - expected).max() < 1e-2


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_upscaling_as_a_convolution(scale):
    x = torch.rand(1, 3, 6, 7)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="replicate")
    upscaled = torch.pixel_shuffle(torch.nn.functional.conv2d(padded, bicubic_weights(scale, 3)), scale)
    expected = torch.nn.functional.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False)
    assert torch.allclose(upscaled, expected, atol=1e-5)


@pytest.mark.parametrize("mode", GRAPH_MODES)
def test_the_graph_is_standard_onnx(tiny, mode):
    graph = export(tiny, mode)
    onnx.checker.check_model(graph, full_check=True)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 18)]
    assert {node.domain for node in graph.graph.node} == {""}
    assert not graph.functions
    sizes = [
        [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (graph.graph.input[0], graph.graph.output[0])
    ]
    n = 1 if mode == "sparse" else "N"
    assert sizes == [[n, "H", "W", 3], [n, "2*H", "2*W", 3]]


def test_released_weights_agree_on_sample_images():
    model = load_model(REPOSITORY / "experiment/released/SMSR_X4/model/model_best.pt")
    folder = REPOSITORY / "testsets/benchmark/Sample/LR_bicubic/X4"
    session = start(export(model))
    for name in ("camera", "coffee"):
        image = read_image(folder / f"{name}.png")
        (sr,) = session.run(None, {"image": image[None]})
        assert np.abs(sr - run_native(model, image[None])[0].clip(0, 255).round()).max() <= 1
        assert np.abs(sr[0].astype(int) - model.upscale(image)).max() <= 1


def test_graph_modules_do_not_need_the_exporter(tiny):
    image = torch.rand(1, 6, 8, 3) * 255
    sr, masks = build_graph_module(tiny, "sparse", "float")(image)
    assert sr.shape == (1, 12, 16, 3)
    assert masks.shape == (1, len(tiny.blocks), 6, 8)


def test_a_mode_or_masks_that_the_network_lacks():
    model = build_model("EDSR", scale=2, n_feats=8, n_resblocks=1).eval()
    with pytest.raises(InputError, match="EDSR has no graph of mode 'sparse'; use one of dense") as error:
        build_graph_module(model, "sparse")
    assert error.value.argument == "mode"
    with pytest.raises(InputError, match="EDSR has no masks") as error:
        export(model, "dense", masks=True)
    assert error.value.argument == "masks"


def test_without_onnx_the_message_names_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-deploy\.txt"):
        export(tiny)


def test_loading_a_network_does_not_import_onnx():
    program = "import sys; from model import load_model; assert not {'onnx', 'model.onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)
