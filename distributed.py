"""Several processes that train or test together, started by torchrun: their ranks, and what they exchange.

With a single process every function here is trivial. The process of rank 0 is the main one: it writes files and logs.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from program import LAUNCHER_VARIABLES, InputError, launched_processes
from utility import logger, pick_device


def is_launched() -> bool:
    """Whether torchrun or another launcher started this process as one of several."""
    return launched_processes() > 1


def start(name: str) -> torch.device:
    """Join the other processes, if there are any, and return the device `name` (see utility.pick_device) of this one.

    Each process takes its own GPU if `name` is cuda, or auto with GPUs available. Raises InputError.
    """
    if not is_launched():
        if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
            missing = ", ".join(variable for variable in LAUNCHER_VARIABLES if not os.environ.get(variable))
            logger.info(f"WORLD_SIZE is set, but not {missing}: running as a single process; torchrun starts several")
        return pick_device(name)
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        local_rank, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise InputError(
                f"process {local_rank + 1} runs on a machine with {n_gpus} GPUs; start one process per GPU",
                argument="nproc_per_node",
            )
        name = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    elif name.startswith("cuda"):
        raise InputError(f"torchrun gives each process its own GPU; use cuda instead of {name}", argument="device")
    device = pick_device(name)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the processes cannot connect ({problem}); start them with torchrun") from None
    if not is_main_process():
        logger.setLevel("ERROR")
    return device


def stop() -> None:
    """Leave the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return rank() == 0


def is_connection_lost(error: Exception) -> bool:
    """Whether an error means that another process has died."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def gather(value: Any) -> list:
    """Return the values of all processes in the order of their ranks; they must be picklable."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    if world_size() == 1:
        return flag
    flag = torch.tensor([float(flag)])
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def average(tensors: Iterable[torch.Tensor]) -> None:
    """Replace each tensor by its mean over all processes."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= world_size()


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process run the block before the others, which then find its files."""
    if not is_main_process():
        dist.barrier()
    yield
    if world_size() > 1 and is_main_process():
        dist.barrier()
