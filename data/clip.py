"""Video files, read and written with PyAV: frames as RGB arrays with their times, and sound, which is copied.

Colors are numbered as in ITU-T H.273, like in the files themselves.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from program import InputError
from utility import logger

if TYPE_CHECKING:  # the package is optional, because only videos need it
    import av

OLDEST_PYAV = 17
BT709, BT601, BT2020 = 1, 6, 9
UNKNOWN = (0, 2, 3)  # primaries and transfer then get the number of the matrix: browsers ignore incomplete tags
BT470_TRANSFERS = {5: 6}  # the one exception, BT.601 at 25 frames per second
# Number in the file -> in PyAV: BT.709, FCC, BT.601 (two numbers), SMPTE 240M.
SWSCALE_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7}
HDR_TRANSFERS = (16, 18)  # PQ and HLG
LIMITED, FULL = 1, 2  # luma 16...235 or 0...255
# Flags of FFmpeg's scaler, which PyAV 17 does not name: bicubic, rounded, chroma interpolated when read and written.
EXACT_CONVERSION = 0x4 | 0x40000 | 0x2000 | 0x4000
H264 = {"preset": "medium", "crf": "17", "rc-lookahead": "10"}  # visually lossless; looking farther takes memory
MPEG4 = {"qmin": "2", "qmax": "3"}
MPEG4_TICKS = 60000  # per second, at most; the format ends at 65535
DEFAULT_RATE = Fraction(25)  # frames per second if the file does not state it
MAX_MISSING = 0.5  # seconds at the end of a file; the durations that files state are not exact
NOT_VIDEOS = ("image2", "tty")  # FFmpeg's formats for images and text; more formats for images end with _pipe


def import_pyav(path: Path) -> Any:
    """Import the optional package av, to read the video `path`. Raises InputError if it is missing or too old."""
    try:
        import av
    except ImportError:
        raise InputError(f"{path}: videos need the av package, which is not installed; pip install av") from None
    if int(av.__version__.split(".")[0]) < OLDEST_PYAV:
        raise InputError(f"{path}: videos need version {OLDEST_PYAV} of the av package; pip install --upgrade av")
    return av


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipInfo:
    """What all frames of a video share."""

    path: Path
    stored_size: tuple[int, int]  # width, height
    stored_aspect: Fraction  # width of a pixel over its height
    turn: tuple[tuple[int, int], tuple[int, int]]  # ((a, b), (c, d)): stored (x, y) is shown at (a x + c y, b x + d y)
    matrix: int
    primaries: int
    transfer: int
    rate: Fraction  # frames per second, roughly
    time_base: Fraction  # seconds per unit of a frame's time
    start: Fraction  # seconds at which the file starts
    n_frames: int  # according to the file; 0 if it does not say
    is_interlaced: bool

    @property
    def is_transposed(self) -> bool:
        """Whether columns are shown as rows."""
        return abs(self.turn[0][1]) > abs(self.turn[0][0])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as shown."""
        return self.stored_size if self.is_transposed else self.stored_size[::-1]

    @property
    def aspect(self) -> Fraction:
        """Width of a pixel over its height as shown."""
        return 1 / self.stored_aspect if self.is_transposed else self.stored_aspect

    def to_rgb(self, frame: "av.VideoFrame") -> np.ndarray:
        """A decoded frame -> uint8 RGB (H, W, 3) as shown."""
        width, height = self.stored_size  # frames of another size, which some streams have, are scaled
        image = frame.reformat(
            width=width,
            height=height,
            format="rgb24",
            src_colorspace=SWSCALE_MATRICES.get(frame.colorspace, SWSCALE_MATRICES[self.matrix]),
            src_color_range=frame.color_range,
            dst_color_range=FULL,
            interpolation=EXACT_CONVERSION,
        ).to_ndarray()
        (a, b), (c, d) = self.turn
        if self.is_transposed:
            image, a, d = image.transpose(1, 0, 2), c, b
        return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


class ClipReader:
    """Reads a video file once: iteration gives its frames and the packets of its sound, in the order of the file.

    Damaged parts are left out and counted in `n_damaged`. Raises InputError if the file is not a video, or if PyAV is
    not installed.
    """

    def __init__(self, path: Path, with_sound: bool = False):
        self.path = path
        self.av = import_pyav(path)
        problem = InputError(f"{path}: not a video that PyAV can read; give a video file, e.g. clip.mp4")
        if not path.is_file():
            raise problem
        options = {"protocol_whitelist": "file"}  # a video may not refer to the network
        try:
            self.container = self.av.open(f"file:{path}", options=options, metadata_errors="replace")
        except (self.av.FFmpegError, ValueError):
            raise problem from None
        self.video = self.container.streams.best("video")
        if not self._holds_a_video():
            self.container.close()
            raise problem
        self.sound = [stream for stream in self.container.streams.audio if stream.codec_context] if with_sound else []
        self.start = Fraction(self.container.start_time or 0, self.av.time_base)
        self._end = Fraction(0)  # of what was read so far, in seconds
        self._n_frames = 0
        self.n_damaged = 0

    def _holds_a_video(self):
        format_name = self.container.format.name
        if self.video is None or format_name in NOT_VIDEOS or format_name.endswith("_pipe"):
            return False
        return not self.video.disposition & self.av.stream.Disposition.attached_pic  # the cover of a piece of music

    def __enter__(self) -> "ClipReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def __iter__(self) -> Iterator["av.VideoFrame | av.Packet"]:
        try:
            for packet in self.container.demux(self.video, *self.sound):
                if packet.pts is not None:
                    end = (packet.pts + (packet.duration or 0)) * packet.time_base
                    self._end = max(self._end, end - self.start)
                if packet.stream is self.video:
                    yield from self._decode(packet)
                elif packet.dts is not None:
                    yield packet
        except self.av.FFmpegError:  # the rest of the file cannot be read
            self.n_damaged += 1
            yield from self._decode(None)

    def _decode(self, packet):
        try:
            frames = self.video.codec_context.decode(packet)
        except self.av.FFmpegError:
            self.n_damaged += 1
            return
        for frame in frames:
            self._n_frames += 1
            self.n_damaged += frame.is_corrupt
            yield frame

    def log_damage(self) -> None:
        """Log one line if parts of the file could not be read."""
        end, stated = float(self._end), float(Fraction(self.container.duration or 0, self.av.time_base))
        if self.n_damaged:
            of = f" of {self.video.frames}" if self.video.frames else ""
            logger.warning(f"{self.path}: is damaged; {self._n_frames}{of} frames could be decoded")
        elif end < stated - MAX_MISSING:
            logger.warning(
                f"{self.path}: ends after {end:.1f} of {stated:.1f} s, so it may be cut off; "
                f"{self._n_frames} frames could be decoded"
            )


def read_info(path: Path) -> ClipInfo:
    """What the first frame of a video tells.

    Raises InputError if `path` is not a video, if none of its frames can be decoded, or if it has colors that 8 bits of
    RGB cannot hold (HDR).
    """
    with ClipReader(path) as clip:
        frame = next((item for item in clip if isinstance(item, clip.av.VideoFrame)), None)
        if frame is None:
            raise InputError(f"{path}: no frame of it can be decoded; convert or replace the video")
        matrix = _matrix(frame)
        is_wide = frame.color_trc in HDR_TRANSFERS or frame.color_primaries == BT2020
        if is_wide or matrix not in SWSCALE_MATRICES:
            raise InputError(f"{path}: has HDR or wide-gamut colors; convert it to BT.709 first, e.g. with ffmpeg")
        return ClipInfo(
            path=path,
            stored_size=(frame.width, frame.height),
            stored_aspect=clip.video.sample_aspect_ratio or clip.video.codec_context.sample_aspect_ratio or Fraction(1),
            turn=_turn(frame),
            matrix=matrix,
            primaries=matrix if frame.color_primaries in UNKNOWN else frame.color_primaries,
            transfer=BT470_TRANSFERS.get(matrix, matrix) if frame.color_trc in UNKNOWN else frame.color_trc,
            rate=clip.video.guessed_rate or DEFAULT_RATE,
            time_base=clip.video.time_base,
            start=clip.start,
            n_frames=clip.video.frames,
            is_interlaced=frame.interlaced_frame,
        )


def _matrix(frame):
    """The matrix between RGB and YUV, as players assume it if the file does not say."""
    if frame.format.is_rgb:
        return BT709  # of the result
    if frame.colorspace not in UNKNOWN:
        return frame.colorspace
    return BT709 if frame.width >= 1280 or frame.height > 576 else BT601


def _turn(frame):
    """How the frame is rotated or mirrored, see `ClipInfo.turn`."""
    matrix = None
    with contextlib.suppress(ValueError):  # there is other data with the frame, of a kind that PyAV does not know
        matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return (1, 0), (0, 1)
    (a, b, _), (c, d, _), _ = np.frombuffer(matrix, np.int32).reshape(3, 3).tolist()
    return (a, b), (c, d)


# ---- writing ---------------------------------------------------------------------------------------------------------


class SoundError(Exception):
    """An MP4 file cannot hold this sound: the codec does not fit, or the sound is damaged."""


class ClipWriter:
    """Writes an MP4 file `path` with the colors and the pixel shape of a video: H.264, or MPEG-4 without libx264.

    sound: streams of another file, whose packets are going to be copied
    Raises InputError about `target` if frames of this size cannot be encoded or the file cannot be written. Any method
    may raise SoundError.
    """

    def __init__(self, path: Path, target: Path, info: ClipInfo, scale: int, sound: Sequence["av.AudioStream"] = ()):
        self.av = import_pyav(target)
        self.target, self.info = target, info
        self.height, self.width = (scale * length + scale * length % 2 for length in info.size)  # chroma has half of it
        self._last, self._next = -1, 0  # times of the last frame, and of one that has none
        self._last_sound = {}  # by track
        self.has_sound = bool(sound)
        with self._reporting():
            self.container = self.av.open(str(path), "w", format="mp4", container_options={"movflags": "faststart"})
        try:
            self.video = self._add_video()
            with self._reporting():
                self.tracks = {stream.index: self.container.add_stream_from_template(stream) for stream in sound}
                self.container.start_encoding()
        except BaseException:
            self.close()
            raise

    def _add_video(self):
        has_x264 = "libx264" in self.av.codecs_available
        codec, options = ("libx264", H264) if has_x264 else ("mpeg4", MPEG4)
        video = self.container.add_stream(codec, rate=self.info.rate, options=options)
        context = video.codec_context
        context.width, context.height, context.pix_fmt = self.width, self.height, "yuv420p"
        context.sample_aspect_ratio = self.info.aspect
        context.time_base = self.info.time_base
        if not has_x264 and context.time_base.denominator > MPEG4_TICKS:
            context.time_base = Fraction(1, MPEG4_TICKS)
        context.colorspace, context.color_range = self.info.matrix, LIMITED
        context.color_primaries, context.color_trc = self.info.primaries, self.info.transfer
        try:
            context.open()
        except self.av.FFmpegError:
            raise InputError(
                f"{self.target}: {codec} cannot encode {self.width}x{self.height} pixels; use a smaller video or scale"
            ) from None
        return video

    def write(self, image: np.ndarray, source: "av.VideoFrame") -> None:
        """Append the upscaled image of a frame, uint8 RGB (H, W, 3), at the time of that frame."""
        bottom, right = self.height - image.shape[0], self.width - image.shape[1]
        image = np.pad(image, ((0, bottom), (0, right), (0, 0)), mode="edge")
        frame = self.av.VideoFrame.from_ndarray(image, "rgb24").reformat(
            format="yuv420p",
            dst_colorspace=SWSCALE_MATRICES[self.info.matrix],
            src_color_range=FULL,
            dst_color_range=LIMITED,
            interpolation=EXACT_CONVERSION,
        )
        time_base = self.video.codec_context.time_base
        step = round((source.duration * source.time_base if source.duration else 1 / self.info.rate) / time_base)
        time = self._next
        if source.pts is not None:
            time = round((source.pts * source.time_base - self.info.start) / time_base)
        self._last = max(time, self._last + 1)  # times increase, even if the file is damaged and its times do not
        self._next = self._last + step
        frame.pts, frame.duration, frame.time_base = self._last, step, time_base
        self._encode(frame)

    def copy(self, packet: "av.Packet") -> bool:
        """Append a packet of sound, unless it is damaged. Returns whether it was appended."""
        track = self.tracks[packet.stream_index]
        if None in (packet.pts, packet.dts) or packet.dts <= self._last_sound.get(track, -math.inf):
            return False
        self._last_sound[track] = packet.dts
        offset = round(self.info.start / packet.time_base)
        packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, track
        with self._reporting():
            try:
                self.container.mux(packet)
            except self.av.error.InvalidDataError:
                return False
        return True

    def finish(self) -> None:
        """Write everything that is left."""
        self._encode(None)
        with self._reporting():
            self.container.close()

    def close(self) -> None:
        """Close the file, finished or not."""
        with contextlib.suppress(Exception):  # what cannot be written now was reported, or is thrown away
            self.container.close()

    def _encode(self, frame):
        with self._reporting():
            self.container.mux(self.video.encode(frame))

    @contextlib.contextmanager
    def _reporting(self):
        try:
            yield
        except (self.av.FFmpegError, ValueError) as error:
            if self.has_sound and isinstance(error, ValueError):  # OSError is about the file
                raise SoundError from error
            reason = getattr(error, "strerror", error)
            raise InputError(
                f"{self.target}: cannot be written: {reason}; free some disk space and try again"
            ) from None
