"""Upscale a video frame by frame with OpenCV, so that memory use does not grow with its length."""

import glob
import hashlib
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from data.image import read_image, write_png
from program import InputError
from utility import logger

CODEC = "mp4v"
DEFAULT_RATE = 25.0  # frames per second of the result if the source does not state a valid rate
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # problems of a file are reported as an InputError instead
if hasattr(cv2, "setLogLevel"):  # some builds of OpenCV lack it
    cv2.setLogLevel(0)


def upscale_video(
    upscale: Callable[[np.ndarray], np.ndarray], path: Path, target: Path, n_colors: int = 3, key: bytes = b""
) -> int:
    """Upscale the video `path` to `target`, an .mp4 file with the same frame rate and without sound.

    Codecs halve the resolution of colors, so the last row or column of a frame of odd size is repeated.

    Finished frames are kept as PNG files in a folder next to `target` until the video is complete. After an
    interruption, another call with the same video and `key` resumes after the last finished frame.

    Args:
        upscale: uint8 (H, W, n_colors) -> uint8 (sH, sW, n_colors)
        n_colors: 1 (gray) or 3 (RGB)
        key: anything else the frames depend on, e.g. the weights

    Returns:
        the number of frames

    Raises:
        InputError: OpenCV cannot read `path`, it holds no frames, or `target` cannot be written
    """
    clip = cv2.VideoCapture(str(path)) if path.is_file() else None
    if clip is None or not clip.isOpened():
        raise InputError(f"{path}: not a video that OpenCV can read; give a video file, e.g. clip.mp4")
    frames = target.with_name(f".{target.name}.{_key(path, key)}")
    frames.mkdir(exist_ok=True)
    rate = clip.get(cv2.CAP_PROP_FPS)
    try:
        count = _upscale_frames(upscale, clip, path, frames=frames, n_colors=n_colors)
    finally:
        clip.release()
    if count == 0:
        frames.rmdir()
        raise InputError(f"{path}: no frame of it can be decoded; convert or replace the video")
    _encode([frames / f"{index:06}.png" for index in range(count)], target, rate)
    for finished in target.parent.glob(f".{glob.escape(target.name)}.*"):  # frames of other settings, too
        shutil.rmtree(finished)
    for unfinished in target.parent.glob(f".{glob.escape(target.stem)}.*.tmp{target.suffix}"):  # of killed processes
        unfinished.unlink()
    return count


def _key(path, key):
    stat = path.stat()
    return hashlib.sha256(key + f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:8]


def _upscale_frames(upscale, clip, path, frames, n_colors):
    """Write the frames that the folder `frames` lacks as <index>.png. Returns the number of frames of the clip."""
    total = max(0, int(clip.get(cv2.CAP_PROP_FRAME_COUNT)))
    count = 0
    with tqdm(total=total or None, desc=path.name, unit="frame", leave=False) as bar:
        while clip.grab():
            frame = frames / f"{count:06}.png"
            if not frame.exists():
                decoded, image = clip.retrieve()
                if not decoded:
                    raise InputError(
                        f"{path}: frame {count} cannot be decoded; repair the video (finished frames are kept)"
                    )
                write_png(frame, upscale(_convert(image, n_colors)))
            count += 1
            bar.update()
    if 0 < count < total:
        logger.warning(f"{path}: only {count} of {total} frames could be decoded")
    return count


def _convert(image, n_colors):
    """BGR (H, W, 3), as OpenCV decodes it -> gray or RGB (H, W, n_colors)"""
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB if n_colors == 3 else cv2.COLOR_BGR2GRAY)
    return image.reshape(*image.shape[:2], n_colors)


def _encode(frames, target, rate):
    """Encode PNG files as a video, which appears once it is complete."""
    height, width = (length + length % 2 for length in read_image(frames[0]).shape[:2])
    unfinished = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    rate = rate if 0 < rate < math.inf else DEFAULT_RATE
    writer = cv2.VideoWriter(str(unfinished), cv2.VideoWriter_fourcc(*CODEC), rate, (width, height))
    try:
        if not writer.isOpened():
            raise InputError(
                f"{target}: OpenCV cannot write {CODEC} videos of {width}x{height} pixels here; "
                "give an .mp4 file or install a build of OpenCV with FFmpeg"
            )
        for frame in tqdm(frames, desc=f"write {target.name}", unit="frame", leave=False):
            image = cv2.cvtColor(read_image(frame), cv2.COLOR_RGB2BGR)
            bottom, right = height - image.shape[0], width - image.shape[1]
            writer.write(
                cv2.copyMakeBorder(image, top=0, bottom=bottom, left=0, right=right, borderType=cv2.BORDER_REPLICATE)
            )
        writer.release()
        _check_complete(unfinished, target, len(frames))
        os.replace(unfinished, target)
    finally:
        writer.release()
        unfinished.unlink(missing_ok=True)


def _check_complete(path, target, n_frames):
    """Raise InputError unless the video has `n_frames` frames: OpenCV does not report that a disk is full."""
    clip = cv2.VideoCapture(str(path))
    written = 0
    while clip.grab():
        written += 1
    clip.release()
    if written < n_frames:
        raise InputError(
            f"{target}: only {written} of {n_frames} frames could be written; free some disk space and try again"
        )
