"""SMSR: Learning Sparse Masks for Efficient Image Super-Resolution. Train, test, upscale."""

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import option
from program import INTERRUPTED, InputError, report_batch, run_program

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    run_program(option.build_parser().print_help)  # before the imports below, which take seconds

import torch

import distributed
from checkpoint import Experiment, write_options
from data import DataSettings, PatchSettings, build_test_sets, build_train_loader
from data.clip import read_info
from data.device import DeviceLoader
from data.srdata import PatchLoader
from data.video import upscale_video
from evaluation import evaluate, table
from files import Results, check_name, check_outputs, digest, overwritten
from loss import build_loss
from loss.adversarial import AdversarialSettings
from model import StateDict, build_model, read_weights
from model.inference import build_predictor
from model.network import Network, Predict
from model.weights import fingerprint
from perceptual import Measure, build_measures
from recovery import report_failures, resume_hint
from results import ResultSettings, SetResults
from summary import TensorBoard, check_tensorboard
from trainer import Schedules, Trainer, TrainSettings, dry_run, revive_masks
from training_step import OptimizerSettings, StepSettings, TrainingStep, build_optimizer
from utility import PRECISIONS, be_deterministic, free_memory, has_fast_bf16, log_to_console, logger, write_json

RESULTS_ADVICE = "pass --reset to overwrite it or choose another --save"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with a command line; returns the exit code. Raises InputError."""
    log_to_console()
    args = option.parse(argv)
    stored = {}
    if args.load:
        experiment = Experiment(args.load, argument="load")
        if experiment.folder.is_dir() and not experiment.exists():
            raise InputError(
                f"--load {args.load}: {experiment.folder} holds no checkpoint yet; "
                f"start the run with --save {args.load} and its options"
            )
        stored = option.check_stored(experiment.load_options(), experiment.options_path)
        args = option.parse(argv, stored)
    ignored = option.ignored_in_tests(argv) if args.test_only else []
    torch.manual_seed(args.seed)
    be_deterministic(args.deterministic)
    device = distributed.start(args.device)
    if args.precision == "bf16" and device.type == "cpu" and not has_fast_bf16():
        logger.info("--precision bf16: this processor computes bfloat16 slowly; single is faster on it")
    if ignored:
        logger.info(f"{', '.join(ignored)}: without effect in a test")
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
    args.save = args.save or choose_name(args.reset)
    experiment = Experiment(args.save)
    state = experiment.load_checkpoint() if args.load else None
    if state and state["epoch"] > args.epochs:  # no mistake: jobs of a batch system resume a run until it is finished
        logger.info(f"--load {args.save}: all {state['epoch'] - 1} epochs are done; add more with --epochs")
        return 0
    if state is None and not args.dry_run:
        check_new_run(args, experiment)
    weights = state["model"] if state else read_weights(args.pre_train) if args.pre_train else None
    model = build_network(args, weights, args.pre_train or args.load, transfer=state is None)
    model = model.to(device, memory_format=torch.channels_last)
    if args.freeze_masks:
        model.freeze_masks(spatial=args.freeze_masks == "all")
    check_memory(args, model)
    trainer = build_trainer(args, model, experiment, deadline)
    if state:
        trainer.load_state(state)
    if args.dry_run:
        for line in dry_run(trainer, args.epochs):
            logger.info(line)
        return 0
    revived = revive_masks(model, trainer.test_sets, args.pre_train) if args.revive_masks and not state else None
    is_main = distributed.is_main_process()
    if is_main and not state:
        with experiment.lock():
            experiment.create(args.reset)
    finished = fit_and_log(args, stored, trainer, revived) if is_main else trainer.fit(args.epochs)
    # Stopping at the time limit is a success: torchrun and batch systems report anything else as a failure.
    return 0 if distributed.any_rank(finished or time.monotonic() > deadline) else INTERRUPTED


def choose_name(reset: bool) -> str:
    """A name for a run without --save: with `reset` the default one, else the first that is not taken."""
    names = (option.DEFAULT_NAME, *(f"{option.DEFAULT_NAME}-{number}" for number in range(2, 10**6)))
    return next(name for name in names if reset or not Experiment(name).exists())


def check_memory(args: argparse.Namespace, model: Network) -> None:
    """Raise InputError if the memory is too small for a step: the system would end the process without a word."""
    pixels = args.patch_size**2 * args.batch_size / args.split_batch / distributed.world_size()
    maps = sum(isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) for module in model.modules())
    needed = pixels * maps * model.n_feats * PRECISIONS[args.precision].itemsize  # what backward needs, at least
    if model.device.type == "cpu" and needed > free_memory(model.device):
        raise InputError(
            f"--batch_size {args.batch_size}: a step needs more than {needed / 2**30:.0f} GiB of memory, "
            "more than is free; use a smaller --batch_size or --patch_size, or --split_batch"
        )


def check_new_run(args: argparse.Namespace, experiment: Experiment) -> None:
    """Raise InputError if the new run would overwrite another one, or a file that it reads."""
    if not experiment.exists():
        return
    if not args.reset:
        resume = f", resume with --load {args.save}" if experiment.checkpoint_path.exists() else ""
        raise InputError(
            f"--save {args.save}: {experiment.folder} already contains a run; "
            f"choose another --save{resume}, or overwrite it with --reset"
        )
    for name in ("pre_train", "vgg_weights"):
        if overwritten([getattr(args, name)], experiment.files()):
            raise InputError(f"--reset: would delete --{name} {getattr(args, name)}; choose another --save")


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
    for images in test_sets:
        images.check_files()
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


def fit_and_log(args: argparse.Namespace, stored: dict[str, Any], trainer: Trainer, revived: str | None = None) -> bool:
    """Train in the main process, which writes the log, options.json and TensorBoard; returns whether it finished.

    revived: what --revive_masks has done
    """
    experiment, model = trainer.experiment, trainer.model
    with experiment.lock(), report_failures(experiment), experiment.log_file():
        if args.tensorboard:
            trainer.tensorboard = TensorBoard(experiment.folder, args.images_every)
        origin = {key: stored[key] for key in option.RECORDED if key in stored}
        write_options(experiment.options_path, {**vars(args), **origin}, option.defaults())
        n_images = len(trainer.loader.dataset)
        logger.info(f"{args.model} x{args.scale}, {model.n_parameters:,} parameters, {n_images} images, {model.device}")
        logger.info(f"writing to {experiment.folder}")
        if stored and (names := option.missing(stored)):
            values = ", ".join(f"{name} {getattr(args, name)}" for name in names)
            logger.info(f"{experiment.options_path}: lacks options of this version, or was edited; using {values}")
        if revived:
            logger.info(f"--revive_masks: {revived}")
        if args.compile:
            logger.info("--compile: the first steps compile the network, which takes a minute or more")
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
    if args.model == "SMSR":
        logger.info(f"engine: {model.engine}")
    predict = build_predictor(
        model, mode=args.inference, chop=args.chop, chop_size=args.chop_size, ensemble=args.self_ensemble
    )
    if args.data_test == ["video"]:
        return test_video(args, experiment, model, predict)
    measures = build_measures([option.split_metric(text) for text in args.metrics or ()], device)
    settings = result_settings(args, model)
    results = [
        SetResults(experiment.results_folder(images.name, args.scale), images, settings)
        for images in build_test_sets(args.data_test, option.settings(DataSettings, args))
    ]
    with distributed.main_process_first():
        check_results(args, results, path)
        if args.reset and distributed.is_main_process():
            for of_set in results:
                of_set.remove()
    for of_set in results:
        test_set(args, model, of_set, predict=predict, measures=measures)
    failures = [message for of_set in results for message in of_set.failed.values()]
    count = sum(len(of_set.images) for of_set in results)
    return report_batch(failures, count) if distributed.is_main_process() else 0


def check_results(args: argparse.Namespace, results: Sequence[SetResults], weights: str | Path) -> None:
    """Raise InputError if the test would overwrite results of something else, or a file that it reads."""
    for of_set in results:
        if args.dir_demo and Path(args.dir_demo).resolve() == of_set.folder.resolve():
            raise InputError(f"--dir_demo {args.dir_demo}: is the folder of the results; choose another --save")
        of_set.check(args.reset, [weights], RESULTS_ADVICE)


def result_settings(args: argparse.Namespace, model: Network) -> ResultSettings:
    """What the test writes, and what its results depend on."""
    options = [args.inference, args.engine, args.chop, args.chop_size, str(model.device), torch.get_num_threads()]
    for name, weights in map(option.split_metric, args.metrics or ()):
        options.append(f"{name} {digest([Path(weights)], b'')}" if weights else name)
    return ResultSettings(
        made_with=made_with(args, model),
        measured_with=options,
        save_results=args.save_results,
        n_masks=len(model.blocks) if args.save_masks else 0,
    )


def made_with(args: argparse.Namespace, model: Network) -> bytes:
    """A key of everything that upscaled pictures depend on besides the pictures."""
    return repr((fingerprint(model.state_dict()), args.precision, args.self_ensemble)).encode()


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
            f"--resume {args.resume}: {path} does not exist; use 0 for the best weights or -1 for the latest "
            "(a training with --save_models keeps those of every epoch)"
        )
    return path


def test_set(
    args: argparse.Namespace, model: Network, results: SetResults, predict: Predict, measures: dict[str, Measure]
) -> None:
    """Test on one set and write its results."""
    images, folder = results.images, results.folder
    metrics = evaluate(model, images, predict, results, measures=measures)
    if not distributed.is_main_process() or not metrics["images"]:
        return
    path = folder / "metrics.json"
    if path.exists() and not results.n_reused and not args.reset:
        logger.info(f"{path}: replacing the numbers of an earlier test")
    write_json(path, metrics | ({"failed": results.failed} if results.failed else {}))
    write_options(folder / "options.json", vars(args), option.defaults())
    for line in table(metrics):
        logger.info(line)
    if not images.has_hr:
        logger.info("no HR images to compare with: PSNR and SSIM are omitted")
    if results.n_reused:
        logger.info(f"{results.n_reused} of {len(images)} images were done already; --reset does them again")
    logger.info(f"written to {folder}")


def test_video(args: argparse.Namespace, experiment: Experiment, model: Network, predict: Predict) -> int:
    """Upscale the video --dir_demo; returns the exit code."""
    clip = Path(args.dir_demo)
    if not clip.is_file():
        problem = "is a folder; give a video file" if clip.is_dir() else "no such file; check the path"
        raise InputError(f"{clip}: {problem}", argument="dir_demo")
    name = f"{clip.stem}_x{args.scale}_SR.mp4"
    check_name(name, clip)
    info = read_info(clip)
    results = Results(experiment.results_folder("video", args.scale))
    target, made_from = results.folder / name, digest([clip], made_with(args, model))
    if not args.reset:
        results.check(name, made_from, [name], RESULTS_ADVICE)
        if results.find(name, made_from, [name]) is not None:
            logger.info(f"{target}: done already; --reset does it again")
            return 0
    check_outputs([target], [clip, args.pre_train], argument="save")
    if args.reset:
        results.remove(name, [name])
    results.record(name, made_from, [name], {})
    upscale = functools.partial(model.upscale, predict=predict)
    count = upscale_video(upscale, info, target, scale=args.scale, n_colors=args.n_colors, key=made_from)
    write_options(results.folder / "options.json", vars(args), option.defaults())
    logger.info(f"{count} frames written to {target}")
    return 0


def build_network(
    args: argparse.Namespace, weights: StateDict | None, origin: str | Path, transfer: bool = False
) -> Network:
    """Build the network of the options, with weights if there are any."""
    sizes = {name: getattr(args, name) for name in option.MODEL_FLAGS if name != "model"}
    return build_model(args.model, weights, origin, transfer, **sizes)


if __name__ == "__main__":
    run_program(main, memory_hint="use a smaller --batch_size, --patch_size or --n_feats, or add --chop or --ext sep")
