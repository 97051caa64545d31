"""Upscale images with a network that tools/export_onnx.py exported; PyTorch is
not needed.

    python tools/run_onnx.py --model smsr_x2.onnx --input photos --output upscaled

This needs onnxruntime, numpy, pillow, and three more files of this project:
copy run_onnx.py, picture.py, files.py and program.py into one folder anywhere.
TIFF images and 16 bits per channel also need tifffile and opencv-python-
headless.

It writes <name>_x<scale>_SR.png for each image. Another call skips the images
that are done, so an interrupted one resumes; it does not overwrite results of
another network or of other images. Alpha and color profiles are kept. So are
16 bits, if the network was exported with --pixels float.

Images that cannot be upscaled are named at the end. The exit code is then 1,
or 2 if no image could be upscaled.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # after the folder of this file

try:
    from files import Results, check_name, check_outputs, digest, write_whole
    from picture import Picture, encode_png, image_files, name_images, read_picture, skipped_files, to_8_bits
    from program import InputError, report_batch, run_program, shorten
except ModuleNotFoundError as missing:
    advice = f"put picture.py, files.py and program.py next to {Path(__file__).name}, and install their packages"
    print(f"error: {missing}; {advice}", file=sys.stderr)
    sys.exit(2)

try:
    import onnxruntime
except ImportError:
    onnxruntime = None

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")  # others compile once per image size or lack operators
DTYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}  # of images
MAX_SCALE = 64
BYTES_PER_FEATURE = 60  # memory that a graph needs per pixel and feature channel, measured on a CPU


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message.removeprefix('argument ')}; see --help")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FILE.onnx", help="exported network")
    parser.add_argument("--input", type=Path, required=True, metavar="PATH", help="an image, or a folder of images")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--scale", type=int, metavar="N", help="stop unless the network has this scale")
    parser.add_argument("--threads", type=threads, metavar="N", help="number of CPU threads (default: all cores)")
    return parser.parse_args(argv)


def threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 256:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 256")
    return int(text)


class Network:
    """An exported network. Call with an image (H, W, n_colors) -> (scale H, scale W, n_colors), uint8 or uint16.

    Graphs that compute on uint8 return uint8, all others the type of the image.

    Raises InputError if the file is not an exported network or has another scale than `scale`, and when called with an
    image that is too large for the memory.
    """

    def __init__(self, path: Path, scale: int | None = None, threads: int | None = None):
        self.session = _load(path, threads)
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "smsr_scale" not in metadata:
            raise InputError(f"--model {path}: has no metadata smsr_scale; export it with tools/export_onnx.py")
        try:
            self.scale, n_feats = int(metadata["smsr_scale"]), int(metadata.get("smsr_n_feats", 64))
            inputs = {value.name: value for value in self.session.get_inputs()}
            self.n_colors, self.dtype = inputs["image"].shape[3], DTYPES[inputs["image"].type]
            is_known = 1 <= self.scale <= MAX_SCALE and n_feats > 0 and self.n_colors in (1, 3)
        except (ValueError, KeyError, IndexError):
            is_known = False
        if not is_known or "sr" not in {value.name for value in self.session.get_outputs()}:
            raise InputError(f"--model {path}: not a network of tools/export_onnx.py, or damaged; export it again")
        if scale not in (None, self.scale):
            raise InputError(
                f"--scale {scale}: {path} upscales by {self.scale}; remove the flag or use another network"
            )
        self.bytes_per_pixel = BYTES_PER_FEATURE * n_feats

    def __call__(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        needed = self.bytes_per_pixel * height * width
        too_large = InputError(
            f"not enough memory for an image of {height}x{width} pixels, which needs about {needed / 2**30:.1f} GiB; "
            "cut it into parts"
        )
        if self.session.get_providers()[0] == "CPUExecutionProvider" and needed > _free_memory():
            raise too_large
        if self.dtype == np.uint8:
            image = to_8_bits(image)
        factor = np.iinfo(image.dtype).max / 255  # floats are in 0...255
        x = image if self.dtype == np.uint8 else (image / np.float32(factor)).astype(self.dtype)
        try:
            (sr,) = self.session.run(["sr"], {"image": x[None]})
            if sr.dtype != np.uint8:
                sr = np.rint(sr.astype(np.float32).clip(0, 255) * factor).astype(image.dtype)
        except Exception as error:  # ONNX Runtime raises many types
            message = str(error).lower()
            if isinstance(error, MemoryError) or "alloc" in message or "memory" in message:
                raise too_large from None
            raise InputError(f"the network fails ({shorten(str(error), 200)}); export it again") from None
        if sr.shape != (1, height * self.scale, width * self.scale, self.n_colors):
            raise InputError(f"the network returns an array {sr.shape}; export it again")
        return sr[0]


def _load(path, threads):
    if onnxruntime is None:
        raise InputError("onnxruntime is not installed; pip install onnxruntime")
    if not path.is_file():
        raise InputError(f"--model {path}: no such file; export a network with tools/export_onnx.py")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 4
    providers = [name for name in PROVIDERS if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime raises many types
        message = f"not an ONNX file, or damaged ({shorten(str(error), 200)}); export the network again"
        raise InputError(f"--model {path}: {message}") from None


def _free_memory():
    """Bytes of free memory; infinity if the system does not report it.

    Linux grants more than that when it is requested, and kills the process when it is used.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes["MemAvailable"] + sizes["SwapFree"]


def upscale(path: Path, network: Network) -> Picture:
    """Read and upscale an image file. Raises InputError if it cannot be read or is too large."""
    picture = read_picture(path, network.n_colors)
    try:
        return picture.with_upscaled(network(picture.pixels))
    except InputError as mistake:
        raise InputError(f"{path}: {mistake}") from None


def find(source: Path) -> dict[str, Path]:
    """{name: path} of the image files of a folder, or of the file itself. Prints what it skips. Raises InputError."""
    if source.is_file():
        return {source.stem: source}
    if not source.is_dir():
        raise InputError(f"--input {source}: no such file or folder; check the path")
    for line in skipped_files(source):
        print(line, file=sys.stderr)
    images = name_images(image_files(source))
    if not images:
        raise InputError(f"--input {source}: contains no images; pass a folder of images or one image")
    return images


def check_results(images: Mapping[str, Path], args: argparse.Namespace, scale: int) -> dict[str, str]:
    """{name: the key of what the result of an image is made from}.

    Raises InputError if a result of something else, or a file that is read, would be overwritten.
    """
    if args.input.resolve() == args.output.resolve():
        raise InputError(f"--output {args.output}: is the folder of the images; choose another")
    targets = [args.output / target_name(name, scale) for name in images]
    check_outputs(targets, [args.model, *images.values()], argument="output")
    results, network = Results(args.output), digest([args.model], b"").encode()
    keys = {name: digest([path], network) for name, path in images.items()}
    for name, key in keys.items():
        results.check(name, key, [target_name(name, scale)], "choose another --output")
    return keys


def target_name(name: str, scale: int) -> str:
    return f"{name}_x{scale}_SR.png"


def process(name: str, path: Path, network: Network, results: Results, key: str) -> None:
    """Upscale an image and write the result, unless that is done. Raises InputError."""
    target = target_name(name, network.scale)
    check_name(target, path)
    if results.find(name, key, [target]) is None:
        content = encode_png(upscale(path, network))
        results.record(name, key, [target], {})
        write_whole(results.folder / target, content)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    network = Network(args.model, args.scale, args.threads)
    images = find(args.input)
    keys, failures = check_results(images, args, network.scale), []
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {args.output}: {error.strerror}; choose another folder") from None
    for index, (name, path) in enumerate(images.items()):
        _show_progress(index, len(images), path.name)
        try:
            process(name, path, network, results=Results(args.output), key=keys[name])
        except InputError as mistake:
            failures.append(str(mistake))
        except MemoryError:
            failures.append(f"{path}: not enough memory; cut it into parts")
    _show_progress(len(images), len(images), "")
    if count := len(images) - len(failures):
        print(f"{count} upscaled image{'s' * (count != 1)} in {args.output}")
    return report_batch(failures, len(images))


def _show_progress(done, total, name):
    if sys.stderr.isatty():
        bar = "#" * (30 * done // total)
        end = "" if done < total else "\n"
        print(f"\r[{bar:30}] {done}/{total} {name:30.30}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_program(main)
