import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint import Experiment, write_options
from program import InputError
from utility import logger, save_torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def experiment(tmp_path):
    """A run with an empty folder."""
    created = Experiment("run", tmp_path)
    created.create()
    return created


def test_options_round_trip_and_changed_ones_are_listed(experiment):
    path = experiment.folder / "options.json"
    with pytest.raises(InputError, match=r"options\.json: No such file or directory; start another run"):
        experiment.load_options()
    write_options(path, {"lr": 2e-4, "decay": [100]}, {"lr": 2e-4, "decay": [200]})
    written = json.loads(path.read_text())
    assert written["changed"] == {"decay": [100]}
    assert set(written["versions"]) == {"python", "torch", "numpy"}
    assert experiment.load_options() == {"lr": 2e-4, "decay": [100]}
    for broken, problem in (
        ("[", "not JSON, or broken"),
        ("[" * 100_000, "not JSON, or broken"),
        ("\xff", "not JSON, or broken"),
        ("[]", r"it is \[\], not a mapping"),
        ("{}", "options is missing"),
        ('{"options": 1}', "options is 1, not a mapping"),
    ):
        path.write_text(broken, encoding="latin-1")
        with pytest.raises(InputError, match=f"{problem}; start another run from the weights in .*model") as error:
            experiment.load_options()
        assert error.value.for_command_line().startswith(f"--load: {path}: ")


def test_a_run_without_a_folder_cannot_be_resumed(tmp_path):
    experiment = Experiment("absent", tmp_path)
    for load in (experiment.load_options, experiment.load_checkpoint):
        with pytest.raises(InputError, match=r"absent.* does not exist; check the name of the run") as error:
            load()
        assert error.value.argument == "load"
    assert not experiment.exists()
    assert not experiment.folder.exists()


def test_the_console_log_is_copied_until_the_run_ends(experiment, caplog):
    caplog.set_level("INFO")
    with experiment.log_file():
        logger.info("inside")
    logger.info("outside")
    text = (experiment.folder / "log.txt").read_text()
    assert "inside" in text
    assert "outside" not in text
    with experiment.log_file():
        logger.info("resumed → later")
    text = (experiment.folder / "log.txt").read_text(encoding="utf-8")
    assert [line.split(maxsplit=2)[2] for line in text.splitlines()] == ["inside", "resumed → later"]


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "a\\b", "/root", "~", "a b", "a\n"])
def test_the_name_of_a_run_is_a_plain_folder_name(name, tmp_path):
    with pytest.raises(InputError, match="is not a valid run name; use letters") as error:
        Experiment(name, tmp_path)
    line = error.value.for_command_line()
    assert line.startswith("--save: ")
    assert "\n" not in line


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


RUN = (
    "options.json",
    "checkpoint.pt",
    "log.csv",
    "loss.png",
    "model/model_best.pt",
    "tensorboard/events.out.tfevents.1",
)
OTHERS = (
    "notes",
    "data/Set/HR/a.png",
    "model/vgg.pt",
    "model/model_teacher.pt",
    "results-Set5-x2/metrics.json",
    "lost+found/x",
    "log.txt.old",
)


def test_a_reset_deletes_the_run_and_nothing_else(tmp_path, experiment):
    other = Experiment("other", tmp_path)
    other.create()
    fill(other.folder, RUN)
    fill(experiment.folder, OTHERS)
    experiment.create()
    assert not experiment.exists()
    fill(experiment.folder, RUN)
    assert experiment.exists()
    with pytest.raises(InputError, match=r"run: already contains a run; choose another name"):
        experiment.create()
    assert all((experiment.folder / name).exists() for name in RUN + OTHERS)
    experiment.create(reset=True)
    assert not experiment.exists()
    assert not any((experiment.folder / name).exists() for name in RUN)
    assert all((experiment.folder / name).exists() for name in OTHERS)
    assert all((other.folder / name).exists() for name in RUN)


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_a_folder_that_is_a_symbolic_link_is_emptied_and_kept(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    experiment = Experiment("run", tmp_path)
    experiment.create()
    fill(experiment.folder, RUN)
    experiment.create(reset=True)
    assert (tmp_path / "run").is_symlink()
    assert not [path for path in (tmp_path / "disk").rglob("*") if path.is_file()]


def test_weights_are_saved_under_their_names(experiment):
    weights = {"head.0.weight": torch.arange(3.0)}
    for which in ("best", "latest", 7):
        experiment.save_weights(which, weights)
        path = experiment.folder / f"model/model_{which}.pt"
        assert path == experiment.weights_path(which)
        assert torch.equal(torch.load(path, weights_only=True)["head.0.weight"], weights["head.0.weight"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_of_a_gpu_can_be_read_without_one(experiment):
    experiment.save_weights("best", {"head.0.weight": torch.ones(1, device="cuda")})
    assert torch.load(experiment.weights_path("best"), weights_only=True)["head.0.weight"].device.type == "cpu"


STATE = {
    "model": {"head.0.weight": torch.zeros(1)},
    "ema": None,
    "optimizer": {},
    "optimizer_name": "Adam",
    "scaler": None,
    "criterion": {},
    "epoch": 3,
    "step": 0,
    "names": [],
    "sums": None,
    "bad": torch.zeros(2),
    "seconds": 0.0,
    "mask_histogram": {},
    "history": [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": torch.nan, "psnr_y_Set5": 30}],
}


def test_checkpoints_round_trip(experiment):
    experiment.save_checkpoint(STATE | {"of a later version": 1})
    assert experiment.checkpoint_path == experiment.folder / "checkpoint.pt"
    loaded = experiment.load_checkpoint()
    assert loaded.keys() == {*STATE, "of a later version"}
    assert loaded["epoch"] == 3
    assert torch.equal(loaded["model"]["head.0.weight"], torch.zeros(1))


@pytest.mark.parametrize("key", STATE)
def test_a_checkpoint_with_a_missing_or_wrong_entry_is_refused(experiment, key):
    def assert_refused(state, problem):
        save_torch(experiment.checkpoint_path, state)
        with pytest.raises(InputError, match=rf"{problem}.*; start another run from the weights in .*model$") as error:
            experiment.load_checkpoint()
        assert error.value.for_command_line().startswith(f"--load: {experiment.checkpoint_path}: ")

    assert_refused({name: value for name, value in STATE.items() if name != key}, f"{key} is missing")
    wrong = 3.5 if isinstance(STATE[key], str | int) else "text"
    assert_refused(STATE | {key: wrong}, f"{key} is ")


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"epoch": 0}, "epoch is 0, not an integer >= 1"),
        ({"epoch": True}, "epoch is True, not an integer >= 1"),
        ({"step": -1}, "step is -1, not an integer >= 0"),
        ({"epoch": 10**30}, "epoch is 1000.*000, not an integer >= 1"),
        ({"seconds": torch.inf}, "seconds is inf, not a finite number >= 0"),
        ({"model": {3: torch.zeros(1)}}, "model.3 is unknown"),
        ({"model": {"a": 1}}, "model.a is int, not a tensor of real numbers"),
        ({"bad": torch.zeros(3)}, r"bad is \(3,\), not \(2,\)"),
        ({"bad": torch.tensor([0, torch.nan])}, "bad contains NaN or infinity"),
        ({"names": ["loss", 1]}, "names.1 is 1, not text"),
        ({"history": [{"epoch": 1}]}, "history.0.loss is missing"),
        ({"history": [{"epoch": 1, "loss": "low"}]}, "history.0.loss is 'low', not a number"),
        ({"history": ["row"] * 9}, "history.0 is 'row', not a mapping, .* and 5 more"),
        ({"mask_histogram": {"mask_0.1": None}}, "mask_histogram.mask_0.1 is None, not a number"),
        ({"scaler": {}}, "scaler.scale is missing"),
    ],
)
def test_values_that_the_program_never_writes_are_named(experiment, changed, problem):
    save_torch(experiment.checkpoint_path, STATE | changed)
    with pytest.raises(InputError, match=rf"checkpoint\.pt: {problem}.*; start another run") as error:
        experiment.load_checkpoint()
    assert len(str(error.value)) < 700


def test_a_broken_checkpoint_is_named(experiment):
    for broken in (b"broken", b""):
        experiment.checkpoint_path.parent.mkdir(exist_ok=True)
        experiment.checkpoint_path.write_bytes(broken)
        with pytest.raises(
            InputError, match=r"cannot be read as weights \(broken or cut off\); start another"
        ) as error:
            experiment.load_checkpoint()
        assert error.value.for_command_line().startswith(f"--load: {experiment.checkpoint_path}: ")


def test_a_resumed_run_removes_unfinished_files_of_killed_processes(experiment):
    unfinished = [experiment.folder / ".checkpoint.pt.1.tmp", experiment.folder / "model/.model_best.pt.1.tmp"]
    kept = [experiment.folder / "checkpoint.pt", experiment.folder / "results-Set5-x2/.img_x2_SR.png.2.tmp"]
    for path in unfinished + kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with experiment.lock():
        assert [path.exists() for path in unfinished + kept] == [False, False, True, True]


PROGRAM = """
import sys; sys.path.insert(0, sys.argv[1])
from checkpoint import Experiment
with Experiment("run", sys.argv[2]).lock():
    pass
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_only_one_process_trains_in_a_folder(tmp_path, experiment):
    with experiment.lock():
        with pytest.raises(InputError, match="run: another process is training there; wait for it or stop it"):
            experiment.lock().__enter__()
        done = subprocess.run([sys.executable, "-c", PROGRAM, ROOT, tmp_path], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].endswith("another process is training there; wait for it or stop it")
    with experiment.lock():
        pass


def test_a_folder_that_does_not_exist_needs_no_lock(tmp_path):
    experiment = Experiment("absent", tmp_path)
    with experiment.lock():
        assert not experiment.folder.exists()


def test_results_of_a_test_do_not_stand_in_the_way_of_a_run(tmp_path):
    experiment = Experiment("run", tmp_path)
    results = experiment.results_folder("Set5", 2)
    assert results == experiment.folder / "results-Set5-x2"
    fill(results, ["metrics.json"])
    assert not experiment.exists()
    experiment.create()
    assert (results / "metrics.json").exists()


def test_the_folder_of_the_released_weights_is_no_run(tmp_path):
    for argument in ("save", "load"):
        with pytest.raises(InputError, match="'released' is the folder of the released weights") as error:
            Experiment("released", tmp_path, argument)
        assert error.value.argument == argument
    (tmp_path / "released/SMSR_X2").mkdir(parents=True)
    for name, target in (("link", "released"), ("deep", "released/SMSR_X2")):
        (tmp_path / name).symlink_to(tmp_path / target)
        with pytest.raises(InputError, match="is the folder of the released weights"):
            Experiment(name, tmp_path)
