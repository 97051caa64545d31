import os

import imageio.v3 as iio
import numpy as np
import pytest

from data import cache
from data.image import read_image
from utility import InputError


@pytest.fixture
def paths(make_set):
    return sorted((make_set() / "Tiny/HR").iterdir())


@pytest.mark.parametrize("kind", cache.KINDS)
def test_every_kind_gives_the_same_pixels(paths, kind):
    sources = cache.prepare(paths, paths[0].parents[1], kind)
    for path, source in zip(paths, sources, strict=True):
        assert np.array_equal(cache.open_image(source), read_image(path))


def test_sep_is_memory_mapped_and_kept(paths):
    root = paths[0].parents[1]
    first = cache.prepare(paths, root, "sep")
    assert isinstance(cache.open_image(first[0]), np.memmap)
    assert first[0].parent == root / "bin/HR"
    times = [source.stat().st_mtime_ns for source in first]
    assert cache.prepare(paths, root, "sep") == first
    assert [source.stat().st_mtime_ns for source in first] == times


def test_sep_reset_makes_anew(paths):
    root = paths[0].parents[1]
    (source, *_) = cache.prepare(paths, root, "sep")
    source.write_bytes(b"broken")
    with pytest.raises(InputError, match="--ext sep_reset"):
        cache.open_image(source)
    cache.prepare(paths, root, "sep_reset")
    assert np.array_equal(cache.open_image(source), read_image(paths[0]))


def test_a_changed_source_is_decoded_anew_and_its_old_copy_removed(paths):
    root = paths[0].parents[1]
    cache.prepare(paths, root, "sep")
    iio.imwrite(paths[0], read_image(paths[0])[::-1])
    os.utime(paths[0], ns=(1, 1))
    (source, *_) = cache.prepare(paths, root, "sep")
    assert np.array_equal(cache.open_image(source), read_image(paths[0]))
    assert len(list((root / "bin/HR").iterdir())) == len(paths)


def test_grey_and_rgb_copies_live_side_by_side(paths):
    root = paths[0].parents[1]
    (grey, *_) = cache.prepare(paths, root, "sep", n_colors=1)
    (rgb, *_) = cache.prepare(paths, root, "sep", n_colors=3)
    assert cache.open_image(grey).shape[2] == 1
    assert cache.open_image(rgb).shape[2] == 3


def test_an_interrupted_write_leaves_nothing(paths, monkeypatch):
    root = paths[0].parents[1]

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        cache.prepare(paths, root, "sep")
    assert list((root / "bin/HR").iterdir()) == []
