"""The results of a test on one set: pictures and measurements of each image, kept so that no call does them again."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import schema
import visualize
from data.image import write_png
from data.srdata import WholeImages
from files import Results, check_name, check_outputs, digest, write_whole
from model.network import Cost
from picture import to_8_bits

Row = dict[str, Any]  # what metrics.json says about an image

# What is recorded about an image.
FACTS = schema.mapping(
    {
        "measured_with": schema.anything,
        "row": schema.mapping(
            {
                "name": schema.text,
                "lr_shape": schema.sequence(schema.integer(1), schema.integer(1)),
                "psnr_y": schema.number(),
                "ssim_y": schema.number(),
                "seconds": schema.number(0),
                "mask_density": schema.list_of(schema.number(0)),
                "active_share": schema.number(0),
            },
            {"perceptual": schema.mapping(rest=schema.number())},
            rest=schema.number(),
        ),
        "cost": schema.mapping(
            {
                "pixels": schema.integer(1),
                "macs": schema.integer(0),
                "macs_dense": schema.integer(1),
                "macs_run": schema.integer(0),
                "important": schema.list_of(schema.integer(0)),
                "active": schema.number(0),
            }
        ),
    }
)


@dataclass(frozen=True)
class ResultSettings:
    """What a test writes, and what its results depend on besides the images."""

    made_with: bytes  # everything that changes the pictures, e.g. the weights
    measured_with: list  # everything else that changes the measurements of sets with HR images; as JSON holds it
    save_results: bool  # write the SR images; always done for images without HR
    n_masks: int = 0  # masks of which pictures are written


class SetResults:
    """The results of a test on a set.

    folder      that they are written to
    failed      {image name: why it could not be done}
    n_reused    how many images an earlier call had done
    """

    def __init__(self, folder: Path, images: WholeImages, settings: ResultSettings):
        self.folder, self.images, self.settings = folder, images, settings
        self.failed, self.n_reused = {}, 0
        self._results = Results(folder)
        self._made_from = functools.lru_cache(maxsize=None)(self._digest)

    def check(self, reset: bool, inputs: list[str | Path], advice: str) -> None:
        """Look for what the test would lose, before anything is deleted or written.

        Raises InputError, which ends with `advice`, if results of something else exist and `reset` does not remove
        them, and if one of `inputs` or of the images would be overwritten.
        """
        names = self.images.names
        inputs = [*inputs, *(path for pair in self.images.paths for path in pair)]
        outputs = [path for name in names for path in self._results.files(name, self.files(name))]
        check_outputs(outputs, inputs, argument="save")
        for name in names if not reset else ():
            self._results.check(name, self._made_from(name), self.files(name), advice)

    def remove(self) -> None:
        """Remove the results of the images of this set, and nothing else."""
        for name in self.images.names:
            self._results.remove(name, self.files(name))

    def files(self, name: str) -> list[str]:
        """The names of the files that are written for an image."""
        kinds = ["SR"] if self.settings.save_results or not self.images.has_hr else []
        if self.settings.n_masks:
            kinds += [*(f"mask{k + 1}" for k in range(self.settings.n_masks)), "density", "masks"]
        return [f"{name}_x{self.images.scale}_{kind}.png" for kind in kinds]

    def find(self, name: str) -> tuple[Row, Cost] | None:
        """The measurements of an image that an earlier call has done; None if it is to be done.

        Raises InputError if files cannot be named after it.
        """
        for file in self.files(name):
            check_name(file, name)
        facts = self._results.find(name, self._made_from(name), self.files(name))
        is_same = facts is not None and not any(FACTS(facts, "")) and facts["row"]["name"] == name
        if not is_same or (self.images.has_hr and facts["measured_with"] != self.settings.measured_with):
            return None
        return facts["row"], Cost(**facts["cost"] | {"important": tuple(facts["cost"]["important"])})

    def save(self, row: Row, cost: Cost, lr: np.ndarray, sr: np.ndarray, masks: np.ndarray) -> None:
        """Write the results of an image: LR and SR, uint8 or uint16 (H, W, C), and masks, bool (K, H, W)."""
        name, files = row["name"], self.files(row["name"])
        facts = {"measured_with": self.settings.measured_with, "row": row}
        facts["cost"] = {field.name: getattr(cost, field.name) for field in dataclasses.fields(cost) if field.compare}
        self._results.record(name, self._made_from(name), files, facts)
        if self.settings.n_masks:
            save_masks(self.folder, f"{name}_x{self.images.scale}", lr=to_8_bits(lr), sr=to_8_bits(sr), masks=masks)
        if not self.images.has_hr:
            write_png(self.folder / files[0], self.images.source(name).with_upscaled(sr))
        elif self.settings.save_results:
            write_png(self.folder / files[0], sr)

    def _digest(self, name):
        """The key of what the results of an image are made from."""
        paths = self.images.paths[self.images.names.index(name)]
        return digest([path for path in paths if path], self.settings.made_with)


def save_masks(folder: Path, stem: str, lr: np.ndarray, sr: np.ndarray, masks: np.ndarray) -> None:
    """Write <stem>_mask<k>.png, <stem>_density.png and the sheet <stem>_masks.png."""
    for k, mask in enumerate(masks):
        write_png(folder / f"{stem}_mask{k + 1}.png", visualize.overlay_mask(lr, mask))
    write_png(folder / f"{stem}_density.png", visualize.density_map(masks))
    title = stem.encode(errors="backslashreplace").decode()  # names of files may not be UTF-8
    write_whole(folder / f"{stem}_masks.png", visualize.mask_sheet(title, lr, sr, masks))
