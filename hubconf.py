"""The networks for torch.hub: torch.hub.load(<this folder, or owner/name on GitHub>, "smsr_x2").

The modules of this project keep their names, e.g. `model` and `utility`, in the process that loads them. A program that
has imported other modules of these names gets an ImportError instead of a mixture of both.
"""

import pathlib
import sys

dependencies = ["torch", "numpy", "PIL", "tqdm"]

_ROOT = pathlib.Path(__file__).resolve().parent
_NEEDED = ("files", "loading", "model", "picture", "program", "schema", "utility")


def _check_names():
    """Raise ImportError if another module has the name of one that the networks need."""
    for name in _NEEDED:
        module = sys.modules.get(name)
        if module is None:
            continue
        folders = getattr(module, "__path__", [])  # a folder without __init__.py has no file
        origin = getattr(module, "__file__", None) or next(iter(folders), "another program")
        if _ROOT not in pathlib.Path(origin).resolve().parents:
            raise ImportError(
                f"{_ROOT}: needs its own module {name!r}, but this process has imported {origin}; "
                "load the network in another process"
            )


_check_names()

from model import build_model as _build_model
from model import load_model
from model.network import Network as _Network
from program import InputError as _InputError


def smsr_x2(pretrained: bool = True) -> _Network:
    """SMSR for scale 2 in eval mode, with the released weights unless `pretrained` is false."""
    return _smsr(2, pretrained)


def smsr_x3(pretrained: bool = True) -> _Network:
    """SMSR for scale 3 in eval mode, with the released weights unless `pretrained` is false."""
    return _smsr(3, pretrained)


def smsr_x4(pretrained: bool = True) -> _Network:
    """SMSR for scale 4 in eval mode, with the released weights unless `pretrained` is false."""
    return _smsr(4, pretrained)


def _smsr(scale, pretrained):
    if pretrained:
        return load_model(_ROOT / f"experiment/released/SMSR_X{scale}/model/model_best.pt")
    return _build_model("SMSR", scale=scale).eval()


def edsr_baseline(scale: int = 2, pretrained: bool = False) -> _Network:
    """EDSR-baseline (16 blocks of 64 channels) in eval mode, untrained: no weights of it are released here.

    `load_model` loads weights from a file, e.g. the ones that the EDSR authors published.
    """
    if pretrained:
        raise _InputError("edsr_baseline: no weights are released; load a file with the entry point load_model")
    return _build_model("EDSR", scale=scale).eval()
