"""Every option of main.py: the parser, its checks, and presets. Nothing runs at import."""

import argparse
import dataclasses
import functools
import math
import os
import re
import reprlib
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from program import InputError, launched_processes, shorten, usable_processors

# Presets (--template): other defaults, which the command line overrides.
TEMPLATES = {
    "SMSR": {"model": "SMSR"},
    "EDSR_baseline": {"model": "EDSR", "lr": 1e-4},
    "EDSR_paper": {"model": "EDSR", "lr": 1e-4, "n_resblocks": 32, "n_feats": 256, "res_scale": 0.1},
    "short": {"model": "SMSR", "patch_size": 48, "batch_size": 8, "test_every": 300, "epochs": 60, "ema": 0.999},
    "GAN": {"epochs": 200, "lr": 5e-5, "loss": "5*VGG54+0.15*GAN"},
}
# Default schedules, for runs of this many epochs. Runs of another length scale them.
PAPER_SCHEDULES = {"epochs": 1000, "decay": [200], "tau_epochs": 500, "lambda_warmup": 50}
SCHEDULES = {  # of templates
    "short": {"epochs": 60, "decay": [40, 48, 55], "tau_epochs": 50, "lambda_warmup": 3},
    "GAN": {"epochs": 200, "decay": [150], "tau_epochs": 100, "lambda_warmup": 10},
}

# Options of a single call, which a resumed run does not take from its stored options.
NOT_RESUMED = {
    *("cpu", "n_GPUs", "load", "save", "pre_train", "revive_masks", "reset", "resume", "template"),
    *("test_only", "dry_run", "time_limit", "dir_demo"),
}
RECORDED = ("pre_train", "revive_masks", "template")  # of those, the ones that a resumed run keeps in its options.json
# Options that only a training uses; the network, the machine and the name of the run have options of their own.
TRAINING_FLAGS = (
    *("data_train", "ext", "patch_size", "no_augment", "compile", "test_every", "epochs", "batch_size", "split_batch"),
    *("gclip", "skip_threshold", "max_bad_steps", "ema", "loss", "lambda_sparsity", "vgg_weights"),
    *("gan_k", "optimizer", "lr", "momentum", "betas", "epsilon", "weight_decay", "schedule", "decay", "gamma"),
    *("unmasked_epochs", "revive_masks", "freeze_masks", "tau_min", "tau_epochs", "lambda_warmup"),
    *("save_models", "print_every", "tensorboard", "images_every"),
)
TEST_ONLY_FLAGS = ("chop", "self_ensemble", "save_results", "save_masks", "metrics", "dir_demo")
MODEL_FLAGS = (
    *("model", "scale", "n_feats", "n_blocks", "n_layers", "n_resblocks"),
    *("res_scale", "n_colors", "rgb_range"),
)
DEFAULT_NAME = "test"  # of a run; a training that finds it taken chooses test-2, test-3 ...
RESERVED_SET_NAMES = ("demo", "video")  # of --data_test: the user's own files
INFERENCE_MODES = ("auto", "sparse", "dense")
PRECISIONS = ("single", "half", "bf16")
ENGINES = ("auto", "plain", "fused", "native")
SCHEDULE_KINDS = ("steps", "cosine")
CACHE_KINDS = ("img", "sep", "sep_reset", "bin", "device")
LARGEST = 10**9  # of all numbers without a bound of their own: float32 and 64-bit integers hold their products
DESCRIPTION = """
SMSR: train, test and run networks for efficient image super-resolution.

train      python main.py --save mine --scale 2 --data_train DIV2K
resume     python main.py --load mine
test       python main.py --load mine --test_only --data_test Set5+Set14
upscale    python main.py --load mine --test_only --save_results \\
               --data_test demo --dir_demo photos

Runs are kept in experiment/. --pre_train FILE loads weights from a file, for
example experiment/released/SMSR_X2/model/model_best.pt.
""".strip()
OnOff = argparse.BooleanOptionalAction  # so that a resumed run can switch it off


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps paragraphs, and shows the default of every option and what kind of value it takes."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs are wrapped; those with indented lines, such as examples and tables, stay as they are."""
        paragraphs = text.strip().split("\n\n")
        wrapped = (part if "\n " in f"\n{part}" else textwrap.fill(part, width) for part in paragraphs)
        return textwrap.indent("\n\n".join(wrapped), indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        value = action.default
        has_none = isinstance(value, bool) or value in (None, "", [], math.inf, argparse.SUPPRESS)
        if has_none or "(default: " in action.help:
            return action.help
        if action.nargs:
            shown = " ".join(map(str, value))
        else:
            shown = f"{value:g}" if isinstance(value, float) else flag_value(action.dest, value)
        return f"{action.help} (default: {shown})"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {None: "NAME", Path: "PATH"}.get(action.type, "N")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake as an InputError, in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, **options})

    def error(self, message: str) -> None:
        start, _, names = message.partition(": ")
        if start == "unrecognized arguments":
            message = f"{(names.split() or [repr(names)])[0]}: no such option"
        elif start == "the following arguments are required":
            message = f"{names}: missing"
        raise InputError(f"{message.removeprefix('argument ')}; see --help")


def parse(argv: Sequence[str] | None = None, stored: dict[str, Any] | None = None) -> argparse.Namespace:
    """Parse the options.

    Args:
        argv: command line; None: sys.argv
        stored: {name: value} of the run that is resumed, which replace the defaults

    Raises:
        InputError: a value is wrong, or options contradict each other
    """
    parser = build_parser()
    given = parser.parse_args(argv)
    steps = [flag for flag in ("decay", "gamma") if getattr(given, flag) != parser.get_default(flag)]
    if given.template:
        parser.set_defaults(**TEMPLATES[given.template])
    if stored:
        resumed = {action.dest for action in parser._actions} - NOT_RESUMED
        if given.test_only:
            resumed.remove("precision")  # in training it is not the precision of the whole network
        parser.set_defaults(**{key: value for key, value in stored.items() if key in resumed})
    args = parser.parse_args(argv)
    if args.schedule == "cosine" and steps:
        raise InputError(f"--{steps[0]}: has no effect with --schedule cosine; leave it out, or add --schedule steps")
    _scale_schedules(args)
    _check_same_run(args, stored or {})
    _check(args)
    return args


def check_stored(stored: dict[str, Any], origin: str | Path = "options.json") -> dict[str, Any]:
    """Check the options of a run, read from the file `origin`, as if they were given as flags.

    Returns those that a resumed run takes or records. Raises InputError if their flags do not accept a value.
    """
    parser, line = build_parser(), []
    actions = {
        action.dest: action for action in parser._actions if action.dest not in NOT_RESUMED or action.dest in RECORDED
    }
    names = [name for name in stored if name in actions]
    try:
        for name in names:
            line += _as_flags(actions[name], stored[name])
        args = vars(parser.parse_args(line))
    except InputError as error:
        mistake = str(error).removesuffix("; see --help")
        raise InputError(f"{origin}: {mistake}; correct it, or start another run", argument="load") from None
    return {name: args[name] for name in names}


def _as_flags(action, value):
    """The part of a command line that sets an option to a value."""
    flag = action.option_strings[0]
    if value is None and action.default is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"{flag}: {reprlib.repr(value)} is neither true nor false")
        return [flag] if value else action.option_strings[1:]
    if action.type is None and not (isinstance(value, str) and _is_argument(value)):
        raise InputError(f"{flag}: {reprlib.repr(value)} is not text")
    if action.nargs and isinstance(value, list) and all(isinstance(item, int | float) for item in value):
        return [flag, *map(str, value)]
    return [f"{flag}={flag_value(action.dest, value)}"]


def _is_argument(text):
    """Whether a command line can hold this text."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def flag_value(name: str, value: Any) -> str:
    """The value of an option as the command line takes it; "" for a switch."""
    if isinstance(value, list):
        separator = {"decay": "-", "betas": " ", "metrics": " ", "data_range": "/"}.get(name, "+")
        return separator.join("-".join(map(str, item)) if isinstance(item, list) else str(item) for item in value)
    return "" if value is True else str(value)


def _check_same_run(args, stored):
    """Raise InputError if a resumed run would get another network, or train its masks in other epochs."""
    if stored:
        stored = {"unmasked_epochs": 0} | stored  # version 0.1.0 had none
    for key in (*MODEL_FLAGS, "unmasked_epochs"):
        if key in stored and stored[key] != getattr(args, key):
            found = "its network's own value" if stored[key] is None else stored[key]
            raise InputError(f"--{key} {getattr(args, key)}: the run has {found}; leave it out, or start another run")
    if stored and args.freeze_masks != (frozen := stored.get("freeze_masks")):
        found = f"freezes {frozen}" if frozen else "trains all masks"
        raise InputError(f"--freeze_masks {args.freeze_masks}: the run {found}; leave it out, or start another run")


def _scale_schedules(args):
    """Use the schedules of the template or the paper where none is given, in proportion to the length of the run."""
    schedules = SCHEDULES.get(args.template, PAPER_SCHEDULES)
    share = args.epochs / schedules["epochs"]
    if args.decay is None:
        args.decay = sorted({max(1, round(epoch * share)) for epoch in schedules["decay"]})
    share = (args.epochs - args.unmasked_epochs) / schedules["epochs"]
    for key in ("tau_epochs", "lambda_warmup"):  # these begin with the masks
        if getattr(args, key) is None:
            setattr(args, key, max(1, round(schedules[key] * share)))


def defaults() -> dict[str, Any]:
    """The options of an empty command line."""
    args = build_parser().parse_args([])
    _scale_schedules(args)
    return vars(args)


def changes(args: argparse.Namespace, stored: dict[str, Any]) -> list[str]:
    """The options that differ from those of the run that is resumed: ["lr 0.0002 → 0.0001", ...]."""
    options = vars(args)
    return [
        f"{key} {before} → {options[key]}"
        for key, before in stored.items()
        if key in options and key not in NOT_RESUMED and options[key] != before
    ]


def missing(stored: dict[str, Any]) -> list[str]:
    """The options of a training that the run that is resumed does not have: it was edited, or of another version."""
    names = (*TRAINING_FLAGS, *MODEL_FLAGS, "seed", "precision")
    return [name for name in names if name not in stored and name not in NOT_RESUMED]


def ignored_in_tests(argv: Sequence[str] | None = None) -> list[str]:
    """The flags of a command line that have no effect with --test_only."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return [f"--{name}" for name in TRAINING_FLAGS if name in vars(parser.parse_args(argv))]


def settings(settings_class: type, args: argparse.Namespace, **given: Any) -> Any:
    """Fill a settings dataclass with the options of the same names; `given` replaces the others."""
    names = [field.name for field in dataclasses.fields(settings_class) if field.name not in given]
    return settings_class(**{name: getattr(args, name) for name in names}, **given)


def build_parser() -> Parser:
    """The parser of main.py."""
    parser = Parser(usage="%(prog)s [--option value ...]", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--template", choices=TEMPLATES, help="use the defaults of a preset")
    _add_machine_options(parser.add_argument_group("machine"))
    _add_data_options(parser.add_argument_group("data"))
    _add_network_options(parser.add_argument_group("network"))
    _add_training_options(parser.add_argument_group("training"))
    _add_loss_options(parser.add_argument_group("loss"))
    _add_optimizer_options(parser.add_argument_group("optimizer and schedules"))
    _add_testing_options(parser.add_argument_group("testing"))
    _add_run_options(parser.add_argument_group("run"))
    return parser


def _add_machine_options(group):
    group.add_argument(
        "--n_threads",
        type=at_most(256, count),
        default=min(4, usable_processors()),
        help="number of data-loading worker processes",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    group.add_argument("--cpu", action="store_true", help="the same as --device cpu")
    group.add_argument("--n_GPUs", type=positive_int, help="require this many GPUs, one per process (torchrun)")
    group.add_argument("--seed", type=seed, default=1, help="random seed")


def _add_data_options(group):
    group.add_argument("--dir_data", metavar="DIR", default="dataset", help="folder of the image sets")
    group.add_argument(
        "--dir_demo",
        metavar="PATH",
        default="",
        help="your images (a folder or a file) for --data_test demo; a file for video",
    )
    group.add_argument(
        "--data_train", metavar="SETS", type=names, default=["DIV2K"], help="training sets, e.g. DIV2K+Flickr2K"
    )
    group.add_argument(
        "--data_test",
        metavar="SETS",
        type=names,
        default=["DIV2K"],
        help="test sets, e.g. Set5+Set14 (the first set selects the best epoch), or demo, or video",
    )
    group.add_argument(
        "--data_range",
        type=ranges,
        metavar="A-B/C-D",
        help="images to train on and to test on, by their numbers if all names are numbers, else counted from 1; "
        "benchmark sets are always complete (DIV2K: 1-800/801-810, other sets: all)",
    )
    group.add_argument(
        "--ext",
        choices=CACHE_KINDS,
        help="training images: decode the files each time (img), keep .npy copies (sep), rebuild them (sep_reset), "
        "keep all in memory (bin; on macOS and Windows in the memory of each worker process), "
        "or in the memory of the device, which then cuts the patches (device); "
        "device on an NVIDIA GPU that has enough memory, else sep",
    )
    group.add_argument("--scale", type=at_most(64), default=2, help="upscaling factor")
    group.add_argument("--patch_size", type=positive_int, default=96, help="low-resolution pixels per side of a patch")
    group.add_argument("--n_colors", type=int, choices=(1, 3), default=3, help="1 for gray, 3 for RGB")
    group.add_argument("--no_augment", action="store_true", help="train without flips and rotations")


def _add_network_options(group):
    group.description = "Sizes that are not given come from --pre_train, or else from the network's defaults."
    group.add_argument("--model", default="SMSR", help="SMSR or EDSR")
    group.add_argument("--pre_train", metavar="FILE", default="", help="weights file to start from, or to test")
    group.add_argument("--n_feats", type=at_most(4096), help="feature channels")
    group.add_argument("--n_blocks", type=at_most(1000), help="sparse mask modules of SMSR")
    group.add_argument("--n_layers", type=at_most(100), help="sparse mask convolutions per module")
    group.add_argument("--n_resblocks", type=at_most(1000), help="residual blocks of EDSR")
    group.add_argument(
        "--res_scale", type=positive_float, help="factor of EDSR's residual branches; saved with weights"
    )
    group.add_argument(
        "--rgb_range", type=positive_float, help="largest value of the network's input (255); saved with weights"
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="single",
        help="floating-point precision: of the whole network in tests, of the convolutions in training",
    )
    group.add_argument("--compile", action=OnOff, default=False, help="compile the training step (torch.compile)")


def _add_training_options(group):
    group.add_argument("--test_every", type=positive_int, default=1000, help="batches per epoch")
    group.add_argument("--epochs", type=positive_int, default=1000, help="epochs to train")
    group.add_argument("--batch_size", type=at_most(2**16), default=16, help="patches per batch, over all processes")
    group.add_argument("--split_batch", type=positive_int, default=1, help="run a batch in N parts to save memory")
    group.add_argument("--gclip", type=non_negative_float, default=0.0, help="clip each gradient value to ±N (0: off)")
    group.add_argument(
        "--skip_threshold",
        type=positive_float,
        default=1e8,
        help="skip batches whose loss exceeds N times the previous epoch's",
    )
    group.add_argument(
        "--max_bad_steps", type=positive_int, default=50, help="stop after this many skipped batches in a row"
    )
    group.add_argument(
        "--deterministic",
        action=OnOff,
        default=False,
        help="on a GPU, use slower algorithms that give the same bits in every run; on a CPU that is always so",
    )
    group.add_argument(
        "--ema", type=share, default=0.0, help="also keep a moving average of the weights with this decay"
    )
    group.add_argument(
        "--time_limit",
        type=positive_float,
        default=math.inf,
        metavar="MINUTES",
        help="save and stop after this many minutes",
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="run a few steps and report the memory and time a full run needs; writes only the cache (--ext)",
    )


def _add_loss_options(group):
    group.add_argument(
        "--loss",
        metavar="TERMS",
        default="1*L1",
        help="weighted sum, e.g. 1*L1+0.1*VGG54; L1 MSE VGG22 VGG54 GAN WGAN ...",
    )
    group.add_argument("--lambda_sparsity", type=non_negative_float, default=0.1, help="weight of the sparsity loss")
    group.add_argument("--vgg_weights", metavar="FILE", help="file with torchvision's VGG19 weights")
    group.add_argument(
        "--gan_k", type=at_most(100), default=1, help="discriminator steps per batch, or part of a batch"
    )


def _add_optimizer_options(group):
    group.add_argument("--optimizer", default="ADAM", help="ADAM, SGD or RMSprop")
    group.add_argument("--lr", type=positive_float, default=2e-4, help="learning rate")
    group.add_argument("--momentum", type=non_negative_float, default=0.9, help="of SGD")
    group.add_argument("--betas", type=share, nargs=2, default=[0.9, 0.999], help="of ADAM")
    group.add_argument("--epsilon", type=positive_float, default=1e-8, help="of ADAM and RMSprop")
    group.add_argument("--weight_decay", type=non_negative_float, default=0.0, help="L2 penalty on the weights")
    group.add_argument(
        "--schedule",
        choices=SCHEDULE_KINDS,
        default="steps",
        help="how the learning rate falls: in steps (--decay, --gamma), or to a hundredth along a cosine over --epochs",
    )
    group.add_argument(
        "--decay",
        metavar="EPOCHS",
        type=milestones,
        help="halve the learning rate every N epochs (N), or at epochs A, B and C (A-B-C); "
        "200 for 1000 epochs, in proportion for others",
    )
    group.add_argument(
        "--unmasked_epochs",
        type=count,
        default=0,
        help="train the first N epochs without masks, which is faster; tau and lambda begin after them",
    )
    group.add_argument(
        "--revive_masks",
        action="store_true",
        help="replace masks of --pre_train that are empty or full on every validation image with another module's mask",
    )
    group.add_argument(
        "--freeze_masks",
        choices=("channels", "all"),
        help="keep the channel masks of --pre_train fixed, or all masks, as inference uses them; steps are faster",
    )
    group.add_argument(
        "--gamma", type=at_most(1, positive_float), default=0.5, help="factor of each learning-rate decay"
    )
    group.add_argument(
        "--tau_min", type=positive_float, default=0.4, help="final Gumbel-softmax temperature (1 disables annealing)"
    )
    group.add_argument(
        "--tau_epochs",
        type=positive_int,
        help="the temperature falls by 1/N per epoch; 500 for 1000 epochs with masks, in proportion for others",
    )
    group.add_argument(
        "--lambda_warmup",
        type=count,
        help="epochs over which lambda_sparsity grows from 0; 50 for 1000 epochs with masks, in proportion for others",
    )


def _add_testing_options(group):
    group.add_argument("--test_only", action="store_true", help="test instead of training")
    group.add_argument(
        "--inference",
        choices=INFERENCE_MODES,
        default="auto",
        help="skip the masked work in the modules where that is faster (auto), in all (sparse) or in none (dense)",
    )
    group.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="what runs an SMSR: Triton kernels on an NVIDIA GPU (fused), C++ kernels on a CPU (native), "
        "PyTorch operators (plain), or the fastest one that runs here (auto)",
    )
    group.add_argument("--chop", action="store_true", help="process images in tiles to save memory; same result")
    group.add_argument(
        "--chop_size",
        type=positive_int,
        default=256,
        help="tile size: each full-width strip holds about chop_size² low-resolution pixels",
    )
    group.add_argument("--self_ensemble", action="store_true", help="average over 8 flips and rotations")
    group.add_argument("--save_results", action="store_true", help="write the SR images")
    group.add_argument("--save_masks", action="store_true", help="write pictures of the spatial masks")
    group.add_argument(
        "--metrics",
        type=metric,
        nargs="+",
        metavar="NAME[=FILE]",
        help="also measure these metrics of the pyiqa package, e.g. lpips dists, with the weights in FILE",
    )


def _add_run_options(group):
    group.add_argument(
        "--save",
        help="name of the run: experiment/NAME (default: that of --load, or else test, or test-2 if test is taken ...)",
    )
    group.add_argument(
        "--reset",
        action="store_true",
        help="overwrite the run, or the results of the same images, that --save already holds",
    )
    group.add_argument("--load", default="", help="run to resume, or to test; its options are the defaults")
    group.add_argument(
        "--resume",
        type=int,
        default=0,
        help="with --load --test_only: the best weights (0), the latest (-1) or the weights of epoch N",
    )
    group.add_argument("--save_models", action=OnOff, default=False, help="keep the weights of every epoch")
    group.add_argument("--print_every", type=positive_int, default=10, help="update the displayed loss every N batches")
    group.add_argument("--tensorboard", action=OnOff, default=False, help="also write experiment/NAME/tensorboard")
    group.add_argument(
        "--images_every", type=positive_int, default=10, help="write images to TensorBoard every N epochs"
    )


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check(args):
    """Raise InputError if options contradict each other, and resolve --cpu, --n_GPUs and --save."""
    _check_device(args)
    _check_run(args)
    if args.test_only:
        _check_test(args)
    else:
        _check_training(args)
    _check_video(args)


def _check_device(args):
    if args.cpu:
        if args.device not in ("auto", "cpu") or args.n_GPUs:
            raise InputError("--cpu: a GPU is requested too; use only one of them")
        args.device = "cpu"
    if args.n_GPUs and args.device == "auto":
        args.device = "cuda"
    n_processes = launched_processes()
    if args.n_GPUs and args.n_GPUs != n_processes and (args.n_GPUs > 1 or n_processes > 1):
        running = "only one process is running" if n_processes == 1 else f"{n_processes} processes are running"
        raise InputError(
            f"--n_GPUs {args.n_GPUs}: {running}; start it with: torchrun --nproc_per_node={args.n_GPUs} main.py ..."
        )


def _check_run(args):
    if args.load and args.save not in (None, args.load):
        raise InputError(f"--load {args.load}: continues in experiment/{args.load}; leave --save {args.save} out")
    args.save = args.load or args.save or (DEFAULT_NAME if args.test_only else None)
    if args.resume and not (args.load and (args.test_only or args.resume == -1)):
        raise InputError("--resume: selects weights for --load NAME --test_only; use --load alone to resume training")
    for flag, reason in (
        ("template", "--load brings its own options"),
        ("reset", "--load resumes a run"),
        ("pre_train", "--load brings its own weights"),
        ("revive_masks", "--load brings its own weights"),
    ):
        if args.load and getattr(args, flag) and not (flag == "reset" and args.test_only):
            raise InputError(f"--{flag}: {reason}; use only one of them")


def _check_training(args):
    if args.deterministic and "VGG" in args.loss:
        raise InputError("--deterministic: VGG losses have no such gradient on a GPU; leave one out")
    if args.unmasked_epochs and args.model == "EDSR":
        raise InputError(f"--unmasked_epochs {args.unmasked_epochs}: EDSR has no masks; leave it out")
    for flag in ("revive_masks", "freeze_masks"):
        if getattr(args, flag) and args.model == "EDSR":
            raise InputError(f"--{flag}: EDSR has no masks; leave it out")
        if getattr(args, flag) and not (args.pre_train or args.load):
            raise InputError(f"--{flag}: needs the masks of trained weights; add --pre_train FILE")
    if args.tau_min > 1:
        raise InputError(f"--tau_min {args.tau_min}: the temperature starts at 1; use at most 1")
    if args.split_batch > args.batch_size:
        raise InputError(f"--split_batch {args.split_batch}: exceeds --batch_size {args.batch_size}; use fewer parts")
    for name in ("inference", "engine"):
        if getattr(args, name) != "auto":
            raise InputError(f"--{name} {getattr(args, name)}: is for tests; add --test_only or leave it out")
    for name in TEST_ONLY_FLAGS:
        if getattr(args, name):
            raise InputError(f"--{name}: is for tests; add --test_only or leave it out")
    for name in RESERVED_SET_NAMES:
        if name in args.data_test:
            raise InputError(f"--data_test {name}: has no HR images to validate a training with; add --test_only")


def _check_test(args):
    if args.dry_run:
        raise InputError("--dry_run: is for training; leave it out of a test")
    if args.model == "EDSR" and args.engine != "auto":
        raise InputError(f"--engine {args.engine}: is for SMSR; leave it out")
    if args.model == "EDSR" and args.inference == "sparse":
        raise InputError("--inference sparse: EDSR has no masked work to skip; leave it out")
    if args.save_masks and args.model == "EDSR":
        raise InputError("--save_masks: EDSR has no masks; leave it out")
    if args.dir_demo and not set(args.data_test) & set(RESERVED_SET_NAMES):
        raise InputError("--dir_demo: is only read by --data_test demo and video; add one of them, or leave it out")
    metrics = [name for name, _ in map(split_metric, args.metrics or ())]
    if len(set(metrics)) < len(metrics):
        raise InputError(f"--metrics {' '.join(args.metrics)}: names a metric twice; leave one out")
    if args.save_masks and args.self_ensemble:
        raise InputError("--save_masks: shows the masks of one pass, but --self_ensemble makes eight; leave one out")


def _check_video(args):
    if "video" not in args.data_test:
        return
    if len(args.data_test) > 1:
        raise InputError("--data_test video: cannot be joined with other sets; test them in another call")
    if not args.dir_demo:
        raise InputError("--data_test video: no file is given; name it with --dir_demo")
    for name in ("save_masks", "metrics"):
        if getattr(args, name):
            raise InputError(f"--{name}: is for images; leave it out with --data_test video")
    if launched_processes() > 1:
        raise InputError("--data_test video: runs in a single process; start it without torchrun")


# ---- types of values -------------------------------------------------------------------------------------------------


def positive_int(text: str, largest: int = LARGEST) -> int:
    return _number(text, int, lambda value: value > 0, wanted="a positive integer", largest=largest)


def count(text: str, largest: int = LARGEST) -> int:
    return _number(text, int, lambda value: value >= 0, wanted="an integer of 0 or more", largest=largest)


def positive_float(text: str, largest: float = LARGEST) -> float:
    return _number(text, float, lambda value: 0 < value < math.inf, wanted="a number above 0", largest=largest)


def non_negative_float(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value < math.inf, wanted="a number of 0 or more", largest=LARGEST)


def at_most(largest: float, kind: Callable[..., float] = positive_int) -> Callable[[str], float]:
    """The type of the numbers of a kind up to `largest`."""
    return functools.partial(kind, largest=largest)


def share(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value < 1, wanted="a number of 0 or more, below 1")


def seed(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value < 2**63, wanted="an integer of 0 or more")


def port(text: str) -> int:
    return _number(text, int, lambda value: 0 < value < 2**16, wanted="a number from 1 to 65535")


def plain_name(text: str) -> str:
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name; use letters, digits and . _ -")
    return text


def metric(text: str) -> str:
    if not re.fullmatch(r"[\w+-]+(=.+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a metric; write NAME, or NAME=FILE")
    return text


def split_metric(text: str) -> tuple[str, str | None]:
    """The name and the weights file of an entry of --metrics; None without a file."""
    name, _, weights = text.partition("=")
    return name, weights or None


def names(text: str) -> list[str]:
    found = [plain_name(part) for part in text.split("+")]
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different sets, e.g. Set5+Set14")
    return found


def milestones(text: str) -> list[int]:
    found = [positive_int(part) for part in text.split("-")]
    if found != sorted(set(found)):
        raise argparse.ArgumentTypeError(f"{text!r} is not in increasing order, e.g. 200-400-600")
    return found


def ranges(text: str) -> list[list[int]]:
    parts = text.split("/")
    if len(parts) == 1:  # the same images for both, as in EDSR
        parts *= 2
    spans = [[positive_int(number) for number in part.split("-")] for part in parts]
    if len(spans) != 2 or any(len(span) != 2 or span[0] > span[1] for span in spans):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1-800/801-810")
    return spans


def file_to_write(*suffixes: str) -> Callable[[str], Path]:
    """A type of options: the name of a file with one of these suffixes, e.g. ".png"."""

    def parse(text):
        path = Path(text)
        if path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r} does not end with {' or '.join(suffixes)}")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} is a folder")
        return path

    return parse


def _number(text, kind, accepted, *, wanted, largest=math.inf):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accepted(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    if value > largest:
        raise argparse.ArgumentTypeError(f"{shorten(text, 60)} is too large; use at most {largest}")
    return value
