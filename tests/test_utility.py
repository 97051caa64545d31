import errno
import json
import math
import os
import sys
import time

import pytest
import torch

from utility import (
    Experiment,
    InputError,
    free_in_cgroup,
    free_memory,
    in_parallel,
    logger,
    pick_device,
    remove_unfinished,
    save_torch,
    write_json,
    write_options,
    write_whole,
)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", b"old")

    def fail(_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"disk full: .*file"):
        write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_json_is_strict(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.inf, math.nan, 1.5]})

    def refuse(name):
        raise AssertionError(name)

    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse) == {"a": ["inf", None, 1.5]}


def test_options_round_trip_and_mark_what_differs(tmp_path):
    run = Experiment("run", tmp_path)
    run.start()
    path = run.folder / "options.json"
    with pytest.raises(InputError, match=r"options\.json is not there"):
        run.load_options()
    write_options(path, {"lr": 2e-4, "decay": [100]}, {"lr": 2e-4, "decay": [200]})
    assert json.loads(path.read_text())["changed"] == {"decay": [100]}
    assert run.load_options() == {"lr": 2e-4, "decay": [100]}
    path.write_text("[")
    with pytest.raises(InputError, match=r"options\.json is not there or broken"):
        run.load_options()


def test_a_log_ends_with_its_run(tmp_path, caplog):
    run = Experiment("run", tmp_path)
    run.start()
    caplog.set_level("INFO")
    with run.logging():
        logger.info("within")
    logger.info("after")
    text = (run.folder / "log.txt").read_text()
    assert "within" in text
    assert "after" not in text


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "a\\b", "/root", "~"])
def test_a_run_has_a_plain_name(name, tmp_path):
    with pytest.raises(InputError, match="names no run"):
        Experiment(name, tmp_path)


def test_a_run_is_not_overwritten_and_reset_deletes_it_alone(tmp_path):
    other = Experiment("other", tmp_path)
    other.start()
    run = Experiment("run", tmp_path)
    run.start()
    run.start()  # empty: nothing to lose
    (run.folder / "notes").write_text("")
    with pytest.raises(InputError, match="already; --reset"):
        run.start()
    run.save_checkpoint({})
    with pytest.raises(InputError, match="--load run goes on"):
        run.start()
    assert (run.folder / "notes").exists()
    with pytest.raises(InputError, match="--reset would delete"):
        run.check_start(reset=True, keep=str(run.folder / "notes"))
    run.start(reset=True)
    assert list(run.folder.iterdir()) == []
    assert other.folder.is_dir()


def test_a_broken_checkpoint_is_named(tmp_path):
    run = Experiment("run", tmp_path)
    with pytest.raises(InputError, match="no run to continue"):
        run.load_checkpoint()
    state = {"epoch": 3, "model": {}, "optimizer": {}}
    save_torch(run.folder / "checkpoint.pt", state)
    assert run.load_checkpoint() == state
    save_torch(run.folder / "checkpoint.pt", {"head.0.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="no checkpoint of a run"):
        run.load_checkpoint()
    (run.folder / "checkpoint.pt").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"--pre_train .*model_latest"):
        run.load_checkpoint()


def test_history_is_written_as_a_table_and_as_curves(tmp_path):
    run = Experiment("run", tmp_path)
    history = [{"epoch": 1, "loss": 2.0, "active": 0.9}, {"epoch": 2, "loss": 1.0, "active": 0.8, "psnr_y_Set5": 30.0}]
    run.write_history(history)
    lines = (run.folder / "log.csv").read_text().splitlines()
    assert lines == ["epoch,loss,active,psnr_y_Set5", "1,2,0.9,", "2,1,0.8,30"]
    assert all((run.folder / f"{name}.png").stat().st_size > 1000 for name in ("loss", "psnr", "active_share"))


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "nonsense"):
        with pytest.raises(InputError, match=f"--device {name}"):
            pick_device(name)


def test_work_in_parallel_keeps_its_order_and_the_first_error_ends_it():
    assert in_parallel(lambda value: value**2, [3, 1, 2], 3, "squares") == [9, 1, 4]
    assert in_parallel(str, [], 2, "nothing") == []
    done = []

    def work(value):
        if value == 1:
            raise InputError("bad")
        time.sleep(0.01)
        done.append(value)

    with pytest.raises(InputError, match="bad"):
        in_parallel(work, [1, *range(2, 100)], 2, "numbers")
    assert len(done) < 50


def test_a_run_that_goes_on_removes_what_killed_ones_left(tmp_path):
    experiment = Experiment("run", tmp_path)
    left = [experiment.folder / ".checkpoint.pt.1.tmp", experiment.folder / "model/.model_best.pt.1.tmp"]
    kept = [experiment.folder / "checkpoint.pt", experiment.folder / "results-Set5-x2/.img_x2_SR.png.2.tmp"]
    for path in left + kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with experiment.alone():
        assert [path.exists() for path in left + kept] == [False, False, True, True]


@pytest.mark.skipif(sys.platform != "linux", reason="nobody tells")
def test_free_memory_is_some_of_what_the_machine_has():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


def test_free_memory_heeds_the_limits_of_all_groups(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("1:name=systemd:/\n0::/job/step\n")
    job, step = tmp_path / "job", tmp_path / "job/step"
    step.mkdir(parents=True)
    for folder, limit in ((job, "1000"), (step, "max")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("700\n")
        (folder / "memory.stat").write_text("anon 600\ninactive_file 100\n")
    assert free_in_cgroup(tmp_path, own) == 400
    (job / "memory.max").write_text("max")
    assert free_in_cgroup(tmp_path, own) == math.inf
    assert free_in_cgroup(tmp_path, tmp_path / "absent") == math.inf


def test_an_unfinished_file_may_vanish(tmp_path):
    (tmp_path / ".a.tmp").symlink_to("absent")
    (tmp_path / ".b.tmp").touch()
    remove_unfinished(tmp_path)
    assert not (tmp_path / ".b.tmp").exists()
