import json

import pytest

from option import TEMPLATES, defaults, parse
from utility import InputError


def test_edsr_flags_are_all_there():
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


def test_options_survive_json():
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


def test_what_cannot_be_taken_over_from_a_run():
    stored = {"precision": "bf16", "compile": True, "res_scale": None, "n_feats": 32}
    assert parse(["--load", "run"], stored).precision == "bf16"
    assert parse(["--load", "run", "--test_only"], stored).precision == "single"
    assert not parse(["--load", "run", "--no-compile"], stored).compile
    with pytest.raises(InputError, match=r"--res_scale 0\.1: the run has the network's own"):
        parse(["--load", "run", "--res_scale", "0.1"], stored)
    with pytest.raises(InputError, match="--n_feats 64: the run has 32"):
        parse(["--load", "run", "--n_feats", "64"], stored)


def test_options_of_a_run_are_defaults_except_those_of_one_call():
    stored = {"lr": 0.1, "epochs": 5, "reset": True, "pre_train": "a.pt", "cpu": True, "device": "cpu", "unknown": 1}
    args = parse(["--load", "run", "--epochs", "9"], stored)
    assert (args.lr, args.epochs, args.reset, args.pre_train, args.device) == (0.1, 9, False, "", "cpu")
    assert parse(["--load", "run", "--device", "cuda"], stored).device == "cuda"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--scale 0", "--scale: '0' is not a whole number of 1 or more"),
        ("--scale two", "--scale: 'two'"), ("--scale -1", "--scale: '-1'"), ("--patch_size 0", "--patch_size: '0'"),
        ("--batch_size -4", "--batch_size"), ("--n_feats 0", "--n_feats"), ("--epochs 0", "--epochs"),
        ("--test_every 0", "--test_every"), ("--split_batch 0", "--split_batch"), ("--n_threads -1", "--n_threads"),
        ("--lr 0", "--lr: '0' is not a number above 0"), ("--lr nan", "--lr"), ("--lr inf", "--lr"),
        ("--gclip -1", "--gclip"), ("--rgb_range 0", "--rgb_range"), ("--betas 1 0.9", "--betas: '1' .* below 1"),
        ("--seed 99999999999999999999", "--seed"), ("--chop_size 0", "--chop_size"),
        ("--decay 5-3", "--decay: '5-3' is not in order"), ("--tau_min 2", "--tau_min 2.0: the temperature"),
        ("--split_batch 8 --batch_size 4", "--split_batch 8: --batch_size 4"),
        ("--decay 0", "--decay"), ("--decay a-b", "--decay"), ("--data_range 5-1/1-2", "--data_range"),
        ("--data_range 1-2-3", "--data_range"), ("--data_test Set5+", "--data_test"), ("--data_test A+A", "--data_test"),  # noqa: E501
        ("--data_test ../Set5", "--data_test"), ("--data_train ..", "--data_train"),
        ("--cpu False", "unrecognized arguments: False"), ("--cpu --device cuda", "--cpu and a GPU"),
        ("--cpu --n_GPUs 1", "--cpu and a GPU"), ("--n_GPUs 2", "--n_GPUs 2"), ("--resume 3", "--resume"),
        ("--load a --resume 3", "--resume"), ("--load a --reset", "--reset"), ("--load a --save b", "leave --save b out"),  # noqa: E501
        ("--load a --pre_train b.pt", "--pre_train"), ("--load a --template GAN", "--template"),
        ("--dry_run --test_only", "--dry_run is for a training"), ("--time_limit 0", "--time_limit"),
        ("--ema 1", "--ema"), ("--max_bad_steps 0", "--max_bad_steps"),
        ("--save_results", "--save_results is for --test_only"),
        ("--data_test demo", "--test_only"), ("--unknown", "unrecognized arguments: --unknown"),
        ("--inference fast", "--inference"), ("--inference sparse", "--inference sparse is for --test_only"),
        ("--inference sparse --test_only --model EDSR", "EDSR has nothing to skip"),
        ("--template none", "--template"), ("--ext zip", "--ext"), ("--n_colors 2", "--n_colors"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_that_names_the_flag(line, said):
    with pytest.raises(InputError, match=said) as error:
        parse(line.split())
    assert "\n" not in str(error.value)


def test_schedules_that_are_not_given_are_in_proportion_to_the_epochs():
    args = parse(["--epochs", "100"])
    assert (args.decay, args.tau_epochs, args.lambda_warmup) == ([20], 50, 5)
    args = parse(["--epochs", "100", "--decay", "200", "--lambda_warmup", "0"])
    assert (args.decay, args.tau_epochs, args.lambda_warmup) == ([200], 50, 0)
    assert parse(["--epochs", "1"]).decay == [1]
    assert parse(["--load", "a", "--epochs", "2000"], vars(parse([]))).decay == [200]


def test_several_gpus_take_torchrun(monkeypatch):
    with pytest.raises(InputError, match=r"torchrun --nproc_per_node=2 main\.py"):
        parse(["--n_GPUs", "2"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse(["--n_GPUs", "2"]).n_GPUs == 2
    with pytest.raises(InputError, match="--n_GPUs 1, and 2 process"):
        parse(["--n_GPUs", "1"])


def test_the_name_of_a_run():
    assert parse([]).save == "test"
    assert parse(["--load", "a"]).save == "a"
    assert parse(["--load", "a", "--save", "a", "--resume", "-1"], {"save": "b", "n_threads": 0}).save == "a"


def test_one_gpu_asked_for_means_cuda():
    assert parse(["--n_GPUs", "1"]).device == "cuda"
    assert parse(["--cpu"]).device == "cpu"
