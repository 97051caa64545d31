"""Weights files: read them as others wrote them, and write them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import schema
from files import write_whole
from loading import load_tensors
from program import InputError
from utility import logger, save_torch

StateDict = dict[str, torch.Tensor]

FIRST_KEY = "head.0.weight"  # every network here has it; what stands in front of it stands in front of all keys
# Where checkpoints of other programs, and our own, keep the weights. Of several entries the first one is taken.
WRAPPERS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "net", "network", "generator")
MAX_DEPTH = 3  # of wrappers in wrappers
COMPILED = "_orig_mod."  # torch.compile puts it in front of the names in a module


def read_weights(path: str | Path) -> StateDict:
    """Read a state dict (name -> tensor, on the CPU) from a PyTorch or safetensors file; never runs code in the file.

    The weights may be those of a checkpoint (see WRAPPERS), and their names may have a prefix: `module.` of
    DataParallel, `model.` of Lightning, `_orig_mod.` of torch.compile or any other.

    Raises InputError if the file holds no weights, or those of several networks.
    """
    content = _unwrap(load_tensors(path), path)
    problem, advice = f"{path}: does not contain a state dict (name -> tensor)", "use another file"
    if not isinstance(content, Mapping) or not content or not all(isinstance(key, str) for key in content):
        raise InputError(f"{problem}; {advice}")
    state_dict = _without_prefix(content, path)
    schema.check(state_dict, schema.mapping(rest=schema.tensor()), problem, advice)
    return state_dict


def _unwrap(content: Any, path: str | Path) -> Any:
    """The innermost dict in the entries of WRAPPERS."""
    for _ in range(MAX_DEPTH):
        found = [name for name in WRAPPERS if isinstance(content, dict) and isinstance(content.get(name), dict)]
        if not found:
            break
        if len(found) > 1:
            logger.info(f"{path}: using the weights in {found[0]!r}, not those in {', '.join(map(repr, found[1:]))}")
        content = content[found[0]]
    return content


def _without_prefix(state_dict: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The entries of the network, without the prefix of their names."""
    state_dict = {key.replace(COMPILED, ""): value for key, value in state_dict.items()}
    prefixes = sorted(key.removesuffix(FIRST_KEY) for key in state_dict if f".{key}".endswith(f".{FIRST_KEY}"))
    if not prefixes or prefixes[0] == "":
        return state_dict
    if len(prefixes) > 1:
        raise InputError(f"{path}: contains several networks ({', '.join(prefixes)}); save one of them alone")
    (prefix,) = prefixes
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def write_weights(path: str | Path, state_dict: StateDict) -> None:
    """Write a state dict, as safetensors if the name ends with .safetensors, else as PyTorch does.

    Raises InputError if the optional safetensors package is not installed.
    """
    if Path(path).suffix != ".safetensors":
        save_torch(path, state_dict)
        return
    try:
        from safetensors.torch import save
    except ImportError:
        raise InputError(f"{path}: the safetensors package is not installed; pip install safetensors") from None
    write_whole(path, save({key: value.contiguous() for key, value in state_dict.items()}))


def fingerprint(state_dict: StateDict) -> str:
    """A key of the content of a state dict."""
    content = hashlib.sha256()
    for name, value in state_dict.items():
        content.update(f"{name} {tuple(value.shape)}".encode())
        content.update(value.float().cpu().numpy().tobytes())
    return content.hexdigest()
