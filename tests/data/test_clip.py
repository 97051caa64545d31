import base64
import re
import socket
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.clip import ClipReader, ClipWriter, SoundError, read_info
from program import InputError
from tests.data.clips import LUMA, Content, av, flat_yuv, to_yuv, write_clip, write_sound

COLORS = [(200, 60, 40), (0, 0, 0), (255, 255, 255), (20, 180, 240), (128, 128, 128)]


def flat(color=(90, 90, 90), size=(48, 64)):
    return np.full((*size, 3), color, np.uint8)


def noise(count, size=(48, 64)):
    return list(np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8))


def copy_clip(source, target, scale=1):
    """Read a video and write it, enlarged with nearest neighbors."""
    info = read_info(source)
    with ClipReader(source, with_sound=True) as clip:
        writer = ClipWriter(target, target, info, scale=scale, sound=clip.sound)
        for item in clip:
            if isinstance(item, av.Packet):
                writer.copy(item)
            else:
                writer.write(info.to_rgb(item).repeat(scale, axis=0).repeat(scale, axis=1), item)
        writer.finish()
        clip.log_damage()
    return Content(target)


def first_image(path):
    info = read_info(path)
    with ClipReader(path) as clip:
        return info.to_rgb(next(iter(clip)))


# ---- colors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", LUMA)
def test_colors_are_read_with_the_matrix_and_range_of_the_file(tmp_path, matrix, full_range):
    for color in COLORS:
        yuv = to_yuv(color, matrix, full_range).round().clip(0, 255)
        path = tmp_path / "a.mkv"
        write_clip(path, [flat_yuv(yuv)], colorspace=matrix, color_range=2 if full_range else 1)
        assert first_image(path).astype(int) == pytest.approx(flat(color).astype(int), abs=2)  # YUV has 8 bits, too


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p10le", "gray", "bgr0", "gbrp10le"])
def test_colors_are_read_in_every_layout(tmp_path, pix_fmt):
    image = flat((120, 120, 120) if pix_fmt == "gray" else (200, 60, 40))
    limits = 2 if "b" in pix_fmt else 1  # RGB has the full range
    frame = av.VideoFrame.from_ndarray(image)
    frame = frame.reformat(format=pix_fmt, dst_colorspace=5, src_color_range=2, dst_color_range=limits)
    path = write_clip(tmp_path / "a.mkv", [frame], pix_fmt=pix_fmt, color_range=limits)
    assert first_image(path).astype(int) == pytest.approx(image.astype(int), abs=2)


@pytest.mark.parametrize(("size", "matrix"), [((48, 64), 6), ((576, 720), 6), ((720, 960), 1), ((48, 1280), 1)])
def test_videos_that_do_not_name_a_matrix_are_read_as_players_do(tmp_path, size, matrix):
    path = write_clip(tmp_path / "a.mkv", [flat_yuv(to_yuv((200, 60, 40), matrix).round(), size=size)])
    assert first_image(path)[0, 0].tolist() == pytest.approx([200, 60, 40], abs=2)
    assert copy_clip(path, tmp_path / "b.mp4").tags == (matrix, 1, matrix, matrix)


@pytest.mark.parametrize("matrix", LUMA)
def test_results_have_the_colors_of_the_video_and_say_which(tmp_path, matrix):
    for color in COLORS:
        yuv = to_yuv(color, matrix, full_range=True).round().clip(0, 255)
        tags = {"colorspace": matrix, "color_range": 2, "color_primaries": 5, "color_trc": 4}
        path = write_clip(tmp_path / "a.mkv", [flat_yuv(yuv)], **tags)
        result = copy_clip(path, tmp_path / "b.mp4")
        assert result.tags == (matrix, 1, 5, 4)
        for plane, wanted in zip(result.planes(), to_yuv(color, matrix), strict=True):
            assert plane.mean() == pytest.approx(wanted, abs=2)


@pytest.mark.parametrize("tags", [{"color_trc": 16}, {"color_trc": 18}, {"color_primaries": 9}, {"colorspace": 9}])
def test_hdr_is_refused(tmp_path, tags):
    path = write_clip(tmp_path / "a.mkv", [flat_yuv((100, 128, 128))], **tags)
    with pytest.raises(InputError, match=r"a\.mkv: has HDR or wide-gamut colors; convert it to BT\.709 first"):
        read_info(path)


def test_interlaced_videos_are_known(tmp_path):
    path = write_clip(tmp_path / "a.mkv", noise(2), codec="mpeg4", pix_fmt="yuv420p", flags=1 << 18 | 1 << 29)
    assert read_info(path).is_interlaced
    assert not read_info(write_clip(tmp_path / "b.mkv", noise(2))).is_interlaced


# ---- shape -----------------------------------------------------------------------------------------------------------


def turned(path, matrix):
    """Set the display matrix ((a, b), (c, d)) of an MP4 file."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    (a, b), (c, d) = matrix
    values = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    content[start : start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(content)


@pytest.mark.parametrize("across", [1, -1])
@pytest.mark.parametrize("down", [1, -1])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_rotated_and_mirrored_videos_are_turned_upright(tmp_path, across, down, is_transposed):
    image = np.zeros((48, 64, 3), np.uint8)
    image[:16, :16] = 250
    image[32:, :16] = 120
    path = write_clip(tmp_path / "a.mp4", [image], codec="mpeg4", pix_fmt="yuv420p")
    turned(path, ((0, down), (across, 0)) if is_transposed else ((across, 0), (0, down)))
    wanted = image.transpose(1, 0, 2) if is_transposed else image
    wanted = wanted[::down, ::across]
    found = first_image(path)
    assert found.shape == wanted.shape
    assert abs(found.astype(int) - wanted).mean() < 8  # the codec is lossy
    assert copy_clip(path, tmp_path / "b.mp4", scale=2).size == (2 * wanted.shape[0], 2 * wanted.shape[1])


def test_a_phone_held_upright_turns_the_picture_clockwise(tmp_path):
    image = np.zeros((48, 64, 3), np.uint8)
    image[:16, :16] = 250
    path = write_clip(tmp_path / "a.mp4", [image], codec="mpeg4", pix_fmt="yuv420p", sample_aspect_ratio=Fraction(4, 3))
    turned(path, ((0, 1), (-1, 0)))
    assert first_image(path)[:16, -16:].mean() > 230  # the upper left corner is now on the right
    assert copy_clip(path, tmp_path / "b.mp4").aspect == Fraction(3, 4)


@pytest.mark.parametrize("name", ["a.mp4", "a.avi"])  # AVI files have it in the frames alone
@pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(32, 27), Fraction(1)])
def test_the_shape_of_pixels_is_kept(tmp_path, name, aspect):
    path = write_clip(tmp_path / name, [flat()], codec="mpeg4", pix_fmt="yuv420p", sample_aspect_ratio=aspect)
    assert copy_clip(path, tmp_path / "b.mp4", scale=2).aspect == aspect


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (24, 31), (25, 32)])
def test_odd_sizes_are_padded_by_repeating_the_border(tmp_path, size):
    image = np.zeros((*size, 3), np.uint8)
    image[-1] = image[:, -1] = 200
    path = write_clip(tmp_path / "a.mkv", [image], pix_fmt="bgr0")
    result = copy_clip(path, tmp_path / "b.mp4", scale=3)
    height, width = 3 * size[0], 3 * size[1]
    assert result.size == (height + height % 2, width + width % 2)
    luma = result.planes()[0].astype(int)
    assert luma[-1].mean() == pytest.approx(luma[height - 1].mean(), abs=6)
    assert luma[:, -1].mean() == pytest.approx(luma[:, width - 1].mean(), abs=6)


def test_sizes_that_the_encoder_refuses_are_reported(tmp_path):
    path = write_clip(tmp_path / "a.mkv", [flat(size=(16, 8400))], pix_fmt="bgr0")
    with pytest.raises(InputError, match=r"out\.mp4: \w+ cannot encode 16800x32 pixels; use a smaller video or scale"):
        ClipWriter(tmp_path / "unfinished", tmp_path / "out.mp4", read_info(path), scale=2)


# ---- time ------------------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8), st.sampled_from([1000, 90000, 12800]))
def test_the_time_of_every_frame_is_kept(tmp_path_factory, gaps, ticks):
    folder = tmp_path_factory.mktemp("times")
    times = np.cumsum([0, *gaps]).tolist()
    write_clip(folder / "a.nut", noise(len(times), (16, 16)), pix_fmt="bgr0", times=times, time_base=Fraction(1, ticks))
    source = Content(folder / "a.nut")
    assert source.times == [Fraction(time, ticks) for time in times]
    assert copy_clip(folder / "a.nut", folder / "b.mp4").times == source.times


def test_the_last_frame_lasts_as_long_as_before(tmp_path):
    path = write_clip(tmp_path / "a.mkv", noise(5), pix_fmt="bgr0", rate=4)
    assert copy_clip(path, tmp_path / "b.mp4").duration == pytest.approx(5 / 4)


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(50)])
def test_files_without_times_have_a_constant_rate(tmp_path, rate):
    path = write_clip(tmp_path / "a.m4v", noise(6), codec="mpeg4", pix_fmt="yuv420p", rate=rate, time_base=1 / rate)
    times = copy_clip(path, tmp_path / "b.mp4").times
    assert [float(time) for time in times] == pytest.approx([index / rate for index in range(6)], abs=1e-4)


def test_videos_start_at_zero(tmp_path):
    path = write_clip(tmp_path / "a.ts", noise(4), codec="mpeg2video", pix_fmt="yuv420p", sound=["aac"])
    assert Content(path).times[0] > 0
    result = copy_clip(path, tmp_path / "b.mp4")
    assert min(float(result.times[0]), result.sound[0][0]) == pytest.approx(0, abs=1e-3)
    assert np.diff(result.times).astype(float) == pytest.approx([1 / 25] * 3, abs=1e-4)


# ---- sound -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "aac"), ("a.mkv", "aac"), ("a.mkv", "flac"), ("a.mkv", "ac3")])
def test_sound_is_copied(tmp_path, caplog, name, codec):
    path = write_clip(tmp_path / name, noise(10), codec="mpeg4", pix_fmt="yuv420p", sound=[codec])
    source, result = Content(path), copy_clip(path, tmp_path / "b.mp4")
    assert [content for _, content in result.sound] == [content for _, content in source.sound]
    offsets = [float(content.times[0]) - content.sound[0][0] for content in (source, result)]
    assert offsets[0] == pytest.approx(offsets[1], abs=2e-3)
    assert caplog.text == ""


def test_sound_that_mp4_cannot_hold_is_refused(tmp_path):
    path = write_clip(tmp_path / "a.wmv", noise(3), codec="wmv2", pix_fmt="yuv420p", sound=["wmav2"])
    with pytest.raises(SoundError):
        copy_clip(path, tmp_path / "b.mp4")


# ---- files -----------------------------------------------------------------------------------------------------------


def test_results_play_in_browsers(tmp_path):
    path = write_clip(tmp_path / "a.mkv", noise(3), pix_fmt="bgr0")
    result = copy_clip(path, tmp_path / "b.mp4")
    assert (result.codec, result.pix_fmt) == ("h264", "yuv420p")
    content = (tmp_path / "b.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # playback starts before the whole file is there


PLAY = """
const done = arguments[1], video = document.createElement("video"), canvas = document.createElement("canvas");
video.onerror = () => done(video.error.message);
video.onloadeddata = () => { video.currentTime = 0.1; };
const show = () => {
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    const context = canvas.getContext("2d");
    context.drawImage(video, 0, 0);
    const color = context.getImageData(50, 50, 1, 1).data;
    if (color[3] == 0) setTimeout(show, 10);  // the frame is not decoded yet
    else done([canvas.width, canvas.height, video.duration, ...color]);
};
video.onseeked = show;
video.src = "data:video/mp4;base64," + arguments[0];
"""


def test_a_browser_shows_the_right_shape_and_colors(tmp_path, browser):
    for matrix, size in ((1, (90, 160)), (6, (90, 160)), (1, (720, 1280)), (6, (720, 1280))):
        frame = flat_yuv(to_yuv((200, 60, 40), matrix).round(), size=size)
        path = tmp_path / "a.mp4"
        write_clip(path, [frame] * 5, "libx264", "yuv444p", colorspace=matrix, sample_aspect_ratio=Fraction(4, 3))
        copy_clip(path, tmp_path / "b.mp4")
        content = base64.b64encode((tmp_path / "b.mp4").read_bytes()).decode()
        shown = browser.execute_async_script(PLAY, content)
        assert shown == pytest.approx([round(size[1] * 4 / 3), size[0], 0.2, 200, 60, 40, 255], abs=3)


def test_without_an_h264_encoder_results_are_mpeg4(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    times = [0, 3003, 9000, 12003]
    path = write_clip(tmp_path / "a.nut", noise(4), pix_fmt="bgr0", times=times, time_base=Fraction(1, 90000))
    result = copy_clip(path, tmp_path / "b.mp4")
    assert result.codec == "mpeg4"
    assert [float(time) for time in result.times] == pytest.approx([time / 90000 for time in times], abs=2e-5)
    with pytest.raises(InputError, match="mpeg4 cannot encode 8192x6144 pixels"):
        ClipWriter(tmp_path / "unfinished", tmp_path / "out.mp4", read_info(path), scale=128)


@pytest.mark.parametrize("name", ["long.avi", "long.ts", "long.mkv"])
def test_videos_that_are_cut_off_are_named(tmp_path, caplog, name):
    codec, pix_fmt = ("mjpeg", "yuvj420p") if name == "long.avi" else ("mpeg2video", "yuv420p")
    path = write_clip(tmp_path / name, noise(50), codec=codec, pix_fmt=pix_fmt)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    count = len(copy_clip(path, tmp_path / "b.mp4").frames)
    assert 15 < count < 35
    problem = rf"is damaged; {count} |ends after \d\.\d of 2\.0 s, so it may be cut off; {count} frames could"
    assert re.search(rf"{path}: ({problem})", caplog.text)


def test_the_rest_of_a_damaged_video_is_read(tmp_path, caplog):
    path = write_clip(tmp_path / "a.mov", noise(30), codec="mjpeg", pix_fmt="yuvj420p")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    path.write_bytes(content)
    times = copy_clip(path, tmp_path / "b.mp4").times
    assert 20 < len(times) < 30
    assert times[-1] == Fraction(29, 25)
    assert f"{path}: is damaged; {len(times)} of 30 frames could be decoded" in caplog.text


def test_what_is_not_a_video_is_refused(tmp_path):
    (tmp_path / "text.mp4").write_text("broken")
    (tmp_path / "text.txt").write_text("words\n" * 99)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    with av.open(str(tmp_path / "image.png"), "w", format="image2") as container:
        stream = container.add_stream("png")
        stream.codec_context.height, stream.codec_context.width, stream.codec_context.pix_fmt = 48, 64, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(flat())))
    with av.open(str(tmp_path / "sound.m4a"), "w") as container:
        track = container.add_stream("aac")
        write_sound(container, track, seconds=1)
    with av.open(str(tmp_path / "cover.m4a"), "w", format="mp4") as container:
        cover, track = container.add_stream("mjpeg"), container.add_stream("aac")
        cover.codec_context.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame(640, 480, "yuvj420p")))
        write_sound(container, track, seconds=1)
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 7
    for name in [*names, "absent.mp4"]:
        with pytest.raises(InputError, match=f"{name}: not a video that PyAV can read; give a video file"):
            read_info(tmp_path / name)


def test_videos_without_frames_are_reported(tmp_path):
    path = write_clip(tmp_path / "a.avi", noise(2), codec="mjpeg", pix_fmt="yuvj420p")
    content = path.read_bytes()
    start = content.index(b"movi") + 12
    path.write_bytes(content[:start] + bytes(len(content) - start))
    with pytest.raises(InputError, match=r"a\.avi: no frame of it can be decoded; convert or replace the video"):
        read_info(path)


def test_playlists_do_not_reach_the_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        (tmp_path / "a.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{address}\n#EXT-X-ENDLIST\n")
        with pytest.raises(InputError, match=r"a\.m3u8: not a video"):
            read_info(tmp_path / "a.m3u8")
        with pytest.raises(BlockingIOError):
            server.accept()


def test_names_are_not_taken_for_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (write_clip(tmp_path / "a.mkv", [flat()], pix_fmt="bgr0")).rename(tmp_path / "http:a %d.mkv")
    assert read_info(Path("http:a %d.mkv")).size == (48, 64)


def test_a_missing_or_old_package_is_reported(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mkv", [flat()], pix_fmt="bgr0")
    monkeypatch.setattr(av, "__version__", "9.2.0")
    with pytest.raises(InputError, match=r"a\.mkv: videos need version 17 of the av package; pip install --upgrade av"):
        read_info(path)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"a\.mkv: videos need the av package, .* pip install av"):
        read_info(path)


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_full_disk_is_reported(tmp_path):
    import resource

    path = write_clip(tmp_path / "a.mkv", noise(90), pix_fmt="bgr0")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"b\.mp4: cannot be written: File too large; free some disk space"):
            copy_clip(path, tmp_path / "b.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
