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


def test_options_of_a_run_are_defaults_except_those_of_one_call():
    stored = {"lr": 0.1, "epochs": 5, "reset": True, "pre_train": "a.pt", "cpu": True, "unknown": 1}
    args = parse(["--load", "run", "--epochs", "9"], stored)
    assert (args.lr, args.epochs, args.reset, args.pre_train, args.cpu) == (0.1, 9, False, "", False)


@pytest.mark.parametrize(
    "line",
    [
        "--scale 0", "--scale two", "--scale -1", "--patch_size 0", "--batch_size -4", "--n_feats 0", "--epochs 0",
        "--test_every 0", "--n_threads -1", "--lr 0", "--lr nan", "--lr inf", "--gclip -1", "--split_batch 0",
        "--chop --chop_size 32", "--decay 0", "--decay a-b", "--data_range 5-1/1-2", "--data_range 1-2-3",
        "--data_test Set5+", "--data_test Set5+Set5", "--cpu False", "--cpu --device cuda", "--cpu --n_GPUs 1",
        "--n_GPUs 2", "--resume 3", "--load a --reset", "--load a --pre_train b.pt", "--precision half",
        "--data_test demo", "--unknown", "--template none", "--ext zip", "--n_colors 2", "--rgb_range 0",
    ],
)  # fmt: skip
def test_mistakes_are_one_line(line):
    with pytest.raises(InputError) as error:
        parse(line.split())
    assert "\n" not in str(error.value)
    assert line.split()[0].lstrip("-") in str(error.value) or "--" in str(error.value)


def test_one_gpu_asked_for_means_cuda():
    assert parse(["--n_GPUs", "1"]).device == "cuda"
    assert parse(["--cpu"]).device == "cpu"
