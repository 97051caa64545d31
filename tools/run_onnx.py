"""Upscale images with a network that tools/export_onnx.py exported; PyTorch is not needed.

    python tools/run_onnx.py --model smsr_x2.onnx --input photos --output upscaled

Needs onnxruntime, numpy and pillow alone, and nothing else of this project: the file may be copied anywhere. Writes
<name>_x<scale>_SR.png for each image; those that are there already are kept, so an interrupted call goes on.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")  # others compile anew for each size, or lack operators
BYTES = 60  # of memory that a graph needs for each pixel and feature, measured on a CPU

try:
    import onnxruntime
except ImportError:
    onnxruntime = None


class InputError(Exception):
    """A user's mistake, told in one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FILE.onnx")
    parser.add_argument("--input", type=Path, required=True, help="an image, or a folder of images")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--scale", type=int, help="refuse a network of another scale")
    parser.add_argument("--threads", type=threads, metavar="N", help="of the CPU (default: all)")
    return parser.parse_args(argv)


def threads(text):
    if not text.isdecimal() or not 1 <= int(text) <= 256:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 256")
    return int(text)


class Network:
    """An exported network: images in and out, uint8 (H, W, 3).

    Raises InputError if the file is not one of ours, or of another scale than is asked for, and when called with an
    image that is too large for the memory.
    """

    def __init__(self, path, scale=None, threads=None):
        if onnxruntime is None:
            raise InputError("onnxruntime is not installed; pip install onnxruntime")
        if not path.is_file():
            raise InputError(f"--model {path}: no such file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 4
        providers = [name for name in PROVIDERS if name in onnxruntime.get_available_providers()]
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # of many kinds
            raise InputError(f"--model {path}: is no ONNX file, or broken ({_line(error)})") from None
        facts = self.session.get_modelmeta().custom_metadata_map
        if "smsr_scale" not in facts:
            raise InputError(f"--model {path}: was not made by tools/export_onnx.py; its metadata has no smsr_scale")
        self.scale = int(facts["smsr_scale"])
        if scale not in (None, self.scale):
            raise InputError(f"--scale {scale}: {path} is of x{self.scale}")
        self.bytes_a_pixel = BYTES * int(facts.get("smsr_n_feats", 64))
        image = self.session.get_inputs()[0]
        self.n_colors = image.shape[3]
        self.dtype = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}[image.type]

    def __call__(self, image):
        height, width = image.shape[:2]
        needed = self.bytes_a_pixel * height * width
        too_large = InputError(
            f"not enough memory for an image of {height}x{width} pixels, which takes about {needed / 2**30:.1f} GiB; "
            "cut it into parts"
        )
        if self.session.get_providers()[0] == "CPUExecutionProvider" and needed > _free_memory():
            raise too_large
        try:
            (sr,) = self.session.run(["sr"], {"image": image[None].astype(self.dtype, copy=False)})
            if sr.dtype != np.uint8:
                sr = np.rint(sr.astype(np.float32).clip(0, 255)).astype(np.uint8)
        except Exception as error:  # of many kinds
            said = str(error).lower()
            if isinstance(error, MemoryError) or "alloc" in said or "memory" in said:
                raise too_large from None
            raise
        return sr[0]


def _free_memory():
    """Bytes; without end where the system does not tell. It would grant more, and kill the process on its use."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes["MemAvailable"] + sizes["SwapFree"]


def read(path, n_colors):
    """An image file -> uint8 (H, W, n_colors), turned as its EXIF data say; 16-bit grey is reduced to 8.

    Raises InputError if it is broken, has 32 bits a channel, or is too large to read.
    """
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "F"):
                raise InputError("has 32 bits a pixel; save it with 8 or 16")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
            array = np.asarray(image.convert("L" if n_colors == 1 else "RGB"))
    except InputError:
        raise
    except (Image.DecompressionBombError, MemoryError):
        raise InputError("is too large to read; cut it into parts") from None
    except Exception as error:  # decoders raise nearly anything on a broken file
        raise InputError(f"is no image, or broken ({_line(error)})") from None
    return array.reshape(*array.shape[:2], n_colors)


def find(source):
    """The image files of a folder, or the file itself. Raises InputError."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise InputError(f"--input {source}: no such file or folder")
    endings = Image.registered_extensions()
    paths = [path for path in sorted(source.iterdir()) if path.suffix.lower() in endings and path.name[0] != "."]
    if not paths:
        raise InputError(f"--input {source}: no images there")
    stems = {}
    for path in paths:
        if path.stem in stems:
            raise InputError(f"{path}: would be written to the same file as {stems[path.stem]}; rename one of the two")
        stems[path.stem] = path
    return paths


def write(path, image):
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # then renamed, so that no half of a file is seen
    try:
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(beside, format="PNG")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _line(error):
    return " ".join(str(error).split())[:200]


def main(argv=None):
    args = parse(argv)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the memory decides what is too large
    network = Network(args.model, args.scale, args.threads)
    paths = find(args.input)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {args.output}: {error.strerror}; name a folder") from None
    for index, path in enumerate(paths):
        _progress(index, len(paths), path.name)
        target = args.output / f"{path.stem}_x{network.scale}_SR.png"
        if not target.exists():
            try:
                write(target, network(read(path, network.n_colors)))
            except InputError as mistake:
                raise InputError(f"{path}: {mistake}") from None
    _progress(len(paths), len(paths), "")
    print(f"{len(paths)} images, written to {args.output}")


def _progress(done, total, name):
    if sys.stderr.isatty():
        bar = "#" * (30 * done // total)
        print(
            f"\r[{bar:30}] {done}/{total} {name:30.30}", end="" if done < total else "\n", file=sys.stderr, flush=True
        )


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
