"""The kernels of the fused engine without a GPU: their results in the interpreter, and the code compiled for GPUs."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs the triton package, see requirements-dev.txt")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from model.engines import fused_kernels as kernels
from model.engines.fused import ATTEND_TILE, TILES, FusedPlan, layer_warps
from model.smsr import SMSR
from model.sparse import Plan

STAGES = 3
ROOT = Path(__file__).resolve().parents[3]
POINTERS = {
    **{"order": "*i32", "bits": "*i32", "counts": "*i32", "total": "*i32", "not_finite": "*i32"},
    **{"mask": "*u8", "sums": "*i64", "finished": "*i64", "factor": "*fp32"},
}
NUMBERS = ("H", "W", "PH", "PW", "P", "height", "width", "sn", "sc", "sh", "sw", "stride", "sums_stride")
ATTENTION = ("w1", "b1", "w2", "b2")
SIZES = {"C": 64, "STAGES": STAGES, "DOT": "tf32"}
DENSE = 32 | 16 << 8 | 16 << 16  # dense channels of the layers of the published x2 weights, padded
LAYER = {"LAYERS": 4, "R": 4, "D_OUT": 16}


def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-n", "0", "-W", "ignore::RuntimeWarning", "interpreted_fused.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def compile_ahead(kernel, constants, architecture, dtype="fp16", float32=(), **options):
    """Compile a kernel as it is launched: pointers are aligned to 16 bytes."""
    types = {**POINTERS, **dict.fromkeys(NUMBERS, "i32"), **dict.fromkeys(float32, "*fp32")}
    signature = {name: "constexpr" if name in constants else types.get(name, f"*{dtype}") for name in kernel.arg_names}
    attributes = {
        (index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": 4} | options)


def copied_bytes(ptx):
    """The width of each asynchronous copy from global to shared memory."""
    return [int(width, 0) for width in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x[0-9a-f]+|\d+)", ptx)]


def copying_loops(ptx):
    """The loops that copy from global to shared memory asynchronously."""
    loops = re.findall(r"^(\$L__BB\d+_\d+):(.*?)\bbra(?:\.uni)?\s+\1;", ptx, re.DOTALL | re.MULTILINE)
    return [body for _, body in loops if "cp.async.c" in body]


def spilled_bytes(ptx, architecture, folder):
    """What the assembler says about registers that do not suffice."""
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    (folder / "kernel.ptx").write_text(ptx)
    name = f"sm_{architecture}a" if architecture == 90 else f"sm_{architecture}"
    command = [assembler, "-v", f"--gpu-name={name}", folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(int(number) for number in re.findall(r"(\d+) bytes spill", done.stderr))


def assert_fast(built, architecture, folder, pipelined=True, multiplies=True, few_channels=False, reads_images=False):
    ptx = built.asm["ptx"]
    if not reads_images:
        assert not re.findall(r"ld\.global[.\w]*\.[bu]16\b", ptx)  # of a single number, which cannot be asynchronous
    if multiplies:
        assert "wgmma.mma_async" in ptx or "mma.sync" in ptx  # tensor cores
    if pipelined:
        copied = copied_bytes(ptx)  # loads of the main loop are asynchronous and 16 bytes wide
        assert copied.count(16) >= 2 * STAGES
        assert not any("ld.shared" in loop for loop in copying_loops(ptx))  # threads exchange nothing there
        narrow = STAGES if few_channels else 0  # weights of few channels do not fill all threads
        assert len(copied) - copied.count(16) <= narrow
    assert spilled_bytes(ptx, architecture, folder) == 0
    assert built.metadata.shared < 100 * 2**10


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("tile", "last", "d_in"), [(128, False, 64), (128, False, 32), (128, True, 16), (128, True, 0), (64, True, 32)]
)
def test_important_layers_are_pipelined_on_tensor_cores(tile, last, d_in, dtype, architecture, tmp_path):
    constants = SIZES | LAYER | {"BM": tile, "LAST": last, "D_IN": d_in}
    options = {"float32": ATTENTION, "num_warps": layer_warps(64, tile, last)}
    built = compile_ahead(kernels.important_layer, constants, architecture, dtype, **options)
    assert_fast(built, architecture, tmp_path)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("d_in", "d_out"), [(64, 32), (32, 16), (16, 16)])
def test_dense_layers_are_pipelined_on_tensor_cores(d_in, d_out, architecture, tmp_path):
    constants = {"STAGES": STAGES, "DOT": "tf32", "BM": 128, "D_IN": d_in, "D_OUT": d_out}
    assert_fast(compile_ahead(kernels.dense_layer, constants, architecture), architecture, tmp_path, few_channels=True)


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_largest_kernels_fit(architecture, tmp_path):
    tile, stages = TILES[128, 2]
    constants = {"C": 128, "BM": tile, "LAYERS": 4, "DOT": "tf32"}
    layer_constants = constants | {"R": 8, "STAGES": stages, "LAST": True, "D_IN": 64, "D_OUT": 0}
    layer = compile_ahead(kernels.important_layer, layer_constants, architecture, float32=ATTENTION, num_warps=8)
    assert_fast(layer, architecture, tmp_path)
    attend_constants = constants | {"DENSE": 128 | 64 << 8 | 32 << 16}
    attend = compile_ahead(kernels.attend, attend_constants, architecture, num_warps=8)
    assert_fast(attend, architecture, tmp_path, pipelined=False)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("channels", [64, 128])
def test_float32_fits(channels, architecture):
    tile, stages = TILES[channels, 4]
    constants = LAYER | {"C": channels, "BM": tile, "STAGES": stages, "DOT": "tf32", "LAST": True, "D_IN": 16}
    options = {"float32": ATTENTION, "num_warps": layer_warps(channels, tile, is_last=True)}
    built = compile_ahead(kernels.important_layer, constants, architecture, "fp32", **options)
    assert built.metadata.shared < 100 * 2**10


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize(
    ("name", "constants", "options"),
    [
        ("conv3x3", {"ADD": True}, {"num_warps": 8}),
        ("mask_pool", {"R": 16, "STAGES": 2}, {}),
        ("reduce", {"BLOCKS": 5}, {}),
    ],
)
def test_convolutions_are_pipelined_on_tensor_cores(name, constants, options, tile, architecture, tmp_path):
    built = compile_ahead(getattr(kernels, name), SIZES | {"BM": tile} | constants, architecture, **options)
    assert_fast(built, architecture, tmp_path)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("scale", "k", "tile", "chunk"),
    [(2, 16, 128, 64), (2, 16, 32, 64), (3, 32, 128, 64), (4, 64, 64, 64), (5, 128, 32, 32), (8, 256, 16, 16)],
)
def test_the_reconstruction_is_pipelined_on_tensor_cores(scale, k, tile, chunk, architecture, tmp_path):
    constants = SIZES | {"BM": tile, "STAGES": 2, "COLORS": 3, "SCALE": scale, "K": k, "TAPS": 112, "CHUNK": chunk}
    built = compile_ahead(kernels.reconstruct, constants, architecture, num_warps=8)
    assert_fast(built, architecture, tmp_path, few_channels=k > 64, reads_images=True)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("name", "constants", "float32", "options"),
    [
        ("first_conv", {"COLORS": 3, "K": 32, "C": 64, "BM": 128, "DOT": "tf32"}, (), {}),
        ("mask_decide", {"R": 16, "BM": 128, "STAGES": STAGES, "DOT": "tf32"}, ("decide", "decide_bias"), {}),
        ("kernel_map", {"BM": 128}, (), {}),
        ("attend", {"C": 64, "BM": ATTEND_TILE, "LAYERS": 4, "DENSE": DENSE, "DOT": "tf32"}, (), {}),
        ("attend", {"C": 64, "BM": ATTEND_TILE, "LAYERS": 4, "DENSE": 0, "DOT": "tf32"}, (), {}),
    ],
)
def test_other_kernels_do_not_spill(name, constants, float32, options, architecture, tmp_path):
    built = compile_ahead(getattr(kernels, name), constants, architecture, float32=float32, **options)
    multiplies = name != "kernel_map" and constants.get("DENSE") != 0
    reads_images = name == "first_conv"
    assert_fast(built, architecture, tmp_path, pipelined=False, multiplies=multiplies, reads_images=reads_images)


class FakeDriver:
    """As much of a GPU as compiling and loading kernels needs."""

    def __init__(self):
        self.utils = self
        self.loading_threads = []  # one entry per kernel

    def launcher_cls(self, source, metadata):
        self.loading_threads.append(threading.current_thread())

    def get_device_properties(self, device):
        return {"max_shared_mem": 100 * 2**10, "warpSize": 32}

    def load_binary(self, *_):
        return None, None, 0, 0, 1024

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def fake_gpu(monkeypatch):
    driver = FakeDriver()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    return driver


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_all_kernels_are_compiled_ahead(dtype, fake_gpu, monkeypatch):
    plan = FusedPlan(Plan(SMSR(2).to(dtype).eval()))
    plan.compile(torch.zeros(1, 3, 20, 20, dtype=dtype))
    assert fake_gpu.loading_threads
    assert threading.main_thread() not in fake_gpu.loading_threads
    compiled = []
    monkeypatch.setattr(JITFunction, "_do_compile", lambda *args: compiled.append(args))
    for n in (1, 2, 3):  # other sizes and addresses need no other kernels
        plan.compile(torch.zeros(n, 3, 10, 22, dtype=dtype))
    assert not compiled


def test_a_kernel_that_fails_to_compile_does_not_hinder_others(fake_gpu, monkeypatch):
    plan = FusedPlan(Plan(SMSR(2, n_feats=16, n_blocks=1, n_layers=1).eval()))
    x = torch.zeros(1, 3, 8, 8)

    def fail(*_, **__):
        raise RuntimeError("no compiler")

    with monkeypatch.context() as broken:
        broken.setattr(triton.compiler.compiler.ASTSource, "make_ir", fail)
        broken.setenv("TRITON_ALWAYS_COMPILE", "1")
        plan.compile(x)
    compiled = []
    monkeypatch.setattr(JITFunction, "_do_compile", lambda *args: compiled.append(args))
    plan.compile(x)
    assert {"first_conv", "attend", "reduce"} <= {args[0].__name__ for args in compiled}  # again, as if never tried
