"""The networks: build one by name, or from the weights in a file."""

import inspect

import torch

from model.edsr import EDSR
from model.smsr import SMSR
from utility import InputError, logger

MODELS = {"SMSR": SMSR, "EDSR": EDSR}


def build_model(name, state_dict=None, origin="the weights", transfer=False, **sizes):
    """Build the network `name`, with the weights of `state_dict` if there is one.

    Args:
        name: a key of MODELS
        state_dict: weights as `read_weights` gives them; sizes that are not asked for are taken from their shapes
        origin: where they are from, for error messages
        transfer: of weights of another scale take all but the tail
        sizes: constructor arguments of the network; None stands for its default

    Raises:
        InputError: no such network; the weights are of another network, scale or size
    """
    if name not in MODELS:
        raise InputError(f"--model {name}: no such model; there are {', '.join(MODELS)}")
    network = MODELS[name]
    sizes = {key: value for key, value in sizes.items() if value is not None}
    for key in sizes.keys() - inspect.signature(network).parameters.keys():
        raise InputError(f"--{key}: {name} has no such size; leave it out")
    if state_dict is None:
        return _construct(network, sizes)
    state_dict = network.translate(state_dict)
    try:
        inferred = network.hyperparameters(state_dict)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise InputError(f"{origin}: not those of {name} ({error} is not among them)") from None
    scale = sizes.get("scale", inferred["scale"])
    if transfer and scale != inferred["scale"]:
        logger.info(f"{origin}: of x{inferred['scale']}; all but the tail is taken for x{scale}")
        inferred["scale"] = scale
        own = _construct(network, {**inferred, **sizes}).state_dict()
        state_dict = {key: value for key, value in state_dict.items() if not _is_tail(key)}
        state_dict |= {key: value for key, value in own.items() if _is_tail(key)}
    differing = [key for key in inferred if sizes.get(key, inferred[key]) != inferred[key]]
    if differing:
        found = ", ".join(f"--{key} {inferred[key]} and not {sizes[key]}" for key in differing)
        raise InputError(f"{origin}: of {name} with {found}")
    model = _construct(network, {**inferred, **sizes})
    load_weights(model, state_dict, origin)
    return model


def _is_tail(key):
    return key.startswith("tail.")


def _construct(network, sizes):
    try:
        return network(**sizes)
    except ValueError as error:
        raise InputError(str(error)) from None


def load_model(path, name=None, **sizes):
    """The network in a weights file, in eval mode on the CPU. Raises InputError.

    Which network it is, unless `name` tells, and its sizes are read from the weights. What their shapes do not tell
    (rgb_range, EDSR's res_scale) is as in training: give it in `sizes` where it is not the default.
    """
    state_dict = read_weights(path)
    return build_model(name or _network_of(state_dict), state_dict, str(path), **sizes).eval()


def _network_of(state_dict):
    """The name of the network whose keys these are; SMSR if it is none."""
    for name, network in MODELS.items():
        try:
            network.hyperparameters(network.translate(state_dict))
        except (KeyError, IndexError, ValueError, AttributeError):
            continue
        return name
    return "SMSR"


def load_weights(model, state_dict, origin="the weights"):
    """Load all weights or none; InputError names every key, shape and value that does not fit."""
    own = model.state_dict()
    problems = [f"{key} is missing" for key in own if key not in state_dict]
    problems += [f"{key} is unknown" for key in state_dict if key not in own]
    problems += [
        f"{key} is {tuple(state_dict[key].shape)} and not {tuple(own[key].shape)}"
        for key in own
        if key in state_dict and state_dict[key].shape != own[key].shape
    ]
    problems += [f"{key} holds NaN or infinity" for key, value in state_dict.items() if not value.isfinite().all()]
    if problems:
        raise InputError(f"{origin}: do not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(state_dict)


def read_weights(path):
    """A state dict (name -> tensor, on the CPU) from a file; never runs code that the file may hold.

    Takes plain state dicts and the checkpoints of a run. Raises InputError if the file is anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no such weights file") from None
    except Exception as error:  # a broken file may raise nearly anything: pickle, zip, key and type errors
        reason = "it holds code, not weights alone" if "Weights only load failed" in str(error) else "broken or cut off"
        raise InputError(f"{path}: cannot be read as PyTorch weights ({reason})") from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise InputError(f"{path}: holds no state dict (name -> tensor)")
    return content
