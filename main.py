"""SMSR: Learning Sparse Masks for Efficient Image Super-Resolution. Train, test, run."""

import functools
import logging
import sys
import time
from pathlib import Path

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

import distributed
import option
import pictures
import watch
from data import build_test_sets, build_train_loader
from data.image import write_png
from evaluation import evaluate, table
from loss import build_loss
from model import build_model, read_weights
from model.inference import build_run
from trainer import Schedules, Trainer, build_optimizer
from utility import (
    INTERRUPTED,
    Experiment,
    InputError,
    logger,
    run_program,
    write_json,
    write_options,
    write_whole,
)
from video import upscale_video


def main(argv=None):
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO, force=True)
    args = option.parse(argv)
    stored = {}
    if args.load:
        stored = Experiment(args.load).load_options()
        args = option.parse(argv, stored)
    torch.manual_seed(args.seed)
    device = distributed.start(args.device)
    try:
        return test(args, device) if args.test_only else train(args, stored, device)
    finally:
        distributed.stop()


def train(args, stored, device):
    deadline = time.monotonic() + args.time_limit * 60
    if args.tensorboard:
        watch.check_installed()
    experiment = Experiment(args.save)
    state = experiment.load_checkpoint() if args.load else None
    if state is None and not args.dry_run:
        experiment.check_start(args.reset, keep=args.pre_train)
    weights = state["model"] if state else read_weights(args.pre_train) if args.pre_train else None
    model = make_model(args, weights, args.pre_train or args.load, transfer=state is None)
    model = model.to(device, memory_format=torch.channels_last)
    criterion = build_loss(
        args.loss, args.n_colors, args.rgb_range, args.vgg_weights, args.patch_size * args.scale,
        k=args.gan_k, lr=args.lr, betas=args.betas, eps=args.epsilon, weight_decay=args.weight_decay,
    ).to(device)  # fmt: skip
    optimizer = build_optimizer(
        args.optimizer, model.parameters(), args.lr, args.betas, args.epsilon, args.momentum, args.weight_decay
    )
    test_sets = build_test_sets(args.data_test, args.dir_data, args.scale, args.data_range, args.n_colors)
    with distributed.main_first():  # it builds the cache
        ext = "sep" if distributed.is_helper() and args.ext == "sep_reset" else args.ext
        loader = build_train_loader(
            args.data_train, args.dir_data, args.scale, args.data_range, args.patch_size, not args.no_augment,
            args.n_colors, ext, args.seed, args.batch_size, args.test_every, args.n_threads, device.type == "cuda",
            distributed.rank(), distributed.world_size(),
        )  # fmt: skip
    schedules = Schedules(
        args.lr, args.decay, args.gamma, args.tau_min, args.tau_epochs, args.lambda_sparsity, args.lambda_warmup
    )
    trainer = Trainer(
        model, criterion, optimizer, loader, test_sets, experiment, schedules, args.seed, args.rgb_range, args.gclip,
        args.split_batch, args.skip_threshold, args.max_bad_steps, option.PRECISIONS[args.precision], args.compile,
        args.ema, args.print_every, args.save_models, deadline,
    )  # fmt: skip
    if state:
        trainer.load_state(state)
        if trainer.epoch > args.epochs:
            raise InputError(f"--load {args.save}: has its {trainer.epoch - 1} epochs; ask for more with --epochs")
    if args.dry_run:
        for line in trainer.dry_run(args.epochs):
            logger.info(line)
        return 0
    if distributed.is_helper():
        return exit_code(trainer.fit(args.epochs), deadline)
    if not state:
        with experiment.alone():
            experiment.start(args.reset)
    with experiment.alone(), experiment.logging(), logging_redirect_tqdm():
        if args.tensorboard:
            trainer.board = watch.Board(experiment.folder, args.images_every)
        origin = {key: stored[key] for key in ("pre_train", "template") if key in stored}
        write_options(experiment.folder / "options.json", {**vars(args), **origin}, option.defaults())
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        logger.info(f"{args.model} x{args.scale}, {n_parameters:,} parameters, {len(loader.dataset)} images, {device}")
        for change in option.changes(args, stored):
            logger.info(f"from here on: {change}")
        finished = trainer.fit(args.epochs)
        if finished:
            logger.info(f"written to {experiment.folder}")
        else:
            logger.info(f"go on with: python main.py --load {args.save}")
    return exit_code(finished, deadline)


def exit_code(finished, deadline):
    """Stopped in time is success: torchrun and batch systems would report anything else as a failure."""
    return 0 if distributed.any_rank(finished or time.monotonic() > deadline) else INTERRUPTED


def test(args, device):
    experiment = Experiment(args.save)
    path = args.pre_train
    if args.load:
        path = experiment.weights_path({0: "best", -1: "latest"}.get(args.resume, args.resume))
        if not path.is_file():
            raise InputError(f"--resume {args.resume}: no {path}; --save_models keeps those of all epochs")
    if not path:
        raise InputError("--test_only needs weights: give --pre_train FILE, or --load NAME for those of a run")
    model = make_model(args, read_weights(path), path)
    model = model.to(device, option.PRECISIONS[args.precision], memory_format=torch.channels_last)
    run = build_run(model, args.inference, args.chop, args.chop_size, args.self_ensemble)
    if "video" in args.data_test:
        return test_video(args, experiment, model, run, path)
    test_sets = build_test_sets(
        args.data_test, args.dir_data, args.scale, args.data_range, args.n_colors, args.dir_demo
    )
    for images in test_sets:
        with distributed.main_first():
            folder = experiment.start_results(images.name, args.scale, args.reset and not distributed.is_helper())
        metrics = evaluate(model, images, run, args.rgb_range, functools.partial(save, args, images.name, folder))
        if distributed.is_helper():
            continue
        write_json(folder / "metrics.json", metrics)
        write_options(folder / "options.json", vars(args), option.defaults())
        for line in table(metrics):
            logger.info(line)
        if images.name == "demo":
            logger.info("no HR images to compare with: PSNR and SSIM are left out")
        logger.info(f"written to {folder}")
    return 0


def test_video(args, experiment, model, run, weights):
    clip = Path(args.dir_demo)
    folder = experiment.start_results("video", args.scale, args.reset)
    parameter = next(model.parameters())
    target = folder / f"{clip.stem}_x{args.scale}_SR.mp4"
    if target.exists():
        raise InputError(f"{target}: is there already; --reset makes it anew, another --save leaves it alone")
    settings = (args.precision, args.self_ensemble, args.rgb_range, args.n_colors, args.res_scale)
    key = Path(weights).read_bytes() + repr(settings).encode()
    count = upscale_video(run, clip, target, args.n_colors, args.rgb_range, parameter.device, parameter.dtype, key)
    write_options(folder / "options.json", vars(args), option.defaults())
    logger.info(f"{count} frames, without sound, written to {target}")
    return 0


def save(args, set_name, folder, name, lr, sr, masks):
    """Write what is asked for of an image: <name>_SR.png; <name>_mask<k>.png, _density.png and the sheet _masks.png."""
    name = f"{name}_x{args.scale}"
    if args.save_results or set_name == "demo":
        write_png(folder / f"{name}_SR.png", sr)
    if args.save_masks:
        for k, mask in enumerate(masks):
            write_png(folder / f"{name}_mask{k + 1}.png", pictures.overlay(lr, mask))
        write_png(folder / f"{name}_density.png", pictures.density_map(masks))
        write_whole(folder / f"{name}_masks.png", pictures.mask_sheet(name, lr, sr, masks))


def make_model(args, weights, origin, transfer=False):
    return build_model(
        args.model, weights, origin, transfer, scale=args.scale, n_colors=args.n_colors, rgb_range=args.rgb_range,
        n_feats=args.n_feats, n_blocks=args.n_blocks, n_layers=args.n_layers,
        n_resblocks=args.n_resblocks, res_scale=args.res_scale,
    )  # fmt: skip


if __name__ == "__main__":
    run_program(main)
