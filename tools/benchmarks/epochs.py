"""Time whole epochs of a training as main.py runs them, data included, for train.py and gpu.py."""

import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from checkpoint import Experiment
from data import DataSettings, PatchSettings, build_test_sets, build_train_loader
from loss import build_loss
from model.smsr import SMSR
from tools.benchmarks.data import write_pairs
from trainer import Schedules, Trainer, TrainSettings
from training_step import OptimizerSettings, StepSettings, TrainingStep, build_optimizer

N_IMAGES, TRAIN_SIZE = 8, (1356, 2040)  # HR images to train on, of the size of DIV2K's
N_TEST_IMAGES, TEST_SIZE = 10, (500, 500)


class TimedTrainer(Trainer):
    """A trainer that notes how long each evaluation takes."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.evaluation_seconds = []

    def _evaluate(self):
        started = time.perf_counter()
        row = super()._evaluate()
        self.evaluation_seconds.append(time.perf_counter() - started)
        return row


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
    """Train for some epochs on images in a temporary folder, and evaluate after each.

    The first epoch, which also compiles, is not counted. Triton's cache on disk is empty before.

    Args:
        settings: of the step
        steps: per epoch
        model: None: a new SMSR of full size

    Returns:
        {"epoch_seconds": without the evaluation, "images_per_second", "loader", "evaluation_seconds": one per epoch}
    """
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder + "/triton"):
        write_pairs(Path(folder) / "Train", N_IMAGES, TRAIN_SIZE, scale)
        write_pairs(Path(folder) / "Test", N_TEST_IMAGES, TEST_SIZE, scale)
        data = DataSettings(folder, scale=scale)
        ext = "device" if device.type == "cuda" else "sep"
        patches = PatchSettings(
            patch_size=patch_size, batch_size=batch_size, steps=steps, ext=ext, n_threads=n_threads, device=device
        )
        model = (model or SMSR(scale)).to(device, memory_format=torch.channels_last)
        optimizer = build_optimizer(model.parameters(), OptimizerSettings())
        trainer = TimedTrainer(
            TrainingStep(model, build_loss("1*L1").to(device), optimizer, settings),
            loader=build_train_loader(["Train"], data, patches),
            test_sets=build_test_sets(["Test"], data),
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
        "evaluation_seconds": trainer.evaluation_seconds,
    }
