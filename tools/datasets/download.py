"""Download published sets and unpack them: `prepare_data.py download`."""

import argparse
import functools
import os
import time
from pathlib import Path

from data import BENCHMARK_SETS
from loading import WEB_PAGE
from program import InputError, naming
from tools.datasets.unpack import check_space, find_members, n_published, unpack
from utility import progress_bar

DIV2K_SCALES = (2, 3, 4)
ADDRESSES = {
    "DIV2K": "https://data.vision.ee.ethz.ch/cvl/DIV2K",
    "benchmark": "https://cv.snu.ac.kr/research/EDSR",
}
BENCHMARK_FOLDERS = tuple(
    f"benchmark/{name}/{part}"
    for name in BENCHMARK_SETS
    for part in ("HR", "LR_bicubic/X2", "LR_bicubic/X3", "LR_bicubic/X4")
)
# The authors publish no checksums. These are the ones that TensorFlow Datasets checks (DIV2K), and that the project
# sisr has published for the archive of 250,112,000 bytes (benchmark.tar).
SHA256 = {
    "DIV2K_train_HR.zip": "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335",
    "DIV2K_train_LR_bicubic_X2.zip": "a53a424317575838dadce4bcd97cf7b744d6855f43740ed5f0245af3cf4bd850",
    "DIV2K_train_LR_bicubic_X3.zip": "ad5c8e5507e2765823d3c2c5bd0934842efcd487c5370604c224090898b3163a",
    "DIV2K_train_LR_bicubic_X4.zip": "f006b837f4eb52b82909aa01478e6d6d199eefce932179491d0c9dbb706dde3a",
    "DIV2K_valid_HR.zip": "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc",
    "DIV2K_valid_LR_bicubic_X2.zip": "60eed9875c697df51204aa579e2a699e1d5215095788a097ff54dd17e2664d57",
    "DIV2K_valid_LR_bicubic_X3.zip": "04b9a2ed3b4a0715d3924d3ae8514830c3328fac8d30512ce716d6f419e052a3",
    "DIV2K_valid_LR_bicubic_X4.zip": "a50a5d1c4b88de4e8d300d8fb2b904c52fe93b2b298a4899697760d7cbb6d553",
    "benchmark.tar": "80c21c333bbf6ceb5308b7243761f8284478274413a97b96f1d63e9045fd93e8",
}
TIMEOUT_SECONDS = 60  # without an answer, or without more of the file
PAUSE_SECONDS = 2  # before a broken transfer is resumed
CHUNK_BYTES = 2**16


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `prepare_data.py download`."""
    command.set_defaults(run=run)
    command.add_argument("set", choices=ADDRESSES, help="DIV2K, or benchmark: Set5, Set14, B100 and Urban100")
    command.add_argument(
        "--scales", type=int, nargs="+", choices=DIV2K_SCALES, help="of the LR images of DIV2K (default: 2)"
    )
    command.add_argument("--out", type=Path, default=Path("dataset"), help="folder to write to")
    command.add_argument("--url", metavar="URL", help="address of a folder with the same archives, on a mirror")
    command.add_argument(
        "--sha256",
        type=_checksum,
        nargs="+",
        default=[],
        metavar="NAME=SUM",
        help="checksums of archives that differ from the published ones",
    )


def _checksum(text):
    name, _, value = text.partition("=")
    if name not in SHA256 or len(value) != 64 or set(value.lower()) - set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of an archive, =, and the 64 digits of its SHA-256")
    return name, value.lower()


def run(args: argparse.Namespace) -> None:
    """Download the archives of a set to <out>/archives, check them, and unpack them. What is there is kept.

    Raises InputError if an archive cannot be had, is not the expected one, or cannot be unpacked.
    """
    if args.set == "benchmark" and args.scales:
        raise InputError("--scales: the benchmark archive has all scales; leave this option out")
    address = (args.url or ADDRESSES[args.set]).rstrip("/")
    checksums = SHA256 | dict(args.sha256)
    for name, folders in archives_of(args.set, args.scales or [2]).items():
        if all(_is_complete(args.out / folder, n_published(folder)) for folder in folders):
            print(f"{name}: its images are all there")
            continue
        archive = fetch(f"{address}/{name}", args.out / "archives" / name, checksums[name])
        unpack(find_members(archive), args.out, args.n_threads)
    flags = "--data_train DIV2K" if args.set == "DIV2K" else f"--data_test {'+'.join(BENCHMARK_SETS)}"
    print(f"{args.out}: ready; use it with --dir_data {args.out} {flags}")
    if (args.out / "archives").is_dir():
        print(f"{args.out / 'archives'} is no longer needed")


def archives_of(name: str, scales: list[int]) -> dict[str, tuple[str, ...]]:
    """{archive: the folders of images in it, below the folder of the sets}, of the set "DIV2K" or "benchmark"."""
    if name == "benchmark":
        return {"benchmark.tar": BENCHMARK_FOLDERS}
    archives = {}
    for part in ("train", "valid"):
        archives[f"DIV2K_{part}_HR.zip"] = (f"DIV2K/DIV2K_{part}_HR",)
        for scale in scales:
            archives[f"DIV2K_{part}_LR_bicubic_X{scale}.zip"] = (f"DIV2K/DIV2K_{part}_LR_bicubic/X{scale}",)
    return archives


def _is_complete(folder, count):
    return sum(1 for _ in folder.glob("*.png")) == count


def fetch(url: str, path: Path, sha256: str) -> Path:
    """Download a file unless it is there, and check it; returns its path. A broken transfer is resumed by a later call.

    Raises InputError if pooch is not installed, the file cannot be had, or its checksum is another.
    """
    try:
        import pooch  # an optional package
        import requests  # which pooch brings
    except ImportError:
        raise InputError("download: the package pooch is not installed; pip install pooch") from None
    pooch.get_logger().setLevel("ERROR")
    if path.exists():
        if pooch.file_hash(str(path)) != sha256:
            raise InputError(f"{path}: has another SHA-256 than {sha256}; remove it, or pass its own with --sha256")
        return path
    downloader = functools.partial(_download, part=path.with_name(f"{path.name}.part"))
    try:
        pooch.retrieve(url, f"sha256:{sha256}", fname=path.name, path=path.parent, downloader=downloader)
    except requests.HTTPError as error:
        answer = f"{error.response.status_code} {error.response.reason}"
        raise InputError(f"{url}: the server answers {answer}; pass another --url") from None
    except (requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL):
        raise InputError(f"{url}: is not an address; pass --url http://…") from None
    except requests.RequestException as error:
        raise InputError(
            f"{url}: the connection failed ({type(error).__name__}); run the command again to resume, "
            f"or pass another --url"
        ) from None
    except ValueError:
        raise InputError(
            f"{url}: the file was downloaded, but has another SHA-256 than {sha256}, so it was removed; "
            f"try again, or pass another --url, or the right --sha256"
        ) from None
    return path


def _download(url, output_file, _pooch, part):
    """A downloader for pooch, whose own cannot resume. It goes on as long as each attempt brings more of the file."""
    import requests

    while True:
        before = _size(part)
        try:
            _transfer(url, part)
            break
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
            if _size(part) <= before:
                raise
            time.sleep(PAUSE_SECONDS)
    os.replace(part, output_file)


def _transfer(url, part):
    """Download what is missing of the file `part`, or all of it if the server cannot send a part."""
    import requests

    done = _size(part)
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={done}-"}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        if done and response.status_code == 416:  # nothing is missing
            return
        response.raise_for_status()
        done = done if response.status_code == 206 else 0
        left = int(response.headers.get("Content-Length", 0))
        check_space(part.parent, left)
        name = url.rpartition("/")[2]
        bar = progress_bar(desc=name, initial=done, total=done + left or None, unit="B", unit_scale=True)
        with open(part, "ab" if done else "wb") as file, bar:
            for chunk in response.iter_content(CHUNK_BYTES):
                if not done and not bar.n and chunk.lstrip().lower().startswith(WEB_PAGE):
                    raise InputError(f"{url}: the server sends a web page, not the archive; pass another --url")
                with naming(part):
                    file.write(chunk)
                bar.update(len(chunk))


def _size(path):
    return path.stat().st_size if path.exists() else 0
