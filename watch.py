"""Show a training in TensorBoard (--tensorboard): the numbers of log.csv, and images."""

import importlib.util

import torch

from utility import InputError


def check_installed():
    """Raise InputError where the tensorboard package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard: the package is not installed; pip install tensorboard")


class Board:
    """Writes <folder>/tensorboard.

    Args:
        folder: of the run
        images_every: epochs between two looks at the images
    """

    def __init__(self, folder, images_every=10):
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        self.writer = SummaryWriter(folder / "tensorboard")
        self.images_every = images_every

    def show(self, row, model, images, rgb_range):
        """The numbers of an epoch, and every so many epochs the first of the `images` (WholeImages) and its masks."""
        epoch = row["epoch"]
        for name, value in row.items():
            if name != "epoch":
                self.writer.add_scalar(name.replace("_", "/", 1), value, epoch)
        if (epoch - 1) % self.images_every == 0:
            self._show_images(epoch, model, images, rgb_range)
        self.writer.flush()

    @torch.no_grad()
    def _show_images(self, epoch, model, images, rgb_range):
        name, lr, hr = images[0]
        parameter = next(model.parameters())
        model.eval()
        x = lr[None].to(parameter.device, parameter.dtype) * (rgb_range / 255)
        sr, work = model.inference(x)
        self.writer.add_image(f"{name}/LR", lr, epoch)
        self.writer.add_image(f"{name}/SR", (sr[0] / rgb_range).clamp(0, 1), epoch)
        self.writer.add_image(f"{name}/HR", hr, epoch, dataformats="HWC")
        for k, mask in enumerate(work.masks):
            self.writer.add_image(f"{name}/mask {k + 1}", mask[0].float(), epoch)
