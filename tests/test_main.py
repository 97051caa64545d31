import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from evaluation import compare
from main import main
from metrics import quantize
from model import EDSR, SMSR
from model.inference import self_ensemble
from utility import Experiment, InputError

ROOT = Path(__file__).resolve().parents[1]
MAIN = [sys.executable, str(ROOT / "main.py")]


@pytest.fixture
def folder(tmp_path, monkeypatch, make_set, tiny):
    """A folder to run in: data/Tiny, data/benchmark/Tiny2 and weights.pt."""
    monkeypatch.chdir(tmp_path)
    make_set("Tiny", count=4)
    make_set("Tiny2", count=2, benchmark=True)
    torch.save(tiny.state_dict(), tmp_path / "weights.pt")
    return tmp_path


TRAIN = (
    "--dir_data data --data_train Tiny --data_test Tiny+Tiny2 --data_range 1-3/4-4 --n_feats 8 --n_blocks 2 "
    "--n_layers 2 --patch_size 8 --batch_size 2 --test_every 2 --n_threads 0 --save run"
)
TEST = "--dir_data data --data_test Tiny2 --pre_train weights.pt --test_only --save check"


def run(line):
    return main(line.split())


def test_train_then_go_on_then_test(folder, capsys):
    assert run(f"{TRAIN} --epochs 2") == 0
    experiment = folder / "experiment/run"
    options = json.loads((experiment / "options.json").read_text())
    assert options["changed"]["n_feats"] == 8
    assert "lr" not in options["changed"]
    assert len((experiment / "log.csv").read_text().splitlines()) == 3

    with pytest.raises(InputError, match="--load run goes on"):
        run(f"{TRAIN} --epochs 2")
    with pytest.raises(InputError, match="has its 2 epochs"):
        run("--load run")
    assert run("--load run --epochs 3") == 0
    assert len((experiment / "log.csv").read_text().splitlines()) == 4

    for resume, which in ((0, "best"), (-1, "latest")):
        assert run(f"--load run --test_only --data_test Tiny2 --resume {resume}") == 0
        metrics = json.loads((experiment / "results-Tiny2-x2/metrics.json").read_text())
        path = experiment / f"model/model_{which}.pt"
        assert run(f"{TEST} --pre_train {path}") == 0
        same = json.loads(Path("experiment/check/results-Tiny2-x2/metrics.json").read_text())
        assert metrics["psnr_y"] == same["psnr_y"]
    with pytest.raises(InputError, match=r"--resume 7: no .*model_7\.pt"):
        run("--load run --test_only --resume 7")


def test_a_line_that_fails_leaves_the_run_as_it_was(folder):
    run(f"{TRAIN} --epochs 1")
    before = {path: path.read_bytes() for path in Path("experiment/run").rglob("*") if path.is_file()}
    for line, said in (
        ("--load run --epochs 2 --optimizer SGD", "the run has Adam"),
        ("--load run --epochs 2 --loss L1+GAN", "--loss"),
        ("--load run --epochs 2 --scale 3", "--scale 3: the run has 2"),
        ("--load run --epochs 2 --rgb_range 1", "--rgb_range 1.0: the run has 255"),
        ("--load run", "has its 1 epochs"),
    ):
        with pytest.raises(InputError, match=said):
            run(line)
    assert before == {path: path.read_bytes() for path in Path("experiment/run").rglob("*") if path.is_file()}


def test_going_on_keeps_the_origin_of_a_run(folder):
    run(f"{TRAIN} --epochs 1 --pre_train weights.pt")
    run("--load run --epochs 2")
    assert json.loads(Path("experiment/run/options.json").read_text())["changed"]["pre_train"] == "weights.pt"


def test_going_on_by_command_line_is_exact(folder):
    run(f"{TRAIN} --epochs 2")
    shutil.move("experiment/run", "experiment/whole")
    run(f"{TRAIN} --epochs 1")
    run(f"{TRAIN.replace('--save', '--load')} --epochs 2")
    ours, whole = (
        torch.load(f"experiment/{name}/model/model_latest.pt", weights_only=True) for name in ("run", "whole")
    )
    assert all(torch.equal(ours[key], whole[key]) for key in whole)


def test_test_writes_images_metrics_and_a_table(folder, capsys):
    assert run(f"{TEST} --save_results") == 0
    results = folder / "experiment/check/results-Tiny2-x2"
    assert {path.name for path in results.iterdir()} == {
        "img0_x2_SR.png", "img1_x2_SR.png", "metrics.json", "options.json",
    }  # fmt: skip
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["n_images"] == 2
    assert iio.imread(results / "img0_x2_SR.png").shape == (40, 48, 3)
    printed = capsys.readouterr().out
    assert "img1" in printed
    assert f"{metrics['psnr_y']:.2f}" in printed


def test_masks_are_drawn(folder):
    make_odd = iio.imread("data/benchmark/Tiny2/LR_bicubic/X2/img0.png")[:19, :23]
    iio.imwrite("odd.png", make_odd)
    demo = "--data_test demo --dir_demo odd.png --scale 2 --pre_train weights.pt --test_only --save_masks --save demo"
    assert run(demo) == 0
    results = folder / "experiment/demo/results-demo-x2"
    drawn = {path.name: iio.imread(path) for path in results.glob("*.png")}
    assert set(drawn) == {
        f"odd_x2_{kind}.png" for kind in ("SR", "mask1", "mask2", "density", "masks")
    }  # fmt: skip
    for kind in ("mask1", "mask2", "density"):
        assert drawn[f"odd_x2_{kind}.png"].shape == (19, 23, 3)
    for line, said in (("--self_ensemble", "takes eight"), ("--model EDSR", "EDSR has no masks")):
        with pytest.raises(InputError, match=said):
            run(f"{demo} {line}")


def test_an_image_too_large_for_the_memory_is_run_in_tiles(folder, monkeypatch, capsys):
    run(f"{TEST} --save_results")
    whole = iio.imread("experiment/check/results-Tiny2-x2/img0_x2_SR.png")
    assert "in tiles" not in capsys.readouterr().out
    monkeypatch.setattr("model.inference.free_memory", lambda device: 1000)
    run(f"{TEST} --save_results")
    assert capsys.readouterr().out.count("20x24 pixels need about 0.0 GiB, more than is free: run in tiles") == 1
    assert np.array_equal(iio.imread("experiment/check/results-Tiny2-x2/img0_x2_SR.png"), whole)


def test_self_ensemble_and_precision(folder, tiny):
    run(f"{TEST} --save_results")
    plain = iio.imread("experiment/check/results-Tiny2-x2/img0_x2_SR.png").astype(int)
    others = []
    for flags in ("--self_ensemble", "--precision bf16"):
        run(f"{TEST} --save_results --reset {flags}")
        others.append(iio.imread("experiment/check/results-Tiny2-x2/img0_x2_SR.png"))
        assert np.abs(plain - others[-1]).mean() < 8
    lr = torch.from_numpy(iio.imread("data/benchmark/Tiny2/LR_bicubic/X2/img0.png")).permute(2, 0, 1)[None].float()
    expected, _ = self_ensemble(tiny.eval().inference, lr)
    assert np.array_equal(others[0], quantize(expected[0], 255))
    expected = tiny.bfloat16()(lr.bfloat16())
    assert np.array_equal(others[1], quantize(expected[0], 255))


@pytest.mark.parametrize("model", [SMSR(2, n_blocks=2), EDSR(2, n_resblocks=2)])
def test_tiles_and_modes_give_the_same_image(folder, model):
    torch.save(model.state_dict(), "weights.pt")
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    iio.imwrite(
        "photos/own.png", np.kron(rng.integers(0, 256, (80, 30, 3), dtype=np.uint8), np.ones((4, 6, 1), np.uint8))
    )
    demo = f"--data_test demo --dir_demo photos --pre_train weights.pt --test_only --model {type(model).__name__}"
    images = []
    for flags in ("", "--chop --chop_size 150", "--inference dense", "--inference auto --chop --chop_size 1"):
        run(f"{demo} --save check --reset {flags}")
        images.append(iio.imread("experiment/check/results-demo-x2/own_x2_SR.png").astype(int))
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[3])
    assert np.abs(images[0] - images[2]).max() <= 1
    assert (images[0] != images[2]).mean() < 1e-3


def bound_memory():
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (10 << 30, 10 << 30))


@pytest.mark.skipif(sys.platform != "linux", reason="bounds the memory of a process as Linux does")
def test_too_large_an_image_is_named_with_the_way_out(folder):
    torch.save(SMSR(2).state_dict(), "weights.pt")
    (folder / "photos").mkdir()
    iio.imwrite("photos/huge.png", np.zeros((7000, 8000, 3), np.uint8))
    line = "--data_test demo --dir_demo photos --pre_train weights.pt --test_only --save check --cpu"
    done = subprocess.run([*MAIN, *line.split()], capture_output=True, text=True, preexec_fn=bound_memory)
    assert done.returncode == 2, done.stderr
    assert "error: huge: not enough memory for an image of 7000x8000 pixels; add --chop" in done.stderr


def test_demo_writes_images_and_says_that_it_does_not_measure(folder, capsys):
    (folder / "photos").mkdir()
    shutil.copy("data/Tiny/LR_bicubic/X2/img0.png", "photos/own.png")
    run("--data_test demo --dir_demo photos --pre_train weights.pt --test_only --save_results --save check")
    assert iio.imread("experiment/check/results-demo-x2/own_x2_SR.png").shape == (40, 48, 3)
    assert "no HR images" in capsys.readouterr().out
    assert json.loads(Path("experiment/check/results-demo-x2/metrics.json").read_text())["psnr_y"] is None


@pytest.mark.parametrize("flags", ["--n_colors 1", "--rgb_range 1"])
def test_grey_images_and_another_range(folder, flags):
    run(f"{TRAIN} --epochs 2 --lr 1e-3 {flags}")
    run("--load run --test_only --data_test Tiny2 --resume -1 --save_results")
    metrics = json.loads(Path("experiment/run/results-Tiny2-x2/metrics.json").read_text())
    image = iio.imread("experiment/run/results-Tiny2-x2/img0_x2_SR.png")
    assert image.shape == ((40, 48) if "colors" in flags else (40, 48, 3))
    assert metrics["psnr_y"] > 15


def test_weights_survive_a_reset_of_results(folder):
    run(f"{TRAIN} --epochs 1")
    weights = "experiment/run/model/model_best.pt"
    run(f"{TEST} --save run --pre_train {weights} --reset")
    assert Path(weights).exists()
    with pytest.raises(InputError, match="--reset would delete"):
        run(f"{TRAIN} --pre_train {weights} --reset")
    assert Path(weights).exists()


def test_training_starts_from_other_weights(folder, tiny):
    run(f"{TRAIN} --epochs 1 --pre_train weights.pt --lr 1e-12 --lambda_warmup 9")
    trained = torch.load("experiment/run/model/model_latest.pt", weights_only=True)
    assert all((trained[key] - value).abs().max() < 1e-6 for key, value in tiny.state_dict().items())


def test_edsr_trains_too(folder):
    run(TRAIN.replace("--n_blocks 2 --n_layers 2", "--model EDSR --n_resblocks 1") + " --epochs 1")
    (row,) = csv.DictReader(Path("experiment/run/log.csv").read_text().splitlines())
    assert row["active"] == row["active_share_Tiny"] == "1"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{TRAIN} --model RCAN", "SMSR, EDSR"),
        (f"{TRAIN} --loss L3", "there are L1, MSE"),
        (f"{TRAIN} --optimizer LION", "ADAM, SGD, RMSprop"),
        (f"{TRAIN} --data_train Set9", "the sets there: Tiny, Tiny2"),
        (f"{TRAIN} --dir_data nowhere", "no such folder"),
        (f"{TRAIN} --scale 3", r"prepare_data\.py"),
        (f"{TRAIN} --patch_size 30", r"img0\.png: 20x24 .* --patch_size 30"),
        (f"{TRAIN} --data_range 1-3/4-9", "4-9: Tiny holds 4"),
        (f"{TRAIN} --device cuda:9", "--device cuda:9"),
        (f"{TRAIN} --loss VGG54 --patch_size 4", "VGG54 needs HR patches of 16"),
        ("--load absent", "there is no run"),
        ("--load absent --test_only", "there is no run"),
        (f"{TEST} --data_test Set5", "no set 'Set5'"),
        (f"{TEST} --scale 4", "--scale 2 and not 4"),
        (f"{TEST} --pre_train absent.pt", r"absent\.pt"),
        (f"{TEST} --pre_train data/Tiny/HR/img0.png", r"img0\.png"),
        (f"{TEST} --model EDSR", "not those of EDSR"),
        (f"{TEST} --n_feats 16", "--n_feats 8 and not 16"),
        (f"{TEST} --n_resblocks 3", "no such size"),
        ("--test_only", "needs weights"),
        (f"{TEST} --data_test demo --dir_demo absent", "absent: no such folder"),
        (f"{TEST} --save ../up", "names no run"),
    ],
)  # fmt: skip
def test_mistakes_are_named_and_leave_nothing(folder, line, said):
    before = sorted(folder.rglob("*.pt"))
    with pytest.raises(InputError, match=said) as error:
        run(line)
    assert "\n" not in str(error.value)
    assert sorted(folder.rglob("*.pt")) == before
    assert not (folder / "experiment").exists()


def test_a_broken_image_is_named(folder):
    path = Path("data/benchmark/Tiny2/HR/img1.png")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"img1\.png"):
        run(TEST)


def test_a_mistake_is_one_line_and_exit_code_2(folder):
    done = subprocess.run([*MAIN, "--scale", "0"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: argument --scale")
    assert done.stderr.count("\n") == 1


def started(line):
    return subprocess.Popen(
        [*MAIN, *line.split()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(condition, seconds=120):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_ctrl_c_saves_and_says_how_to_go_on(folder):
    process = started(f"{TRAIN.replace('--n_threads 0', '--n_threads 1')} --epochs 100000")
    wait_for(Path("experiment/run/log.csv").exists)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: workers, too
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "python main.py --load run" in printed
    assert "Traceback" not in printed
    epoch = torch.load("experiment/run/checkpoint.pt", weights_only=True)["epoch"]
    assert run(f"--load run --epochs {epoch}") == 0


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="sends POSIX signals, as Linux has them")
def test_sigterm_to_all_processes_of_a_run_saves(folder):
    process = started(f"{TRAIN.replace('--n_threads 0', '--n_threads 2')} --epochs 100000")
    wait_for(Path("experiment/run/log.csv").exists)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) >= 2
    for pid in (*map(int, workers), process.pid):  # as a batch system does it
        os.kill(pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "everything is saved" in printed
    assert "Traceback" not in printed
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_a_killed_run_can_be_taken_up_while_its_workers_live(folder):
    process = started(f"{TRAIN.replace('--n_threads 0', '--n_threads 1')} --epochs 100000")
    wait_for(Path("experiment/run/checkpoint.pt").exists)
    wait_for(Path("experiment/run/log.csv").exists)
    process.kill()
    process.wait()
    epoch = torch.load("experiment/run/checkpoint.pt", weights_only=True)["epoch"]
    assert run(f"--load run --epochs {epoch}") == 0
    process.communicate(timeout=60)  # the workers, which hold the pipe, have ended, too


def test_a_time_limit_stops_and_the_run_goes_on(folder, capsys):
    assert run(f"{TRAIN} --epochs 100000 --time_limit 0.02") == 0
    assert "python main.py --load run" in capsys.readouterr().out
    state = torch.load("experiment/run/checkpoint.pt", weights_only=True)
    assert run(f"--load run --epochs {state['epoch']}") == 0  # without the limit


def test_without_a_compiler_compile_says_so(folder):
    (folder / "empty").mkdir()
    environment = os.environ | {"PATH": str(folder / "empty"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "kernels")}
    done = subprocess.run(
        [*MAIN, *f"{TRAIN} --epochs 1 --compile --cpu".split()], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --compile: ")
    assert "Traceback" not in done.stderr


def test_a_dry_run_writes_nothing(folder, capsys):
    assert run(f"{TRAIN} --epochs 7 --dry_run") == 0
    printed = capsys.readouterr().out
    assert "7 epochs: about" in printed
    assert "GiB" in printed
    assert not (folder / "experiment").exists()


def test_weights_of_another_scale_lend_all_but_the_tail(folder, make_set, tiny, capsys):
    make_set("Three", count=4, size=(60, 72), scale=3)
    line = TRAIN.replace("Tiny+Tiny2", "Three").replace("--data_train Tiny", "--data_train Three")
    run(f"{line} --scale 3 --epochs 1 --pre_train weights.pt --lr 1e-12 --lambda_warmup 9")
    assert "weights.pt: of x2; all but the tail is taken for x3" in capsys.readouterr().out
    trained = torch.load("experiment/run/model/model_latest.pt", weights_only=True)
    for key, value in tiny.state_dict().items():
        if key.startswith("tail."):
            assert trained[key].shape[0] == 27
        else:
            torch.testing.assert_close(trained[key], value)


def test_what_a_run_goes_on_with_is_said(folder, capsys):
    run(f"{TRAIN} --epochs 1")
    capsys.readouterr()
    run("--load run --epochs 2 --lr 1e-5")
    printed = capsys.readouterr().out
    assert "from here on: lr 1e-05 (0.0002 before)" in printed
    assert "from here on: epochs 2 (1 before)" in printed
    assert printed.count("from here on") == 2


@pytest.mark.skipif(os.name == "nt", reason="there are no such locks")
def test_two_runs_in_one_folder_are_refused(folder):
    run(f"{TRAIN} --epochs 1")
    with Experiment("run").alone():
        for line in ("--load run --epochs 2", f"{TRAIN} --reset"):
            with pytest.raises(InputError, match="another process is training there"):
                run(line)
    assert run("--load run --epochs 2") == 0


def bound_files():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.skipif(sys.platform != "linux", reason="bounds the files of a process as Linux does")
def test_a_disk_that_takes_no_more_is_told_and_loses_nothing(folder):
    run(f"{TRAIN} --epochs 1")
    before = Path("experiment/run/checkpoint.pt").read_bytes()
    line = "--load run --epochs 2"
    done = subprocess.run([*MAIN, *line.split()], capture_output=True, text=True, preexec_fn=bound_files)
    assert done.returncode == 2, done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: experiment/run/checkpoint.pt: File too large; mend that, then go on from")
    assert "Traceback" not in done.stderr
    assert Path("experiment/run/checkpoint.pt").read_bytes() == before


def test_tensorboard_is_optional(folder):
    pytest.importorskip("tensorboard")
    run(f"{TRAIN} --epochs 2 --tensorboard --images_every 1")
    assert list(Path("experiment/run/tensorboard").iterdir())


def test_without_tensorboard_the_line_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        run(f"{TRAIN} --epochs 1 --tensorboard")
    assert not Path("experiment").exists()


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_a_killed_run_leaves_a_checkpoint_that_loads(folder):
    process = started(f"{TRAIN} --epochs 100000 --test_every 100000")
    wait_for(Path("experiment/run/checkpoint.pt").exists)
    process.kill()
    process.communicate()
    assert run("--load run --epochs 1 --test_every 2") == 0


def test_the_released_weights_run_on_the_sample_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = ROOT / "experiment/SMSR_X2/model/model_best.pt"
    run(f"--dir_data {ROOT / 'testsets'} --data_test Sample --pre_train {weights} --test_only --save check")
    metrics = json.loads((tmp_path / "experiment/check/results-Sample-x2/metrics.json").read_text())
    for row in metrics["images"]:
        lr = iio.imread(ROOT / f"testsets/benchmark/Sample/LR_bicubic/X2/{row['name']}.png")
        hr = iio.imread(ROOT / f"testsets/benchmark/Sample/HR/{row['name']}.png")
        bicubic = torch.nn.functional.interpolate(
            torch.from_numpy(lr).permute(2, 0, 1)[None].float(), scale_factor=2, mode="bicubic"
        )
        assert row["psnr_y"] > compare(quantize(bicubic[0], 255), hr, 2)["psnr_y"] + 0.5


def test_published_weights_on_set5(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = shared / "reference/SMSR_X2.pt"
    run(f"--dir_data {shared / 'data'} --data_test Set5 --pre_train {weights} --test_only --save check --save_results")
    mean = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mean"))
    assert mean.split()[1] == "37.99"
    assert mean.split()[2][:5] == "0.960"
    assert len(list((tmp_path / "experiment/check/results-Set5-x2").glob("*_SR.png"))) == 5
