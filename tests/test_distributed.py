"""Compare two processes on a CPU, started by torchrun, with a single one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import distributed
from main import main
from program import InputError, launched_processes

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "main.py")]
TRAIN = (
    "--dir_data data --data_train Tiny --data_test Tiny+Tiny2 --data_range 1-3/4-4 --patch_size 8 --batch_size 4 "
    "--test_every 3 --n_threads 0 --cpu --save run"
)
EDSR = f"{TRAIN} --model EDSR --n_feats 8 --n_resblocks 1 --optimizer SGD --lr 1e-5"
UNMASKED = f"{TRAIN} --n_feats 8 --n_blocks 2 --n_layers 2 --unmasked_epochs 9 --optimizer SGD --lr 1e-5"

LAUNCHED = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")


@pytest.fixture
def folder(tmp_path, monkeypatch, make_set):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_set("Tiny", count=4)
    make_set("Tiny2", count=3, benchmark=True)
    return tmp_path


def run_in_two_processes(line):
    return subprocess.run([*TORCHRUN, *line.split()], capture_output=True, text=True, timeout=300)


def weights(name):
    return torch.load(f"experiment/{name}/model/model_latest.pt", weights_only=True)


def columns(name):
    lines = Path(f"experiment/{name}/log.csv").read_text().splitlines()
    return [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]


@pytest.mark.parametrize("line", [EDSR, UNMASKED])
def test_two_processes_train_as_one(folder, line):
    """Without noise, averaging the gradients of two halves of a batch must give the gradient of the whole."""
    assert main(f"{line} --epochs 2".split()) == 0
    shutil.move("experiment/run", "experiment/one")
    done = run_in_two_processes(f"{line} --epochs 1 --split_batch 2 --ext device")
    assert done.returncode == 0, done.stderr
    assert main(["--load", "run", "--epochs", "2"]) == 0  # resumes as one process
    one, two = weights("one"), weights("run")
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(columns("run"), columns("one"), strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-4)
        assert float(ours["psnr_y_Tiny2"]) == pytest.approx(float(theirs["psnr_y_Tiny2"]), abs=0.01)


@pytest.mark.parametrize("masks", ["", "--freeze_masks all"])
def test_two_processes_report_the_mask_densities_of_one(folder, tiny, masks):
    torch.save(tiny.state_dict(), "weights.pt")
    line = f"{TRAIN} --n_feats 8 --n_blocks 2 --n_layers 2 --pre_train weights.pt {masks} --epochs 1"
    line += " --lr 1e-12"  # too low to change a weight
    assert main(line.split()) == 0
    shutil.move("experiment/run", "experiment/one")
    done = run_in_two_processes(line)
    assert done.returncode == 0, done.stderr
    (one,), (two,) = columns("one"), columns("run")
    densities = {column for column in one if column.startswith("density_")}
    assert len(densities) == 2 * 3  # two modules, in training and on two sets
    for column in densities - {"density_1", "density_2"}:
        assert two[column] == one[column]
    for column in ("density_1", "density_2"):  # the noise differs
        assert float(two[column]) == pytest.approx(float(one[column]), abs=0.05)


def test_two_processes_test_as_one(folder, tiny):
    torch.save(tiny.state_dict(), "weights.pt")
    line = "--dir_data data --data_test Tiny2 --pre_train weights.pt --test_only --save_results --cpu --save"
    assert main(f"{line} one".split()) == 0
    done = run_in_two_processes(f"{line} two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mean") == 1
    folders = [Path(f"experiment/{name}/results-Tiny2-x2") for name in ("one", "two")]
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in folders)
    for metrics in (one, two):
        metrics.pop("seconds_per_image")
        for row in metrics["images"]:
            row.pop("seconds")
    assert one == two
    for row in one["images"]:
        assert np.array_equal(*(iio.imread(folder / f"{row['name']}_x2_SR.png") for folder in folders))


def long_training():
    """Start torchrun with two processes and wait until they have finished an epoch; returns that of torchrun."""
    line = f"{TRAIN} --n_feats 8 --n_blocks 2 --n_layers 2 --epochs 100000"
    process = subprocess.Popen(
        [*TORCHRUN, *line.split()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while not Path("experiment/run/log.csv").exists():
        assert process.poll() is None
    return process


def test_if_a_process_dies_the_other_ends_and_the_run_can_be_resumed(folder):
    process = long_training()
    helper = next(pid for pid in children(process.pid) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(helper, signal.SIGKILL)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: another process of this run has died; resume with: python main.py --load run" in printed
    epoch = torch.load("experiment/run/checkpoint.pt", weights_only=True)["epoch"]
    assert main(f"--load run --epochs {epoch}".split()) == 0


def test_sigterm_to_all_processes_saves_although_torchrun_forwards_it(folder):
    process = long_training()
    for pid in (*children(process.pid), process.pid):
        os.kill(pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert "everything is saved" in printed
    assert "error:" not in printed


def test_a_time_limit_stops_both_without_an_error(folder):
    done = run_in_two_processes(f"{EDSR} --epochs 100000 --time_limit 0.05")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    epoch = torch.load("experiment/run/checkpoint.pt", weights_only=True)["epoch"]
    assert main(f"--load run --epochs {epoch}".split()) == 0


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_batch_that_cannot_be_divided_evenly_is_refused(folder):
    done = run_in_two_processes(f"{EDSR.replace('--batch_size 4', '--batch_size 3')} --epochs 1")
    assert done.returncode != 0
    assert (
        "error: --batch_size: 3 patches cannot be divided evenly among 2 processes; use a multiple of 2" in done.stderr
    )
    assert not Path("experiment").exists()


def test_a_process_needs_a_gpu_of_its_own(monkeypatch):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(
        InputError, match="process 2 runs on a machine with 1 GPUs; start one process per GPU"
    ) as caught:
        distributed.start("cuda")
    assert caught.value.argument == "nproc_per_node"
    with pytest.raises(InputError, match="use cuda instead of cuda:1") as caught:
        distributed.start("cuda:1")
    assert caught.value.argument == "device"


SINGLE = [
    {"WORLD_SIZE": ""},
    {"WORLD_SIZE": "two"},
    {"WORLD_SIZE": "2"},
    {"WORLD_SIZE": "2", "RANK": "0"},
    {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
    {"RANK": "1", "LOCAL_RANK": "1"},
    {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"},
    {**LAUNCHED, "RANK": ""},
    {**LAUNCHED, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
]


@pytest.mark.parametrize("variables", SINGLE, ids=str)
def test_without_all_variables_of_a_launcher_a_process_is_alone(monkeypatch, caplog, variables):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_processes() == 1
    with caplog.at_level("INFO"):
        assert distributed.start("cpu") == torch.device("cpu")
    assert ("running as a single process; torchrun starts several" in caplog.text) == (
        variables.get("WORLD_SIZE", "1") not in ("", "1")
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "0"), ("WORLD_SIZE", "x"), ("RANK", "2"), ("RANK", "-1"), ("MASTER_PORT", "a")],
)
def test_contradicting_variables_of_a_launcher_are_reported(monkeypatch, name, value):
    for variable, right in {**LAUNCHED, name: value}.items():
        monkeypatch.setenv(variable, right)
    with pytest.raises(InputError, match=rf"{name}={value}.*: not as a launcher sets them; start with torchrun"):
        distributed.start("cpu")


def test_processes_that_cannot_connect_are_reported(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {**LAUNCHED, "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=r"^the processes cannot connect \(.*\); start them with torchrun$"):
            distributed.start("cpu")


def test_a_single_process_exchanges_nothing():
    tensor = torch.tensor([1.0, 2.0])
    distributed.average([tensor])
    assert tensor.tolist() == [1, 2]
    assert distributed.gather("a") == ["a"]
    assert [distributed.any_rank(flag) for flag in (True, False)] == [True, False]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.is_main_process()
    assert not distributed.is_launched()
    assert not distributed.is_connection_lost(RuntimeError("gloo"))
    with distributed.main_process_first():
        pass
    distributed.stop()
