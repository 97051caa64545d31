import json
import os
from dataclasses import dataclass

import pytest

from option import (
    MODEL_FLAGS,
    NOT_RESUMED,
    RECORDED,
    TEMPLATES,
    TRAINING_FLAGS,
    build_parser,
    changes,
    check_stored,
    defaults,
    ignored_in_tests,
    missing,
    parse,
    settings,
)
from program import InputError


def test_all_flags_of_edsr_exist():
    edsr = (
        "n_threads cpu n_GPUs seed dir_data dir_demo data_train data_test data_range ext scale patch_size rgb_range "
        "n_colors chop no_augment model pre_train n_resblocks n_feats res_scale precision reset test_every epochs "
        "batch_size split_batch self_ensemble test_only gan_k lr decay gamma optimizer momentum betas epsilon "
        "weight_decay gclip loss skip_threshold save load resume save_models print_every save_results template"
    )
    assert set(edsr.split()) <= defaults().keys()


def test_the_defaults_are_those_of_the_paper():
    args = parse([])
    assert (args.lr, args.decay, args.gamma, args.epochs, args.test_every) == (2e-4, [200], 0.5, 1000, 1000)
    assert (args.patch_size, args.batch_size, args.betas, args.epsilon) == (96, 16, [0.9, 0.999], 1e-8)
    assert (args.tau_min, args.tau_epochs, args.lambda_sparsity, args.lambda_warmup) == (0.4, 500, 0.1, 50)


def test_options_survive_a_round_trip_through_json():
    args = vars(parse(["--data_range", "1-80/81-91", "--decay", "10-20", "--data_test", "Set5+Sample"]))
    assert json.loads(json.dumps(args)) == args
    assert args["data_range"] == [[1, 80], [81, 91]]
    assert args["decay"] == [10, 20]
    assert args["data_test"] == ["Set5", "Sample"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_set_defaults_that_the_command_line_overrides(name):
    for key, value in TEMPLATES[name].items():
        assert getattr(parse(["--template", name]), key) == value
    assert parse(["--template", name, "--lr", "0.5"]).lr == 0.5


def test_a_resumed_run_keeps_its_network_and_a_test_chooses_its_own_precision():
    stored = {"precision": "bf16", "compile": True, "res_scale": None, "n_feats": 32}
    assert parse(["--load", "run"], stored).precision == "bf16"
    assert parse(["--load", "run", "--test_only"], stored).precision == "single"
    assert not parse(["--load", "run", "--no-compile"], stored).compile
    with pytest.raises(InputError, match=r"--res_scale 0\.1: the run has its network's own value; leave it out"):
        parse(["--load", "run", "--res_scale", "0.1"], stored)
    with pytest.raises(InputError, match="--n_feats 64: the run has 32; leave it out"):
        parse(["--load", "run", "--n_feats", "64"], stored)


def test_stored_options_are_the_defaults_except_those_of_a_single_call():
    stored = {"lr": 0.1, "epochs": 5, "reset": True, "pre_train": "a.pt", "cpu": True, "device": "cpu", "unknown": 1}
    args = parse(["--load", "run", "--epochs", "9"], stored)
    assert (args.lr, args.epochs, args.reset, args.pre_train, args.device) == (0.1, 9, False, "", "cpu")
    assert parse(["--load", "run", "--device", "cuda"], stored).device == "cuda"
    assert not hasattr(args, "unknown")
    assert {"save", "load", "reset", "pre_train", "test_only", "time_limit"} <= NOT_RESUMED <= defaults().keys()


@pytest.mark.parametrize(
    "line", ["", "--data_range 1-8/9-9 --betas 0 0.5 --decay 3-5 --compile --data_test A+B --vgg_weights=-f"]
)
def test_stored_options_are_what_was_written(line):
    written = vars(parse(line.split()))
    stored = check_stored(json.loads(json.dumps(written)) | {"of another version": [1]})
    assert stored == {key: written[key] for key in stored}
    assert written.keys() - stored.keys() == NOT_RESUMED - set(RECORDED)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": "fast"}, "--lr: 'fast' is not a number above 0"),
        ({"lr": None}, "--lr: 'None' is not a number above 0"),
        ({"n_feats": 8.5}, "--n_feats: '8.5' is not a positive integer"),
        ({"n_feats": True}, "--n_feats: .* is not a positive integer"),
        ({"n_colors": 2}, "--n_colors: invalid choice: 2"),
        ({"betas": [0.9]}, "--betas: expected 2 arguments"),
        ({"betas": [0.9, "--chop"]}, "--betas: expected 2 arguments"),
        ({"betas": 0.9}, "--betas: expected 2 arguments"),
        ({"decay": {"a": 1}}, "--decay: .* is not a positive integer"),
        ({"data_range": [1, [2, 3]]}, "--data_range: '1/2-3' is not of the form"),
        ({"data_test": "../x"}, "--data_test: '../x' is not a name"),
        ({"compile": "yes"}, "--compile: 'yes' is neither true nor false"),
        ({"dir_data": 5}, "--dir_data: 5 is not text"),
        ({"dir_data": "a\0b"}, "--dir_data: 'a.x00b' is not text"),
        ({"dir_data": "\ud800"}, "--dir_data: .* is not text"),
        ({"ext": "zip"}, "--ext: invalid choice: 'zip'"),
        ({"template": "none"}, "--template: invalid choice"),
    ],
    ids=str,
)
def test_stored_options_must_pass_the_checks_of_their_flags(changed, message):
    with pytest.raises(InputError, match=rf"^run/options.json: {message}.*; correct it, or start another") as error:
        check_stored(defaults() | changed, "run/options.json")
    assert error.value.argument == "load"


def test_changed_options_are_listed():
    stored = {"lr": 0.1, "epochs": 5, "decay": [1], "tau_epochs": 2, "lambda_warmup": 1, "save": "other", "unknown": 1}
    args = parse(["--load", "run", "--epochs", "9", "--lr", "0.2"], stored)
    assert changes(args, stored) == ["lr 0.1 → 0.2", "epochs 5 → 9"]
    assert changes(args, {}) == []


def test_settings_are_filled_with_options_of_the_same_names():
    @dataclass(frozen=True)
    class Settings:
        lr: float
        gclip: float
        deadline: float

    filled = settings(Settings, parse(["--lr", "0.5", "--gclip", "2"]), gclip=3.0, deadline=1.0)
    assert filled == Settings(lr=0.5, gclip=3.0, deadline=1.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--scale 0", "--scale: '0' is not a positive integer; see --help"),
        ("--scale two", "--scale: 'two' is not"),
        ("--scale -1", "--scale: '-1' is not"),
        ("--patch_size 0", "--patch_size: '0' is not"),
        ("--batch_size -4", "--batch_size: '-4' is not"),
        ("--n_feats 0", "--n_feats: '0' is not"),
        ("--epochs 0", "--epochs: '0' is not"),
        ("--test_every 0", "--test_every: '0' is not"),
        ("--split_batch 0", "--split_batch: '0' is not"),
        ("--n_threads -1", "--n_threads: '-1' is not an integer of 0 or more"),
        ("--scale 65", "--scale: 65 is too large; use at most 64"),
        ("--n_feats 1000000", "--n_feats: 1000000 is too large; use at most 4096"),
        ("--n_blocks 1000000", "--n_blocks: 1000000 is too large"),
        ("--n_layers 1000000", "--n_layers: 1000000 is too large"),
        ("--n_resblocks 1000000", "--n_resblocks: 1000000 is too large"),
        ("--batch_size 1000000000", "--batch_size: 1000000000 is too large"),
        ("--n_threads 1000000", "--n_threads: 1000000 is too large; use at most 256"),
        ("--gan_k 1000000", "--gan_k: 1000000 is too large"),
        ("--gamma 1.5", "--gamma: 1.5 is too large; use at most 1"),
        ("--epochs 1000000000000", "--epochs: 1000000000000 is too large; use at most 1000000000"),
        (f"--test_every {'9' * 4000}", "--test_every: 9{40} … 9{20} is too large"),
        (f"--test_every {'9' * 5000}", "--test_every: .* is not a positive integer"),
        ("--lr 1e300", "--lr: 1e300 is too large"),
        ("--gclip 1e300", "--gclip: 1e300 is too large"),
        ("--lr 0", "--lr: '0' is not a number above 0"),
        ("--lr nan", "--lr: 'nan' is not"),
        ("--lr inf", "--lr: 'inf' is not"),
        ("--gclip -1", "--gclip: '-1' is not a number of 0 or more"),
        ("--rgb_range 0", "--rgb_range: '0' is not"),
        ("--betas 1 0.9", "--betas: '1' is not a number of 0 or more, below 1"),
        ("--seed 99999999999999999999", "--seed: '99999999999999999999' is not"),
        ("--chop_size 0", "--chop_size: '0' is not"),
        ("--decay 5-3", "--decay: '5-3' is not in increasing order"),
        ("--tau_min 2", "--tau_min 2.0: the temperature"),
        ("--model EDSR --unmasked_epochs 3", "--unmasked_epochs 3: EDSR has no masks"),
        ("--model EDSR --freeze_masks all", "--freeze_masks: EDSR has no masks"),
        ("--split_batch 8 --batch_size 4", "--split_batch 8: exceeds --batch_size 4"),
        ("--decay 0", "--decay: '0' is not"),
        ("--decay a-b", "--decay: 'a' is not"),
        ("--decay 5 --schedule cosine", "--decay: has no effect with --schedule cosine; leave it out, or add"),
        ("--gamma 0.3 --schedule cosine", "--gamma: has no effect with --schedule cosine"),
        ("--schedule linear", "--schedule: invalid choice: 'linear'"),
        ("--data_range 5-1/1-2", "--data_range: '5-1/1-2' is not of the form 1-800/801-810"),
        ("--data_range 1-2-3", "--data_range: '1-2-3' is not"),
        ("--data_test Set5+", "--data_test: '' is not a name"),
        ("--data_test A+A", "--data_test: 'A\\+A' is not a list of different sets"),
        ("--data_test ../Set5", "--data_test: '../Set5' is not a name"),
        ("--data_train ..", "--data_train: '..' is not a name"),
        ("--cpu False", "False: no such option; see --help"),
        ("--cpu --device cuda", "--cpu: a GPU is requested too"),
        ("--cpu --n_GPUs 1", "--cpu: a GPU is requested too"),
        ("--n_GPUs 2", "--n_GPUs 2: only one process is running"),
        ("--resume 3", "--resume: selects weights for --load NAME --test_only"),
        ("--load a --resume 3", "--resume: selects weights for --load NAME --test_only"),
        ("--load a --reset", "--reset: --load resumes a run"),
        ("--load a --save b", "--load a: continues in experiment/a; leave --save b out"),
        ("--load a --pre_train b.pt", "--pre_train: --load brings its own weights"),
        ("--load a --template GAN", "--template: --load brings its own options"),
        ("--dry_run --test_only", "--dry_run: is for training"),
        ("--time_limit 0", "--time_limit: '0' is not"),
        ("--ema 1", "--ema: '1' is not"),
        ("--max_bad_steps 0", "--max_bad_steps: '0' is not"),
        ("--save_results", "--save_results: is for tests; add --test_only"),
        ("--save_masks", "--save_masks: is for tests; add --test_only"),
        ("--self_ensemble", "--self_ensemble: is for tests; add --test_only"),
        ("--chop", "--chop: is for tests; add --test_only"),
        ("--dir_demo photos", "--dir_demo: is for tests; add --test_only"),
        ("--test_only --data_test Set5 --dir_demo photos", "--dir_demo: is only read by --data_test demo and video"),
        ("--save_masks --self_ensemble --test_only", "--save_masks: shows the masks of one pass"),
        ("--save_masks --model EDSR --test_only", "--save_masks: EDSR has no masks"),
        ("--data_test demo", "--data_test demo: has no HR images .* add --test_only"),
        ("--data_test video", "--data_test video: has no HR images .* add --test_only"),
        ("--data_test video+Set5 --test_only", "--data_test video: cannot be joined"),
        ("--data_test video --test_only", "--data_test video: no file is given; name it with --dir_demo"),
        ("--data_test video --test_only --dir_demo a.mp4 --save_masks", "--save_masks: is for images"),
        ("--unknown", "--unknown: no such option; see --help"),
        ("--inference fast", "--inference: invalid choice: 'fast'"),
        ("--inference sparse", "--inference sparse: is for tests; add --test_only"),
        ("--deterministic --loss L1+VGG54 --vgg_weights x", "--deterministic: VGG losses have no such gradient"),
        ("--engine plain", "--engine plain: is for tests; add --test_only"),
        ("--engine plain --test_only --model EDSR", "--engine plain: is for SMSR; leave it out"),
        ("--inference sparse --test_only --model EDSR", "--inference sparse: EDSR has no masked work to skip"),
        ("--template none", "--template: invalid choice"),
        ("--ext zip", "--ext: invalid choice"),
        ("--n_colors 2", "--n_colors: invalid choice"),
    ],
)
def test_mistakes_are_reported_in_one_line_that_names_the_flag(line, message):
    with pytest.raises(InputError, match=f"^(argument )?{message}") as error:
        parse(line.split())
    assert "\n" not in error.value.for_command_line()
    assert error.value.for_command_line() == str(error.value)  # with the flag once


def test_schedules_that_are_not_given_are_proportional_to_the_epochs():
    args = parse(["--epochs", "100"])
    assert (args.decay, args.tau_epochs, args.lambda_warmup) == ([20], 50, 5)
    args = parse(["--epochs", "100", "--decay", "200", "--lambda_warmup", "0"])
    assert (args.decay, args.tau_epochs, args.lambda_warmup) == ([200], 50, 0)
    assert parse(["--epochs", "1"]).decay == [1]
    args = parse(["--epochs", "100", "--unmasked_epochs", "60"])
    assert (args.decay, args.tau_epochs, args.lambda_warmup) == ([20], 20, 2)
    args = parse(["--template", "short", "--epochs", "120"])
    assert (args.unmasked_epochs, args.decay, args.tau_epochs, args.lambda_warmup) == (0, [80, 96, 110], 100, 6)
    args = parse(["--template", "short", "--epochs", "2"])
    assert (args.unmasked_epochs, args.decay, args.tau_epochs, args.lambda_warmup) == (0, [1, 2], 2, 1)
    assert parse(["--load", "a", "--epochs", "2000"], vars(parse([]))).decay == [200]


def test_several_gpus_need_torchrun(monkeypatch):
    with pytest.raises(InputError, match=r"torchrun --nproc_per_node=2 main\.py"):
        parse(["--n_GPUs", "2"])
    for setting in ["WORLD_SIZE=2", "RANK=0", "LOCAL_RANK=0", "MASTER_ADDR=localhost", "MASTER_PORT=29500"]:
        monkeypatch.setenv(*setting.split("="))
    assert parse(["--n_GPUs", "2"]).n_GPUs == 2
    with pytest.raises(
        InputError, match=r"--n_GPUs 1: 2 processes are running; start it with: torchrun --nproc_per_node=1"
    ):
        parse(["--n_GPUs", "1"])
    with pytest.raises(InputError, match="--data_test video: runs in a single process; start it without torchrun"):
        parse(["--data_test", "video", "--test_only", "--dir_demo", "a.mp4"])


def test_the_name_of_a_run():
    assert parse(["--test_only"]).save == "test"
    assert parse([]).save is None  # main.py chooses one that is not taken
    assert parse(["--load", "a"]).save == "a"
    assert parse(["--load", "a", "--save", "a", "--resume", "-1"], {"save": "b", "n_threads": 0}).save == "a"


def test_one_gpu_means_cuda():
    assert parse(["--n_GPUs", "1"]).device == "cuda"
    assert parse(["--cpu"]).device == "cpu"


def test_options_that_a_resumed_run_lacks_are_listed():
    stored = vars(parse([]))
    assert missing(stored) == []
    del stored["lr"], stored["seed"], stored["scale"], stored["chop"]
    assert sorted(missing(stored)) == ["lr", "scale", "seed"]


def test_options_of_a_training_are_listed_in_a_test():
    assert set(TRAINING_FLAGS) | set(MODEL_FLAGS) <= defaults().keys()
    line = "--test_only --lr 1e-4 --patch_size 96 --scale 2 --save_results --no-compile"
    assert ignored_in_tests(line.split()) == ["--patch_size", "--compile", "--lr"]
    assert ignored_in_tests(["--test_only", "--seed", "1"]) == []


def test_help_begins_with_examples_explains_all_options_and_shows_defaults_where_there_are_some(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = build_parser()
    text = parser.format_help()
    assert all(action.help for action in parser._actions)
    assert "(default: 0.0002)" in text
    assert "(default: None)" not in text
    assert "(default: False)" not in text
    assert "(default: )" not in text
    assert text.index("python main.py --load mine --test_only") < text.index("--seed N")
    assert max(map(len, text.splitlines())) < 80


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="selects processors as Linux does")
def test_workers_are_as_many_as_processors_may_be_used():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert parse([]).n_threads == 1
    finally:
        os.sched_setaffinity(0, allowed)
