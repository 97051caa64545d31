"""Find the sets by name and build what is trained and tested on."""

import dataclasses
import itertools
import os
import signal
import threading
import time
from pathlib import Path

import torch

from data import benchmark, demo, div2k
from data.srdata import EpochSampler, Patches, PatchLoader, WholeImages
from utility import InputError

TRAIN, TEST = 0, 1
DIV2K_RANGES = ((1, 800), (801, 810))  # EDSR's images of training and of validation, by the number they bear
SELECTIVE = hasattr(signal, "sigtimedwait")  # a process can ask who sent a signal; not on macOS and Windows


def find_set(name, dir_data, scale, dir_demo=""):
    """The set `name` wherever it lies below `dir_data`, found by looking. Raises InputError."""
    dir_data = Path(dir_data)
    if name == "demo":
        return demo.find(dir_demo)
    if name == "DIV2K" and (dir_data / "DIV2K").is_dir():
        return div2k.find(dir_data / "DIV2K", scale)
    for root, is_benchmark in ((dir_data / "benchmark" / name, True), (dir_data / name, False)):
        if name and (root / "HR").is_dir():
            return benchmark.find(root, name, scale, is_benchmark)
    if not dir_data.is_dir():
        raise InputError(f"--dir_data {dir_data}: no such folder")
    there = sorted(
        {path.parent.name for path in itertools.chain(dir_data.glob("*/HR"), dir_data.glob("benchmark/*/HR"))}
    )
    there = ", ".join(there) or "none"
    raise InputError(f"no set {name!r} in --dir_data {dir_data}; the sets there: {there}")


def take_range(images, span):
    """The images from the first to the last number of `span` (both counted, from 1)."""
    first, last = span
    if last > len(images.pairs):
        raise InputError(f"--data_range {first}-{last}: {images.name} holds {len(images.pairs)} images")
    return dataclasses.replace(images, pairs=dict(itertools.islice(images.pairs.items(), first - 1, last)))


def build_train_loader(
    names, dir_data, scale, data_range=None, patch_size=96, augment=True, n_colors=3, ext="sep", seed=1,
    batch_size=16, steps=1000, n_threads=4, pin_memory=False, rank=0, world_size=1,
):  # fmt: skip
    """A PatchLoader, one epoch `steps` batches; see Patches and EpochSampler."""
    sets = [find_set(name, dir_data, scale) for name in names]
    sets = [_part_of(images, data_range, TRAIN) for images in sets]
    patches = Patches(sets, scale, patch_size, augment, n_colors, ext, seed, n_threads)
    sampler = EpochSampler(len(patches), steps, batch_size, seed, rank, world_size)
    return PatchLoader(
        patches,
        sampler,
        n_threads,
        pin_memory,
        worker_init_fn=_leave_interrupts_alone,
        generator=torch.Generator(),  # its own, so that iterating leaves the global random state alone
    )


def build_test_sets(names, dir_data, scale, data_range=None, n_colors=3, dir_demo=""):
    """A WholeImages for each name."""
    sets = [find_set(name, dir_data, scale, dir_demo) for name in names]
    return [WholeImages(_part_of(images, data_range, TEST), scale, n_colors) for images in sets]


def _part_of(images, data_range, part):
    if images.benchmark or images.name == "demo":
        return images
    if data_range is not None:
        return take_range(images, data_range[part])
    if images.name == "DIV2K":
        first, last = DIV2K_RANGES[part]
        chosen = {name: pair for name, pair in images.pairs.items() if name.isdigit() and first <= int(name) <= last}
        return dataclasses.replace(images, pairs=chosen)
    return images


def _leave_interrupts_alone(_):
    """Ctrl-C, and a SIGTERM to all processes of a job, are for the main process: it saves, then ends its workers."""
    if os.name == "posix":
        os.setpgid(0, 0)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if SELECTIVE:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent):
    """End this process when its parent says so, or is gone: a worker whose pipe is full would wait for ever."""
    while os.getppid() == parent:
        if not SELECTIVE:
            time.sleep(1)
        elif (received := signal.sigtimedwait({signal.SIGTERM}, 1)) and received.si_pid == parent:
            break
    os._exit(0)
