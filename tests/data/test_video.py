import importlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data import video
from data.video import upscale_video
from main import main
from program import InputError


def write_clip(path, count=7, size=(24, 32), rate=12.5):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, size[::-1])
    for index in range(count):
        writer.write(np.full((*size, 3), 20 + 25 * index, np.uint8))
    writer.release()


def read_clip(path):
    clip = cv2.VideoCapture(str(path))
    rate, frames = clip.get(cv2.CAP_PROP_FPS), []
    while (found := clip.read())[0]:
        frames.append(found[1])
    return rate, np.array(frames)


def doubled(image):
    return image.repeat(2, axis=0).repeat(2, axis=1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.mp4")
    return tmp_path


@pytest.mark.parametrize("n_colors", [1, 3])
def test_every_frame_is_upscaled_in_order(folder, n_colors):
    assert upscale_video(doubled, folder / "clip.mp4", folder / "out.mp4", n_colors) == 7
    rate, frames = read_clip("out.mp4")
    assert rate == 12.5
    assert frames.shape == (7, 48, 64, 3)
    assert frames.mean(axis=(1, 2, 3)) == pytest.approx(
        read_clip("clip.mp4")[1].mean(axis=(1, 2, 3)), abs=6
    )  # the codec is lossy
    assert sorted(path.name for path in folder.iterdir()) == ["clip.mp4", "out.mp4"]


@pytest.mark.parametrize("n_colors", [1, 3])
def test_frames_are_passed_as_gray_or_rgb_arrays(folder, n_colors):
    writer = cv2.VideoWriter("red.avi", cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    writer.write(np.full((48, 64, 3), (0, 0, 200), np.uint8))  # BGR
    writer.release()
    seen = []

    def upscale(image):
        seen.append(image)
        return doubled(image)

    upscale_video(upscale, folder / "red.avi", folder / "out.mp4", n_colors)
    (image,) = seen
    assert isinstance(image, np.ndarray)
    assert image.dtype == np.uint8
    assert image.shape == (48, 64, n_colors)
    red, gray = (200, 0, 0), (0.299 * 200,)
    assert image.mean(axis=(0, 1)) == pytest.approx(red if n_colors == 3 else gray, abs=4)


def test_odd_sizes_are_padded(folder):
    write_clip("odd.mp4", count=2, size=(24, 32))

    def cut(image):
        return image[:23, :31]

    upscale_video(cut, folder / "odd.mp4", folder / "out.mp4")
    assert read_clip("out.mp4")[1].shape == (2, 24, 32, 3)


def test_interrupted_videos_are_resumed(folder):
    seen = []

    def interrupted(image):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(image)
        return doubled(image)

    with pytest.raises(KeyboardInterrupt):
        upscale_video(interrupted, folder / "clip.mp4", folder / "out.mp4", key=b"weights")
    assert not (folder / "out.mp4").exists()
    seen = [None] * 4  # past the interruption: the next calls finish
    upscale_video(interrupted, folder / "clip.mp4", folder / "out.mp4", key=b"weights")
    assert len(seen) == 4 + 4
    upscale_video(doubled, folder / "clip.mp4", folder / "whole.mp4")
    assert np.array_equal(read_clip("out.mp4")[1], read_clip("whole.mp4")[1])


def test_frames_of_other_weights_are_not_reused(folder):
    def fails_at_once(image):
        raise KeyboardInterrupt

    calls = []

    def counted(image):
        calls.append(image)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return doubled(image)

    for upscale in (counted, fails_at_once):
        with pytest.raises(KeyboardInterrupt):
            upscale_video(upscale, folder / "clip.mp4", folder / "out.mp4", key=b"some")
    calls.clear()
    calls += [None] * 2
    upscale_video(counted, folder / "clip.mp4", folder / "out.mp4", key=b"others")
    assert len(calls) == 2 + 7


def test_videos_are_upscaled_from_the_command_line(folder, tiny):
    torch.save(tiny.state_dict(), "weights.pt")
    line = "--data_test video --dir_demo clip.mp4 --pre_train weights.pt --test_only --save_results --save v --cpu"
    assert main(line.split()) == 0
    target = Path("experiment/v/results-video-x2/clip_x2_SR.mp4")
    assert read_clip(str(target))[1].shape == (7, 48, 64, 3)
    before, made = target.read_bytes(), target.stat().st_mtime_ns
    assert main(line.replace("clip.mp4", "./clip.mp4").split()) == 0
    assert target.stat().st_mtime_ns == made  # not done again
    write_clip("clip.avi", count=3)
    for other in (line.replace("clip.mp4", "clip.avi"), f"{line} --self_ensemble"):
        with pytest.raises(InputError, match=r"clip_x2_SR\.mp4: already exists, made from another input, .*--reset"):
            main(other.split())
    assert target.read_bytes() == before
    write_clip("second.mp4", count=2)
    assert main(line.replace("clip.mp4", "second.mp4").split()) == 0
    assert main([*line.replace("clip.mp4", "clip.avi").split(), "--reset"]) == 0
    assert len(read_clip(str(target))[1]) == 3
    assert target.with_name("second_x2_SR.mp4").exists()  # of another clip


def test_a_result_can_be_upscaled_again_and_is_not_lost(folder, tiny):
    torch.save(tiny.state_dict(), "weights.pt")
    line = "--data_test video --pre_train weights.pt --test_only --save v --cpu --dir_demo"
    results = Path("experiment/v/results-video-x2")
    main(f"{line} clip.mp4".split())
    before = (results / "clip_x2_SR.mp4").read_bytes()
    for _ in range(2):
        assert main(f"{line} {results}/clip_x2_SR.mp4 --reset".split()) == 0
    assert (results / "clip_x2_SR.mp4").read_bytes() == before
    Path("link").mkdir()
    Path("link/clip.mp4").symlink_to(Path(results / "clip_x2_SR.mp4").resolve())
    with pytest.raises(InputError, match=r"would overwrite link/clip\.mp4, which this call reads"):
        main(f"{line} link/clip.mp4 --reset".split())
    assert (results / "clip_x2_SR.mp4").read_bytes() == before


@pytest.mark.parametrize(("name", "problem"), [("absent.mp4", "no such file"), (".", "is a folder; give a video")])
def test_a_path_that_is_no_file_is_named(folder, tiny, name, problem):
    torch.save(tiny.state_dict(), "weights.pt")
    with pytest.raises(InputError, match=problem) as error:
        main(f"--data_test video --dir_demo {name} --pre_train weights.pt --test_only --save v --cpu".split())
    assert error.value.argument == "dir_demo"
    assert not Path("experiment").exists()


def test_truncated_videos_are_reported(folder, caplog):
    writer = cv2.VideoWriter("long.avi", cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for _ in range(9):
        writer.write(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    writer.release()
    content = (folder / "long.avi").read_bytes()
    (folder / "long.avi").write_bytes(content[: len(content) // 2])
    count = upscale_video(doubled, folder / "long.avi", folder / "out.mp4")
    assert 0 < count < 9
    assert f"only {count} of 9 frames could be decoded" in caplog.text


def test_leftovers_are_removed_once_a_video_is_complete(folder):
    (folder / ".out.mp4.0badcafe").mkdir()
    (folder / ".out.1.tmp.mp4").touch()
    upscale_video(doubled, folder / "clip.mp4", folder / "out.mp4")
    assert sorted(path.name for path in folder.iterdir()) == ["clip.mp4", "out.mp4"]


def test_unreadable_videos_and_unwritable_targets_are_reported(folder):
    (folder / "text.mp4").write_text("broken")
    write_clip(folder / "empty.mp4", count=0)
    for name, problem in (
        ("text.mp4", "not a video that OpenCV can read; give a video file"),
        ("empty.mp4", "no(t a video that OpenCV can read| frame of it can be decoded); "),
        ("absent.mp4", "not a video that OpenCV can read; give a video file"),
    ):
        with pytest.raises(InputError, match=f"{name}: {problem}"):
            upscale_video(doubled, folder / name, folder / "out.mp4")
    assert {path.name for path in folder.iterdir()} == {"clip.mp4", "text.mp4", "empty.mp4"}
    with pytest.raises(InputError, match=r"out\.xyz: OpenCV cannot write mp4v videos of 64x48 pixels here; "):
        upscale_video(doubled, folder / "clip.mp4", folder / "out.xyz")


def test_incomplete_videos_are_not_kept(folder, monkeypatch):
    class Full:  # not a subclass: OpenCV's types crash Python's garbage collector when subclassed
        def __init__(self, *args):
            self.writer, self.written = writer(*args), 0

        def write(self, frame):
            self.written += 1
            if self.written < 5:
                self.writer.write(frame)

        def isOpened(self):  # noqa: N802
            return self.writer.isOpened()

        def release(self):
            self.writer.release()

    writer = cv2.VideoWriter
    monkeypatch.setattr(cv2, "VideoWriter", Full)
    with pytest.raises(InputError, match="only 4 of 7 frames could be written; free some disk space"):
        upscale_video(doubled, folder / "clip.mp4", folder / "out.mp4")
    assert not (folder / "out.mp4").exists()


def test_builds_of_opencv_without_log_levels_are_supported(monkeypatch):
    monkeypatch.delattr(cv2, "setLogLevel", raising=False)
    importlib.reload(video)
