"""Engines that run a compiled SMSR. sparse.Plan, with plain PyTorch operators, is the reference and runs everywhere."""

import functools
from collections.abc import Callable

import torch

from model.engines.build import BuildError
from model.engines.native import NativeEngine
from model.network import Cost, DeferredCost
from model.sparse import Plan
from program import InputError, is_out_of_memory
from utility import logger

# A function of images (N, n_colors, H, W), the mode and the tile, as `SMSR.inference`.
Engine = Callable[[torch.Tensor, str, int | None], tuple[torch.Tensor, Cost | DeferredCost]]

NAMES = ("auto", "plain", "fused", "native")
FASTEST = {"cuda": "fused", "cpu": "native"}  # by the kind of device; plain elsewhere


class UnavailableError(Exception):
    """An engine cannot run here. The message says why."""


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
            raise InputError(
                f"{wanted} cannot run here ({error}); choose another, or auto", argument="engine"
            ) from None
        _report(f"{wanted} engine: {error}; using plain operators, which are slower")
        return plan


def name_of(engine: Engine) -> str:
    """The name of an engine, of NAMES."""
    return "plain" if isinstance(engine, Plan) else "native" if isinstance(engine, NativeEngine) else "fused"


@functools.cache  # once per process
def _report(line: str) -> None:
    logger.info(line)


def _build_fused(plan: Plan) -> Engine:
    device = plan.model.device
    if device.type != "cuda":
        raise UnavailableError("it runs on NVIDIA GPUs only")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise UnavailableError("it needs a GPU of compute capability 8.0 or newer")
    try:
        from model.engines.fused import FusedEngine  # Triton is optional, and may be broken in many ways

        return FusedEngine(plan)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnavailableError(f"it needs a Triton that works ({problem})") from error


def _build_native(plan: Plan) -> Engine:
    if plan.model.device.type != "cpu" or plan.model.dtype != torch.float32:
        raise UnavailableError("it runs on CPUs in float32 only")
    try:
        return NativeEngine(plan)
    except BuildError as error:
        raise UnavailableError(str(error)) from error


_BUILDERS = {"fused": _build_fused, "native": _build_native}
