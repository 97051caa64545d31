"""Read files that others wrote, or that are damaged: PyTorch, safetensors and JSON.

No code in a file runs, and no file makes the program use much more memory than the file is large.
"""

import json
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from program import InputError

ZIP, GIT_LFS, WEB_PAGE = b"PK\x03\x04", b"version https://git-lfs", (b"<!doctype", b"<html", b"<?xml")


class _UnreadableError(Exception):
    """Why a file cannot be read, and what to do if that is known."""

    def __init__(self, problem: str, advice: str | None = None):
        super().__init__(problem)
        self.problem, self.advice = problem, advice


def load_tensors(path: str | Path, advice: str = "use another file", argument: str | None = None) -> Any:
    """Read what torch.save or safetensors wrote: usually a dict, with tensors on the CPU.

    Args:
        advice: what to do if the file cannot be read
        argument: the setting at fault, see InputError

    Raises:
        InputError: the file is missing, damaged or something else, contains code, or has tensors that are not dense or
            that claim more data than the file holds
    """
    try:
        return _load(Path(path))
    except _UnreadableError as error:
        raise InputError(f"{path}: {error.problem}; {error.advice or advice}", argument) from None


def _load(path):
    if not path.is_file():
        problem = "is a folder, not a weights file" if path.is_dir() else "no such weights file"
        raise _UnreadableError(problem, "check the path")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except PermissionError:
        raise _UnreadableError("cannot be opened", "check its permissions") from None
    if start.startswith(GIT_LFS):
        raise _UnreadableError("is a Git LFS pointer, not the file itself", "fetch it with git lfs pull")
    if start.lstrip().lower().startswith(WEB_PAGE):
        raise _UnreadableError("is a web page, not weights", "download the file that the page links to")
    try:
        with warnings.catch_warnings():  # old and exotic kinds of tensors
            warnings.simplefilter("ignore")
            if path.suffix == ".safetensors" or start[8:9] == b"{":
                return _load_safetensors(path)
            return _load_torch(path, is_zip=start.startswith(ZIP))
    except _UnreadableError:
        raise
    except Exception as error:  # a broken file may raise nearly anything: pickle, zip, key, type and memory errors
        reason = "it contains code" if "GLOBAL" in str(error) else "broken or cut off"
        raise _UnreadableError(f"cannot be read as weights ({reason})") from None


def _load_safetensors(path):
    try:
        from safetensors.torch import load  # an optional package
    except ImportError:
        raise _UnreadableError("the safetensors package is not installed", "pip install safetensors") from None
    return load(path.read_bytes())


def _load_torch(path, is_zip):
    size = path.stat().st_size
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if any(member.compress_type for member in members) or sum(member.file_size for member in members) > size:
            raise _UnreadableError("is compressed, which PyTorch never does")
    # Mapped, because PyTorch does not compare the sizes of tensors with the file before it copies them.
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    _copy_tensors(content, size)
    return content


def _copy_tensors(content, size):
    """Copy the tensors, which are mapped from a file, to memory. Tensors of the same data stay so."""
    copies, tensors = {}, list(_find_tensors(content))
    for tensor in tensors:
        if not _is_dense(tensor):
            raise _UnreadableError("has tensors that are sparse, quantized, nested or without data")
        copies[_data_of(tensor)] = tensor
    if sum(tensor.nbytes for tensor in copies.values()) > size:
        raise _UnreadableError("its tensors claim more data than the file holds")
    copies = {key: tensor.detach().clone() for key, tensor in copies.items()}
    for tensor in tensors:
        tensor.data = copies[_data_of(tensor)]


def _find_tensors(content: Any) -> Iterator[torch.Tensor]:
    """All tensors in dicts, lists and tuples, which may contain each other, and themselves."""
    stack, seen = [content], set()
    while stack:
        value = stack.pop()
        if id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, dict):
                stack += value.values()
            elif isinstance(value, list | tuple):
                stack += value


def _is_dense(tensor):
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return is_plain and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)


def _data_of(tensor):
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def load_json(path: str | Path, advice: str, argument: str | None = None) -> Any:
    """Read a JSON file. Raises InputError, with this advice and argument, if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problem = error.strerror if isinstance(error, OSError) else "not JSON, or broken"
        raise InputError(f"{path}: {problem}; {advice}", argument) from None
