"""Every option, once: the parser, its checks, and presets. Nothing runs at import."""

import argparse
import math
import os
import re
from pathlib import Path

import torch

from data.cache import KINDS
from model.sparse import MODES
from utility import InputError

# Sets of defaults by name (--template); what is given on the command line prevails.
TEMPLATES = {
    "SMSR": {"model": "SMSR"},
    "EDSR_baseline": {"model": "EDSR", "lr": 1e-4},
    "EDSR_paper": {"model": "EDSR", "lr": 1e-4, "n_resblocks": 32, "n_feats": 256, "res_scale": 0.1},
    "GAN": {"epochs": 200, "lr": 5e-5, "decay": [150], "loss": "5*VGG54+0.15*GAN"},
}


# Options that say what to do this time, so that a run which goes on does not take them over from its start.
OF_ONE_CALL = {
    "cpu", "n_GPUs", "load", "save", "pre_train", "reset", "resume", "template", "test_only", "dry_run", "time_limit",
}  # fmt: skip
OF_TESTS = ("chop", "self_ensemble", "save_results", "save_masks")
OF_MODELS = (
    "model", "scale", "n_feats", "n_blocks", "n_layers", "n_resblocks", "res_scale", "n_colors", "rgb_range",
)  # fmt: skip
OF_NO_SET = ("demo", "video")  # names of --data_test that stand for files of the user
OF_1000_EPOCHS = {"decay": [200], "tau_epochs": 500, "lambda_warmup": 50}  # the paper's schedules
OnOff = argparse.BooleanOptionalAction  # a run that goes on may do without
PRECISIONS = {"single": torch.float32, "half": torch.float16, "bf16": torch.bfloat16}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are one line, an InputError."""

    def error(self, message):
        raise InputError(f"{message}; see --help")


def parse(argv=None, stored=None):
    """The options as a Namespace.

    Args:
        argv: command line; None: that of the program
        stored: {name: value} of the run that is continued, which take the place of the defaults

    Raises:
        InputError: a value that is wrong, or options that contradict each other
    """
    parser = build_parser()
    first = parser.parse_args(argv)
    if first.template:
        parser.set_defaults(**TEMPLATES[first.template])
    if stored:
        taken_over = {action.dest for action in parser._actions} - OF_ONE_CALL
        if first.test_only:
            taken_over.remove("precision")  # that of a training is not meant for the whole network
        parser.set_defaults(**{key: value for key, value in stored.items() if key in taken_over})
    args = parser.parse_args(argv)
    for key in OF_MODELS:
        if stored and key in stored and stored[key] != getattr(args, key):
            found = "the network's own" if stored[key] is None else stored[key]
            raise InputError(f"--{key} {getattr(args, key)}: the run has {found}; leave it out, or start another run")
    _scale_schedules(args)
    _check(args)
    return args


def _scale_schedules(args):
    """Those that are not given are the paper's, for 1000 epochs, in proportion to --epochs."""
    for key, value in OF_1000_EPOCHS.items():
        if getattr(args, key) is None:
            lengths = [max(1, round(length * args.epochs / 1000)) for length in (value if key == "decay" else [value])]
            setattr(args, key, lengths if key == "decay" else lengths[0])


def defaults():
    args = build_parser().parse_args([])
    _scale_schedules(args)
    return vars(args)


def changes(args, stored):
    """What differs from the options of the run that is continued: ["lr 0.0001 (0.0002 before)", ...]."""
    options = vars(args)
    return [
        f"{key} {options[key]} ({before} before)"
        for key, before in stored.items()
        if key in options and key not in OF_ONE_CALL and options[key] != before
    ]


def build_parser():
    parser = Parser(
        description="SMSR: train, test and run networks for efficient image super-resolution.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--template", choices=TEMPLATES, help="take the defaults of a preset")

    group = parser.add_argument_group("machine")
    group.add_argument("--n_threads", type=count, default=min(4, os.cpu_count() or 1), help="processes that read data")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument("--cpu", action="store_true", help="the same as --device cpu")
    group.add_argument("--n_GPUs", type=positive_int, help="ask for a GPU, or for as many as torchrun starts processes")
    group.add_argument("--seed", type=seed, default=1, help="of all that is random")

    group = parser.add_argument_group("data")
    group.add_argument("--dir_data", default="dataset", help="folder that holds the sets")
    group.add_argument(
        "--dir_demo", default="", help="for --data_test demo: your images, a folder or a file; video: a file"
    )
    group.add_argument("--data_train", type=names, default=["DIV2K"], help="sets to train on, such as DIV2K+Flickr2K")
    group.add_argument(
        "--data_test", type=names, default=["DIV2K"], help="sets to test on, such as Set5+Set14, or demo, or video"
    )
    group.add_argument(
        "--data_range", type=ranges, metavar="A-B/C-D",
        help="images to train and to test on, counted from 1, except in benchmark sets "
        "(DIV2K: 1-800/801-810, other sets: all)",
    )  # fmt: skip
    group.add_argument(
        "--ext", choices=KINDS, default="sep",
        help="training images: decode files each time; keep .npy files; make them anew; keep all in memory "
        "(on macOS and Windows in that of each reading process)",
    )  # fmt: skip
    group.add_argument("--scale", type=positive_int, default=2, help="upscaling factor")
    group.add_argument("--patch_size", type=positive_int, default=96, help="low-resolution pixels of a training patch")
    group.add_argument("--rgb_range", type=positive_float, default=255, help="largest value of the network's input")
    group.add_argument("--n_colors", type=int, choices=(1, 3), default=3, help="grey or RGB")
    group.add_argument("--no_augment", action="store_true", help="no flips and turns")
    group.add_argument("--chop", action="store_true", help="run in tiles, to need less memory; the result is the same")
    group.add_argument(
        "--chop_size", type=positive_int, default=256,
        help="low-resolution pixels of a tile's side; a tile is as wide as the image and as flat as that asks for",
    )  # fmt: skip

    group = parser.add_argument_group("model (sizes that are not given: those of --pre_train, else the network's own)")
    group.add_argument("--model", default="SMSR", help="SMSR or EDSR")
    group.add_argument("--pre_train", default="", help="weights to start from")
    group.add_argument("--n_feats", type=positive_int, help="feature channels")
    group.add_argument("--n_blocks", type=positive_int, help="sparse mask modules of SMSR")
    group.add_argument("--n_layers", type=positive_int, help="sparse mask convolutions in each of them")
    group.add_argument("--n_resblocks", type=positive_int, help="residual blocks of EDSR")
    group.add_argument("--res_scale", type=positive_float, help="factor of EDSR's residual branches")
    group.add_argument(
        "--precision", choices=PRECISIONS, default="single",
        help="numbers of the network in a test; in a training of its convolutions",
    )  # fmt: skip
    group.add_argument("--compile", action=OnOff, default=False, help="compile the training (torch.compile)")

    group = parser.add_argument_group("training")
    group.add_argument("--reset", action="store_true", help="delete what the run --save left before")
    group.add_argument("--test_every", type=positive_int, default=1000, help="batches of an epoch")
    group.add_argument("--epochs", type=positive_int, default=1000)
    group.add_argument("--batch_size", type=positive_int, default=16)
    group.add_argument("--split_batch", type=positive_int, default=1, help="run a batch in parts, to need less memory")
    group.add_argument("--lr", type=positive_float, default=2e-4, help="learning rate")
    group.add_argument(
        "--decay", type=milestones, help="epochs: N each N, or A-B-C at these (200 of 1000 epochs, else in proportion)"
    )
    group.add_argument("--gamma", type=positive_float, default=0.5, help="factor of each decay")
    group.add_argument("--tau_min", type=positive_float, default=0.4, help="where the temperature ends; 1: none")
    group.add_argument(
        "--tau_epochs", type=positive_int,
        help="the temperature falls by 1/N an epoch (500 of 1000 epochs, else in proportion)",
    )  # fmt: skip
    group.add_argument("--lambda_sparsity", type=non_negative_float, default=0.1, help="weight of the sparsity loss")
    group.add_argument(
        "--lambda_warmup", type=count, help="epochs in which it grows from 0 (50 of 1000 epochs, else in proportion)"
    )
    group.add_argument("--optimizer", default="ADAM", help="ADAM, SGD or RMSprop")
    group.add_argument("--momentum", type=non_negative_float, default=0.9, help="of SGD")
    group.add_argument("--betas", type=share, nargs=2, default=[0.9, 0.999], help="of ADAM")
    group.add_argument("--epsilon", type=positive_float, default=1e-8, help="of ADAM and RMSprop")
    group.add_argument("--weight_decay", type=non_negative_float, default=0.0)
    group.add_argument("--gclip", type=non_negative_float, default=0.0, help="bound of each gradient value; 0: none")
    group.add_argument("--loss", default="1*L1", help="such as 1*L1+0.1*VGG54; L1 MSE VGG22 VGG54 GAN WGAN ...")
    group.add_argument("--vgg_weights", help="file of torchvision's VGG19 weights")
    group.add_argument(
        "--gan_k", type=positive_int, default=1, help="steps of the discriminator a batch, or part of one"
    )
    group.add_argument("--skip_threshold", type=positive_float, default=1e8,
                       help="skip a batch whose loss is N times that of the last epoch")  # fmt: skip
    group.add_argument("--max_bad_steps", type=positive_int, default=50, help="so many skipped batches in a row end it")
    group.add_argument("--ema", type=share, default=0.0, help="decay of a moving average of the weights, kept too")
    group.add_argument("--time_limit", type=positive_float, default=math.inf, metavar="MINUTES",
                       help="stop in time with everything saved")  # fmt: skip
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="take some steps, run an image, write nothing but the cache (--ext), say what a run takes",
    )

    group = parser.add_argument_group("testing")
    group.add_argument("--test_only", action="store_true", help="test, do not train")
    group.add_argument(
        "--inference", choices=MODES, default="auto",
        help="skip the masked work of SMSR's modules: where that is quicker, everywhere, or nowhere",
    )  # fmt: skip
    group.add_argument("--self_ensemble", action="store_true", help="mean over 8 flips and turns")
    group.add_argument("--save_results", action="store_true", help="write the SR images")
    group.add_argument("--save_masks", action="store_true", help="write pictures of the spatial masks")

    group = parser.add_argument_group("run")
    group.add_argument("--save", help="name of the run: experiment/NAME (default: that of --load, else test)")
    group.add_argument("--load", default="", help="run to go on with; its options are the defaults")
    group.add_argument("--resume", type=int, default=0,
                       help="with --load --test_only: 0 its best weights, -1 the latest, N of epoch N")  # fmt: skip
    group.add_argument("--save_models", action=OnOff, default=False, help="keep the weights of every epoch")
    group.add_argument("--print_every", type=positive_int, default=10, help="batches between two looks at the loss")
    group.add_argument("--tensorboard", action=OnOff, default=False, help="write experiment/NAME/tensorboard, too")
    group.add_argument(
        "--images_every", type=positive_int, default=10, help="epochs between two images of --tensorboard"
    )
    return parser


def _check(args):
    if args.cpu:
        if args.device not in ("auto", "cpu") or args.n_GPUs:
            raise InputError("--cpu and a GPU are both asked for; leave one out")
        args.device = "cpu"
    if args.n_GPUs and args.device == "auto":
        args.device = "cuda"
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.n_GPUs and args.n_GPUs != world_size and (args.n_GPUs > 1 or world_size > 1):
        raise InputError(
            f"--n_GPUs {args.n_GPUs}, and {world_size} process(es); several GPUs take: "
            f"torchrun --nproc_per_node={args.n_GPUs} main.py ..."
        )
    if args.tau_min > 1:
        raise InputError(f"--tau_min {args.tau_min}: the temperature falls from 1; give 1 for none, or less")
    if args.split_batch > args.batch_size:
        raise InputError(f"--split_batch {args.split_batch}: --batch_size {args.batch_size} has not so many images")
    if args.load and args.save not in (None, args.load):
        raise InputError(f"--load {args.load} goes on in experiment/{args.load}; leave --save {args.save} out")
    args.save = args.load or args.save or "test"
    if args.resume and not (args.load and (args.test_only or args.resume == -1)):
        raise InputError("--resume chooses weights for --load NAME --test_only; training goes on with --load alone")
    if args.load and args.template:
        raise InputError("--load brings its own options; leave --template out")
    if args.load and args.reset:
        raise InputError("--load goes on with a run and --reset deletes it; leave one out")
    if args.load and args.pre_train:
        raise InputError("--load brings its own weights; leave --pre_train out")
    if args.test_only and args.dry_run:
        raise InputError("--dry_run is for a training; leave it out of a test")
    if not args.test_only:
        if args.inference != "auto":
            raise InputError(f"--inference {args.inference} is for --test_only; leave it out of a training")
        for name in OF_TESTS:
            if getattr(args, name):
                raise InputError(f"--{name} is for --test_only; leave it out of a training")
        for name in OF_NO_SET:
            if name in args.data_test:
                raise InputError(f"--data_test {name} has no HR images to measure a training by; add --test_only")
    if "video" in args.data_test:
        if len(args.data_test) > 1:
            raise InputError("--data_test video stands alone; test other sets in another call")
        if not args.dir_demo:
            raise InputError("--data_test video: say with --dir_demo which file")
        if args.save_masks:
            raise InputError("--save_masks is for images; leave it out with --data_test video")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("--data_test video runs in one process; leave torchrun out")
    if args.model == "EDSR" and args.inference == "sparse":
        raise InputError("--inference sparse: EDSR has nothing to skip; leave it out")
    if args.save_masks and args.model == "EDSR":
        raise InputError("--save_masks: EDSR has no masks; leave it out")
    if args.save_masks and args.self_ensemble:
        raise InputError("--save_masks shows those of one pass, and --self_ensemble takes eight; leave one out")


# ---- types of values -------------------------------------------------------------------------------------------------


def positive_int(text):
    return _number(text, int, lambda value: value > 0, "a whole number of 1 or more")


def count(text):
    return _number(text, int, lambda value: value >= 0, "a whole number of 0 or more")


def positive_float(text):
    return _number(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def non_negative_float(text):
    return _number(text, float, lambda value: 0 <= value < math.inf, "a number of 0 or more")


def share(text):
    return _number(text, float, lambda value: 0 <= value < 1, "a number of 0 or more, below 1")


def seed(text):
    return _number(text, int, lambda value: 0 <= value < 2**63, "a whole number of 0 or more")


def port(text):
    return _number(text, int, lambda value: 0 < value < 2**16, "a number from 1 to 65535")


def plain_name(text):
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of letters, digits and . _ -")
    return text


def names(text):
    found = [plain_name(part) for part in text.split("+")]
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of sets such as Set5+Set14")
    return found


def milestones(text):
    found = [positive_int(part) for part in text.split("-")]
    if found != sorted(set(found)):
        raise argparse.ArgumentTypeError(f"{text!r} is not in order, such as 200-400-600")
    return found


def ranges(text):
    parts = text.split("/")
    if len(parts) == 1:  # the same images for both, as in EDSR
        parts *= 2
    spans = [[positive_int(number) for number in part.split("-")] for part in parts]
    if len(spans) != 2 or any(len(span) != 2 or span[0] > span[1] for span in spans):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1-800/801-810")
    return spans


def png(text):
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a .png file")
    return path


def _number(text, kind, accepted, wanted):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accepted(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value
