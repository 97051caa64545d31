import re
import subprocess
import sys
from pathlib import Path

import pytest

from program import InputError
from tools.benchmark import COMMANDS, main, parse

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("flags", [["--pre_train", "w.pt"], ["--size", "8x8", "--pre_train", "w.pt"]])
def test_the_default_command_is_inference(flags):
    assert parse(flags) == parse(["inference", *flags])
    assert parse(flags).command == "inference"


def test_without_arguments_the_weights_for_inference_are_required():
    with pytest.raises(InputError, match="--pre_train: missing"):
        main([])


def test_an_unknown_command_is_an_error():
    with pytest.raises(InputError, match=r"invalid choice: 'inferense' \(choose from .*inference.*train.*data.*onnx"):
        main(["inferense", "--pre_train", "w.pt"])


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--help"], ("benchmark.py", *COMMANDS)),
        (["-h"], ("benchmark.py", *COMMANDS)),
        (["inference", "--help"], ("benchmark.py inference", "--plot", "speedup_as_written")),
        (["train", "--help"], ("benchmark.py train", "--baseline", "+compile")),
        (["data", "--help"], ("benchmark.py data", "--rounds", "memory-mapped")),
        (["onnx", "--help"], ("benchmark.py onnx", "--repeats", "of_native")),
    ],
)
def test_help_describes_each_command(argv, shown, capsys):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in shown)


def test_no_module_is_executed_twice():
    # With -v, Python reports every module that it executes, except the script itself, "tools.benchmark".
    done = subprocess.run(
        [sys.executable, "-v", "tools/benchmark.py", "train", "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    modules = re.findall(r"^import '([\w.]+)' # <\S*SourceFileLoader", done.stderr, re.M)
    found = sorted(name for name in modules if name.startswith(("tools.", "benchmark", "baselines", "timing")))
    names = [*COMMANDS, "baselines", "epochs", "timing"]
    assert found == sorted(f"tools.benchmarks.{name}" for name in names)
