"""Time the steps of a training, at full size and on random patches.

    python tools/benchmark.py train --baseline --batch_size 16 --patch_size 96 --device cuda

A step is the whole of it: masks, forward, losses, backward, update. All run in one process and in turns, after a
warm-up; times are medians.

    baseline  the plain loop: float32, eager, contiguous memory, the loss read after every step, and the forward with
              its branches written out: dense and sparse features convolved one after the other in every layer
    single    main.py's step
    bf16      with --precision bf16
    half      with --precision half
    +compile  with --compile as well
"""

import argparse
import copy
import functools
from pathlib import Path

import torch
import torch.nn.functional as F

from loss import build_loss
from model.common import pad_to_multiple
from model.smsr import SMSR
from option import PRECISIONS, Parser, positive_int
from tools.benchmark import timed
from trainer import Schedules, Trainer, build_optimizer
from utility import pick_device, write_json


def parse(argv):
    parser = Parser(
        prog="benchmark.py train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--baseline", action="store_true", help="time the plain loop too, and compare with it")
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=["single", "bf16"], help="which to time")
    parser.add_argument("--compile", action="store_true", help="time each of them compiled, too")
    parser.add_argument("--scale", type=positive_int, default=2)
    parser.add_argument("--batch_size", type=positive_int, default=16)
    parser.add_argument("--patch_size", type=positive_int, default=96, help="low-resolution pixels")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--threads", type=positive_int, help="of the CPU (default: PyTorch's choice)")
    parser.add_argument("--repeats", type=positive_int, default=11, help="timed steps of each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    return parser.parse_args(argv)


def branches(block, x, m, c):
    """What SMM.forward computes, branch by branch (paper eq. 5), of the same features and masks."""
    c = [c_l.view(1, -1, 1, 1) for c_l in c[0].unbind(1)]
    z = block.convs[0](x)
    outputs = [F.relu(z * c[0] + z * (1 - c[0]) * m)]
    for conv, c_in, c_out in zip(block.convs[1:], c[:-1], c[1:], strict=True):
        dense, sparse = conv(outputs[-1] * c_in), conv(outputs[-1] * (1 - c_in))
        dense_to_dense, dense_to_sparse = dense * c_out, dense * (1 - c_out) * m
        sparse_to_dense, sparse_to_sparse = sparse * c_out * m, sparse * (1 - c_out) * m
        outputs.append(F.relu(dense_to_dense + dense_to_sparse + sparse_to_dense + sparse_to_sparse))
    return x + block.attention(block.collect(torch.cat(outputs, 1)))


class Baseline:
    """The plain loop: `step` on LR (N, C, P, P) and HR (N, C, sP, sP)."""

    def __init__(self, model):
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), 2e-4, foreach=False)

    def forward(self, lr, tau):
        """SR and the sparsity loss, all of whose products are built."""
        model = self.model
        x = pad_to_multiple(lr - model.mean, 2)
        head = f = model.head(x)
        features, shares = [], []
        for block in model.blocks:
            m, c = block.sample_masks(f, tau)
            shares += [m * (1 - c_l) + c_l for c_l in (c[..., i].view(1, -1, 1, 1) for i in range(c.shape[2]))]
            f = branches(block, f, m, c)
            features.append(f)
        sr = model.tail(model.collect(torch.cat(features, 1)) + head) + model.upsample(x)
        sr = sr[..., : lr.shape[2] * model.scale, : lr.shape[3] * model.scale]
        return sr, torch.cat(shares).mean()

    def step(self, lr, hr, tau, lambda_):
        self.optimizer.zero_grad()
        sr, share = self.forward(lr, tau)
        loss = F.l1_loss(sr, hr) + lambda_ * share
        loss.backward()
        self.optimizer.step()
        return loss.item()


def measure(args):
    """{name: milliseconds of a step}"""
    device = pick_device(args.device)
    torch.manual_seed(0)
    model = SMSR(args.scale).train()
    lr = torch.rand(args.batch_size, 3, args.patch_size, args.patch_size, device=device) * 255
    hr = F.interpolate(lr, scale_factor=args.scale)
    schedule = torch.tensor(0.7, device=device), torch.tensor(0.1, device=device)  # tau and lambda of some epoch
    runs = {}
    if args.baseline:
        baseline = Baseline(copy.deepcopy(model).to(device))
        runs["baseline"] = functools.partial(baseline.step, lr, hr, *(number.item() for number in schedule))
    lr, hr = (images.contiguous(memory_format=torch.channels_last) for images in (lr, hr))
    for precision in args.precision:
        for compiled in (False, True) if args.compile else (False,):
            own = copy.deepcopy(model).to(device, memory_format=torch.channels_last)
            trainer = Trainer(
                own, build_loss("1*L1").to(device), build_optimizer("ADAM", own.parameters(), 2e-4), None, [], None,
                Schedules(), precision=PRECISIONS[precision], compile=compiled,
            )  # fmt: skip
            runs[precision + "+compile" * compiled] = functools.partial(trainer.train_step, lr, hr, *schedule)
    return timed(runs, device, args.repeats)


def main(argv):
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    times = measure(args)
    slowest = times.get("baseline", times[next(iter(times))])
    rows = {
        name: {"step_ms": ms, "images_per_second": args.batch_size / ms * 1e3, "speedup": slowest / ms}
        for name, ms in times.items()
    }
    print(f"{'step':16} {'ms':>9} {'images/s':>9} {'speedup':>8}")
    for name, row in rows.items():
        print(f"{name:16} {row['step_ms']:9.1f} {row['images_per_second']:9.1f} {row['speedup']:8.2f}")
    if args.json:
        settings = {key: getattr(args, key) for key in ("scale", "batch_size", "patch_size")}
        settings |= {"device": str(pick_device(args.device)), "threads": torch.get_num_threads()}
        write_json(args.json, settings | {"torch": torch.__version__, "steps": rows})
