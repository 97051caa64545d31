import json

import numpy as np
import pytest
import torch

from data import PatchSettings, find_set
from data.srdata import Patches
from program import InputError
from tools.benchmark import main
from tools.benchmarks.baselines import PickledPatches
from tools.benchmarks.data import write_pairs


def test_pickled_images_give_the_same_patches(tmp_path):
    write_pairs(tmp_path / "Pairs", 2, (60, 81))
    sets = [find_set("Pairs", tmp_path, 2)]
    settings = PatchSettings(patch_size=16, ext="img", n_threads=1)
    pickled, expected = PickledPatches(sets, 2, 3, settings), Patches(sets, 2, 3, settings)
    for draw in range(8):
        for ours, theirs in zip(pickled[draw % 2, 1, draw], expected[draw % 2, 1, draw], strict=True):
            assert ours.dtype == torch.float32
            assert ours.is_contiguous()
            assert np.array_equal(ours, theirs.transpose(2, 0, 1))


def test_kinds_of_cache_are_timed(tmp_path, capsys):
    out = tmp_path / "out.json"
    line = "data --size 60x80 --images 2 --patch_size 8 --batch_size 2 --seconds 0.1 --rounds 1 --n_threads 0"
    line += " --device cpu --json"
    main([*line.split(), str(out)])
    assert list(json.loads(out.read_text())["patches_per_second"]) == ["pickle", "img", "sep", "bin", "device"]
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_images_smaller_than_a_patch_are_an_error():
    line = "data --size 60x80 --images 1 --n_threads 0"
    with pytest.raises(InputError, match=r"--size 60x80: .* --patch_size 96"):
        main(line.split())
