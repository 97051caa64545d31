"""Runs native.cpp by native_driver.cpp: builds the driver, writes what it reads, and reads what it writes."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import torch

from model.common import pad_to_multiple
from model.engines.build import FLAGS
from model.engines.native import Layer, Module, NativeWeights, branch_size
from model.sparse import Plan

DRIVER = Path(__file__).with_name("native_driver.cpp")


def build_driver(compiler, plan, folder, *flags):
    """Compile the driver for the size of a network. Returns the program."""
    program = folder / f"driver-{plan.n_feats}"
    sizes = [f"-DSMSR_FEATURES={plan.n_feats}", f"-DSMSR_MASK_FEATURES={branch_size(plan)}"]
    usual = [flag for flag in FLAGS if flag not in ("-shared", "-fno-rtti")]
    command = [*compiler, *usual, *sizes, *flags, "-pthread", "-o", program, DRIVER]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def write_number(file, number):
    file.write(int(number).to_bytes(8, "little", signed=True))


def write_floats(file, tensor):
    write_number(file, 0 if tensor is None else tensor.numel())
    if tensor is not None:
        file.write(tensor.contiguous().numpy().tobytes())


def write_structure(file, structure, tensors, counts):
    """Write the fields in their order; pointers become the tensors {address: tensor}, arrays their items."""
    for name, kind in structure._fields_:
        value = getattr(structure, name)
        if kind is ctypes.c_void_p:
            write_floats(file, tensors.get(value))
        elif kind is ctypes.c_int64:
            write_number(file, value)
        else:
            for index in range(counts[kind]):
                write_structure(file, value[index], tensors, counts)


def write_case(file, plan, x, sr, vector, strip_rows, keep_head, threads):
    weights = NativeWeights(plan, vector)
    tensors = {kept.data_ptr(): kept for kept in weights.kept if isinstance(kept, torch.Tensor)}
    counts = {ctypes.POINTER(Module): weights.net.n_modules, ctypes.POINTER(Layer): weights.net.n_layers}
    write_structure(file, weights.net, tensors, counts)
    for number in (*x.shape[1:], strip_rows, keep_head, threads):
        write_number(file, number)
    write_floats(file, x)
    write_floats(file, sr)


@torch.no_grad()
def run_driver(command, folder, model, x, vector, strip_rows=None, keep_head=True, threads=1):
    """Run one image x (n_colors, H, W), H and W even, by `command INPUT OUTPUT`. Returns the SR image and the masks."""
    plan = Plan(model)
    centered = pad_to_multiple(x[None] - model.mean, 2)
    sr = model.upsample(centered)[0].contiguous()
    with open(folder / "input", "wb") as file:
        write_case(
            file,
            plan,
            centered[0].contiguous(),
            sr,
            vector=vector,
            strip_rows=strip_rows or x.shape[1],
            keep_head=keep_head,
            threads=threads,
        )
    done = subprocess.run([*command, folder / "input", folder / "output"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    content = (folder / "output").read_bytes()
    masks = np.frombuffer(content, np.uint8, len(plan.blocks) * x[0].numel(), 4 * sr.numel())
    result = np.frombuffer(content, np.float32, sr.numel()).copy()
    return torch.from_numpy(result).view_as(sr), torch.from_numpy(masks.copy()).view(-1, *x.shape[1:])
