"""SMSR: Learning Sparse Masks for Efficient Image Super-Resolution. Train, test, upscale."""

import argparse
import functools
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.contrib.logging import logging_redirect_tqdm

import distributed
import option
import visualize
from checkpoint import Experiment, write_options
from data import DataSettings, PatchSettings, build_test_sets, build_train_loader
from data.device import DeviceLoader
from data.image import write_png
from data.srdata import PatchLoader, WholeImages
from data.video import upscale_video
from evaluation import evaluate, table
from loss import build_loss
from loss.adversarial import AdversarialSettings
from model import StateDict, build_model, read_weights
from model.inference import build_predictor
from model.network import Network, Predict
from perceptual import Measure, build_measures
from picture import to_8_bits
from recovery import resume_hint
from summary import TensorBoard, check_tensorboard
from trainer import Schedules, Trainer, TrainSettings, dry_run
from training_step import OptimizerSettings, StepSettings, TrainingStep, build_optimizer
from utility import INTERRUPTED, PRECISIONS, InputError, be_deterministic, logger, run_program, write_json, write_whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with a command line; returns the exit code. Raises InputError."""
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO, force=True)
    args = option.parse(argv)
    stored = {}
    if args.load:
        experiment = Experiment(args.load, argument="load")
        stored = option.check_stored(experiment.load_options(), experiment.options_path)
        args = option.parse(argv, stored)
    torch.manual_seed(args.seed)
    be_deterministic(args.deterministic)
    device = distributed.start(args.device)
    try:
        return test(args, device) if args.test_only else train(args, stored, device)
    finally:
        distributed.stop()


# ---- training --------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, stored: dict[str, Any], device: torch.device) -> int:
    """Train, or resume the run with the options `stored`; returns the exit code."""
    deadline = time.monotonic() + args.time_limit * 60
    if args.tensorboard:
        check_tensorboard()
    experiment = Experiment(args.save)
    state = experiment.load_checkpoint() if args.load else None
    if state is None and not args.dry_run:
        check_new_run(args, experiment)
    weights = state["model"] if state else read_weights(args.pre_train) if args.pre_train else None
    model = build_network(args, weights, args.pre_train or args.load, transfer=state is None)
    trainer = build_trainer(args, model.to(device, memory_format=torch.channels_last), experiment, deadline)
    if state:
        trainer.load_state(state)
        if trainer.epoch > args.epochs:
            raise InputError(f"--load {args.save}: all {trainer.epoch - 1} epochs are done; add more with --epochs")
    if args.dry_run:
        for line in dry_run(trainer, args.epochs):
            logger.info(line)
        return 0
    if distributed.is_main_process() and not state:
        with experiment.lock():
            experiment.create(args.reset)
    finished = fit_and_log(args, stored, trainer) if distributed.is_main_process() else trainer.fit(args.epochs)
    # Stopping at the time limit is a success: torchrun and batch systems report anything else as a failure.
    return 0 if distributed.any_rank(finished or time.monotonic() > deadline) else INTERRUPTED


def check_new_run(args: argparse.Namespace, experiment: Experiment) -> None:
    """Raise InputError if the new run would overwrite another one, or the weights that it starts from."""
    if not experiment.exists():
        return
    if not args.reset:
        resume = f", resume with --load {args.save}" if experiment.checkpoint_path.exists() else ""
        raise InputError(
            f"--save {args.save}: {experiment.folder} already contains a run; "
            f"choose another --save{resume}, or overwrite it with --reset"
        )
    if args.pre_train and experiment.contains(args.pre_train):
        raise InputError(f"--reset: would delete --pre_train {args.pre_train}; choose another --save")


def build_trainer(args: argparse.Namespace, model: Network, experiment: Experiment, deadline: float) -> Trainer:
    """Build everything that a training needs from its options."""
    criterion = build_loss(
        args.loss,
        n_colors=args.n_colors,
        rgb_range=model.rgb_range.item(),
        vgg_weights=args.vgg_weights,
        hr_size=args.patch_size * args.scale,
        adversarial=option.settings(AdversarialSettings, args, k=args.gan_k, eps=args.epsilon),
    )
    optimizer = build_optimizer(model.parameters(), option.settings(OptimizerSettings, args, name=args.optimizer))
    step_settings = option.settings(StepSettings, args, precision=PRECISIONS[args.precision])
    test_sets = build_test_sets(args.data_test, option.settings(DataSettings, args))
    return Trainer(
        TrainingStep(model, criterion.to(model.device), optimizer, step_settings),
        loader=build_loader(args, model.device),
        test_sets=test_sets,
        experiment=experiment,
        schedules=option.settings(Schedules, args),
        settings=option.settings(TrainSettings, args, keep_all=args.save_models, deadline=deadline),
    )


def build_loader(args: argparse.Namespace, device: torch.device) -> PatchLoader | DeviceLoader:
    """Build the loader of training patches; the main process builds the cache for all."""
    ext = args.ext or ("device" if device.type == "cuda" else "sep")
    with distributed.main_process_first():
        patches = option.settings(
            PatchSettings,
            args,
            augment=not args.no_augment,
            ext="sep" if ext == "sep_reset" and not distributed.is_main_process() else ext,
            steps=args.test_every,
            device=device,
        )
        return build_train_loader(
            args.data_train,
            option.settings(DataSettings, args),
            patches,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )


def fit_and_log(args: argparse.Namespace, stored: dict[str, Any], trainer: Trainer) -> bool:
    """Train in the main process, which writes the log, options.json and TensorBoard; returns whether it finished."""
    experiment, model = trainer.experiment, trainer.model
    with experiment.lock(), experiment.log_file(), logging_redirect_tqdm():
        if args.tensorboard:
            trainer.tensorboard = TensorBoard(experiment.folder, args.images_every)
        origin = {key: stored[key] for key in option.RECORDED if key in stored}
        write_options(experiment.options_path, {**vars(args), **origin}, option.defaults())
        n_images = len(trainer.loader.dataset)
        logger.info(f"{args.model} x{args.scale}, {model.n_parameters:,} parameters, {n_images} images, {model.device}")
        for change in option.changes(args, stored):
            logger.info(f"changed: {change}")
        finished = trainer.fit(args.epochs)
        logger.info(f"written to {experiment.folder}" if finished else resume_hint(experiment))
        return finished


# ---- testing ---------------------------------------------------------------------------------------------------------


def test(args: argparse.Namespace, device: torch.device) -> int:
    """Test on sets, or upscale the user's images or video; returns the exit code."""
    experiment = Experiment(args.save)
    path = find_weights(args, experiment)
    model = build_network(args, read_weights(path), path)
    model = model.to(device, PRECISIONS[args.precision], memory_format=torch.channels_last)
    if args.engine != "auto":
        model.use_engine(args.engine)
    predict = build_predictor(
        model, mode=args.inference, chop=args.chop, chop_size=args.chop_size, ensemble=args.self_ensemble
    )
    if args.data_test == ["video"]:
        return test_video(args, experiment, model, predict)
    measures = build_measures([option.split_metric(text) for text in args.metrics or ()], device)
    for images in build_test_sets(args.data_test, option.settings(DataSettings, args)):
        test_set(args, experiment, model, images=images, predict=predict, measures=measures)
    return 0


def find_weights(args: argparse.Namespace, experiment: Experiment) -> str | Path:
    """The weights file to test. Raises InputError if none is given or the run does not have it."""
    if not args.load:
        if not args.pre_train:
            raise InputError("--test_only: needs weights; give --pre_train FILE, or --load NAME to test a run")
        return args.pre_train
    path = experiment.weights_path({0: "best", -1: "latest"}.get(args.resume, args.resume))
    if not path.is_file() and args.resume in (0, -1):
        raise InputError(f"--load {args.load}: {path} does not exist; train at least one epoch")
    if not path.is_file():
        raise InputError(
            f"--resume {args.resume}: {path} does not exist; --save_models keeps the weights of all epochs"
        )
    return path


def test_set(
    args: argparse.Namespace,
    experiment: Experiment,
    model: Network,
    images: WholeImages,
    predict: Predict,
    measures: dict[str, Measure],
) -> None:
    """Test on one set and write its results."""
    with distributed.main_process_first():
        reset = args.reset and distributed.is_main_process()
        folder = experiment.create_results(images.name, args.scale, reset)

    def save(name, lr, sr, masks):
        stem = f"{name}_x{args.scale}"
        if not images.has_hr:
            write_png(folder / f"{stem}_SR.png", images.source(name).with_upscaled(sr))
        elif args.save_results:
            write_png(folder / f"{stem}_SR.png", sr)
        if args.save_masks:
            save_masks(folder, stem, lr=to_8_bits(lr), sr=to_8_bits(sr), masks=masks)

    metrics = evaluate(model, images, predict, save, measures=measures)
    if not distributed.is_main_process():
        return
    write_json(folder / "metrics.json", metrics)
    write_options(folder / "options.json", vars(args), option.defaults())
    for line in table(metrics):
        logger.info(line)
    if not images.has_hr:
        logger.info("no HR images to compare with: PSNR and SSIM are omitted")
    logger.info(f"written to {folder}")


def save_masks(folder: Path, stem: str, lr: np.ndarray, sr: np.ndarray, masks: np.ndarray) -> None:
    """Write <stem>_mask<k>.png, <stem>_density.png and the sheet <stem>_masks.png."""
    for k, mask in enumerate(masks):
        write_png(folder / f"{stem}_mask{k + 1}.png", visualize.overlay_mask(lr, mask))
    write_png(folder / f"{stem}_density.png", visualize.density_map(masks))
    write_whole(folder / f"{stem}_masks.png", visualize.mask_sheet(stem, lr, sr, masks))


def test_video(args: argparse.Namespace, experiment: Experiment, model: Network, predict: Predict) -> int:
    """Upscale the video --dir_demo; returns the exit code."""
    clip = Path(args.dir_demo)
    folder = experiment.create_results("video", args.scale, args.reset)
    target = folder / f"{clip.stem}_x{args.scale}_SR.mp4"
    if target.exists():
        raise InputError(f"{target}: already exists; pass --reset to overwrite it or choose another --save")
    weights = b"".join(value.float().cpu().numpy().tobytes() for value in model.state_dict().values())
    count = upscale_video(
        functools.partial(model.upscale, predict=predict),
        clip,
        target,
        n_colors=args.n_colors,
        key=weights + repr((args.precision, args.self_ensemble)).encode(),
    )
    write_options(folder / "options.json", vars(args), option.defaults())
    logger.info(f"{count} frames, without sound, written to {target}")
    return 0


def build_network(
    args: argparse.Namespace, weights: StateDict | None, origin: str | Path, transfer: bool = False
) -> Network:
    """Build the network of the options, with weights if there are any."""
    sizes = {name: getattr(args, name) for name in option.MODEL_FLAGS if name != "model"}
    return build_model(args.model, weights, origin, transfer, **sizes)


if __name__ == "__main__":
    run_program(main, memory_hint="use a smaller --batch_size, --patch_size or --n_feats, or add --chop or --ext sep")
