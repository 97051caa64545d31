"""Engines that run a compiled SMSR. sparse.Plan, with plain PyTorch operators, is the reference and runs everywhere."""

from collections.abc import Callable

import torch

from model.engines.native import build_native_engine
from model.network import Cost, DeferredCost
from model.sparse import Plan
from utility import logger

# A function of images (N, n_colors, H, W), the mode and the tile, as `SMSR.inference`.
Engine = Callable[[torch.Tensor, str, int | None], tuple[torch.Tensor, Cost | DeferredCost]]


def pick_engine(plan: Plan) -> Engine:
    """The fastest engine for the weights: native on a CPU, fused on a GPU that Triton supports, else the plan."""
    if plan.model.device.type == "cpu" and plan.model.dtype == torch.float32:
        return build_native_engine(plan) or plan
    if plan.model.device.type != "cuda":
        return plan
    try:
        from model.engines.fused import FusedEngine  # Triton is optional
    except ImportError as error:
        logger.info(f"the fused engine needs Triton ({error}); using plain operators, which are slower")
        return plan
    if torch.cuda.get_device_capability(plan.model.device) < (8, 0):
        logger.info("the fused engine needs a GPU of compute capability 8.0 or newer; using plain operators")
        return plan
    return FusedEngine(plan)
