"""Time whole epochs of a training as main.py runs them, data included, for train.py and gpu.py."""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from checkpoint import Experiment
from data import DataSettings, PatchSettings, build_test_sets, build_train_loader
from evaluation import evaluate
from loss import build_loss
from model.inference import build_predictor
from model.smsr import SMSR
from tools.benchmarks.data import write_pairs
from trainer import Schedules, Trainer, TrainSettings
from training_step import OptimizerSettings, StepSettings, TrainingStep, build_optimizer
from utility import synchronize

N_IMAGES, TRAIN_SIZE = 8, (1356, 2040)  # HR images to train on, of the size of DIV2K's
N_TEST_IMAGES, TEST_SIZE = 10, (500, 500)


def measure_epochs(
    settings: StepSettings,
    device: torch.device,
    scale: int = 2,
    batch_size: int = 16,
    patch_size: int = 96,
    steps: int = 100,
    epochs: int = 3,
    n_threads: int = 4,
    model: SMSR | None = None,
) -> dict[str, object]:
    """Train for some epochs on images in a temporary folder. The first epoch, which also compiles, is not counted.

    Args:
        settings: of the step
        steps: per epoch
        model: None: a new SMSR of full size

    Returns:
        {"epoch_seconds": without the evaluation, "images_per_second", "loader", "evaluation_seconds": [first, second]}
    """
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder) / "Train", N_IMAGES, TRAIN_SIZE, scale)
        write_pairs(Path(folder) / "Test", N_TEST_IMAGES, TEST_SIZE, scale)
        data = DataSettings(folder, scale=scale)
        ext = "device" if device.type == "cuda" else "sep"
        patches = PatchSettings(
            patch_size=patch_size, batch_size=batch_size, steps=steps, ext=ext, n_threads=n_threads, device=device
        )
        model = (model or SMSR(scale)).to(device, memory_format=torch.channels_last)
        test_sets = build_test_sets(["Test"], data)
        evaluation_seconds = [_seconds_to_evaluate(model, *test_sets) for _ in range(2)]
        optimizer = build_optimizer(model.parameters(), OptimizerSettings())
        trainer = Trainer(
            TrainingStep(model, build_loss("1*L1").to(device), optimizer, settings),
            loader=build_train_loader(["Train"], data, patches),
            test_sets=test_sets,
            experiment=Experiment("benchmark", folder),
            schedules=Schedules(),
            settings=TrainSettings(),
        )
        trainer.experiment.create()
        trainer.fit(epochs + 1)
        seconds = statistics.median(row["seconds"] for row in trainer.history[1:])
    return {
        "epoch_seconds": seconds,
        "images_per_second": steps * batch_size / seconds,
        "loader": type(trainer.loader).__name__,
        "evaluation_seconds": evaluation_seconds,
    }


def _seconds_to_evaluate(model, images):
    started = time.perf_counter()
    evaluate(model, images, build_predictor(model), warm_up=False)
    synchronize(model.device)
    return time.perf_counter() - started
