"""Downloads from a local HTTP server that can break transfers."""

import errno
import hashlib
import io
import os
import socket
import stat
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import imageio.v3 as iio
import numpy as np
import pytest

from data import find_set
from data.image import read_image
from data.resize import downscale
from program import InputError, naming
from tools.datasets import download, unpack
from tools.prepare_data import main

pytest.importorskip("pooch")


class Server(ThreadingHTTPServer):
    """Serves `files` {name: bytes}. Each entry of `cuts` ends one answer after that many bytes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cuts, self.knows_ranges = {}, [], True
        self.asked = []  # (name, first byte) of each request
        self.url = f"http://127.0.0.1:{self.server_port}/sets"

    def handle_error(self, *_):
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, name = self.server, self.path.removeprefix("/sets/")
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if server.knows_ranges else 0
        server.asked.append((name, start))
        content = server.files.get(name)
        if content is None:
            return self.send_error(404)
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: server.cuts.pop(0) if server.cuts else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def png(image):
    return iio.imwrite("<bytes>", image, extension=".png")


def make_images(count, size=(240, 360)):
    """HR images of noise, which no archive can compress."""
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def zip_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def benchmark():
    """The content of a benchmark archive with two sets, and their HR images. Other files are to be ignored."""
    images, files = make_images(4), {"benchmark/README": b"hello", "benchmark/Set5/._baby.png": b"of macOS"}
    for index, hr in enumerate(images):
        root = f"benchmark/{('Set5', 'B100')[index // 2]}"
        files[f"{root}/HR/{index}.png"] = png(hr)
        for scale in (2, 3, 4):
            files[f"{root}/LR_bicubic/X{scale}/{index}x{scale}.png"] = png(downscale(hr, scale))
    return tar_of(files), images


def div2k_archives(scale=2):
    archives = {}
    for part, number in (("train", 1), ("valid", 801)):
        (hr,) = make_images(1)
        archives[f"DIV2K_{part}_HR.zip"] = zip_of({f"DIV2K_{part}_HR/{number:04}.png": png(hr)})
        lr = png(downscale(hr, scale))
        folder = f"DIV2K_{part}_LR_bicubic/X{scale}"
        archives[f"{folder.replace('/', '_')}.zip"] = zip_of({f"{folder}/{number:04}x{scale}.png": lr})
    return archives


def fetch(server, name, out, **files):
    """Run the command with the checksums of what the server has."""
    sums = [f"{file}={hashlib.sha256(content).hexdigest()}" for file, content in (files or server.files).items()]
    main(["download", name, "--out", str(out), "--url", server.url, "--sha256", *sums])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_benchmark_sets_are_downloaded_and_found(server, benchmark, tmp_path, capsys):
    server.files["benchmark.tar"], images = benchmark
    fetch(server, "benchmark", tmp_path)
    for scale in (2, 3, 4):
        pairs = find_set("Set5", tmp_path, scale).pairs
        assert list(pairs) == ["0", "1"]
        for (hr, lr), image in zip(pairs.values(), images, strict=False):
            assert np.array_equal(read_image(hr), image)
            assert np.array_equal(read_image(lr), downscale(image, scale))
    assert len(find_set("B100", tmp_path, 2).pairs) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"archives", "benchmark"}
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".") or path.name == "README"]
    printed = capsys.readouterr().out
    assert f"{tmp_path}/benchmark/Set5/HR: 2 of 5 images" in printed
    assert "ready; use it with --dir_data" in printed


def test_div2k_is_downloaded_and_found(server, tmp_path):
    server.files = div2k_archives()
    fetch(server, "DIV2K", tmp_path)
    assert list(find_set("DIV2K", tmp_path, 2).pairs) == ["0001", "0801"]
    assert {name for name, _ in server.asked} == set(server.files)


def test_what_is_there_is_neither_downloaded_again_nor_overwritten(server, benchmark, tmp_path):
    server.files["benchmark.tar"], _ = benchmark
    fetch(server, "benchmark", tmp_path)
    written, asked = contents(tmp_path), len(server.asked)
    fetch(server, "benchmark", tmp_path)
    assert len(server.asked) == asked
    assert contents(tmp_path) == written
    hr = tmp_path / "benchmark/Set5/HR/0.png"
    hr.write_bytes(b"mine")
    with pytest.raises(InputError, match=r"HR/0\.png: already exists and differs from .*benchmark\.tar; remove it"):
        fetch(server, "benchmark", tmp_path)
    assert hr.read_bytes() == b"mine"
    archive = tmp_path / "archives/benchmark.tar"
    archive.write_bytes(b"mine")
    with pytest.raises(InputError, match=r"benchmark\.tar: has another SHA-256 than [0-9a-f]{64}; remove it"):
        fetch(server, "benchmark", tmp_path)
    assert archive.read_bytes() == b"mine"


def test_complete_sets_are_not_downloaded(server, tmp_path, capsys):
    for folder in download.BENCHMARK_FOLDERS:
        (tmp_path / folder).mkdir(parents=True)
        for index in range(unpack.n_published(folder)):
            (tmp_path / folder / f"{index}.png").touch()
    main(["download", "benchmark", "--out", str(tmp_path), "--url", server.url])
    assert not server.asked
    assert "benchmark.tar: its images are all there" in capsys.readouterr().out


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_broken_transfers_are_resumed(server, benchmark, tmp_path, knows_ranges):
    server.files["benchmark.tar"], _ = benchmark
    server.knows_ranges, server.cuts = knows_ranges, [300_000, 400_000]
    fetch(server, "benchmark", tmp_path)
    starts = [start for _, start in server.asked]
    assert len(starts) == 3
    assert starts == sorted(starts)
    assert (starts[1] > 0) == knows_ranges
    assert len(find_set("Set5", tmp_path, 2).pairs) == 2


def test_a_later_call_resumes(server, benchmark, tmp_path):
    server.files["benchmark.tar"], _ = benchmark
    server.cuts = [300_000, 0]
    with pytest.raises(InputError, match=r"benchmark\.tar: the connection failed \(.*\); run the command again"):
        fetch(server, "benchmark", tmp_path)
    assert {path.name for path in (tmp_path / "archives").iterdir()} == {"benchmark.tar.part"}
    fetch(server, "benchmark", tmp_path)
    assert server.asked[-1][1] > 0
    assert not list(tmp_path.rglob("*.part"))
    assert len(find_set("Set5", tmp_path, 2).pairs) == 2


def test_a_part_that_has_all_or_other_bytes(server, benchmark, tmp_path):
    server.files["benchmark.tar"], _ = benchmark
    part = tmp_path / "archives/benchmark.tar.part"
    part.parent.mkdir()
    part.write_bytes(server.files["benchmark.tar"])
    fetch(server, "benchmark", tmp_path)
    (tmp_path / "archives/benchmark.tar").unlink()
    part.write_bytes(b"of another file")
    with pytest.raises(InputError, match="has another SHA-256 than"):
        fetch(server, "benchmark", tmp_path)
    assert not list((tmp_path / "archives").iterdir())
    fetch(server, "benchmark", tmp_path)


def test_wrong_checksums_are_refused(server, benchmark, tmp_path):
    server.files["benchmark.tar"], _ = benchmark
    message = rf"{server.url}/benchmark\.tar: the file was downloaded, but has another SHA-256 than "
    with pytest.raises(InputError, match=message + "80c21c333bbf"):
        main(["download", "benchmark", "--out", str(tmp_path), "--url", server.url + "/"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(InputError, match=message):
        fetch(server, "benchmark", tmp_path, **{"benchmark.tar": b"other"})


def test_missing_files_and_pages_are_named(server, tmp_path):
    with pytest.raises(InputError, match=rf"^{server.url}/benchmark\.tar: the server answers 404 Not Found; pass"):
        fetch(server, "benchmark", tmp_path, **{"benchmark.tar": b""})
    server.files["benchmark.tar"] = b"\n<!DOCTYPE html><title>Sign in</title>"
    with pytest.raises(InputError, match="the server sends a web page, not the archive; pass another --url"):
        fetch(server, "benchmark", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:{port}", r"the connection failed \(ConnectionError\)"),
        ("127.0.0.1/x", "is not an address; pass --url http"),
        ("ftp://127.0.0.1/x", "is not an address; pass --url http"),
        ("http://", "is not an address; pass --url http"),
    ],
)
def test_servers_that_cannot_be_reached(tmp_path, url, message):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = url.format(port=unused.getsockname()[1])
        with pytest.raises(InputError, match=message) as error:
            main(["download", "DIV2K", "--out", str(tmp_path), "--url", url])
    assert "\n" not in str(error.value)


def test_command_lines_are_checked(tmp_path):
    for line, message in (
        ("benchmark --scales 2", "--scales: the benchmark archive has all scales"),
        ("Set5", "invalid choice: 'Set5'"),
        ("DIV2K --scales 5", "--scales: invalid choice: 5"),
        ("DIV2K --sha256 x", "--sha256: 'x' is not the name of an archive"),
        (f"DIV2K --sha256 DIV2K_train_HR.zip={'g' * 64}", "--sha256: .* is not the name of an archive"),
    ):
        with pytest.raises(InputError, match=message):
            main(["download", *line.split(), "--out", str(tmp_path)])


def test_without_pooch_the_command_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(InputError, match="the package pooch is not installed; pip install pooch"):
        main(["download", "benchmark", "--out", str(tmp_path)])


# ---- archives that are not the published ones ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "benchmark/../../Set5/HR/evil.png", "a\\..\\b.png"])
@pytest.mark.parametrize(("make", "suffix"), [(zip_of, "zip"), (tar_of, "tar")])
def test_paths_out_of_an_archive_are_refused(tmp_path, name, make, suffix):
    archive = tmp_path / f"a.{suffix}"
    archive.write_bytes(make({"benchmark/Set5/HR/a.png": b"x", name: b"x"}))
    with pytest.raises(InputError, match=r"a\..*inside it leads out of it, which no published archive has"):
        unpack.find_members(archive)


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("benchmark/Set5/HR/a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("DIV2K_train_HR/0001.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    for name in ("a.tar", "a.zip"):
        with pytest.raises(InputError, match="inside it is a link"):
            unpack.find_members(tmp_path / name)


def test_sizes_are_bounded(tmp_path, monkeypatch):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("DIV2K_train_HR/0001.png", bytes(unpack.MAX_BYTES + 1))
    assert archive.stat().st_size < 1e6
    with pytest.raises(InputError, match=r"0001\.png inside it has 67108865 bytes"):
        unpack.find_members(archive)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 10}))
    archive.write_bytes(zip_of({"DIV2K_train_HR/0001.png": b"eleven byte"}))
    with pytest.raises(InputError, match=r"0\.0 GB are needed, but only 0\.0 GB are free"):
        unpack.unpack(unpack.find_members(archive), tmp_path / "out", n_threads=1)


def test_a_disk_that_is_too_small_is_named(server, benchmark, tmp_path, monkeypatch):
    server.files["benchmark.tar"], _ = benchmark
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 10}))
    with pytest.raises(InputError, match=r"archives: .* GB are needed"):
        fetch(server, "benchmark", tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_becomes_full_is_named():
    with (
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(OSError, match="/dev/full") as error,
        naming(full.name),
    ):
        full.write(b"x")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "/dev/full")


@pytest.mark.parametrize(("make", "suffix"), [(zip_of, "zip"), (tar_of, "tar")])
def test_cut_archives_are_named(tmp_path, make, suffix):
    archive = tmp_path / f"a.{suffix}"
    archive.write_bytes(make({"DIV2K_train_HR/0001.png": bytes(3000), "DIV2K_train_HR/0002.png": bytes(3000)})[:5000])
    with pytest.raises(InputError, match=rf"a\.{suffix}: not a complete {suffix} file; remove it"):
        unpack.find_members(archive)


def test_an_interrupted_unpacking_leaves_no_set_that_looks_whole(benchmark, tmp_path):
    archive = tmp_path / "benchmark.tar"
    archive.write_bytes(benchmark[0])
    members = unpack.find_members(archive)
    for count in range(len(members)):
        left, out = iter(range(count)), tmp_path / f"out{count}"

        def read(member, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return member.read()

        interrupted = [
            unpack.Member(member.target, member.size, member.origin, lambda member=member: read(member))
            for member in members
        ]
        with pytest.raises(KeyboardInterrupt):
            unpack.unpack(interrupted, out, n_threads=1)
        for name in ("Set5", "B100"):
            try:
                found = find_set(name, out, 2)
            except InputError:
                continue
            assert len(found.pairs) == 2
    unpack.unpack(members, out, n_threads=1)
    assert len(find_set("Set5", out, 4).pairs) == 2
