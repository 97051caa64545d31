"""Upscale a video through OpenCV, frame by frame, so that memory does not grow with its length."""

import glob
import hashlib
import math
import os
import shutil

import cv2
import torch
from tqdm import tqdm

from data.image import read_image, write_png
from metrics import quantize
from utility import InputError, logger

CODEC = "mp4v"
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong with a file is told by an InputError
cv2.setLogLevel(0)


def upscale_video(run, path, target, n_colors=3, rgb_range=255, device=None, dtype=torch.float32, key=b""):
    """Write the video `target`, an .mp4, with the frame rate of `path` and without its sound.

    Codecs halve the resolution of colors: of an odd height or width the last line is repeated.

    Finished frames are kept as PNG files in a folder beside `target` until the video is whole; called again after an
    interruption, with the same video and `key`, it goes on behind the last of them.

    Args:
        run: LR (1, C, H, W) in 0...rgb_range -> SR and Work
        key: what the frames depend on beside the video, such as the weights

    Raises:
        InputError: `path` is no video that OpenCV reads, or holds no frames, or `target` cannot be written
    """
    clip = cv2.VideoCapture(str(path)) if path.is_file() else None
    if clip is None or not clip.isOpened():
        raise InputError(f"--dir_demo {path}: is no video that OpenCV can read; give a file such as clip.mp4")
    frames = target.with_name(f".{target.name}.{_key(path, key)}")
    frames.mkdir(exist_ok=True)
    rate = clip.get(cv2.CAP_PROP_FPS)
    total = max(0, int(clip.get(cv2.CAP_PROP_FRAME_COUNT)))
    count = 0
    with tqdm(total=total or None, desc=path.name, unit="frame", leave=False) as bar:
        while clip.grab():
            frame = frames / f"{count:06}.png"
            if not frame.exists():
                decoded, image = clip.retrieve()
                if not decoded:
                    raise InputError(f"--dir_demo {path}: frame {count} cannot be decoded; what is done stays done")
                write_png(frame, _upscale(run, image, n_colors, rgb_range, device, dtype))
            count += 1
            bar.update()
    clip.release()
    if 0 < count < total:
        logger.warning(f"{path}: only {count} of {total} frames could be decoded")
    if count == 0:
        frames.rmdir()
        raise InputError(f"--dir_demo {path}: holds no frames that can be decoded")
    _encode([frames / f"{index:06}.png" for index in range(count)], target, rate)
    for frames in target.parent.glob(f".{glob.escape(target.name)}.*"):  # those of other settings, too
        shutil.rmtree(frames)
    for unfinished in target.parent.glob(f".{glob.escape(target.stem)}.*.tmp{target.suffix}"):  # of killed processes
        unfinished.unlink()
    return count


def _key(path, key):
    stat = path.stat()
    return hashlib.sha256(key + f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:8]


@torch.no_grad()
def _upscale(run, image, n_colors, rgb_range, device, dtype):
    """BGR (H, W, 3) as OpenCV gives it -> SR (sH, sW, n_colors)"""
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB if n_colors == 3 else cv2.COLOR_BGR2GRAY)
    image = image.reshape(*image.shape[:2], n_colors)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].to(device, dtype) * (rgb_range / 255)
    return quantize(run(x)[0][0], rgb_range)


def _encode(frames, target, rate):
    """PNG files -> a video, which appears when it is whole."""
    height, width = (length + length % 2 for length in read_image(frames[0]).shape[:2])
    unfinished = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    writer = cv2.VideoWriter(
        str(unfinished), cv2.VideoWriter_fourcc(*CODEC), rate if 0 < rate < math.inf else 25.0, (width, height)
    )
    try:
        if not writer.isOpened():
            raise InputError(f"{target}: OpenCV cannot write a {CODEC} video of {width}x{height} pixels here")
        for frame in tqdm(frames, desc=f"write {target.name}", unit="frame", leave=False):
            image = cv2.cvtColor(read_image(frame), cv2.COLOR_RGB2BGR)
            bottom, right = height - image.shape[0], width - image.shape[1]
            writer.write(cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_REPLICATE))
        writer.release()
        _check_whole(unfinished, target, len(frames))
        os.replace(unfinished, target)
    finally:
        writer.release()
        unfinished.unlink(missing_ok=True)


def _check_whole(path, target, count):
    """InputError unless the video holds so many frames: OpenCV does not tell when a disk is full."""
    clip = cv2.VideoCapture(str(path))
    written = 0
    while clip.grab():
        written += 1
    clip.release()
    if written < count:
        raise InputError(f"{target}: only {written} of {count} frames could be written; is the disk full?")
