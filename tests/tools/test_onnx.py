import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageCms

from data.image import read_image, write_png
from model import build_model
from picture import Picture, read_picture, to_8_bits
from program import InputError
from tools.benchmark import main as benchmark_main
from tools.export_onnx import main as export_main
from tools.export_onnx import project_version
from tools.run_onnx import Network
from tools.run_onnx import main as run_main

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny, exported):
    """The present folder: weights w.pt, which `tiny` has too, their graph w.onnx, and three images in photos."""
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
    tiny.eval()
    for path in Path("photos").iterdir():
        sr = read_image(folder / f"out/{path.stem}_x2_SR.png")
        image = read_image(path)
        expected, _ = tiny.inference(torch.tensor(image).permute(2, 0, 1)[None].float(), "sparse")
        assert np.abs(sr - expected[0].permute(1, 2, 0).numpy().clip(0, 255).round()).max() <= 1
        assert np.abs(sr.astype(int) - tiny.upscale(image)).max() <= 1


def test_run_onnx_alone_tells_what_it_needs(folder):
    shutil.copy(REPOSITORY / "tools/run_onnx.py", ".")
    done = subprocess.run([sys.executable, "run_onnx.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: No module named 'files'; put picture.py, files.py and program.py next to")
    assert done.stderr.count("\n") == 1


def test_run_onnx_needs_three_other_files_of_the_project(folder):
    for name in ("tools/run_onnx.py", "picture.py", "files.py", "program.py"):
        shutil.copy(REPOSITORY / name, ".")
    program = "import run_onnx, sys; run_onnx.main(); "
    program += "assert not {'torch', 'utility', 'option', 'model', 'data', 'cv2', 'tifffile'} & set(sys.modules)"
    line = "--model w.onnx --input photos/0.png --output out --threads 1"
    done = subprocess.run([sys.executable, "-c", program, *line.split()], check=True, capture_output=True, text=True)
    assert done.stdout == "1 upscaled image in out\n"


def test_existing_results_are_kept(folder, capsys):
    line = ["--model", "w.onnx", "--input", "photos", "--output", "out"]
    run_main(line)
    Path("out/1_x2_SR.png").unlink()
    Path("out/0_x2_SR.png").write_bytes(b"kept")
    run_main(line)
    assert Path("out/0_x2_SR.png").read_bytes() == b"kept"
    assert read_image(Path("out/1_x2_SR.png")).shape == (20, 14, 3)
    assert capsys.readouterr().out.splitlines()[-1] == "3 upscaled images in out"


def test_metadata(folder):
    metadata = {entry.key: entry.value for entry in onnx.load("w.onnx").metadata_props}
    assert metadata == {
        "smsr_scale": "2",
        "smsr_model": "SMSR",
        "smsr_n_feats": "8",
        "smsr_mode": "sparse",
        "smsr_pixels": "uint8",
        "smsr_precision": "single",
        "smsr_version": project_version(),
        "smsr_weights_sha256": hashlib.sha256(Path("w.pt").read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize("recorded", [True, False])
def test_the_residual_scale_is_read_from_the_weights_or_given(tmp_path, recorded):
    model = build_model("EDSR", scale=2, n_feats=8, n_resblocks=2, res_scale=0.1).eval()
    weights = model.state_dict()
    if not recorded:
        del weights["res_scale"]
    torch.save(weights, tmp_path / "w.pt")
    line = ["--pre_train", str(tmp_path / "w.pt"), "--output", str(tmp_path / "w.onnx"), "--pixels", "float"]
    export_main(line if recorded else [*line, "--res_scale", "0.1"])
    image = np.random.default_rng(0).integers(0, 256, (1, 9, 12, 3)).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "w.onnx", providers=["CPUExecutionProvider"])
    (sr,) = session.run(None, {"image": image})
    expected, _ = model.inference(torch.from_numpy(image).permute(0, 3, 1, 2))
    assert np.abs(sr - expected.permute(0, 2, 3, 1).numpy()).max() < 1e-2


def test_mistakes_in_exporting(folder):
    edsr = build_model("EDSR", scale=2, n_feats=8, n_resblocks=1)
    torch.save(edsr.state_dict(), "edsr.pt")
    for line, message in (
        ("--pre_train edsr.pt --output e.onnx --mode sparse", "--mode sparse: edsr.pt holds an EDSR"),
        ("--pre_train edsr.pt --output e.onnx --masks", "--masks: edsr.pt holds an EDSR"),
        ("--pre_train w.pt --output w.pb", "'w.pb' does not end with .onnx"),
        ("--pre_train absent.pt --output e.onnx", "absent.pt: no such weights file"),
        ("--pre_train edsr.pt --output e.onnx --res_scale 0.1", "edsr.pt holds EDSR weights for res_scale 1, not 0.1"),
    ):
        with pytest.raises(InputError, match=message):
            export_main(line.split())
    export_main(["--pre_train", "edsr.pt", "--output", "e.onnx"])
    assert Network(Path("e.onnx")).scale == 2


def test_an_output_folder_that_cannot_be_created_is_reported_before_the_export(folder, monkeypatch):
    monkeypatch.setattr("tools.export_onnx.export", None)  # would fail otherwise
    with pytest.raises(InputError, match=r"--output w\.pt/e\.onnx: cannot be written: "):
        export_main(["--pre_train", "w.pt", "--output", "w.pt/e.onnx"])


def test_mistakes_in_running(folder, monkeypatch):
    other = onnx.load("w.onnx")
    del other.metadata_props[:]
    onnx.save(other, "other.onnx")
    Path("broken.onnx").write_bytes(b"broken")
    Path("empty").mkdir()
    Path("photos/1_text.png").write_text("no image")
    for line, message in (
        ("--model other.onnx --input photos --output out", "other.onnx: has no metadata smsr_scale; .*export_onnx.py"),
        ("--model broken.onnx --input photos --output out", "broken.onnx: not an ONNX file, or damaged"),
        ("--model absent.onnx --input photos --output out", "absent.onnx: no such file"),
        ("--model w.onnx --input photos --output out --scale 3", "--scale 3: w.onnx upscales by 2"),
        ("--model w.onnx --input absent --output out", "--input absent: no such file or folder"),
        ("--model w.onnx --input empty --output out", "--input empty: contains no images"),
        ("--model w.onnx", "required"),
        ("--model w.onnx --input photos --output w.pt", "--output w.pt: File exists; choose another folder"),
        ("--model w.onnx --input photos --output out --threads 0", "--threads: '0' is not a number from 1 to 256"),
    ):
        with pytest.raises(InputError, match=message):
            run_main(line.split())
    monkeypatch.setattr("tools.run_onnx.onnxruntime", None)
    with pytest.raises(InputError, match="pip install onnxruntime"):
        run_main(["--model", "w.onnx", "--input", "photos", "--output", "out"])


def test_a_broken_image_does_not_end_a_batch_and_nothing_is_done_twice(folder, capsys):
    Path("photos/1_text.png").write_text("")
    Path("photos/0.bmp").write_bytes(Path("photos/0.png").read_bytes())
    line = ["--model", "w.onnx", "--input", "photos", "--output", "out"]
    assert run_main(line) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "4 upscaled images in out"
    assert printed.err.splitlines()[-1].startswith("error: photos/1_text.png: not an image, or broken")
    names = {"0.bmp_x2_SR.png", "0.png_x2_SR.png", "1_x2_SR.png", "2_x2_SR.png"}
    times = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("*.png")}
    assert times.keys() == names
    assert run_main(line) == 1
    assert {path.name: path.stat().st_mtime_ns for path in Path("out").glob("*.png")} == times


def test_results_of_other_images_or_networks_are_not_replaced_or_taken_for_done(folder):
    run_main(["--model", "w.onnx", "--input", "photos/1.png", "--output", "out"])
    before = Path("out/1_x2_SR.png").read_bytes()
    write_png(folder / "others/1.png", np.zeros((9, 9, 3), np.uint8))
    graph = onnx.load("w.onnx")
    graph.doc_string = "another one"
    onnx.save(graph, "other.onnx")
    for model, source in (("w.onnx", "others"), ("other.onnx", "photos")):
        with pytest.raises(InputError, match=r"out/1_x2_SR\.png: already exists, made from another .*--output"):
            run_main(["--model", model, "--input", source, "--output", "out"])
    assert {path.name for path in Path("out").glob("*.png")} == {"1_x2_SR.png"}
    assert Path("out/1_x2_SR.png").read_bytes() == before
    with pytest.raises(InputError, match="is the folder of the images"):
        run_main(["--model", "w.onnx", "--input", "photos", "--output", "photos"])


def test_an_export_keeps_files_that_it_did_not_make(folder):
    torch.manual_seed(1)
    torch.save(build_model("EDSR", scale=2, n_feats=8, n_resblocks=1).state_dict(), "other.pt")
    Path("mine.onnx").write_text("mine")
    for weights, output in (("other.pt", "w.onnx"), ("w.pt", "mine.onnx")):
        before = Path(output).read_bytes()
        with pytest.raises(InputError, match=f"--output {output}: already exists, not made from these weights"):
            export_main(["--pre_train", weights, "--output", output])
        assert Path(output).read_bytes() == before


def test_results_keep_depth_alpha_and_profile(folder, tiny):
    tiny.eval()
    export_main(["--pre_train", "w.pt", "--output", "float.onnx", "--pixels", "float"])
    rng = np.random.default_rng(0)
    pixels, alpha = (rng.integers(0, 2**16, shape, dtype=np.uint16) for shape in ((8, 10, 3), (8, 10)))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = Picture(pixels, alpha, profile)
    write_png(folder / "deep.png", picture)
    for name, deep in (("float.onnx", True), ("w.onnx", False)):
        run_main(["--model", name, "--input", "deep.png", "--output", name[:-5]])
        sr = read_picture(folder / name[:-5] / "deep_x2_SR.png")
        expected = tiny.upscale(pixels)
        if not deep:
            expected = tiny.upscale(to_8_bits(pixels))
        assert sr.pixels.dtype == expected.dtype
        assert np.abs(sr.pixels.astype(int) - expected).max() <= (16 if deep else 1)
        assert np.array_equal(sr.alpha, picture.with_upscaled(expected).alpha)
        assert sr.profile == profile


def test_other_files_of_a_folder_are_skipped_by_name(folder, capsys):
    Path("photos/notes.txt").write_text("")
    Path("photos/phone.HEIC").write_bytes(b"")
    run_main(["--model", "w.onnx", "--input", "photos", "--output", "out"])
    assert len(list(Path("out").glob("*.png"))) == 3
    lines = capsys.readouterr().err.splitlines()
    assert "photos: skipped notes.txt: not images" in lines
    assert "photos: skipped phone.HEIC: HEIC images cannot be read here; convert them to PNG or JPEG" in lines


@pytest.mark.parametrize(
    ("key", "value"), [("scale", "two"), ("scale", "0"), ("scale", "9" * 99), ("n_feats", "-1"), ("n_feats", "")]
)
def test_damaged_metadata_is_reported(folder, key, value):
    graph = onnx.load("w.onnx")
    for entry in graph.metadata_props:
        if entry.key == f"smsr_{key}":
            entry.value = value
    onnx.save(graph, "damaged.onnx")
    with pytest.raises(
        InputError, match=r"damaged\.onnx: not a network of tools/export_onnx\.py, or damaged; export it"
    ):
        Network(Path("damaged.onnx"))


def test_another_graph_with_our_metadata_is_reported(folder):
    for name, other in (("image", "picture"), ("sr", "hr")):
        graph = onnx.load("w.onnx")
        for value in (*graph.graph.input, *graph.graph.output):
            value.name = value.name.replace(name, other)
        for node in graph.graph.node:
            for names in (node.input, node.output):
                names[:] = [other if used == name else used for used in names]
        onnx.save(graph, "other.onnx")
        with pytest.raises(InputError, match=r"other\.onnx: not a network of tools/export_onnx\.py"):
            Network(Path("other.onnx"))


def test_a_graph_of_another_scale_than_it_says_is_reported(folder):
    graph = onnx.load("w.onnx")
    next(entry for entry in graph.metadata_props if entry.key == "smsr_scale").value = "3"
    onnx.save(graph, "other.onnx")
    with pytest.raises(InputError, match=r"photos/0\.png: the network returns an array \(1, 18, 28, 3\); export"):
        run_main(["--model", "other.onnx", "--input", "photos/0.png", "--output", "out"])


def limit_memory():
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30,) * 2)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_an_image_too_large_for_memory_is_named(folder):
    write_png(folder / "large.png", np.zeros((4000, 4000, 3), np.uint8))
    line = f"--model {folder}/w.onnx --input {folder}/large.png --output {folder}/out --threads 1"
    done = subprocess.run(
        [sys.executable, "tools/run_onnx.py", *line.split()],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        preexec_fn=limit_memory,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {folder}/large.png: not enough memory for an image of 4000x4000 pixels")
    assert done.stderr.count("\n") == 1


def test_exported_networks_are_timed(folder, capsys):
    benchmark_main(["onnx", "--pre_train", "w.pt", "--images", "photos", "--repeats", "1", "--json", "out.json"])
    report = json.loads(Path("out.json").read_text())
    assert {"onnx_sparse_ms", "onnx_dense_ms", "native_sparse_ms", "native_dense_ms"} <= report["images"][0].keys()
    assert len(capsys.readouterr().out.splitlines()) == 5
