import imageio.v3 as iio
import numpy as np
import pytest
import torch

from model.edsr import EDSR
from program import InputError
from tools.plot_masks import main


def test_channel_masks_are_counted_and_drawn(tmp_path, tiny, capsys):
    with torch.no_grad():
        for block in tiny.blocks:
            block.channel_logits.copy_(torch.tensor([0.0, 1.0]))
        tiny.blocks[1].channel_logits[0, :3, 1] = torch.tensor([1.0, 0.0])
    torch.save(tiny.state_dict(), tmp_path / "weights.pt")
    main(["--pre_train", str(tmp_path / "weights.pt"), "--output", str(tmp_path / "masks.png")])
    counts = [[int(mask.sum()) for mask in block.hard_channel_mask().T] for block in tiny.blocks]
    printed = capsys.readouterr().out.splitlines()
    assert sorted(map(abs, (counts[1][0] - counts[1][1], counts[0][0] - counts[0][1]))) == [0, 3]
    for line, (first, second) in zip(printed, counts, strict=False):
        assert line.endswith(f"dense channels per layer: {first} {second} (of 8)")
    assert iio.imread(tmp_path / "masks.png").ndim == 3


def test_only_pictures_like_it_are_replaced(tmp_path, tiny):
    torch.save(tiny.state_dict(), tmp_path / "weights.pt")
    photo, masks = tmp_path / "photo.png", tmp_path / "masks.png"
    iio.imwrite(photo, np.zeros((4, 4, 3), np.uint8))
    before = photo.read_bytes()
    line = ["--pre_train", str(tmp_path / "weights.pt"), "--output"]
    with pytest.raises(InputError, match=r"photo\.png: already exists and is something else; choose another name"):
        main([*line, str(photo)])
    assert photo.read_bytes() == before
    main([*line, str(masks)])
    masks.write_bytes(masks.read_bytes() + b"old")
    main([*line, str(masks)])
    assert not masks.read_bytes().endswith(b"old")


def test_a_network_without_masks_is_refused(tmp_path):
    torch.save(EDSR(2, n_feats=8, n_resblocks=1).state_dict(), tmp_path / "edsr.pt")
    with pytest.raises(InputError, match=r"edsr\.pt: EDSR has no masks"):
        main(["--pre_train", str(tmp_path / "edsr.pt"), "--output", str(tmp_path / "masks.png")])


def test_the_weights_are_not_overwritten(tmp_path, tiny):
    path = tmp_path / "weights.png"
    torch.save(tiny.state_dict(), path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"would overwrite .*weights\.png, which this call reads"):
        main(["--pre_train", str(path), "--output", str(path)])
    assert path.read_bytes() == before
