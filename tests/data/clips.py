"""Clips for the tests: small videos with the properties a test needs, and what a video holds."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")

# Weights of red and blue in the luma of BT.709, BT.601 and SMPTE 240M, by the number of the matrix in ITU-T H.273.
LUMA = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087)}


def write_clip(path, frames, codec="ffv1", pix_fmt="yuv444p", times=None, rate=25, time_base=None, sound=None, **tags):
    """Write arrays, or frames of av, as a video; ffv1 is lossless. times: in units of time_base."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=rate)
        context = video.codec_context
        first = frames[0]
        height, width = (first.height, first.width) if isinstance(first, av.VideoFrame) else first.shape[:2]
        context.height, context.width, context.pix_fmt = height, width, pix_fmt
        context.time_base = Fraction(time_base or Fraction(1, rate))
        for name, value in tags.items():
            setattr(context, name, value)
        track = add_sound(container, *sound) if sound else None
        for index, image in enumerate(frames):
            frame = image if isinstance(image, av.VideoFrame) else av.VideoFrame.from_ndarray(image)
            frame.pts, frame.time_base = (times or range(len(frames)))[index], context.time_base
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if track:
            write_sound(container, track, seconds=len(frames) / rate)
    return Path(path)


def add_sound(container, codec, layout="mono"):
    """Add a stream of sound to an open container."""
    track = container.add_stream(codec, rate=44100)
    track.codec_context.layout, track.codec_context.bit_rate = layout, 64000
    return track


def write_sound(container, track, seconds):
    """Encode a tone."""
    context = track.codec_context
    wave = np.sin(np.arange(int(44100 * seconds)) / 20)
    resampler = av.AudioResampler(context.format, context.layout, 44100, frame_size=context.frame_size or 1024)
    frame = av.AudioFrame.from_ndarray((wave * 20000).astype(np.int16)[None], "s16", "mono")
    frame.sample_rate, frame.pts, frame.time_base = 44100, 0, Fraction(1, 44100)
    for part in [*resampler.resample(frame), None]:
        container.mux(track.encode(part))


def flat_yuv(values, pix_fmt="yuv444p", size=(48, 64)):
    """A frame of one color, given as 8-bit (Y, U, V)."""
    frame = av.VideoFrame(size[1], size[0], pix_fmt)
    for plane, value in zip(frame.planes, values, strict=True):
        plane.update(np.full(plane.buffer_size, value, np.uint8).tobytes())
    return frame


def to_yuv(rgb, matrix, full_range=False):
    """The formula of BT.601 and BT.709: 8-bit RGB -> Y, U, V, not rounded."""
    kr, kb = LUMA[matrix]
    red, green, blue = np.array(rgb) / 255
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = np.array([(blue - luma) / 2 / (1 - kb), (red - luma) / 2 / (1 - kr)])
    if full_range:
        return np.array([255 * luma, *(128 + 255 * chroma)])
    return np.array([16 + 219 * luma, *(128 + 224 * chroma)])


class Content:
    """What a video file holds, decoded."""

    def __init__(self, path):
        with av.open(str(path)) as container:
            self.video = video = container.streams.video[0]
            self.codec, self.pix_fmt = video.codec_context.name, video.pix_fmt
            self.aspect = video.sample_aspect_ratio
            self.sound, self.frames = [], []
            for packet in container.demux():
                if packet.stream.type == "video":
                    self.frames += packet.decode()
                elif packet.size:
                    self.sound.append((float(packet.pts * packet.time_base), bytes(packet)))
            self.duration = container.duration / av.time_base
        first = self.frames[0]
        self.tags = (first.colorspace, first.color_range, first.color_primaries, first.color_trc)
        self.times = [frame.pts * frame.time_base for frame in self.frames]

    @property
    def size(self):
        """(height, width)"""
        return self.frames[0].height, self.frames[0].width

    def planes(self, index=0):
        """The Y, U and V planes of a frame, without padding."""
        frame = self.frames[index]
        return [
            np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
            for plane in frame.planes
        ]

    def luma(self):
        """The mean luma of each frame."""
        return [float(self.planes(index)[0].mean()) for index in range(len(self.frames))]
