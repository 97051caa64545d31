"""Compare the time of training steps: a plain loop, main.py's step, its precisions, and compilation.

    python tools/benchmark.py train --baseline --batch_size 16 --patch_size 96 --device cuda

A step is complete (masks, forward, losses, backward, update), for a network of full size and random patches. All kinds
of steps run in one process and take turns, after a warm-up; times are medians.

    baseline  a plain loop: float32, eager, contiguous memory, the loss read after every step, and a forward with its
              branches written out: every layer convolves dense and sparse features one after the other
    single    main.py's step
    bf16      the step with --precision bf16
    half      the step with --precision half
    +compile  the step with --compile, too
    unmasked  before the name: the step of an epoch without masks (--unmasked_epochs)

With --epochs, each kind of main.py's step is then run as a user would: whole epochs, with images from a folder. `waits`
is the share of the time of an epoch in which the device would not be busy if its steps took as long as the bare ones.
"""

import argparse
import copy
import functools
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from loss import build_loss
from model.engines.graphs import WARM_UP
from model.smsr import SMSR
from option import count, file_to_write, positive_int
from tools.benchmarks.baselines import PlainTraining
from tools.benchmarks.epochs import measure_epochs
from tools.benchmarks.timing import say, timed
from training_step import OptimizerSettings, StepSettings, TrainingStep, build_optimizer
from utility import PRECISIONS, pick_device, write_json

TAU, LAMBDA = 0.7, 0.1  # of some epoch: the time of a step does not depend on them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--baseline", action="store_true", help="time the plain loop, too, and compare with it")
    parser.add_argument(
        "--precision", choices=PRECISIONS, nargs="+", default=["single", "bf16"], help="which precisions to time"
    )
    parser.add_argument("--compile", action="store_true", help="time each precision compiled, too")
    parser.add_argument("--unmasked", action="store_true", help="time each kind without masks, too")
    parser.add_argument("--scale", type=positive_int, default=2, help="upscaling factor")
    parser.add_argument("--batch_size", type=positive_int, default=16, help="patches per batch")
    parser.add_argument("--patch_size", type=positive_int, default=96, help="low-resolution pixels per side of a patch")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--threads", type=positive_int, help="number of CPU threads (default: PyTorch's choice)")
    parser.add_argument("--repeats", type=positive_int, default=11, help="number of timed steps of each kind")
    parser.add_argument("--epochs", type=count, default=0, help="also time this many whole epochs of each kind")
    parser.add_argument("--steps", type=positive_int, default=100, help="batches per epoch")
    parser.add_argument("--json", type=file_to_write(".json"), metavar="FILE", help="write the results to this file")


def run(args: argparse.Namespace) -> None:
    """Measure, print tables, and write the results where --json asks for it. Raises InputError."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    steps = time_steps(args, device)
    epochs = time_epochs(args, device, steps) if args.epochs else {}
    if args.json:
        settings = {key: getattr(args, key) for key in ("scale", "batch_size", "patch_size")}
        settings |= {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
        write_json(args.json, settings | {"steps": steps, "epochs": epochs})


def time_steps(args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """Time and print bare steps, on the same patches again and again, by name."""
    steps = build_steps(args, device)
    for step in steps.values() if device.type == "cuda" else ():
        for _ in range(WARM_UP):  # then it becomes a CUDA graph
            step()
    say(f"timing {args.repeats + 2} steps each of: {', '.join(steps)}")
    times = timed(steps, device, args.repeats)
    reference = times.get("baseline", times[next(iter(times))])
    rows = {
        name: {"step_ms": ms, "images_per_second": args.batch_size / ms * 1e3, "speedup": reference / ms}
        for name, ms in times.items()
    }
    print(f"{'step':22} {'ms':>9} {'images/s':>9} {'speedup':>8}")
    for name, row in rows.items():
        print(f"{name:22} {row['step_ms']:9.1f} {row['images_per_second']:9.1f} {row['speedup']:8.2f}")
    return rows


def time_epochs(args: argparse.Namespace, device: torch.device, steps: dict[str, dict]) -> dict[str, dict]:
    """Time and print whole epochs of every kind of main.py's step; `steps` are the rows of the bare ones."""
    rows = {}
    print(f"{'epochs':16} {'images/s':>9} {'waits':>6} {'evaluation, first and second time':>34}")
    for name, settings in reversed(step_kinds(args).items()):  # the first evaluation compiles kernels
        say(f"training for {args.epochs + 1} epochs of {args.steps} steps: {name}")
        row = rows[name] = measure_epochs(
            settings,
            device,
            scale=args.scale,
            batch_size=args.batch_size,
            patch_size=args.patch_size,
            steps=args.steps,
            epochs=args.epochs,
        )
        row["waits"] = max(0, 1 - row["images_per_second"] / steps[name]["images_per_second"])
        first, second, *_ = row["evaluation_seconds"]
        print(f"{name:16} {row['images_per_second']:9.1f} {row['waits']:6.0%} {first:26.2f} {second:5.2f} s")
    return rows


def step_kinds(args: argparse.Namespace) -> dict[str, StepSettings]:
    """The kinds of main.py's step that the options ask for, by name."""
    kinds = {}
    for precision, compiled in itertools.product(args.precision, (False, True) if args.compile else (False,)):
        name = f"{precision}+compile" if compiled else precision
        kinds[name] = StepSettings(precision=PRECISIONS[precision], compile=compiled)
    return kinds


def build_steps(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], object]]:
    """{name: a call that takes one step}; each trains its own copy of the same network on the same patches."""
    torch.manual_seed(0)
    model = SMSR(args.scale).train()
    lr = torch.rand(args.batch_size, model.n_colors, args.patch_size, args.patch_size, device=device) * 255
    hr = F.interpolate(lr, scale_factor=args.scale)
    steps = {}
    if args.baseline:
        plain = PlainTraining(copy.deepcopy(model).to(device))
        steps["baseline"] = functools.partial(plain.step, lr, hr, tau=TAU, lambda_=LAMBDA)
    lr, hr = (images.contiguous(memory_format=torch.channels_last) for images in (lr, hr))
    masked = fixed_schedule(device)
    schedules = {"": masked} | ({"unmasked ": masked | {"tau": None}} if args.unmasked else {})
    for (name, settings), (prefix, numbers) in itertools.product(step_kinds(args).items(), schedules.items()):
        step = build_step(copy.deepcopy(model).to(device, memory_format=torch.channels_last), settings)
        steps[prefix + name] = functools.partial(step, lr, hr, **numbers, noise_seed=0)
    return steps


def fixed_schedule(device: torch.device) -> dict[str, torch.Tensor]:
    """The numbers that a step takes from the schedules, of some epoch."""
    numbers = {"tau": TAU, "lambda_": LAMBDA, "largest_loss": math.inf}
    return {name: torch.tensor(value, device=device) for name, value in numbers.items()}


def build_step(model: SMSR, settings: StepSettings) -> TrainingStep:
    """main.py's step with L1 and ADAM."""
    optimizer = build_optimizer(model.parameters(), OptimizerSettings())
    return TrainingStep(model, build_loss("1*L1").to(model.device), optimizer, settings)
