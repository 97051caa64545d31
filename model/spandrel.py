"""The networks as architectures of spandrel, which other programs load weights with, e.g. chaiNNer and ComfyUI.

    from model.spandrel import register
    register()
    spandrel.ModelLoader().load_from_file("model_best.pt")   # and whatever else uses spandrel in this process

spandrel is an optional package. Its images are tensors in 0...1.
"""

import torch

from model import MODELS
from model.building import build_from_weights, matches
from model.inference import build_predictor
from model.network import Network
from program import InputError
from utility import TORCHVISION_ADVICE

try:
    import spandrel
except (ImportError, RuntimeError) as error:  # RuntimeError: of a torchvision that does not fit PyTorch
    advice = "pip install spandrel" if isinstance(error, ImportError) else TORCHVISION_ADVICE
    raise InputError(f"the spandrel package cannot be imported ({error}); {advice}") from None


class NetworkArch(spandrel.Architecture[Network]):
    """A network of MODELS as spandrel sees it."""

    def __init__(self, network: type[Network]):
        super().__init__(id=network.__name__, detect=lambda state_dict: matches(network, state_dict))
        self.network = network

    def load(self, state_dict: spandrel.StateDict) -> spandrel.ImageModelDescriptor[Network]:
        """The network with these weights. Raises InputError if they do not fit."""
        model = build_from_weights(self.network, state_dict, self.name, sizes={}).eval()
        n_blocks = len(model.blocks) if hasattr(model, "blocks") else len(model.body) - 1
        return spandrel.ImageModelDescriptor(
            model,
            model.state_dict(),
            architecture=self,
            purpose="SR",
            tags=[f"{model.n_feats}nf", f"{n_blocks}nb"],
            supports_half=True,
            supports_bfloat16=True,
            scale=model.scale,
            input_channels=model.n_colors,
            output_channels=model.n_colors,
            tiling=spandrel.ModelTiling.INTERNAL,
            call_fn=_upscale,
        )


def _upscale(model: Network, image: torch.Tensor) -> torch.Tensor:
    """Images (N, n_colors, H, W) in 0...1 -> SR images; those that do not fit in memory are tiled."""
    sr, _ = build_predictor(model)(image * model.rgb_range)
    return sr / model.rgb_range


def register(registry: spandrel.ArchRegistry = spandrel.MAIN_REGISTRY) -> None:
    """Add the networks to a registry of spandrel. Further calls change nothing."""
    supports = (spandrel.ArchSupport.from_architecture(NetworkArch(network)) for network in MODELS.values())
    registry.add(*supports, ignore_duplicates=True)
