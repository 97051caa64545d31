"""Several processes that train or measure together, as torchrun starts them: who is who, and what they exchange.

With one process all of it is trivial. The process of rank 0 is the one that writes and speaks; the others help.
"""

import contextlib
import os

import torch
import torch.distributed as dist

from utility import InputError, logger, pick_device


def is_launched():
    """Whether torchrun, or another launcher, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def start(name):
    """Meet the other processes, if there are any. Returns the device `name` (see utility.pick_device) of this one.

    Each process takes a GPU of its machine where `name` is cuda, or auto and there are GPUs. Raises InputError.
    """
    if not is_launched():
        return pick_device(name)
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"--nproc_per_node: process {local_rank + 1} on a machine with {torch.cuda.device_count()} GPUs; "
                "start as many as there are"
            )
        name = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    elif name.startswith("cuda"):
        raise InputError(f"--device {name}: torchrun gives each process a GPU of its own; take --device cuda")
    device = pick_device(name)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if is_helper():
        logger.setLevel("ERROR")
    return device


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_helper():
    return rank() > 0


def is_lost(error):
    """Whether this is what remains of an exchange with a process that is gone."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def gather(value):
    """The values of all processes, in the order of their ranks; picklable."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag):
    """Whether `flag` is true in any process."""
    if world_size() == 1:
        return flag
    flag = torch.tensor([float(flag)])
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def average(tensors):
    """Replace each tensor by its mean over all processes."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= world_size()


@contextlib.contextmanager
def main_first():
    """The process of rank 0 goes through what is within first: it finds nothing done, and the others all of it."""
    if is_helper():
        dist.barrier()
    yield
    if world_size() > 1 and not is_helper():
        dist.barrier()
