"""The networks: build one by name, or from the weights in a file."""

import inspect
import math
from pathlib import Path

import torch

import schema
from model.edsr import EDSR
from model.network import Network
from model.smsr import SMSR
from model.weights import StateDict, read_weights
from program import InputError
from utility import free_memory, logger

MODELS: dict[str, type[Network]] = {"SMSR": SMSR, "EDSR": EDSR}
# What `translate`, `hyperparameters` and the constructor raise on the weights of another network.
NOT_THIS_NETWORK = (KeyError, IndexError, ValueError, AttributeError, ArithmeticError, RuntimeError)


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
        return _construct(network, sizes)
    return _build_from_weights(name, state_dict, origin, transfer=transfer, sizes=sizes)


def _build_from_weights(name, state_dict, origin, transfer, sizes):
    state_dict, stored, skeleton = _identify(name, state_dict, origin)
    _check_fit(skeleton, state_dict, origin)
    scale = sizes.get("scale", stored["scale"])
    if transfer and scale != stored["scale"]:
        logger.info(f"{origin}: these are x{stored['scale']} weights; loading all but the tail for x{scale}")
        stored["scale"] = scale
        state_dict = _replace_tail(state_dict, _construct(MODELS[name], {**stored, **sizes}).state_dict())
    _check_sizes(name, sizes, stored, origin)
    model = _construct(MODELS[name], {**sizes, **stored})
    load_weights(model, state_dict, origin)
    return model


def _identify(name, state_dict, origin):
    """Translated weights, the sizes and settings they record, and their network without data. Raises InputError."""
    try:
        return _read_as(MODELS[name], state_dict)
    except NOT_THIS_NETWORK as error:
        other = _network_of(state_dict)
        if other:
            problem = f"{origin}: holds {other} weights, not {name} weights"
            raise InputError(f"{problem}; use model {other}, or another file") from None
        reason = f"{error} is missing" if isinstance(error, KeyError) else "shapes do not fit"
        raise InputError(f"{origin}: not weights of {name} ({reason}); choose another file") from None


def _read_as(network, state_dict):
    """As `_identify`; raises NOT_THIS_NETWORK. The network is on the meta device, so its size does not matter."""
    state_dict = network.translate(state_dict)
    stored = network.hyperparameters(state_dict)
    with torch.device("meta"):
        return state_dict, stored, network(**stored)


def _replace_tail(state_dict, own):
    kept = {key: value for key, value in state_dict.items() if not key.startswith("tail.")}
    return kept | {key: value for key, value in own.items() if key.startswith("tail.")}


def _check_sizes(name, sizes, stored, origin):
    """Raise InputError if weights do not have the sizes and settings that were given."""
    differing = [key for key in stored if key in sizes and not math.isclose(sizes[key], stored[key], rel_tol=1e-5)]
    if differing:
        found = ", ".join(f"{key} {stored[key]:g}, not {sizes[key]:g}" for key in differing)
        fix = ", ".join(f"{key} {stored[key]:g}" for key in differing)
        raise InputError(
            f"{origin} holds {name} weights for {found}; use {fix}, or other weights", argument=differing[0]
        )


def _construct(network, sizes):
    try:
        with torch.device("meta"):
            needed = 4 * network(**sizes).n_parameters
        if needed > free_memory(torch.device("cpu")):
            raise InputError(
                f"the weights of this network need {needed / 2**30:.0f} GiB of memory, more than is free; use fewer",
                argument="n_feats",
            )
        return network(**sizes)
    except ValueError as error:
        raise InputError(f"{error}; choose another scale", argument="scale") from None


def load_model(path: str | Path, name: str | None = None, **sizes: float | None) -> Network:
    """Load the network in a weights file, in eval mode on the CPU. Raises InputError.

    The sizes and settings are read from the weights, and so is the kind of network unless `name` is given. Only weights
    of version 0.1.0 lack the settings: pass rgb_range, and res_scale of EDSR, if training did not use the defaults.
    """
    state_dict = read_weights(path)
    return build_model(name or _network_of(state_dict) or "SMSR", state_dict, path, **sizes).eval()


def _network_of(state_dict):
    """The name of the network that these weights belong to; None if there is none."""
    for name, network in MODELS.items():
        try:
            _read_as(network, state_dict)
        except NOT_THIS_NETWORK:
            continue
        return name
    return None


def load_weights(model: Network, state_dict: StateDict, origin: str | Path = "the weights") -> None:
    """Load all weights or none; InputError names the keys, shapes and values that do not fit."""
    _check_fit(model, state_dict, origin, finite=True)
    for name in model.settings:
        if name in state_dict and state_dict[name] <= 0:
            raise InputError(f"{origin}: {name} is not positive; choose another file")
    model.load_state_dict(state_dict)


def _check_fit(model, state_dict, origin, finite=False):
    wanted = schema.tensors_like(model.state_dict(), may_lack=model.settings, finite=finite)
    schema.check(state_dict, wanted, f"{origin}: does not fit {type(model).__name__}", "choose another file")
