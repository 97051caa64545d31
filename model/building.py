"""Build a network from weights: compare them with what its class needs before anything large is allocated."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

import schema
from model.weights import StateDict
from program import InputError
from utility import free_memory, logger

# What `translate`, `hyperparameters` and the constructor raise on the weights of another network.
NOT_THIS_NETWORK = (KeyError, IndexError, ValueError, AttributeError, ArithmeticError, RuntimeError)


def build_from_weights(
    network: type[nn.Module],
    state_dict: StateDict,
    origin: str | Path,
    *,
    transfer: bool = False,
    sizes: Mapping[str, float],
    others: Iterable[type[nn.Module]] = (),
) -> nn.Module:
    """Build a network with these weights.

    Args:
        network: a subclass of model.network.Network
        state_dict: weights from `read_weights`; they provide the sizes and settings that are not given
        origin: their source, for error messages
        transfer: load weights of another scale except for the tail, and log it
        sizes: constructor arguments of the network
        others: networks that the weights may belong to instead, for error messages

    Raises InputError if the weights belong to another network, scale or size.
    """
    state_dict, stored, skeleton = _identify(network, state_dict, origin, others)
    _check_fit(skeleton, state_dict, origin)
    scale = sizes.get("scale", stored["scale"])
    if transfer and scale != stored["scale"]:
        logger.info(f"{origin}: these are x{stored['scale']} weights; loading all but the tail for x{scale}")
        stored["scale"] = scale
        state_dict = _replace_tail(state_dict, construct(network, {**stored, **sizes}).state_dict())
    _check_sizes(network.__name__, sizes, stored, origin)
    model = construct(network, {**sizes, **stored})
    load_weights(model, state_dict, origin)
    return model


def fits(network: type[nn.Module], state_dict: StateDict) -> bool:
    """Whether weights have the keys that tell this network from others."""
    try:
        _read_as(network, state_dict)
    except NOT_THIS_NETWORK:
        return False
    return True


def matches(network: type[nn.Module], state_dict: StateDict) -> bool:
    """Whether weights have exactly the keys and shapes that this network needs."""
    try:
        state_dict, _, skeleton = _read_as(network, state_dict)
    except NOT_THIS_NETWORK:
        return False
    return not any(_weights_of(skeleton)(state_dict, ""))


def _identify(network, state_dict, origin, others):
    """Translated weights, the sizes and settings they record, and their network without data. Raises InputError."""
    try:
        return _read_as(network, state_dict)
    except NOT_THIS_NETWORK as error:
        name = network.__name__
        other = next((other.__name__ for other in others if fits(other, state_dict)), None)
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


def construct(network: type[nn.Module], sizes: Mapping[str, float]) -> nn.Module:
    """Build an untrained network. Raises InputError if it cannot have this scale or does not fit in memory."""
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


def load_weights(model: nn.Module, state_dict: StateDict, origin: str | Path = "the weights") -> None:
    """Load all weights or none; InputError names the keys, shapes and values that do not fit."""
    _check_fit(model, state_dict, origin, finite=True)
    for name in model.settings:
        if name in state_dict and state_dict[name] <= 0:
            raise InputError(f"{origin}: {name} is not positive; choose another file")
    model.load_state_dict(state_dict)


def _check_fit(model, state_dict, origin, finite=False):
    schema.check(
        state_dict, _weights_of(model, finite), f"{origin}: does not fit {type(model).__name__}", "choose another file"
    )


def _weights_of(model, finite=False):
    """The schema of the weights that a network needs."""
    return schema.tensors_like(model.state_dict(), may_lack=model.settings, finite=finite)
