import copy
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import engines, load_model
from model.engines import pick_engine
from model.engines.build import cache_folder, find_compiler, processor_flags
from model.engines.native import NativeEngine, NativePlan
from model.smsr import SMSR
from model.sparse import Plan
from program import InputError
from tests.model.engines.native_case import build_driver, run_driver
from tests.model.masks import with_dense_channels, with_density

pytestmark = pytest.mark.skipif(os.name == "nt" or not find_compiler(), reason="needs a C++ compiler")
ROOT = Path(__file__).resolve().parents[3]


def build_model(n_feats=16, densities=(0.3, 0.7), dense=(9, 5, 0, 16), scale=2, n_colors=3):
    """A network with one module per density, and these numbers of dense channels in its layers."""
    model = SMSR(scale, n_feats=n_feats, n_blocks=len(densities), n_layers=len(dense), n_colors=n_colors).eval()
    for block, density in zip(model.blocks, densities, strict=True):
        with_density(block, torch.randn(1, n_feats, 32, 32), density)
        with_dense_channels(block, dense)
    with torch.no_grad():
        for parameter in model.tail.parameters():
            parameter *= 8  # so that the features matter
    return model


@torch.no_grad()
def assert_as_masked(model, x, tile=None):
    """The native engine gives the masked dense image, and the masks and cost of the plain one."""
    plan = Plan(model)
    sr, cost = NativeEngine(plan)(x, "auto", tile)
    plain, plain_cost = plan(x, "sparse", tile)
    assert sr.shape == plain.shape
    torch.testing.assert_close(sr, model.masked_forward(x), atol=1e-3, rtol=0)
    for mask, expected in zip(cost.masks, plain_cost.masks, strict=True):
        assert torch.equal(mask, expected)
    for field in ("pixels", "macs", "macs_dense", "important", "active"):
        assert getattr(cost, field) == getattr(plain_cost, field)
    return sr, cost


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 2),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    densities=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    dense=st.lists(st.integers(0, 16), min_size=1, max_size=6),
    scale=st.integers(1, 4),
    n_colors=st.sampled_from([1, 3]),
)
def test_equals_the_masked_dense_computation(seed, n, size, densities, dense, scale, n_colors):
    torch.manual_seed(seed)
    model = build_model(16, densities, dense, scale, n_colors)
    assert_as_masked(model, torch.rand(n, n_colors, *size) * 255)


@pytest.mark.parametrize("n_feats", [48, 64, 128])
def test_other_numbers_of_features(n_feats):
    for counts in ((0.4, 0.1, 0.02, 0), (0, 1, 0.3, 1), (1, 0.7, 0.5, 0.1)):
        model = build_model(n_feats, dense=[round(share * n_feats) for share in counts])
        assert_as_masked(model, torch.rand(2, 3, 27, 35) * 255)


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dense", [(0, 0, 0), (16, 16, 16), (1, 0, 1), (0, 16, 0), (16, 0, 16), (15, 1, 9), (5,), (0,)])
@pytest.mark.parametrize("size", [(1, 1), (2, 30), (31, 2), (6, 10)])
def test_extreme_masks_and_channel_masks(density, dense, size):
    assert_as_masked(build_model(densities=(density,), dense=dense), torch.rand(2, 3, *size) * 255)


@pytest.mark.parametrize("tile", [1, 150, 200])
@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 7])
def test_strips_change_nothing(tile, n_layers):
    model = build_model(densities=(0.1, 0.5), dense=(16, 9, 3, 5, 0, 7, 2)[:n_layers])
    x = torch.rand(2, 3, 301, 170) * 255
    whole, cost = NativeEngine(Plan(model))(x, "auto", 10**4)
    sr, tiled_cost = assert_as_masked(model, x, tile)
    assert (sr - whole).abs().max() < 1e-4
    assert cost.important == tiled_cost.important


def test_the_same_bits_for_any_number_of_threads():
    model = build_model()
    engine, x = NativeEngine(Plan(model)), torch.rand(2, 3, 90, 170) * 255
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5, 1):
            torch.set_num_threads(count)
            results.append(engine(x)[0])
    finally:
        torch.set_num_threads(threads)
    for one, two in itertools.pairwise(results):
        assert torch.equal(one, two)


def test_one_engine_in_several_python_threads():
    engine = NativeEngine(Plan(build_model()))
    images = [torch.rand(1, 3, 20 + i, 30) * 255 for i in range(8)]
    expected = [engine(x)[0] for x in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for (result, _), alone in zip(pool.map(engine, images), expected, strict=True):
                assert torch.equal(result, alone)


def test_workspaces_do_not_leak_from_call_to_call():
    model = build_model()
    engine = NativeEngine(Plan(model))
    for size in ((40, 40), (6, 8), (30, 50), (1, 1), (200, 16), (16, 200)):
        x = torch.rand(1, 3, *size) * 255
        assert torch.equal(engine(x)[0], NativeEngine(Plan(model))(x)[0])


def test_ties_are_not_important():
    model = build_model()
    with torch.no_grad():
        for block in model.blocks:
            logits = block.spatial_mask.logits
            logits.weight[:, 1], logits.bias[1] = logits.weight[:, 0], logits.bias[0]
    _, cost = assert_as_masked(model, torch.rand(1, 3, 20, 20) * 255)
    assert cost.important == (0, 0)


def test_strided_images_and_inference_mode():
    model = build_model()
    x = torch.rand(2, 3, 21, 18) * 255
    engine, expected = NativeEngine(Plan(model)), model.masked_forward(x).detach()
    for same in (x.contiguous(memory_format=torch.channels_last), x.flip(3).flip(3), x.repeat(1, 1, 1, 2)[..., :18]):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            sr = engine(same)[0]
        assert (sr - expected).abs().max() < 1e-3


def test_nan_and_infinity_are_refused():
    engine = NativeEngine(Plan(build_model()))
    for value in (torch.nan, torch.inf):
        x = torch.rand(2, 3, 8, 8)
        x[1, 1, 2, 3] = value
        with pytest.raises(InputError, match=f"image 1 of the batch is {value} at row 2, column 3, channel 1"):
            engine(x)


@torch.no_grad()
def test_what_is_not_native_runs_by_the_plain_plan():
    model = build_model()
    engine, plain, x = NativeEngine(Plan(model)), Plan(model), torch.rand(1, 3, 8, 8)
    assert engine(x, "dense")[1].macs_run == plain(x, "dense")[1].macs_run
    with pytest.raises(InputError, match="no such mode 'fast'"):
        engine(x, "fast")


def test_where_the_native_engine_is_picked(caplog):
    engines._report.cache_clear()
    caplog.set_level("INFO", "smsr")
    assert isinstance(pick_engine(Plan(build_model())), NativeEngine)
    assert isinstance(build_model()._current_engine(), NativeEngine)
    for other in (
        build_model().double(),
        build_model().bfloat16(),
        SMSR(2, n_feats=8),
        SMSR(2, n_feats=144, n_blocks=1),
    ):
        assert isinstance(pick_engine(Plan(other)), Plan)
    for n_feats in (8, 144):
        problem = f"native engine: runs networks with a multiple of 16 features up to 128, not {n_feats}; using plain"
        assert sum(message.startswith(problem) for message in caplog.messages) == 1


def test_weights_of_another_shape_are_left_to_the_plain_engine(caplog):
    engines._report.cache_clear()
    caplog.set_level("INFO", "smsr")
    model = build_model()
    model.blocks[1].attention[2] = torch.nn.Conv2d(1, 15, 1)
    assert isinstance(pick_engine(Plan(model)), Plan)
    assert "native engine: cannot run weights of the shape (15, 1) instead of (16, 1); using plain" in caplog.text


def test_an_unmasked_network():
    model = build_model(dense=(9, 5, 0))
    x = torch.rand(1, 3, 22, 30) * 255
    sr = NativePlan(Plan(model), masked=False)(x).sr
    unmasked = copy.deepcopy(model)
    with torch.no_grad():
        for block in unmasked.blocks:
            block.spatial_mask.logits.bias[1] += 1000
        torch.testing.assert_close(sr, unmasked.masked_forward(x), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("tile", "maps"), [(None, 5.8), (256, 3.5)])
def test_memory_of_a_large_image(tile, maps):
    plan = NativePlan(Plan(build_model(64, dense=(24, 9, 3, 0))))
    height, width = 1080, 1920

    class Sizes:  # a workspace that allocates nothing
        def rows(self, name, count, channels, like):
            self.count = count * channels
            return torch.empty(0)

    image, sizes = torch.empty(3, height, width, device="meta"), Sizes()
    image.data_ptr = lambda: 0
    plan._prepare(image, image, tile, sizes)
    assert sizes.count < maps * 64 * height * width


def test_published_weights_give_the_masks_of_the_plain_engine(shared):
    model = load_model(shared / "reference/SMSR_X2.pt")
    for name in ("butterfly", "woman"):
        lr = iio.imread(shared / f"data/benchmark/Set5/LR_bicubic/X2/{name}.png")
        assert_as_masked(model, torch.from_numpy(lr).permute(2, 0, 1)[None].float())


# ---- processes -------------------------------------------------------------------------------------------------------

SCRIPT = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
sys.path.insert(0, {root!r})
from model.smsr import SMSR
torch.manual_seed(0)
model, x = SMSR(2, n_feats=16, n_blocks=1, n_layers=2).eval(), torch.rand(1, 3, 40, 40) * 255
"""


def run_script(lines, cache, **environment):
    """Run Python lines after SCRIPT in a new process. Returns what it prints, by line."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)} | environment
    code = SCRIPT.format(root=str(ROOT)) + lines
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


REPORT = "print((model(x) - model.masked_forward(x)).abs().max().item() < 1e-3, type(model._engine).__name__)"


def test_processes_that_build_at_once_and_those_that_find_or_repair_the_library(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda _: run_script(REPORT, tmp_path), range(2)))
    for output in outputs:
        assert [line.partition(" by ")[0] for line in output[:-1]] in ([], ["native engine: built"])
        assert output[-1] == "True NativeEngine"
    (library,) = (tmp_path / "smsr").iterdir()
    assert run_script(REPORT, tmp_path, PATH="", CXX="") == ["True NativeEngine"]  # built ahead, no compiler
    library.write_bytes(b"damaged")
    assert run_script(REPORT, tmp_path)[-1] == "True NativeEngine"
    assert list((tmp_path / "smsr").iterdir()) == [library]
    assert run_script(REPORT, tmp_path) == ["True NativeEngine"]


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    (tmp_path / "tmp").mkdir()
    output = run_script(REPORT, tmp_path / "cache", TMPDIR=str(tmp_path / "tmp"))
    assert output[-1] == "True NativeEngine"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_relative_cache_is_ignored_as_its_standard_demands(monkeypatch):
    for value in ("", "cache", "./cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == Path.home() / ".cache/smsr"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/smsr")


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"CXX": "false"}, "CXX=false failed (exit code 1)"),
        ({"CXX": "no-such-compiler"}, "cannot run CXX=no-such-compiler (No such file or directory)"),
        ({"CXX": "a 'b"}, "CXX=a 'b is not a command (No closing quotation)"),
        ({"CXX": "{folder}/broken"}, "CXX={folder}/broken failed (native.cpp:1: error: broken)"),
        ({"CXX": " ", "PATH": ""}, "found no C++ compiler; install g++ or clang++, or name one in CXX"),
        ({"CXX": "", "PATH": ""}, "found no C++ compiler; install g++ or clang++, or name one in CXX"),
        ({"ATEN_CPU_CAPABILITY": "default"}, "needs a processor with AVX2, AVX-512 or NEON, not x86_64 DEFAULT"),
    ],
)
def test_without_a_working_compiler_the_plain_engine_runs(tmp_path, environment, problem):
    if "ATEN_CPU_CAPABILITY" in environment and not processor_flags():
        pytest.skip("this processor always has its vectors")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit\necho native.cpp:1: error: broken >&2\nexit 1\n")
    broken.chmod(0o755)
    environment = {name: value.format(folder=tmp_path) for name, value in environment.items()}
    output = run_script(f"{REPORT}\nwith torch.no_grad(): model.tail.conv.bias += 1\nmodel(x)", tmp_path, **environment)
    expected = f"native engine: {problem.format(folder=tmp_path)}; using plain operators, which are slower"
    assert output == [expected, "True Plan"]
    assert list(tmp_path.glob("smsr/*")) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_a_forked_worker():
    lines = """
import os
torch.set_num_threads(2)
expected = model(x)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as the workers of a data loader do: the threads of OpenMP do not survive a fork
    os._exit(0 if torch.equal(model(x), expected) else 1)
print(os.waitpid(child, 0)[1])
"""
    cache = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    assert run_script(lines, cache)[-1] == "0"


def test_ctrl_c_between_strips(interruptible):
    model = build_model(64, densities=(0.5,) * 8, dense=(24, 9, 3, 0))
    engine, x = NativeEngine(Plan(model)), torch.rand(1, 3, 400, 400) * 255
    small = x[..., :20, :20]
    expected = engine(small)[0]
    timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT))

    def run():
        timer.start()
        engine(x)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert torch.equal(engine(small)[0], expected)


# ---- the same source, by other compilers ----------------------------------------------------------------------------

DEGENERATE = [  # densities, dense channels, size, rows of a strip, whether the head is kept
    ((0.3, 0.7), (9, 5, 0, 16), (30, 26), 30, True),
    ((0.3, 0.7), (9, 5, 0, 16), (30, 26), 4, False),
    ((0.0, 1.0), (16, 16), (2, 2), 2, True),
    ((0.5,), (0, 3, 0, 1, 7, 2, 0), (50, 2), 2, False),
    ((0.5,), (5,), (2, 50), 2, True),
    ((1.0, 0.0), (0, 0, 0), (6, 24), 2, False),
]


def assert_driver_works(command, folder, vector, model, size, strip_rows, keep_head, threads):
    x = torch.rand(3, *size) * 255
    with torch.no_grad():
        sr, masks = run_driver(
            command, folder, model, x, vector, strip_rows=strip_rows, keep_head=keep_head, threads=threads
        )
        torch.testing.assert_close(sr, model.masked_forward(x[None])[0], atol=1e-3, rtol=0)
        expected = torch.cat(Plan(model)(x[None], "sparse")[1].masks)[:, 0]
    assert torch.equal(masks.bool(), expected)


def native_vector():
    return 16 if "-mavx512f" in processor_flags() else 8 if "-mavx2" in processor_flags() else 4


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_under_sanitizers(sanitizers, tmp_path, monkeypatch):
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-O1", *processor_flags()]
    probe = [*find_compiler(), *flags, "-x", "c++", "-", "-o", tmp_path / "probe"]
    works = subprocess.run(probe, input="int main() {}", text=True, capture_output=True).returncode == 0
    if not works or subprocess.run([tmp_path / "probe"], capture_output=True).returncode:
        pytest.skip("this compiler has no such sanitizers")
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")  # the driver frees nothing
    program = build_driver(find_compiler(), Plan(build_model()), tmp_path, *flags)
    for densities, dense, *case in DEGENERATE:
        model = build_model(densities=densities, dense=dense, scale=5)
        assert_driver_works([program], tmp_path, native_vector(), model, *case, threads=3)


def test_neon_in_an_emulator(tmp_path):
    if not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"):
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-user")
    program = build_driver(["aarch64-linux-gnu-g++"], Plan(build_model()), tmp_path, "-static")
    for densities, dense, *case in DEGENERATE:
        model = build_model(densities=densities, dense=dense)
        assert_driver_works(["qemu-aarch64", program], tmp_path, 4, model, *case, threads=2)


@pytest.mark.skipif(not shutil.which("clang++"), reason="needs clang++")
def test_with_clang(tmp_path):
    program = build_driver(["clang++"], Plan(build_model()), tmp_path, *processor_flags())
    for densities, dense, *case in DEGENERATE:
        model = build_model(densities=densities, dense=dense)
        assert_driver_works([program], tmp_path, native_vector(), model, *case, threads=2)
