"""The networks: build one by name, or from the weights in a file."""

import inspect
from pathlib import Path

from model.building import build_from_weights, construct, fits, load_weights
from model.edsr import EDSR
from model.network import Network
from model.smsr import SMSR
from model.weights import StateDict, read_weights
from program import InputError

__all__ = [
    "EDSR",
    "MODELS",
    "SMSR",
    "Network",
    "StateDict",
    "build_model",
    "load_model",
    "load_weights",
    "read_weights",
]

MODELS: dict[str, type[Network]] = {"SMSR": SMSR, "EDSR": EDSR}


def build_model(
    name: str,
    state_dict: StateDict | None = None,
    origin: str | Path = "the weights",
    transfer: bool = False,
    **sizes: float | None,
) -> Network:
    """Build the network `name`, with the weights of `state_dict` if it is given.

    Args:
        name: a key of MODELS
        state_dict: weights from `read_weights`; they provide the sizes and settings that are not given
        origin: their source, for error messages
        transfer: load weights of another scale except for the tail, and log it
        sizes: constructor arguments of the network; None means the value of the weights, or else the default

    Raises:
        InputError: there is no such network or parameter, or the weights belong to another network, scale or size
    """
    if name not in MODELS:
        raise InputError(f"no such network {name!r}; there are {', '.join(MODELS)}", argument="model")
    network = MODELS[name]
    sizes = {key: value for key, value in sizes.items() if value is not None}
    for key in sizes:
        if key not in inspect.signature(network).parameters:
            raise InputError(f"{name} has no parameter {key!r}; leave it out", argument=key)
    if state_dict is None:
        return construct(network, sizes)
    others = [other for other in MODELS.values() if other is not network]
    return build_from_weights(network, state_dict, origin, transfer=transfer, sizes=sizes, others=others)


def load_model(path: str | Path, name: str | None = None, **sizes: float | None) -> Network:
    """Load the network in a weights file, in eval mode on the CPU. Raises InputError.

    The sizes and settings are read from the weights, and so is the kind of network unless `name` is given. Only weights
    of version 0.1.0 lack the settings: pass rgb_range, and res_scale of EDSR, if training did not use the defaults.
    """
    state_dict = read_weights(path)
    return build_model(name or _network_of(state_dict) or "SMSR", state_dict, path, **sizes).eval()


def _network_of(state_dict):
    """The name of the network that these weights belong to; None if there is none."""
    return next((name for name, network in MODELS.items() if fits(network, state_dict)), None)
