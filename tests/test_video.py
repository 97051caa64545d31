from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from main import main
from utility import InputError
from video import upscale_video


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


def doubled(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3), None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.mp4")
    return tmp_path


@pytest.mark.parametrize("n_colors", [1, 3])
def test_every_frame_comes_out_larger_in_its_place(folder, n_colors):
    assert upscale_video(doubled, folder / "clip.mp4", folder / "out.mp4", n_colors) == 7
    rate, frames = read_clip("out.mp4")
    assert rate == 12.5
    assert frames.shape == (7, 48, 64, 3)
    assert frames.mean(axis=(1, 2, 3)) == pytest.approx(
        read_clip("clip.mp4")[1].mean(axis=(1, 2, 3)), abs=6
    )  # the codec is lossy
    assert sorted(path.name for path in folder.iterdir()) == ["clip.mp4", "out.mp4"]


def test_an_odd_size_is_filled_up(folder):
    write_clip("odd.mp4", count=2, size=(24, 32))

    def cut(x):
        return x[..., :23, :31], None

    upscale_video(cut, folder / "odd.mp4", folder / "out.mp4")
    assert read_clip("out.mp4")[1].shape == (2, 24, 32, 3)


def test_an_interrupted_video_goes_on_where_it_was(folder):
    seen = []

    def interrupted(x):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(x)
        return doubled(x)

    with pytest.raises(KeyboardInterrupt):
        upscale_video(interrupted, folder / "clip.mp4", folder / "out.mp4", key=b"weights")
    assert not (folder / "out.mp4").exists()
    seen = [None] * 4  # as many calls are not interrupted now
    upscale_video(interrupted, folder / "clip.mp4", folder / "out.mp4", key=b"weights")
    assert len(seen) == 4 + 4
    upscale_video(doubled, folder / "clip.mp4", folder / "whole.mp4")
    assert np.array_equal(read_clip("out.mp4")[1], read_clip("whole.mp4")[1])


def test_frames_of_other_weights_are_not_taken(folder):
    def fails_at_once(x):
        raise KeyboardInterrupt

    calls = []

    def counted(x):
        calls.append(x)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return doubled(x)

    for run in (counted, fails_at_once):
        with pytest.raises(KeyboardInterrupt):
            upscale_video(run, folder / "clip.mp4", folder / "out.mp4", key=b"some")
    calls.clear()
    calls += [None] * 2
    upscale_video(counted, folder / "clip.mp4", folder / "out.mp4", key=b"others")
    assert len(calls) == 2 + 7


def test_by_command_line(folder, tiny):
    torch.save(tiny.state_dict(), "weights.pt")
    line = "--data_test video --dir_demo clip.mp4 --pre_train weights.pt --test_only --save_results --save v --cpu"
    assert main(line.split()) == 0
    target = Path("experiment/v/results-video-x2/clip_x2_SR.mp4")
    assert read_clip(str(target))[1].shape == (7, 48, 64, 3)
    before = target.read_bytes()
    with pytest.raises(InputError, match=r"clip_x2_SR\.mp4: is there already; --reset makes it anew"):
        main(line.replace("clip.mp4", "./clip.mp4").split())
    assert target.read_bytes() == before
    assert main([*line.split(), "--reset"]) == 0


def test_a_video_that_is_cut_off_is_told(folder, caplog):
    writer = cv2.VideoWriter("long.avi", cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for _ in range(9):
        writer.write(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    writer.release()
    content = (folder / "long.avi").read_bytes()
    (folder / "long.avi").write_bytes(content[: len(content) // 2])
    count = upscale_video(doubled, folder / "long.avi", folder / "out.mp4")
    assert 0 < count < 9
    assert f"only {count} of 9 frames could be decoded" in caplog.text


def test_what_killed_processes_and_other_settings_left_is_removed_once_a_video_is_whole(folder):
    (folder / ".out.mp4.0badcafe").mkdir()
    (folder / ".out.1.tmp.mp4").touch()
    upscale_video(doubled, folder / "clip.mp4", folder / "out.mp4")
    assert sorted(path.name for path in folder.iterdir()) == ["clip.mp4", "out.mp4"]


def test_what_is_no_video_is_named(folder):
    (folder / "text.mp4").write_text("broken")
    write_clip(folder / "empty.mp4", count=0)
    for name in ("text.mp4", "empty.mp4", "absent.mp4"):
        with pytest.raises(InputError, match=name):
            upscale_video(doubled, folder / name, folder / "out.mp4")
    assert {path.name for path in folder.iterdir()} == {"clip.mp4", "text.mp4", "empty.mp4"}
    with pytest.raises(InputError, match=r"out\.xyz"):
        upscale_video(doubled, folder / "clip.mp4", folder / "out.xyz")


def test_a_video_that_lacks_frames_is_not_kept(folder, monkeypatch):
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
    with pytest.raises(InputError, match="only 4 of 7 frames could be written; is the disk full"):
        upscale_video(doubled, folder / "clip.mp4", folder / "out.mp4")
    assert not (folder / "out.mp4").exists()
