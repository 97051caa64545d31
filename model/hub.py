"""Hugging Face folders: config.json with the constructor arguments, and model.safetensors with the weights.

They are what huggingface_hub.PyTorchModelHubMixin writes and reads. Reading and writing them needs the safetensors
package. Only downloading them needs huggingface_hub.
"""

import inspect
import re
from pathlib import Path

from torch import nn

import schema
from loading import load_json
from model.building import build_from_weights
from model.weights import read_weights, write_weights
from program import InputError
from utility import write_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def read_hub_folder(network: type[nn.Module], source: str | Path) -> nn.Module:
    """Build a network from a folder, or else from the repository "owner/name" on Hugging Face, in eval mode on the CPU.

    network: a subclass of model.network.Network

    Raises InputError if there is no such folder or repository, or it holds another network or does not fit together.
    """
    folder = Path(source) if Path(source).is_dir() else _download(str(source))
    sizes = _read_sizes(network, folder)
    path = folder / WEIGHTS
    return build_from_weights(network, read_weights(path), path, sizes=sizes).eval()


def _read_sizes(network, folder):
    """The constructor arguments in config.json. Raises InputError if it names another network."""
    path, advice = folder / CONFIG, "use a folder that tools/export_hub.py or save_pretrained wrote"
    names = inspect.signature(network).parameters
    numbers = {name: schema.number(1e-9) if name in network.settings else schema.integer(1) for name in names}
    content = load_json(path, advice)
    accepted = schema.mapping(optional={"architectures": schema.list_of(schema.text)} | numbers, rest=schema.anything)
    schema.check(content, accepted, path, advice)
    described = content.get("architectures", [])
    if described and not {base.__name__ for base in network.__mro__} & set(described):
        found = ", ".join(described)
        raise InputError(f"{path}: describes {found}, not {network.__name__}; call from_pretrained of {found}")
    return {name: content[name] for name in names if name in content}


def _download(source):
    """The folder in the cache of huggingface_hub that holds both files of a repository."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise InputError(f"{source}: no such folder; check the path")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise InputError(
            f"{source}: no such folder; to download it from Hugging Face, pip install huggingface_hub"
        ) from None
    try:
        paths = [hf_hub_download(source, name) for name in (CONFIG, WEIGHTS)]
    except Exception as error:  # of the connection, the repository, the cache or the disk
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{source}: no such folder, and it cannot be downloaded from Hugging Face ({reason}); "
            "check the name and the connection"
        ) from None
    return Path(paths[0]).parent


def write_hub_folder(folder: Path, model: nn.Module) -> None:
    """Write config.json and model.safetensors of a network. Raises InputError if safetensors is not installed."""
    state_dict = model.state_dict()
    write_weights(folder / WEIGHTS, state_dict)
    write_json(folder / CONFIG, {"architectures": [type(model).__name__], **model.hyperparameters(state_dict)})
