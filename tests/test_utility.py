import errno
import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import files
from files import write_whole
from program import INTERRUPTED, InputError, is_out_of_memory, run_program
from utility import (
    free_memory,
    free_memory_in_cgroup,
    in_parallel,
    measure_once,
    peak_memory,
    pick_device,
    progress_bar,
    remove_unfinished,
    save_torch,
    seconds_of,
    write_json,
)

CPU = torch.device("cpu")


def test_an_error_with_an_argument_names_its_flag_on_the_command_line_only():
    error = InputError("no such network 'X'; there are SMSR, EDSR", argument="model")
    assert str(error) == "no such network 'X'; there are SMSR, EDSR"
    assert error.for_command_line() == "--model: no such network 'X'; there are SMSR, EDSR"
    error = InputError("a.png: no such file; check the path")
    assert error.argument is None
    assert error.for_command_line() == str(error) == "a.png: no such file; check the path"


def test_a_long_error_is_cut_in_the_middle_and_fits_one_line():
    text = str(InputError("x" * 10**5 + "\n" + "y " * 10**5 + "; remove it"))
    assert text.startswith("xxx")
    assert text.endswith("; remove it")
    assert " … " in text
    assert "\n" not in text
    assert 500 < len(text) < 700


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("a.png: broken; remove it"), "error: a.png: broken; remove it"),
        (
            InputError("no such loss 'L3'; there are L1", argument="loss"),
            "error: --loss: no such loss 'L3'; there are L1",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), "error: a.png: No such file"),
        (MemoryError(), "error: out of memory; use smaller images"),
        (RuntimeError("CUDA out of memory."), "error: out of memory; use smaller images"),
    ],
)
def test_a_program_reports_mistakes_in_one_line_and_exits_with_2(error, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as exited:
        run_program(main)
    assert exited.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(line)
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("bug"), OSError("bug"), ValueError("bug")])
def test_a_program_does_not_hide_its_own_bugs(error):
    def main():
        raise error

    with pytest.raises(type(error), match="bug"):
        run_program(main)


@pytest.mark.parametrize(("returned", "code"), [(None, None), (0, 0), (INTERRUPTED, INTERRUPTED)])
def test_a_program_exits_with_what_it_returns(returned, code):
    with pytest.raises(SystemExit) as exited:
        run_program(lambda: returned)
    assert exited.value.code == code


def test_an_interrupted_program_exits_with_130(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exited:
        run_program(main)
    assert exited.value.code == INTERRUPTED == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", b"old")

    def fail(_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"disk full: .*file"):
        write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_json_files_are_strict(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.inf, math.nan, 1.5]})

    def refuse(name):
        raise AssertionError(name)

    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse) == {"a": ["inf", None, 1.5]}


def test_files_of_tensors_round_trip(tmp_path):
    value = {"a": torch.arange(3), "b": [1, 2.5, None]}
    save_torch(tmp_path / "folder/a.pt", value)
    loaded = torch.load(tmp_path / "folder/a.pt", weights_only=True)
    assert torch.equal(loaded["a"], value["a"])
    assert loaded["b"] == value["b"]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a.pt"]


def test_devices_are_found_by_name():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("cuda:99", "nonsense"):
        with pytest.raises(InputError, match=f"no such device '{name}' on this machine; use cpu or auto") as error:
            pick_device(name)
        assert error.value.argument == "device"
        assert error.value.for_command_line().startswith("--device: ")


def test_a_measurement_is_made_once_per_key():
    calls = []

    def measure():
        time.sleep(0.01)
        calls.append(1)
        return len(calls)

    key = ("test_utility", object())
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: measure_once(key, measure), range(8))) == [1] * 8
    assert measure_once(("test_utility", object()), measure) == 2


def test_a_call_is_timed_in_seconds():
    assert 0.05 <= seconds_of(lambda: time.sleep(0.05), CPU) < 5


@pytest.mark.skipif(sys.platform != "linux", reason="compares with what Linux reports")
def test_peak_memory_is_in_bytes():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert peak_memory(CPU) == pytest.approx(1024 * int(status["VmHWM"].split()[0]), rel=0.1)


def test_parallel_results_keep_their_order_and_the_first_error_ends_the_work():
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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports it")
def test_free_memory_is_in_bytes():
    assert 2**20 < free_memory(CPU) < 2**50


def test_free_memory_obeys_the_limits_of_all_parent_groups(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("1:name=systemd:/\n0::/job/step\n")
    job, step = tmp_path / "job", tmp_path / "job/step"
    step.mkdir(parents=True)
    for folder, limit in ((job, "1000"), (step, "max")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("700\n")
        (folder / "memory.stat").write_text("anon 600\ninactive_file 100\n")
    assert free_memory_in_cgroup(tmp_path, own) == 400
    (job / "memory.max").write_text("max")
    assert free_memory_in_cgroup(tmp_path, own) == math.inf
    assert free_memory_in_cgroup(tmp_path, tmp_path / "absent") == math.inf


def test_files_with_the_longest_names_can_be_written(tmp_path):
    for name in ("a" * 255, "写" * 85):
        write_whole(tmp_path / name, b"content")
        assert (tmp_path / name).read_bytes() == b"content"
    assert len(list(tmp_path.iterdir())) == 2


def test_unfinished_files_are_removed_even_if_one_vanishes(tmp_path):
    (tmp_path / ".a.tmp").symlink_to("absent")
    (tmp_path / ".b.tmp").touch()
    remove_unfinished(tmp_path)
    assert not (tmp_path / ".b.tmp").exists()


def test_young_unfinished_files_can_be_kept(tmp_path):
    for name in (".old.tmp", ".young.tmp", "file.tmp"):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".old.tmp", (0, 0))
    remove_unfinished(tmp_path, seconds=3600)
    assert {path.name for path in tmp_path.iterdir()} == {".young.tmp", "file.tmp"}


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from program import run_program
def main():
    print("a line" * {count})
run_program(main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="writes to /dev/full")
@pytest.mark.parametrize("count", [1, 10**6])  # with and without room in the buffer of the stream
@pytest.mark.parametrize(
    ("redirection", "code", "error"),
    [
        (">/dev/full", 2, "error: standard output.*: No space left on device; free some disk space\n"),
        (">/dev/full 2>/dev/full", 2, ""),
        (">&-", 0, ""),
        ("| true", 141, ""),
    ],
)
def test_output_that_cannot_be_written_ends_a_program_in_one_line_at_most(tmp_path, count, redirection, code, error):
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(Path(files.__file__).parent), count=count))
    wait = "sleep 0.2; " if "|" in redirection else ""  # until nobody reads any more
    command = f"( {wait}{sys.executable} {tmp_path}/program.py; echo $? >{tmp_path}/code ) {redirection}"
    if "|" not in redirection:
        command = f"{sys.executable} {tmp_path}/program.py {redirection}; echo $? >{tmp_path}/code"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert int((tmp_path / "code").read_text()) == code
    assert re.fullmatch(error, done.stderr)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_name_can_be_printed_in_every_encoding(tmp_path, encoding):
    script = (
        f"import sys; sys.path.insert(0, {str(Path(files.__file__).parent)!r})\n"
        "from program import InputError, run_program\nfrom utility import log_to_console, logger\n"
        "def main():\n"
        "    log_to_console()\n"
        "    logger.info('写真 \\udcff →')\n"
        "    raise InputError('写真 \\udcff: broken; remove it')\n"
        "run_program(main)\n"
    )
    (tmp_path / "program.py").write_text(script, encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, str(tmp_path / "program.py")], capture_output=True, env=environment)
    assert done.returncode == 2
    for stream in (done.stdout, done.stderr):
        assert stream.count(b"\n") == 1
        assert b"\\udcff" in stream
        assert b"Traceback" not in stream


def test_progress_bars_are_for_terminals_only(capfd):
    assert list(progress_bar(range(3), desc="never shown")) == [0, 1, 2]
    assert capfd.readouterr().err == ""
