"""Run the programs on damaged copies of a file, and report every outcome that a user should not meet.

    python tests/damaged_files.py KIND FOLDER SEED COUNT

tests/test_bad_input.py prepares the folder.
"""

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tests.outcomes import copies, find_fault

ODD = [None, True, -1, 0, 2.5, 10**9, 10**30, float("nan"), "", "text", "x" * 10**4, [], [1, "a"], {}, {"a": 1}, -0.0]


# ---- damage ----------------------------------------------------------------------------------------------------------


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """Cut off a file, change a few of its bytes, or repeat, remove or blank a part of it."""
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice([1, 4, 64, 4096]))
    if rng.random() < 0.5:  # near the front, where headers are
        start, end = start % 512, start % 512 + end - start
    part = content[start:end]
    return rng.choice(
        [
            content[:start],
            content[:start] + rng.randbytes(len(part)) + content[end:],
            content[:start] + part + content[start:],
            content[:start] + content[end:],
            content[:start] + bytes(len(part)) + content[end:],
            content[:start] + bytes([content[start % len(content)] ^ 1 << rng.randrange(8)]) + content[start + 1 :],
        ]
    )


def damage_value(rng: random.Random, value, odd: list) -> None:
    """Replace, remove, rename or add one entry somewhere in nested dicts and lists."""
    places = []

    def visit(container):
        for key in container if isinstance(container, dict) else range(len(container)):
            places.append((container, key))
            if isinstance(container[key], dict | list):
                visit(container[key])

    visit(value)
    container, key = rng.choice(places)
    action = rng.randrange(4)
    if action == 0:
        del container[key]
    elif action == 1 and isinstance(container, dict):
        container[rng.choice(["extra", "x" * 10**4, key])] = container.pop(key)
    else:
        container[key] = rng.choice([*odd, *[place[0][place[1]] for place in rng.sample(places, min(3, len(places)))]])


class Code:
    """Makes a folder when it is unpickled: the proof that code was executed."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def odd_tensors() -> list:
    quantized = torch.quantize_per_tensor(torch.ones(8), 1, 0, torch.qint8)
    sparse = torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (2**40,))
    tensors = [torch.zeros(0), torch.zeros(8), torch.zeros(3, 3), torch.full((8,), torch.nan), torch.tensor(-1.0)]
    tensors += [torch.zeros(1).expand(2**30), torch.zeros(2**40, device="meta"), quantized, sparse]
    return [*tensors, torch.zeros(8, dtype=torch.complex64), torch.zeros(8, dtype=torch.long), Code()]


def damage_torch(rng: random.Random, path: Path) -> None:
    if rng.random() < 0.4:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
        return
    content = torch.load(path, weights_only=True)
    for _ in range(rng.choice([1, 1, 3])):
        damage_value(rng, content, [*ODD, *odd_tensors()])
    torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.7)


def damage_json(rng: random.Random, path: Path) -> None:
    if rng.random() < 0.3:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
        return
    content = json.loads(path.read_text())
    damage_value(rng, content, ODD)
    path.write_text(json.dumps(content))


def damage_plain(rng: random.Random, path: Path) -> None:
    path.write_bytes(damage_bytes(rng, path.read_bytes()))


# ---- programs --------------------------------------------------------------------------------------------------------


def load_weights():
    from model import load_model

    model = load_model("weights.pt")
    model(torch.rand(1, model.n_colors, 6, 6))
    return 0


def run_main(line: str) -> Callable[[], int]:
    def program():
        from main import main

        return main(line.split())

    return program


def make_report():
    from tools.report import main

    return main(["experiment/tested"])


def run_onnx():
    from tools.run_onnx import main

    return main(["--model", "w.onnx", "--input", "photos", "--output", "out", "--threads", "1"])


UPSCALE = "--pre_train weights.pt --test_only --save up --data_test "
RESUME = run_main("--load run --dry_run")
KINDS = {  # the file to damage, how, and what reads it
    "weights": ("weights.pt", damage_torch, load_weights),
    "checkpoint": ("experiment/run/checkpoint.pt", damage_torch, RESUME),
    "options": ("experiment/run/options.json", damage_json, RESUME),
    "results": ("experiment/tested/results-Tiny2-x2/metrics.json", damage_json, make_report),
    "cache": ("data/Tiny/bin/HR/*.npy", damage_plain, run_main("--load run --dry_run")),
    "images": ("photos/*", damage_plain, run_main(f"{UPSCALE} demo --dir_demo photos")),
    "onnx": ("w.onnx", damage_plain, run_onnx),
    "mp4": ("clip.mp4", damage_plain, run_main(f"{UPSCALE} video --dir_demo clip.mp4")),
    "mkv": ("clip.mkv", damage_plain, run_main(f"{UPSCALE} video --dir_demo clip.mkv")),
}


def main():
    kind, folder, seed, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    pattern, damage, program = KINDS[kind]
    for index, rng in copies(folder, kind, seed, count):
        path = rng.choice(sorted(Path().glob(pattern)))
        damage(rng, path)
        damaged = path.read_bytes()
        fault = find_fault(program)
        if not fault and kind != "cache" and path.read_bytes() != damaged:
            fault = "the damaged file was overwritten"
        if fault:
            print(f"{kind} {seed} {index}: {fault}", flush=True)


if __name__ == "__main__":
    main()
