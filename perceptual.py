"""Perceptual metrics, e.g. LPIPS and DISTS, as the optional package pyiqa computes them."""

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loading import load_tensors
from program import InputError
from utility import TORCHVISION_ADVICE

Measure = Callable[[np.ndarray, np.ndarray | None], float]  # SR and HR, uint8 (H, W, C), or None -> the metric


def build_measures(metrics: Sequence[tuple[str, str | None]], device: torch.device) -> dict[str, Measure]:
    """Build {name: measure} for pairs of a metric's name in pyiqa and its weights file, or None.

    Without a file, pyiqa takes the weights from its cache or downloads them. A measure is nan if the metric needs an HR
    image and there is none; it raises InputError if the metric cannot take an image.

    Raises InputError if pyiqa is not installed, or does not have the metric or its weights.
    """
    if not metrics:
        return {}
    try:
        import pyiqa
    except (ImportError, RuntimeError) as error:  # RuntimeError: of a torchvision that does not fit PyTorch
        advice = "pip install pyiqa" if isinstance(error, ImportError) else TORCHVISION_ADVICE
        raise InputError(f"needs the pyiqa package ({error}); {advice}", argument="metrics") from None
    known = pyiqa.list_models()
    measures = {}
    for name, weights in metrics:
        if name not in known:
            raise InputError(f"pyiqa has no metric {name!r}; see pyiqa -ls", argument="metrics")
        measures[name] = _measure_of(name, _create(pyiqa, name, weights, device), device)
    return measures


def _create(pyiqa, name, weights, device):
    options, content = {}, None
    if weights:
        if Path(weights).suffix != ".mat":  # what MATLAB wrote holds no code
            content = load_tensors(weights, argument="metrics")  # pyiqa itself would run code that is in the file
        options["pretrained_model_path"] = weights
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it loads
            metric = pyiqa.create_metric(name, device=device, **options)
    except Exception as error:  # of downloads, files and the many packages behind the metrics
        reason = " ".join(str(error).split())[:200]
        advice = f"leave ={weights} out, or use another file" if weights else f"give its weights as {name}=FILE"
        backbone = f"put the backbone's into {torch.hub.get_dir()}/checkpoints"
        raise InputError(f"{name} cannot be built ({reason}); {advice}, and {backbone}", argument="metrics") from None
    if content is not None and not _share_keys(content, metric.net.state_dict()):
        raise InputError(f"{weights}: holds no weights of {name}; use another file", argument="metrics")
    return metric


def _share_keys(content, state_dict):
    """Whether a file has any of these weights: pyiqa ignores the others, and keeps random ones where it has none."""
    loaded = content.get("params", content) if isinstance(content, dict) else {}
    return any(key.removeprefix("module.") in state_dict for key in loaded if isinstance(key, str))


def _measure_of(name: str, metric: Any, device: torch.device) -> Measure:
    def measure(sr: np.ndarray, hr: np.ndarray | None) -> float:
        if metric.metric_mode == "FR" and hr is None:
            return math.nan
        images = (_to_unit(image, device) for image in (sr, hr) if image is not None)
        try:
            return float(metric(*images))
        except Exception as error:  # each metric fails in its own way, most of them on small images
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{name} cannot take an image of {sr.shape[0]}x{sr.shape[1]} pixels ({reason}); leave it out",
                argument="metrics",
            ) from None

    return measure


def _to_unit(image, device):
    """uint8 or uint16 (H, W, C) -> (1, 3, H, W) in 0...1."""
    levels = np.iinfo(image.dtype).max
    x = torch.from_numpy(image.astype(np.float32) / levels).permute(2, 0, 1)[None]
    return x.expand(1, 3, -1, -1).contiguous().to(device)
