"""Find sets by name and build the loaders of training patches and test images."""

import dataclasses
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data import demo, div2k, imageset
from data.device import DeviceLoader, build_device_loader
from data.imageset import ImageSet
from data.srdata import EpochSampler, Patches, PatchLoader, PatchSettings, WholeImages
from program import InputError
from utility import logger

TRAIN, TEST = 0, 1  # indices into DataSettings.data_range and DIV2K_RANGES
DIV2K_RANGES = ((1, 800), (801, 810))  # training and validation images as in EDSR
BENCHMARK_SETS = ("Set5", "Set14", "B100", "Urban100")  # in the archive of the EDSR authors
HAS_SIGTIMEDWAIT = hasattr(signal, "sigtimedwait")  # lets a process ask who sent a signal; not on macOS and Windows


@dataclass(frozen=True)
class DataSettings:
    """Where the sets are and what is read from them."""

    dir_data: str  # folder that holds the sets
    scale: int = 2  # high-resolution pixels per low-resolution pixel, on each side
    n_colors: int = 3  # 1 (gray) or 3 (RGB)
    data_range: Sequence[Sequence[int]] | None = None  # (first, last) for training, for testing; see take_range
    dir_demo: str = ""  # folder or file of the set "demo"


def find_set(name: str, dir_data: str | Path, scale: int, dir_demo: str | Path = "") -> ImageSet:
    """Find the set `name` below `dir_data`, whichever of the known layouts it has; "demo" is the content of `dir_demo`.

    Raises InputError if there is no such set, or if its files are incomplete.
    """
    dir_data = Path(dir_data)
    if name == "demo":
        return demo.find(dir_demo)
    if name == "DIV2K" and (dir_data / "DIV2K").is_dir():
        return div2k.find(dir_data / "DIV2K", scale)
    for root, benchmark in ((dir_data / "benchmark" / name, True), (dir_data / name, False)):
        if name and (root / "HR").is_dir():
            return imageset.find(root, name, scale, benchmark)
    remedy = _how_to_download(name, dir_data, scale)
    if not dir_data.is_dir():
        remedy = remedy or "give the folder that holds the sets"
        raise InputError(f"no such folder {str(dir_data)!r}; {remedy}", argument="dir_data")
    folders = itertools.chain(dir_data.glob("*/HR"), dir_data.glob("benchmark/*/HR"))
    available = ", ".join(sorted({folder.parent.name for folder in folders})) or "none"
    raise InputError(f"{dir_data}: contains no set {name!r}; " + (remedy or f"available sets: {available}"))


def _how_to_download(name, dir_data, scale):
    """What to do if a published set is missing; "" for other sets."""
    if name == "DIV2K":
        return div2k.how_to_download(dir_data, scale)
    if name in BENCHMARK_SETS:
        return "download it with: " + imageset.prepare_command("download", "benchmark", "--out", dir_data)
    return ""


def take_range(images: ImageSet, span: Sequence[int]) -> ImageSet:
    """The images `first` to `last` of a set, span = (first, last), including both ends.

    If all names are numbers, as in DIV2K, they are the numbers of the images, and a warning tells if images are
    missing. Otherwise the images are counted from 1, in the order of their names.

    Raises InputError if the set ends before `last`, or if it holds none of the numbers.
    """
    if images.pairs and all(name.isdecimal() for name in images.pairs):
        return _take_numbers(images, span)
    first, last = span
    if last > len(images.pairs):
        raise InputError(
            f"range {first}-{last} is out of bounds: {images.name} holds {len(images.pairs)} images; "
            "choose a range within them",
            argument="data_range",
        )
    return dataclasses.replace(images, pairs=dict(itertools.islice(images.pairs.items(), first - 1, last)))


def _take_numbers(images, span):
    """`take_range` by the numbers that the images have as names."""
    first, last = span
    pairs = {name: pair for name, pair in images.pairs.items() if first <= int(name) <= last}
    if not pairs:
        numbers = [int(name) for name in images.pairs]
        raise InputError(
            f"range {first}-{last} holds no image: those of {images.name} ({images.root}) have the numbers "
            f"{min(numbers)} to {max(numbers)}; choose another range",
            argument="data_range",
        )
    if len(pairs) < last - first + 1:
        logger.warning(
            f"{images.name}: the range {first}-{last} asks for {last - first + 1} images, "
            f"but {images.root} holds only {len(pairs)} of them"
        )
    return dataclasses.replace(images, pairs=pairs)


def build_train_loader(
    names: Iterable[str], settings: DataSettings, patches: PatchSettings, rank: int = 0, world_size: int = 1
) -> PatchLoader | DeviceLoader:
    """Build a loader of random patches of the sets `names`, with `patches.steps` batches per epoch.

    The process of the given rank gets its share of each batch; see `EpochSampler`. With `patches.ext` "device" and
    enough memory on `patches.device` it is a `DeviceLoader`.

    Raises InputError as `find_set`, `take_range`, `Patches` and `EpochSampler` do.
    """
    sets = [find_set(name, settings.dir_data, settings.scale, settings.dir_demo) for name in names]
    sets = [_select(images, settings.data_range, TRAIN) for images in sets]
    dataset = Patches(sets, settings.scale, settings.n_colors, patches)
    sampler = EpochSampler(
        n_images=len(dataset),
        steps=patches.steps,
        batch_size=patches.batch_size,
        seed=patches.seed,
        rank=rank,
        world_size=world_size,
    )
    if patches.ext == "device":
        loader = build_device_loader(dataset, sampler, patches.device, patches.n_threads)
        if loader is not None:
            return loader
    return PatchLoader(
        dataset,
        sampler,
        n_threads=patches.n_threads,
        device=patches.device,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # a separate one, so that iterating does not change the global random state
    )


def build_test_sets(names: Iterable[str], settings: DataSettings) -> list[WholeImages]:
    """Build the test images of each of the sets `names`.

    Raises InputError as `find_set`, `take_range` and `WholeImages` do.
    """
    sets = [find_set(name, settings.dir_data, settings.scale, settings.dir_demo) for name in names]
    sets = [_select(images, settings.data_range, TEST) for images in sets]
    return [WholeImages(images, settings.scale, settings.n_colors) for images in sets]


def _select(images, data_range, part):
    """The images of a set for training or testing (`part`): the given range, EDSR's images of DIV2K, or all.

    Benchmark sets and sets without HR images are always complete.
    """
    if images.benchmark or not images.has_hr:
        return images
    if data_range is not None:
        return take_range(images, data_range[part])
    if images.name == "DIV2K":
        return take_range(images, DIV2K_RANGES[part])
    return images


def _ignore_interrupts(_):
    """Leave Ctrl-C, and a SIGTERM to all processes of a job, to the main process: it saves, then ends its workers."""
    if os.name == "posix":
        os.setpgid(0, 0)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if HAS_SIGTIMEDWAIT:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()


def _exit_with_parent(parent):
    """Exit when the parent sends SIGTERM or is gone: a worker with a full pipe would otherwise wait forever."""
    while os.getppid() == parent:
        if not HAS_SIGTIMEDWAIT:
            time.sleep(1)
        elif (received := signal.sigtimedwait({signal.SIGTERM}, 1)) and received.si_pid == parent:
            break
    os._exit(0)
