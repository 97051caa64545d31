from pathlib import Path

import numpy as np
import pytest
import torch

from data.clip import read_info
from data.video import upscale_video
from main import main
from program import InputError
from tests.data.clips import Content, flat_yuv, write_clip


def make_clip(path, count=7, size=(24, 32), codec="ffv1"):
    """Flat frames that become brighter."""
    frames = [np.full((*size, 3), 20 + 25 * index, np.uint8) for index in range(count)]
    return write_clip(path, frames, codec, pix_fmt="bgr0" if codec == "ffv1" else "yuvj420p")


def doubled(image):
    return image.repeat(2, axis=0).repeat(2, axis=1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_clip(tmp_path / "clip.mkv")
    return tmp_path


def upscale(folder, function=doubled, clip="clip.mkv", **settings):
    return upscale_video(function, read_info(folder / clip), folder / "out.mp4", scale=2, **settings)


@pytest.mark.parametrize("n_colors", [1, 3])
def test_every_frame_is_upscaled_in_order(folder, n_colors):
    assert upscale(folder, n_colors=n_colors) == 7
    result = Content("out.mp4")
    assert result.size == (48, 64)
    assert result.luma() == pytest.approx([16 + 219 * (20 + 25 * index) / 255 for index in range(7)], abs=2)
    assert sorted(path.name for path in folder.iterdir()) == ["clip.mkv", "out.mp4"]


@pytest.mark.parametrize("n_colors", [1, 3])
def test_frames_are_passed_as_gray_or_rgb_arrays(folder, n_colors):
    write_clip("red.mkv", [np.full((48, 64, 3), (200, 0, 0), np.uint8)], pix_fmt="bgr0")
    seen = []

    def keep(image):
        seen.append(image)
        return doubled(image)

    upscale(folder, keep, "red.mkv", n_colors=n_colors)
    (image,) = seen
    assert isinstance(image, np.ndarray)
    assert image.dtype == np.uint8
    assert image.shape == (48, 64, n_colors)
    red, gray = (200, 0, 0), (0.299 * 200,)
    assert image.mean(axis=(0, 1)) == pytest.approx(red if n_colors == 3 else gray, abs=1)


def test_frames_that_change_their_size_are_scaled(folder):
    content = b""
    for size in [(24, 32), (48, 64), (24, 32)]:
        content += make_clip("part.mjpeg", 2, size, codec="mjpeg").read_bytes()
    (folder / "parts.mjpeg").write_bytes(content)
    shapes = []

    def keep(image):
        shapes.append(image.shape)
        return doubled(image)

    assert upscale(folder, keep, "parts.mjpeg") == 6
    assert shapes == [(24, 32, 3)] * 6


def test_sound_is_copied_or_named(folder, caplog):
    frames = [np.full((24, 32, 3), 90, np.uint8)] * 25
    for name, codec, sound in (("a.mkv", "mpeg4", "aac"), ("a.wmv", "wmv2", "wmav2")):
        write_clip(name, frames, codec=codec, pix_fmt="yuv420p", sound=[sound])
        assert upscale(folder, clip=name) == 25
        assert bool(Content("out.mp4").sound) == (name == "a.mkv")
    assert caplog.messages == [f"{folder / 'a.wmv'}: MP4 files cannot hold its sound, so the result is silent"]


def test_damaged_sound_is_left_out_and_named(folder, caplog):
    path = write_clip("a.ts", [np.full((24, 32, 3), 90, np.uint8)] * 25, "mpeg2video", "yuv420p", sound=["aac"])
    packets = Content(path).sound
    content = path.read_bytes()
    for _, packet in packets:  # as ADTS, each with its own header
        content = content.replace(packet[:2], b"\0\0")
    path.write_bytes(content)
    assert upscale(folder, clip="a.ts") == 25
    assert len(Content("out.mp4").sound) < len(packets)
    assert caplog.messages


# ---- interruptions ---------------------------------------------------------------------------------------------------


class Interrupted:
    """Upscales a number of frames, then stops as Ctrl-C does."""

    def __init__(self, count):
        self.left = count

    def __call__(self, image):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return doubled(image)


def test_interrupted_videos_are_resumed(folder):
    with pytest.raises(KeyboardInterrupt):
        upscale(folder, Interrupted(3), key="weights")
    assert not (folder / "out.mp4").exists()
    rest = Interrupted(4)
    assert upscale(folder, rest, key="weights") == 7
    assert rest.left == 0
    upscale_video(doubled, read_info(folder / "clip.mkv"), folder / "whole.mp4", scale=2)
    assert (folder / "out.mp4").read_bytes() == (folder / "whole.mp4").read_bytes()


def test_frames_of_other_weights_and_clips_are_neither_reused_nor_deleted(folder):
    make_clip(folder / "other.mkv", count=6)
    for clip, key in (("clip.mkv", "clip, some"), ("other.mkv", "other, others")):
        with pytest.raises(KeyboardInterrupt):
            upscale(folder, Interrupted(2), clip, key=key)
    all_of_them = Interrupted(7)
    upscale(folder, all_of_them, key="clip, others")
    assert all_of_them.left == 0
    for clip, key, count in (("clip.mkv", "clip, some", 7), ("other.mkv", "other, others", 6)):
        rest = Interrupted(count - 2)
        upscale(folder, rest, clip, key=key)
        assert rest.left == 0
    assert sorted(path.name for path in folder.iterdir()) == ["clip.mkv", "other.mkv", "out.mp4"]


def test_leftovers_of_killed_processes_are_removed(folder):
    with pytest.raises(KeyboardInterrupt):
        upscale(folder, Interrupted(2))
    (frames,) = folder.glob("frames-*")
    (frames / "1.tmp").touch()
    upscale(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["clip.mkv", "out.mp4"]


# ---- bad input -------------------------------------------------------------------------------------------------------


def not_called(image):
    raise AssertionError("no frame is to be upscaled")


def test_problems_are_found_before_any_work_and_leave_nothing(folder):
    (folder / "text.mkv").write_text("broken")
    write_clip("hdr.mkv", [flat_yuv((90, 128, 128))], color_trc=16)
    write_clip("wide.mkv", [np.zeros((16, 8400, 3), np.uint8)], pix_fmt="bgr0")
    before = sorted(folder.iterdir())
    for name, problem in (
        ("text.mkv", r"text\.mkv: not a video"),
        ("hdr.mkv", r"hdr\.mkv: has HDR"),
        ("wide.mkv", r"out\.mp4: \w+ cannot encode 16800x32 pixels; use a smaller video or scale"),
    ):
        with pytest.raises(InputError, match=problem):
            upscale(folder, not_called, name)
    assert sorted(folder.iterdir()) == before


def test_long_names_are_supported(folder):
    name = "n" * 245
    upscale_video(doubled, read_info(folder / "clip.mkv"), folder / f"{name}.mp4", scale=2)
    assert Content(f"{name}.mp4").size == (48, 64)


# ---- command line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def line(folder, tiny):
    torch.save(tiny.state_dict(), "weights.pt")
    return "--data_test video --dir_demo clip.mkv --pre_train weights.pt --test_only --save_results --save v --cpu"


RESULTS = Path("experiment/v/results-video-x2")


def test_videos_are_upscaled_from_the_command_line(line, capsys):
    target = RESULTS / "clip_x2_SR.mp4"
    assert main(line.split()) == 0
    assert len(Content(target).frames) == 7
    assert Content(target).size == (48, 64)
    assert capsys.readouterr().out.splitlines()[-1] == f"7 frames written to {target}"
    made = target.stat().st_mtime_ns
    assert main(line.replace("clip.mkv", "./clip.mkv").split()) == 0
    assert target.stat().st_mtime_ns == made  # not done again


def test_only_reset_replaces_the_result_of_another_video_or_of_other_options(line):
    target, second = RESULTS / "clip_x2_SR.mp4", RESULTS / "second_x2_SR.mp4"
    make_clip("clip.avi", count=3)
    make_clip("second.mkv", count=2)
    main(line.split())
    before = target.read_bytes()
    for other in (line.replace("clip.mkv", "clip.avi"), f"{line} --self_ensemble"):
        with pytest.raises(InputError, match=r"clip_x2_SR\.mp4: already exists, made from another input, .*--reset"):
            main(other.split())
    assert target.read_bytes() == before
    assert main(line.replace("clip.mkv", "second.mkv").split()) == 0
    assert main([*line.replace("clip.mkv", "clip.avi").split(), "--reset"]) == 0
    assert len(Content(target).frames) == 3
    assert len(Content(second).frames) == 2


def test_a_result_can_be_upscaled_again_and_is_not_lost(line):
    main(line.split())
    target = RESULTS / "clip_x2_SR.mp4"
    before = target.read_bytes()
    for _ in range(2):
        assert main([*line.replace("clip.mkv", str(target)).split(), "--reset"]) == 0
    assert Content(RESULTS / "clip_x2_SR_x2_SR.mp4").size == (96, 128)
    Path("link").mkdir()
    Path("link/clip.mp4").symlink_to(target.resolve())
    with pytest.raises(InputError, match=r"would overwrite link/clip\.mp4, which this call reads"):
        main([*line.replace("clip.mkv", "link/clip.mp4").split(), "--reset"])
    assert target.read_bytes() == before


def test_reset_keeps_the_result_if_the_video_is_broken(line):
    main(line.split())
    Path("clip.mkv").write_text("no video")
    with pytest.raises(InputError, match="not a video"):
        main([*line.split(), "--reset"])
    assert (RESULTS / "clip_x2_SR.mp4").exists()


def test_an_interlaced_video_is_named_once(line, capsys):
    frames = [np.full((24, 32, 3), 90, np.uint8)] * 2
    write_clip("clip.mkv", frames, codec="mpeg4", pix_fmt="yuv420p", flags=1 << 18 | 1 << 29)
    assert main(line.split()) == 0
    assert capsys.readouterr().out.count("clip.mkv: is interlaced, and the result will show it; deinterlace it") == 1


def test_a_name_too_long_for_a_result_is_refused_before_any_work(line):
    name = f"{'n' * 250}.mkv"
    Path("clip.mkv").rename(name)
    with pytest.raises(InputError, match="the name of its result would be too long; rename it"):
        main(line.replace("clip.mkv", name).split())
    assert not Path("experiment").exists()


@pytest.mark.parametrize(("name", "problem"), [("absent.mp4", "no such file"), (".", "is a folder; give a video")])
def test_a_path_that_is_no_file_is_named(line, name, problem):
    with pytest.raises(InputError, match=problem) as error:
        main(line.replace("clip.mkv", name).split())
    assert error.value.argument == "dir_demo"
    assert not Path("experiment").exists()


def test_results_can_be_upscaled_again(line):
    main(line.split())
    result = "experiment/v/results-video-x2/clip_x2_SR.mp4"
    assert main([*line.replace("clip.mkv", result).split(), "--reset"]) == 0
    assert Content("experiment/v/results-video-x2/clip_x2_SR_x2_SR.mp4").size == (96, 128)
    assert Path(result).exists()
