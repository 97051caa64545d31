"""Run the programs with odd command lines, and report every outcome that a user should not meet.

    python tests/odd_commands.py FOLDER SEED COUNT

tests/test_bad_input.py prepares the folder. What a command reads must be the same afterwards.
"""

import contextlib
import functools
import importlib
import io
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.outcomes import copies, find_fault

READ = ("data", "photos", "weights.pt")
NUMBERS = ["0", "-1", "1", "2", "2.5", "1e12", "1e400", "nan", "inf", "9" * 20, "0x10", "1_000", "٣"]
PATHS = [
    ".",
    "..",
    "/",
    "data",
    "photos",
    "weights.pt",
    "missing",
    "missing/deep.png",
    "photos/notes.txt",
    "/dev/null",
    "~",
    "run",
]
TEXTS = ["", " ", "-", "--", "text", "ünïcödé", "\udcff", "\n", "x" * 300, "a/b", "1-", "3-1", "1-2/x", "SMSR", "cpu"]
SPECIAL = ["Tiny", "HR", "demo", "Tiny+demo", "1*L1+", "1*L1+0.1*VGG", "0,0,8,8", "out.png", "out.onnx", "1 2 3", "8x8"]
TRAIN = (
    "--dir_data data --data_train Tiny --data_test Tiny2 --n_feats 8 --n_blocks 1 --n_layers 2 --patch_size 8 "
    "--batch_size 2 --test_every 1 --epochs 1 --time_limit 1e-9 --n_threads 0 --save new --device cpu"
)
SMALL = "--n_feats 8 --n_blocks 1 --n_layers 2 --device cpu"
COMMANDS = {  # a program and a command line that works
    "train": ("main", TRAIN),
    "test": ("main", f"{SMALL} --dir_data data --data_test Tiny2 --pre_train weights.pt --test_only --save_results"),
    "demo": ("main", f"{SMALL} --data_test demo --dir_demo photos --pre_train weights.pt --test_only --save up"),
    "resume": ("main", "--load run --dry_run"),
    "report": ("tools.report", "run --output report.html"),
    "train set": ("tools.prepare_data", "train --hr photos --name New --scales 2 --out new --n_threads 1"),
    "benchmark set": ("tools.prepare_data", "benchmark --hr photos --name New --scales 2 3 --out new --n_threads 1"),
    "check": ("tools.prepare_data", "check data/Tiny --scale 2 --n_threads 1"),
    "unpack": ("tools.prepare_data", "div2k --archive_dir photos --out new --n_threads 1"),
    "compare": ("tools.compare", "--image photos/img0.png --crop 0,0,8,8 --methods bicubic weights.pt --output c.png"),
    "masks": ("tools.plot_masks", "--pre_train weights.pt --output masks.png"),
    "convert": ("tools.convert_weights", "--pre_train weights.pt --output converted.pt"),
    "onnx": ("tools.run_onnx", "--model w.onnx --input photos --output out --threads 1"),
    "benchmark": ("tools.benchmark", "--pre_train weights.pt --size 8x8 --repeats 1 --threads 1 --device cpu"),
}
TOO_MUCH = {"--compile", "--tensorboard", "--n_GPUs", "--plot", "-h", "--help"}  # slow, or tested elsewhere


def odd_command(rng: random.Random, line: str, flags: list[str]) -> list[str]:
    """A command line with one to three changes."""
    words = line.split()
    for _ in range(rng.choice([1, 1, 2, 3])):
        value = rng.choice(rng.choice([NUMBERS, PATHS, TEXTS, SPECIAL]))
        place = rng.randrange(len(words))
        action = rng.randrange(5)
        if action == 0:
            del words[place]
        elif action == 1:
            words[place] = value
        elif action == 2:
            words += [rng.choice(flags)]
        else:
            words += [rng.choice(flags), value]
    return words


def find_flags(program: str, command: str) -> list[str]:
    """The options of a program, from its help."""
    text = io.StringIO()
    words = [command.split()[0]] if program == "tools.prepare_data" else []
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        importlib.import_module(program).main([*words, "--help"])
    return sorted(set(re.findall(r"--\w+", text.getvalue())) - TOO_MUCH)


def contents() -> dict[str, bytes]:
    """What the programs read: file -> content. Caches beside the images are theirs."""
    files = [file for name in READ for path in [Path(name)] for file in ([path] if path.is_file() else path.rglob("*"))]
    return {str(file): file.read_bytes() for file in files if file.is_file() and file.suffix != ".npy"}


def main():
    folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    names = sorted(COMMANDS)
    flags = {name: find_flags(*COMMANDS[name]) for name in names}
    for index, rng in copies(folder, "commands", seed, count):
        name = names[index % len(names)]
        program, line = COMMANDS[name]
        words = odd_command(rng, line, flags[name])
        before = contents()
        fault = find_fault(functools.partial(importlib.import_module(program).main, words))
        after = contents()
        lost = [file for file in before if after.get(file) != before[file]]
        if lost:
            fault = f"lost or changed: {lost}; {fault}"
        if fault:
            print(f"{index} {name} {words!a}: {fault}", flush=True)


if __name__ == "__main__":
    main()
