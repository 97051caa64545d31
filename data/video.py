"""Upscale a video frame by frame, so that memory use does not grow with its length."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.clip import ClipInfo, ClipReader, ClipWriter, SoundError
from data.image import read_image, write_png
from picture import to_colors
from utility import logger, progress_bar


def upscale_video(
    upscale: Callable[[np.ndarray], np.ndarray],
    info: ClipInfo,
    target: Path,
    *,
    scale: int,
    n_colors: int = 3,
    key: str = "",
) -> int:
    """Upscale a video to `target`, an MP4 file with the same times of frames, pixel shape, colors and sound.

    Rotated videos are turned upright. Codecs halve the resolution of colors, so the last row or column of a frame of
    odd size is repeated.

    Finished frames are kept as PNG files in a folder next to `target` until the video is complete. After an
    interruption, another call with the same `key` resumes after the last finished frame.

    Args:
        upscale: uint8 (H, W, n_colors) -> uint8 (scale H, scale W, n_colors)
        info: the video, see data.clip.read_info
        n_colors: 1 (gray) or 3 (RGB)
        key: a digest of all that the frames depend on: the video, the weights, options

    Returns:
        the number of frames

    Raises:
        InputError: `target` cannot be written
    """
    if info.is_interlaced:
        logger.warning(f"{info.path}: is interlaced, and the result will show it; deinterlace it first")
    frames = target.with_name(f"frames-{key[:16]}")
    frames.mkdir(exist_ok=True)
    unfinished = frames / f"{os.getpid()}.tmp"

    def write(with_sound):
        with (
            ClipReader(info.path, with_sound) as clip,
            contextlib.closing(ClipWriter(unfinished, target, info, scale=scale, sound=clip.sound)) as writer,
        ):
            return _upscale_frames(upscale, clip, writer, frames=frames, n_colors=n_colors)

    try:
        count = _with_sound_if_possible(write, info.path)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds finished frames
            frames.rmdir()
    shutil.rmtree(frames)
    return count


def _with_sound_if_possible(write, path):
    try:
        return write(with_sound=True)
    except SoundError:
        logger.warning(f"{path}: MP4 files cannot hold its sound, so the result is silent")
        return write(with_sound=False)  # frames that are finished are not upscaled again


def _upscale_frames(upscale, clip: ClipReader, writer: ClipWriter, frames, n_colors):
    """Write all frames and the sound of the clip, and keep the frames as <index>.png. Returns the number of frames."""
    count = 0
    with progress_bar(total=writer.info.n_frames or None, desc=clip.path.name, unit="frame") as bar:
        for item in clip:
            if isinstance(item, clip.av.Packet):
                clip.n_damaged += not writer.copy(item)
                continue
            finished = frames / f"{count:06}.png"
            if not finished.exists():
                write_png(finished, upscale(to_colors(writer.info.to_rgb(item), n_colors)))
            writer.write(read_image(finished), item)
            count += 1
            bar.update()
    writer.finish()
    clip.log_damage()
    return count
