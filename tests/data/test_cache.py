import multiprocessing
import os
import random
import signal
import time

import imageio.v3 as iio
import numpy as np
import pytest

from data import cache
from data.image import read_image
from program import InputError


@pytest.fixture
def paths(make_set):
    return sorted((make_set() / "Tiny/HR").iterdir())


@pytest.mark.parametrize("kind", cache.CACHE_KINDS)
def test_every_kind_gives_the_same_pixels(paths, kind):
    sources = cache.prepare(paths, paths[0].parents[1], kind)
    for path, source in zip(paths, sources, strict=True):
        assert np.array_equal(cache.open_image(source), read_image(path))


def test_unknown_kinds_are_refused(paths):
    with pytest.raises(InputError, match="no such kind of cache 'npz'; there are img, sep, sep_reset, bin") as error:
        cache.prepare(paths, paths[0].parents[1], "npz")
    assert error.value.argument == "ext"


def test_cached_files_are_reused(paths):
    root = paths[0].parents[1]
    first = cache.prepare(paths, root, "sep")
    assert first[0].parent == root / "bin/HR"
    times = [source.stat().st_mtime_ns for source in first]
    assert cache.prepare(paths, root, "sep") == first
    assert [source.stat().st_mtime_ns for source in first] == times


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="only Linux lists mapped and open files")
def test_cached_files_are_mapped_and_not_kept_open(paths):
    before = len(os.listdir("/proc/self/fd"))
    sources = cache.prepare(paths, paths[0].parents[1], "sep")
    images = [cache.open_image(source) for source in sources]
    assert len(os.listdir("/proc/self/fd")) == before
    with open("/proc/self/maps") as maps:
        mapped = maps.read()
    assert all(str(source) in mapped for source in sources)
    with pytest.raises(ValueError, match="read-only"):
        images[0][0] = 0


@pytest.mark.parametrize("size", [0, 5, 100, 150])
def test_truncated_cached_files_are_reported(paths, size):
    (source, *_) = cache.prepare(paths, paths[0].parents[1], "sep")
    os.truncate(source, size)
    with pytest.raises(InputError, match=r"^/.*\.npy: the cached image is broken; rebuild the cache \(ext sep_reset\)"):
        cache.open_image(source)


def test_a_file_cut_off_while_it_is_mapped_is_reported(paths):
    (source, *_) = cache.prepare(paths, paths[0].parents[1], "sep")
    assert cache.open_image(source).any()
    os.truncate(source, 200)
    with pytest.raises(InputError, match=r"the cached image is broken; rebuild the cache"):  # reading it would be fatal
        cache.open_image(source)


@pytest.mark.parametrize(
    "content",
    [
        np.zeros((40, 48), np.uint8),
        np.zeros((40, 48, 3), np.float64),
        np.asfortranarray(np.zeros((40, 48, 3), np.uint8)),
        np.zeros((0, 48, 3), np.uint8),
        np.array([None], dtype=object),
    ],
    ids=str,
)
def test_arrays_that_are_no_image_are_reported_and_rebuilt(paths, content):
    root = paths[0].parents[1]
    (source, *_) = cache.prepare(paths, root, "sep")
    np.save(source, content)
    with pytest.raises(InputError, match=r"the cached image is broken"):
        cache.open_image(source)
    assert cache.prepare(paths, root, "sep")[0] == source
    assert np.array_equal(cache.open_image(source), read_image(paths[0]))


def test_a_header_of_another_image_is_reported_or_rebuilt(paths):
    root = paths[0].parents[1]
    (source, *_) = cache.prepare(paths, root, "sep")
    whole = source.read_bytes()
    for shape in (b"(80, 48, 3)", b"(40, 48, 6)", b"(-4, 48, 3)", b"(40, 4800)", b"(40, 48, x)", b"((((((((((("):
        source.write_bytes(whole.replace(b"(40, 48, 3)", shape))
        with pytest.raises(InputError, match=r"the cached image is broken"):
            cache.open_image(source)
    source.write_bytes(whole.replace(b"(40, 48, 3)", b"(48, 40, 3)"))  # of the same size
    cache.prepare(paths, root, "sep")
    assert source.read_bytes() == whole


def test_sep_reset_rebuilds_the_cache(paths):
    root = paths[0].parents[1]
    (source, *_) = cache.prepare(paths, root, "sep")
    source.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"^/.*\.npy: the cached image is broken; rebuild the cache \(ext sep_reset\)"):
        cache.open_image(source)
    cache.prepare(paths, root, "sep_reset")
    assert np.array_equal(cache.open_image(source), read_image(paths[0]))


def test_changed_sources_are_decoded_again_and_old_copies_removed(paths):
    root = paths[0].parents[1]
    cache.prepare(paths, root, "sep")
    iio.imwrite(paths[0], read_image(paths[0])[::-1])
    os.utime(paths[0], ns=(1, 1))
    (source, *_) = cache.prepare(paths, root, "sep")
    assert np.array_equal(cache.open_image(source), read_image(paths[0]))
    assert len(list((root / "bin/HR").iterdir())) == len(paths)


def test_images_with_long_names_are_cached(paths):
    root = paths[0].parents[1]
    long = [path.rename(path.with_name(f"{'写' * 79}{index}.png")) for index, path in enumerate(paths)]
    for path, source in zip(long, cache.prepare(long, root, "sep"), strict=True):
        assert np.array_equal(cache.open_image(source), read_image(path))


def test_gray_and_rgb_copies_coexist(paths):
    root = paths[0].parents[1]
    (gray, *_) = cache.prepare(paths, root, "sep", n_colors=1)
    (rgb, *_) = cache.prepare(paths, root, "sep", n_colors=3)
    assert cache.open_image(gray).shape[2] == 1
    assert cache.open_image(rgb).shape[2] == 3


def test_several_threads_build_the_same_cache_as_one(paths):
    root = paths[0].parents[1]
    one = [cache.open_image(source).copy() for source in cache.prepare(paths, root, "sep")]
    several = cache.prepare(paths, root, "sep_reset", n_threads=3)
    for source, expected in zip(several, one, strict=True):
        assert np.array_equal(cache.open_image(source), expected)


def build_cache(paths, started):
    started.set()
    while True:
        cache.prepare(paths, paths[0].parents[1], "sep_reset", n_threads=2)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_no_kill_leaves_an_incomplete_cached_file(make_set):
    paths = sorted((make_set(count=8, size=(200, 200)) / "Tiny/HR").iterdir())
    root = paths[0].parents[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.cache"])
    rng = random.Random(0)
    for _ in range(10):
        started = context.Event()
        process = context.Process(target=build_cache, args=(paths, started))
        process.start()
        assert started.wait(60)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        for cached in root.glob("bin/HR/*.npy"):
            np.load(cached)
        for path, source in zip(paths, cache.prepare(paths, root, "sep"), strict=True):
            assert np.array_equal(cache.open_image(source), read_image(path))


def test_unfinished_files_are_removed_once_they_are_old(paths):
    root = paths[0].parents[1]
    old, fresh = root / "bin/HR/.a.npy.1.tmp", root / "bin/HR/.b.npy.2.tmp"
    old.parent.mkdir(parents=True)
    for unfinished in (old, fresh):
        unfinished.touch()
    os.utime(old, (0, 0))
    cache.prepare(paths, root, "sep")
    assert not old.exists()
    assert fresh.exists()


def test_a_cache_that_cannot_be_written_is_reported(paths):
    root = paths[0].parents[1]
    (root / "bin").write_text("in the way")
    with pytest.raises(InputError, match=r"img0\.png.*\.npy: cannot be written .*; .* without a cache \(ext img\)"):
        cache.prepare(paths, root, "sep")


def test_an_interrupted_write_leaves_no_file(paths, monkeypatch):
    root = paths[0].parents[1]

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        cache.prepare(paths, root, "sep")
    assert list((root / "bin/HR").iterdir()) == []
