"""Build and load the library of the native engine.

The compiler of this machine builds it once per size of network, compiler and kind of processor, which takes a few
seconds. The library is kept in the user's cache; it does not depend on the version of Python or PyTorch.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch

from utility import logger, measure_once, remove_unfinished

SOURCE = Path(__file__).with_name("native.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-ffp-contract=fast", "-fno-exceptions", "-fno-rtti")
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mprefer-vector-width=512")
CAPABILITIES = {"AVX2": AVX2, "AVX512": AVX512}  # PyTorch's names of what an x86 processor can do
TIME_LIMIT = 300  # seconds until a compiler counts as broken
FORGOTTEN_AFTER = 3600  # seconds until the unfinished file of another process counts as left over


class BuildError(Exception):
    """Why the library cannot be built or loaded, in one line."""


def load_library(**definitions: int) -> ctypes.CDLL:
    """The native engine, compiled with these macros. It is looked for, or built, once per process.

    Raises BuildError if that is impossible.
    """

    def attempt():
        try:
            return _load_or_build(definitions)
        except BuildError as error:
            return error

    library = measure_once(("native library", *sorted(definitions.items())), attempt)
    if isinstance(library, BuildError):
        raise library
    return library


def _load_or_build(definitions):
    flags = (*FLAGS, *processor_flags(), *(f"-D{name}={value}" for name, value in definitions.items()))
    compiler = find_compiler()
    source = _digest(SOURCE.read_bytes(), platform.system(), platform.machine(), *platform.libc_ver(), *flags)
    if not compiler:
        for path in cache_folder().glob(f"native-{source}-*.so"):  # built ahead
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(path))
        raise BuildError("found no C++ compiler; install g++ or clang++, or name one in CXX")
    path = cache_folder() / f"native-{source}-{_digest(_version(compiler))}.so"
    with contextlib.suppress(OSError):  # not built yet, or damaged
        return ctypes.CDLL(str(path))
    return _build(compiler, flags, path)


def _build(compiler, flags, path):
    started, kept = time.perf_counter(), ""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        library = _compile(compiler, flags, path)
    except OSError as problem:  # the cache cannot be written, is full, or forbids execution
        kept = f", but not kept: {path.parent} cannot be used ({problem.strerror or 'no program may run there'})"
        with tempfile.TemporaryDirectory(prefix="smsr-") as folder:
            try:
                library = _compile(compiler, flags, Path(folder) / path.name)
            except OSError as error:
                raise BuildError(f"cannot load what {shlex.join(compiler)} built ({error})") from None
    logger.info(f"native engine: built by {shlex.join(compiler)} in {time.perf_counter() - started:.0f} s{kept}")
    return library


def _compile(compiler, flags, path):
    """Compile to `path` and load it. Other processes see no file or the whole one. Raises OSError and BuildError."""
    remove_unfinished(path.parent, FORGOTTEN_AFTER)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    temporary.touch()  # fails like the compiler would, but says why
    try:
        _run([*compiler, *flags, "-o", str(temporary), str(SOURCE)])
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return ctypes.CDLL(str(path))


def _run(command):
    """The output of a compiler. Raises BuildError with its first error."""
    name = f"CXX={command[0]}" if os.environ.get("CXX", "").strip() else command[0]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIME_LIMIT)
    except OSError as error:
        raise BuildError(f"cannot run {name} ({error.strerror})") from None
    except subprocess.TimeoutExpired:
        raise BuildError(f"{name} did not finish in {TIME_LIMIT} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit code {done.returncode}"]
        raise BuildError(f"{name} failed ({lines[0].strip()})")
    return done.stdout


def processor_flags() -> tuple[str, ...]:
    """The compiler flags for the vectors of this processor. Raises BuildError for one without AVX2 or NEON."""
    if os.name == "nt":
        raise BuildError("not available on Windows")
    if platform.machine().lower() in ("aarch64", "arm64"):
        return ()  # NEON is always there
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in CAPABILITIES:
        raise BuildError(f"needs a processor with AVX2, AVX-512 or NEON, not {platform.machine()} {capability}")
    return CAPABILITIES[capability]


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler: the environment variable CXX, or the first that is installed."""
    if command := os.environ.get("CXX", "").strip():
        try:
            return shlex.split(command)
        except ValueError as error:
            raise BuildError(f"CXX={command} is not a command ({error})") from None
    return next(([name] for name in COMPILERS if shutil.which(name)), None)


def _version(compiler):
    return _run([*compiler, "--version"])


def cache_folder() -> Path:
    """Where libraries are kept: $XDG_CACHE_HOME/smsr, or ~/.cache/smsr."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(root) if Path(root).is_absolute() else Path.home() / ".cache") / "smsr"  # as its standard demands
    except RuntimeError:  # there is no home
        raise BuildError("this user has no home folder; set XDG_CACHE_HOME") from None


def _digest(*parts):
    parts = [part if isinstance(part, bytes) else part.encode() for part in parts]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
