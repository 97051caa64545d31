"""Engines that run a compiled SMSR. sparse.Plan, with plain PyTorch operators, is the reference and runs everywhere."""

from collections.abc import Callable

import torch

from model.network import Cost, DeferredCost
from model.sparse import Plan
from utility import InputError, logger

# A function of images (N, n_colors, H, W), the mode and the tile, as `SMSR.inference`.
Engine = Callable[[torch.Tensor, str, int | None], tuple[torch.Tensor, Cost | DeferredCost]]

NAMES = ("auto", "plain", "fused")
FASTEST = {"cuda": "fused"}  # by the kind of device; plain elsewhere


class UnavailableError(Exception):
    """An engine cannot run here. The message says what is missing."""


def pick_engine(plan: Plan, name: str = "auto") -> Engine:
    """The engine of this name, of NAMES; "auto": the fastest one for the device of the weights that can run.

    Raises InputError if an engine is named that cannot run.
    """
    wanted = FASTEST.get(plan.model.device.type, "plain") if name == "auto" else name
    if wanted == "plain":
        return plan
    try:
        return _BUILDERS[wanted](plan)
    except UnavailableError as error:
        if name != "auto":
            raise InputError(f"{wanted}: {error}; choose another engine, or auto", argument="engine") from None
        logger.info(f"the {wanted} engine is not used: {error}; using plain operators, which are slower")
        return plan


def _build_fused(plan: Plan) -> Engine:
    device = plan.model.device
    if device.type != "cuda":
        raise UnavailableError("it runs on NVIDIA GPUs only")
    try:
        from model.engines.fused import FusedEngine  # Triton is optional
    except ImportError as error:
        raise UnavailableError(f"Triton is missing ({error})") from error
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise UnavailableError("it needs a GPU of compute capability 8.0 or newer")
    return FusedEngine(plan)


_BUILDERS = {"fused": _build_fused}
