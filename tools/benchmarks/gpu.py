"""Check and measure the fused engine on a GPU, in a few minutes.

    python tools/benchmark.py gpu --json gpu.json

First its results are compared with the masked reference, over extreme masks and channel splits, in every precision; the
exit code is 1 if one is wrong. Trainings that are resumed, or run without a CUDA graph, are compared with those that
are not, bit for bit.
Then inference is timed against the unmasked network. All times are medians in milliseconds. The networks take turns; in
its turn, each is called for eight images in a row, as for the frames of a video.

    unmasked        the same network without masks in its fastest form that PyTorch runs as it is, channels-last
    unmasked_graph  the same in a CUDA graph
    compiled_graph  the same, compiled by torch.compile, in a CUDA graph
    fused           the fused engine, kernel by kernel
    fused_graph     the fused engine in a CUDA graph, as `model.inference` runs it from the second call on
    speedup         unmasked_graph / fused_graph
    over_compiled   compiled_graph / fused_graph
    waits           whether a forward waits for the device

Training steps, and whole epochs with their data, are timed as `benchmark.py train` does. Finally the kernels of a
forward are counted.
"""

import argparse
import copy
import functools
import itertools
import multiprocessing
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from model import load_model
from model.engines.graphs import CudaGraph
from model.smsr import SMSR
from option import file_to_write, positive_int
from program import InputError, usable_processors
from tools.benchmarks import train
from tools.benchmarks.baselines import Unmasked, with_density
from tools.benchmarks.inference import mirrored_photograph
from tools.benchmarks.timing import peak_mib, say, timed
from tools.benchmarks.train import build_step, fixed_schedule
from training_step import StepSettings, TrainingStep
from utility import be_deterministic, write_json

DEFAULT_WEIGHTS = Path(__file__).resolve().parents[2] / "experiment/released/SMSR_X2/model/model_best.pt"
SIZES = ((1, 128, 128), (1, 256, 256), (1, 360, 640), (8, 360, 640), (1, 720, 1280))  # N, H, W
PRECISIONS = {"exact": torch.float32, "tf32": torch.float32, "half": torch.float16, "bf16": torch.bfloat16}
SPLITS = (
    (),
    (0, 0, 0, 0),
    (64, 64, 64, 64),
    (1, 0, 1, 0),
    (0, 64, 0, 64),
    (0, 64, 64, 0),
    (63, 1, 63, 1),
)  # dense channels; (): as is
DENSITIES = (0.0, 0.3, 1.0)
CHECKED_SIZES = ((37, 51), (90, 101), (170, 203), (330, 201))  # of two images; each takes tiles of other sizes
N_CHECKED_STEPS = 16  # of a training; from the fourth of each kind on they are replayed as a CUDA graph
N_UNMASKED_STEPS = 6  # of these, the first ones
N_CALLS = 8  # in a row, of one image
TOLERANCES = dict.fromkeys(PRECISIONS, 4) | {"tf32": 10}  # times the error of the masked computation
TRAINING = ("--precision", "bf16", "--compile", "--epochs", "3")  # of the size of the paper's
COLUMNS = ("unmasked", "unmasked_graph", "compiled_graph", "fused", "fused_graph", "speedup", "over_compiled")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pre_train",
        metavar="FILE",
        type=Path,
        default=DEFAULT_WEIGHTS,
        help="weights of an SMSR network (default: the released ones for x2)",
    )
    parser.add_argument("--repeats", type=positive_int, default=9, help="number of timed rounds")
    parser.add_argument("--json", type=file_to_write(".json"), metavar="FILE", help="write the results to this file")


def run(args: argparse.Namespace) -> int:
    """Check, measure, print, and write the results; returns the exit code. Raises InputError without a GPU."""
    if not torch.cuda.is_available():
        raise InputError("gpu: no CUDA device is available; run it on a machine with an NVIDIA GPU")
    device = torch.device("cuda")
    model = load_model(args.pre_train, "SMSR")
    say("checking results")
    checks = check_all(model, device)
    torch.backends.cudnn.benchmark = True
    model = model.to(device)
    wrong = [check for check in checks if not check["right"]]
    for check in wrong:
        print(f"wrong: {check}")
    print(f"{len(checks) - len(wrong)} of {len(checks)} results are right")
    half = model.half().to(memory_format=torch.channels_last)
    rows = []
    for size in SIZES:
        say(f"timing images {size}")
        rows.append(measure(half, size, args.repeats))
    rows.append(measure(half, SIZES[2], args.repeats, density=1.0))
    print(f"{'LR images':>14} {'density':>8}" + "".join(f" {name:>14}" for name in (*COLUMNS, "MiB")))
    for row in rows:
        times = "".join(f" {row[name]:14.3f}" for name in COLUMNS)
        print(f"{row['size']:>14} {row['density']:8.2f}{times} {row['peak_mib']:14.0f}")
    waits = any(row["waits"] for row in rows)
    say("timing training")
    training = measure_training(device)
    launches = count_launches(half, SIZES[0])  # last: the profiler slows graphs with branches down from then on
    print(f"a forward launches {launches} kernels and waits for the device: {waits}")
    if args.json:
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
        card = torch.cuda.get_device_name()
        results = {"checks": checks, "inference": rows, "training": training, "launches": launches}
        write_json(args.json, {"card": card, "versions": versions} | results)
    return 1 if wrong or waits else 0


def check_all(
    model: SMSR, device: torch.device, engine: str = "fused", compiled: bool = True
) -> list[dict[str, object]]:
    """All checks, each in a process of its own: most of their time is compilation, which takes one core."""
    calls = [functools.partial(check_training, device, compiled)]
    calls += [functools.partial(check_results, model, device, *case, engine=engine) for case in check_cases()]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(calls), usable_processors()), spawn, max_tasks_per_child=1) as pool:
        checks = [pool.submit(call) for call in calls]
        return [check for result in checks for check in result.result()]


def check_cases() -> list[tuple[tuple[int, ...], str, tuple[int, int]]]:
    """(split, precision, size) of the results that are checked: other splits and sizes in one precision."""
    cases = [(SPLITS[0], name, CHECKED_SIZES[0]) for name in PRECISIONS]
    cases += [(split, "half", CHECKED_SIZES[0]) for split in SPLITS[1:]]
    return cases + [(SPLITS[0], "half", size) for size in CHECKED_SIZES[1:]]


@torch.no_grad()
def check_results(
    model: SMSR,
    device: torch.device,
    split: tuple[int, ...],
    precision: str,
    size: tuple[int, int],
    engine: str = "fused",
) -> list[dict[str, object]]:
    """Compare an engine with the masked reference; "right" tells whether a result is within its tolerance.

    The reference is computed in float32. A rounded mask may differ in pixels on its edge, so a result in low precision
    is right if its mean difference is at most 0.005 plus 4 times what the masked computation in this precision has; 10
    times in TF32, to which PyTorch rounds while Triton cuts off.
    """
    height, width = size
    image = mirrored_photograph(2 * height, width, model.n_colors).reshape(2, height, width, model.n_colors)
    checks = []
    for density in DENSITIES:
        _allow_tf32(False)
        case = with_dense_channels(model, split).to(device)
        case.use_engine(engine)
        case = with_density(case, case.to_input(image), density)
        expected = case.masked_forward(case.to_input(image))
        _allow_tf32(precision == "tf32")
        case = case.to(PRECISIONS[precision])
        x = case.to_input(image)
        error = (case.masked_forward(x).float() - expected).abs().mean().item()
        allowed = TOLERANCES[precision] * error + 0.005
        difference = (case.inference(x, "sparse")[0].float() - expected).abs().mean().item()
        check = {"split": split, "density": density, "precision": precision, "size": size}
        check |= {"mean_difference": difference, "allowed": allowed}
        fell_back = sorted(getattr(case._engine, "reported", ()))  # to plain operators
        checks.append(check | {"fell_back": fell_back, "right": difference <= allowed and not fell_back})
    return checks


def _allow_tf32(allowed):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def check_training(device: torch.device, compiled: bool = True) -> list[dict[str, object]]:
    """Compare trainings of a small network, bit for bit."""
    be_deterministic()
    settings = StepSettings(precision=torch.bfloat16, compile=compiled, ema=0.9, gclip=1.0)
    half, full = N_CHECKED_STEPS // 2, N_CHECKED_STEPS
    expected = take_steps(build_small_step(device, settings), 0, full)
    first = take_steps(build_small_step(device, settings), 0, half)
    resumed = build_small_step(device, settings)
    resumed.model.load_state_dict(first["model"])
    resumed.load_state(first)
    eager = build_small_step(device, settings)
    eager._is_graphed = False
    states = {"resumed": take_steps(resumed, half, full), "without a graph": take_steps(eager, 0, full)}
    return [
        {
            "training": name,
            "right": all(torch.equal(state["model"][key], value) for key, value in expected["model"].items()),
        }
        for name, state in states.items()
    ]


def build_small_step(device: torch.device, settings: StepSettings) -> TrainingStep:
    """The step of a small network, with the same weights in every call."""
    torch.manual_seed(0)
    model = SMSR(2, n_feats=16, n_blocks=2, n_layers=2).train()
    return build_step(model.to(device, memory_format=torch.channels_last), settings)


def take_steps(step: TrainingStep, first: int, last: int) -> dict[str, object]:
    """Take the steps `first` to `last` - 1 of a training, which begins without masks, and return its state."""
    device = step.model.device
    schedule = fixed_schedule(device)
    for index in range(first, last):
        lr = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(index)).to(device) * 255
        hr = lr.repeat_interleave(2, 2).repeat_interleave(2, 3)
        tau = None if index < N_UNMASKED_STEPS else schedule["tau"]
        step(lr, hr, noise_seed=index, **(schedule | {"tau": tau}))
    return copy.deepcopy(step.state())


def measure_training(device: torch.device, options: Sequence[str] = TRAINING) -> dict[str, dict]:
    """The times of steps and of whole epochs, for some options of `benchmark.py train`."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args(options)
    steps = train.time_steps(args, device)
    return {"steps": steps, "epochs": train.time_epochs(args, device, steps)}


def with_dense_channels(model: SMSR, split: tuple[int, ...]) -> SMSR:
    """A copy of the network with the first channels of each layer dense, as many as `split` gives; (): unchanged."""
    changed = copy.deepcopy(model)
    for block, (layer, count) in itertools.product(changed.blocks, enumerate(split)):
        block.channel_logits.data[0, :, layer, 0] = torch.arange(model.n_feats) < count
        block.channel_logits.data[0, :, layer, 1] = 0.5
    return changed


@torch.inference_mode()
def measure(model: SMSR, size: tuple[int, int, int], repeats: int, density: float | None = None) -> dict[str, object]:
    """The times of N images of H x W pixels, and the memory that the fused engine needs.

    density: of all masks; None: as they are
    """
    n, height, width = size
    x = photographs(model, size)
    model = model if density is None else with_density(model, x, density)
    model.use_engine("fused")
    _, cost = model.inference(x)
    fused, unmasked = model._engine.fused, Unmasked(model)
    torch._dynamo.reset()  # it compiles a function for a few sizes only
    compiled = torch.compile(unmasked, dynamic=False)
    compiled(x)  # outside of a graph, where it may allocate and measure
    model.inference(x)  # captures a graph
    calls = {
        "unmasked": functools.partial(unmasked, x),
        "unmasked_graph": functools.partial(CudaGraph(lambda images: (unmasked(images),), x), x),
        "compiled_graph": functools.partial(CudaGraph(lambda images: (compiled(images),), x), x),
        "fused": functools.partial(fused, x),
        "fused_graph": functools.partial(model.inference, x),
    }
    in_a_row = max(1, N_CALLS // n)
    times = timed({name: functools.partial(repeat, call, in_a_row) for name, call in calls.items()}, x.device, repeats)
    times = {name: time / in_a_row for name, time in times.items()}
    return {
        "size": f"{n}x{height}x{width}",
        "density": sum(cost.mask_density) / len(cost.mask_density),
        **times,
        "speedup": times["unmasked_graph"] / times["fused_graph"],
        "over_compiled": times["compiled_graph"] / times["fused_graph"],
        "peak_mib": peak_mib(calls["fused"], x.device),
        "waits": waits_for_device(calls["fused_graph"]),
    }


def photographs(model: SMSR, size: tuple[int, int, int]) -> torch.Tensor:
    """N copies of a photograph of H x W pixels, as an input of the network."""
    n, height, width = size
    return model.to_input(np.repeat(mirrored_photograph(height, width, model.n_colors)[None], n, axis=0))


def repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


@torch.inference_mode()
def count_launches(model: SMSR, size: tuple[int, int, int]) -> int:
    """The kernels that a forward of the fused engine starts, fills of memory included."""
    x = photographs(model, size)
    model.use_engine("fused")
    model.inference(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model._engine.fused(x)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def waits_for_device(call: functools.partial) -> bool:
    """Whether a call waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        return False
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
