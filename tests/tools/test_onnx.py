import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.image import read_image, write_png
from model import build_model, load_model
from model.portable import MODES, PIXELS, ROWS, bicubic_weights, build_portable
from tools.benchmark import main as benchmark_main
from tools.export_onnx import export, version
from tools.export_onnx import main as export_main
from tools.run_onnx import InputError as RunError
from tools.run_onnx import Network, read
from tools.run_onnx import main as run_main
from utility import InputError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES = [(1, 1), (1, 2), (2, 1), (3, 5), (1, 40), (40, 1), (24, 24), (17, 32), (31, 18)]


@pytest.fixture
def tiny(tiny):
    """Its modules and masks change images by tens of grey levels, so that a wrong one is seen."""
    with torch.no_grad():
        for block in tiny.blocks:
            for conv in (*block.convs, block.collect):
                conv.weight.mul_(6)
    return tiny


def with_masks(model, spatial=(), channels=()):
    """`model` with the mask of each module full (True) or empty (False), and each layer's channels dense or sparse."""
    with torch.no_grad():
        for block, full in zip(model.blocks, spatial, strict=False):
            block.spatial_mask[-1].bias.copy_(torch.tensor([-1e4, 1e4] if full else [1e4, -1e4]))
        for block, layers in zip(model.blocks, channels, strict=False):
            dense = torch.tensor(layers).expand(block.channel_logits.shape[1:3]).float()
            block.channel_logits[0, ..., 0], block.channel_logits[0, ..., 1] = dense, 1 - dense
    return model


MASKS = {
    "as they are": {},
    "empty, full": {"spatial": (False, True)},
    "all dense, all sparse": {"channels": ([True, True], [False, False])},
    "sparse then dense, dense then sparse": {"channels": ([False, True], [True, False])},
}


def outputs(graph, image):
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image})


def native(model, images):
    """SR images (N, sH, sW, C) and masks (N, K, H, W) of images (N, H, W, C)."""
    sr, work = model.inference(torch.tensor(images).permute(0, 3, 1, 2).float(), "sparse")
    return sr.permute(0, 2, 3, 1).numpy(), torch.cat(work.masks, 1).numpy()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("mode", MODES)
def test_exported_and_native_outputs_agree_at_all_sizes(tiny, mode, kind):
    model = with_masks(tiny.eval(), **MASKS[kind])
    graph = export(model, mode, "float", masks=True)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for height, width in SIZES:
        images = rng.integers(0, 256, (1 if mode == "sparse" else 3, height, width, 3)).astype(np.float32)
        sr, masks = session.run(None, {"image": images})
        expected, expected_masks = native(model, images)
        assert np.abs(sr - expected).max() < 1e-2
        assert (masks == expected_masks).all()


def test_whole_numbers_in_and_out(tiny):
    graph = export(tiny.eval())
    image = np.random.default_rng(1).integers(0, 256, (1, 13, 20, 3), dtype=np.uint8)
    (sr,) = outputs(graph, image)
    assert sr.dtype == np.uint8
    assert np.abs(sr - native(tiny, image)[0].clip(0, 255).round()).max() <= 1


@pytest.mark.parametrize(("mode", "pixels"), zip(MODES, PIXELS, strict=True))
def test_half_precision(tiny, mode, pixels):
    image = np.random.default_rng(1).integers(0, 256, (1, 13, 20, 3), dtype=np.uint8)
    expected = native(tiny.eval(), image)[0].clip(0, 255)
    graph = export(tiny.half(), mode, pixels)
    sr = outputs(graph, image if pixels == "uint8" else image.astype(np.float16))[0].astype(np.float32).clip(0, 255)
    assert np.abs(sr - expected).mean() < 2  # a mask may differ where its logits are nearly the same


def test_layers_are_convolved_in_parts(tiny):
    graph = export(with_masks(tiny.eval(), spatial=(True, True)), pixels="float")
    assert sum(node.op_type == "Scan" for node in graph.graph.node) == sum(len(block.convs) for block in tiny.blocks)
    for pixels in (ROWS - 2, ROWS, ROWS + 2, 2 * ROWS - 2, 2 * ROWS):
        image = np.random.default_rng(0).integers(0, 256, (1, 2, pixels // 2, 3)).astype(np.float32)
        assert np.abs(outputs(graph, image)[0] - native(tiny, image)[0]).max() < 1e-2


def test_a_residual_scale_that_weights_do_not_tell(tmp_path):
    model = build_model("EDSR", scale=2, n_feats=8, n_resblocks=2, res_scale=0.1).eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    line = ["--pre_train", str(tmp_path / "w.pt"), "--output", str(tmp_path / "w.onnx"), "--pixels", "float"]
    export_main([*line, "--res_scale", "0.1"])
    image = np.random.default_rng(0).integers(0, 256, (1, 9, 12, 3)).astype(np.float32)
    expected, _ = model.inference(torch.from_numpy(image).permute(0, 3, 1, 2))
    assert np.abs(outputs(onnx.load(tmp_path / "w.onnx"), image)[0] - expected.permute(0, 2, 3, 1).numpy()).max() < 1e-2


@pytest.mark.parametrize("n_colors", [1, 3])
def test_edsr(n_colors):
    model = build_model("EDSR", scale=3, n_feats=8, n_resblocks=2, n_colors=n_colors).eval()
    graph = export(model, "dense", "float")
    for height, width in SIZES:
        images = np.random.default_rng(0).integers(0, 256, (2, height, width, n_colors)).astype(np.float32)
        expected, _ = model.inference(torch.from_numpy(images).permute(0, 3, 1, 2))
        assert np.abs(outputs(graph, images)[0] - expected.permute(0, 2, 3, 1).numpy()).max() < 1e-2


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_as_a_convolution(scale):
    x = torch.rand(1, 3, 6, 7)
    bordered = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="replicate")
    ours = torch.pixel_shuffle(torch.nn.functional.conv2d(bordered, bicubic_weights(scale, 3)), scale)
    theirs = torch.nn.functional.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False)
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_graph_is_plain_onnx(tiny, mode):
    graph = export(tiny.eval(), mode)
    onnx.checker.check_model(graph, full_check=True)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 18)]
    assert {node.domain for node in graph.graph.node} == {""}
    assert not graph.functions
    sizes = [[size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
             for value in (graph.graph.input[0], graph.graph.output[0])]  # fmt: skip
    assert sizes == [[1 if mode == "sparse" else "N", "H", "W", 3], [1 if mode == "sparse" else "N", "2*H", "2*W", 3]]


def test_the_portable_network_agrees_on_sample_images():
    model = load_model(REPOSITORY / "experiment/SMSR_X4/model/model_best.pt")
    folder = REPOSITORY / "testsets/benchmark/Sample/LR_bicubic/X4"
    session = onnxruntime.InferenceSession(export(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for path in sorted(folder.iterdir()):
        image = read_image(path)[None]
        (sr,) = session.run(None, {"image": image})
        assert np.abs(sr - native(model, image)[0].clip(0, 255).round()).max() <= 1


# ---- the programs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny, exported):
    """Weights, those of `tiny` from now on, their graph, and a folder of three images."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    tiny.load_state_dict(torch.load("w.pt"))
    rng = np.random.default_rng(0)
    for index, size in enumerate([(9, 14), (10, 7), (1, 1)]):
        write_png(tmp_path / f"photos/{index}.png", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    return tmp_path


def test_a_folder_of_images_without_torch(folder, tiny):
    program = "import sys; sys.modules['torch'] = None; sys.path.insert(0, 'tools'); import run_onnx; run_onnx.main()"
    line = f"--model {folder}/w.onnx --input {folder}/photos --output {folder}/out --threads 1"
    subprocess.run([sys.executable, "-c", program, *line.split()], cwd=REPOSITORY, check=True)
    for path in Path("photos").iterdir():
        sr = read_image(folder / f"out/{path.stem}_x2_SR.png")
        expected = native(tiny.eval(), read_image(path)[None])[0][0].clip(0, 255).round()
        assert np.abs(sr - expected).max() <= 1


def test_what_is_there_is_kept(folder, capsys):
    line = ["--model", "w.onnx", "--input", "photos", "--output", "out"]
    run_main(line)
    Path("out/1_x2_SR.png").unlink()
    Path("out/0_x2_SR.png").write_bytes(b"kept")
    run_main(line)
    assert Path("out/0_x2_SR.png").read_bytes() == b"kept"
    assert read_image(Path("out/1_x2_SR.png")).shape == (20, 14, 3)
    assert capsys.readouterr().out.splitlines()[-1] == "3 images, written to out"


def test_metadata(folder):
    facts = {entry.key: entry.value for entry in onnx.load("w.onnx").metadata_props}
    assert facts["smsr_weights_sha256"] == hashlib.sha256(Path("w.pt").read_bytes()).hexdigest()
    assert (facts["smsr_scale"], facts["smsr_mode"], facts["smsr_version"]) == ("2", "sparse", version())


def test_mistakes_of_exporting(folder):
    edsr = build_model("EDSR", scale=2, n_feats=8, n_resblocks=1)
    torch.save(edsr.state_dict(), "edsr.pt")
    for line, said in (
        ("--pre_train edsr.pt --output e.onnx --mode sparse", "--mode sparse: edsr.pt is of EDSR"),
        ("--pre_train edsr.pt --output e.onnx --masks", "--masks: edsr.pt is of EDSR"),
        ("--pre_train w.pt --output w.pb", "'w.pb' is not the name of an .onnx file"),
        ("--pre_train absent.pt --output e.onnx", "absent.pt: no such weights file"),
    ):
        with pytest.raises(InputError, match=said):
            export_main(line.split())
    export_main(["--pre_train", "edsr.pt", "--output", "e.onnx"])
    assert Network(Path("e.onnx")).scale == 2


def test_a_folder_that_cannot_be_is_told_before_the_work(folder, monkeypatch):
    monkeypatch.setattr("tools.export_onnx.export", None)  # would fail otherwise
    with pytest.raises(InputError, match=r"--output w\.pt/e\.onnx: its folder cannot be made"):
        export_main(["--pre_train", "w.pt", "--output", "w.pt/e.onnx"])


def test_without_onnx_the_line_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-deploy\.txt"):
        export(tiny.eval())


def test_mistakes_of_running(folder, monkeypatch):
    other = onnx.load("w.onnx")
    del other.metadata_props[:]
    onnx.save(other, "other.onnx")
    Path("broken.onnx").write_bytes(b"broken")
    Path("empty").mkdir()
    Path("photos/1_text.png").write_text("no image")
    for line, said in (
        ("--model other.onnx --input photos --output out", "other.onnx: was not made by tools/export_onnx.py"),
        ("--model broken.onnx --input photos --output out", "broken.onnx: is no ONNX file, or broken"),
        ("--model absent.onnx --input photos --output out", "absent.onnx: no such file"),
        ("--model w.onnx --input photos --output out --scale 3", "--scale 3: w.onnx is of x2"),
        ("--model w.onnx --input absent --output out", "--input absent: no such file or folder"),
        ("--model w.onnx --input empty --output out", "--input empty: no images there"),
        ("--model w.onnx --input photos --output out", "photos/1_text.png: is no image, or broken"),
        ("--model w.onnx", "required"),
        ("--model w.onnx --input photos --output w.pt", "--output w.pt: File exists; name a folder"),
        ("--model w.onnx --input photos --output out --threads 0", "--threads: '0' is not a number from 1 to 256"),
    ):
        with pytest.raises(RunError, match=said):
            run_main(line.split())
    assert len(list(Path("out").glob("*.png"))) == 2  # those before it
    Path("photos/0.jpg").write_bytes(Path("photos/0.png").read_bytes())
    with pytest.raises(RunError, match="would be written to the same file"):
        run_main(["--model", "w.onnx", "--input", "photos", "--output", "out"])
    monkeypatch.setattr("tools.run_onnx.onnxruntime", None)
    with pytest.raises(RunError, match="pip install onnxruntime"):
        run_main(["--model", "w.onnx", "--input", "photos", "--output", "out"])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
@pytest.mark.parametrize("n_colors", [1, 3])
def test_images_are_read_as_the_project_reads_them(tmp_path, mode, n_colors):
    path = tmp_path / "image.tif"
    numbers = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray(numbers[..., 0].astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]) * 200)
    else:
        image = Image.fromarray(numbers).convert(mode)
    image.save(path)
    if mode in ("I", "F"):
        with pytest.raises(RunError, match="32 bits"):
            read(path, n_colors)
    else:
        assert (read(path, n_colors) == read_image(path, n_colors)).all()


def test_portable_networks_need_no_exporter(tiny):
    image = torch.rand(1, 6, 8, 3) * 255
    sr, masks = build_portable(tiny.eval(), "sparse", "float")(image)
    assert sr.shape == (1, 12, 16, 3)
    assert masks.shape == (1, len(tiny.blocks), 6, 8)


def bound_memory():
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30,) * 2)


@pytest.mark.skipif(sys.platform != "linux", reason="bounds the memory of a process")
def test_too_large_an_image_is_named(folder):
    write_png(folder / "large.png", np.zeros((4000, 4000, 3), np.uint8))
    line = f"--model {folder}/w.onnx --input {folder}/large.png --output {folder}/out --threads 1"
    done = subprocess.run(
        [sys.executable, "tools/run_onnx.py", *line.split()], cwd=REPOSITORY, capture_output=True, text=True,
        preexec_fn=bound_memory,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {folder}/large.png: not enough memory for an image of 4000x4000 pixels")
    assert done.stderr.count("\n") == 1


def test_exported_networks_are_timed(folder, capsys):
    benchmark_main(["onnx", "--pre_train", "w.pt", "--images", "photos", "--repeats", "1", "--json", "out.json"])
    report = json.loads(Path("out.json").read_text())
    assert {"onnx_sparse_ms", "onnx_dense_ms", "native_sparse_ms", "native_dense_ms"} <= report["images"][0].keys()
    assert len(capsys.readouterr().out.splitlines()) == 5
