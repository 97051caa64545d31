import torch

from loss.sparsity import active_shares


def test_shares_equal_the_mean_over_layers_channels_and_pixels():
    masks = [(torch.rand(2, 1, 3, 4), torch.rand(1, 5, 6)) for _ in range(3)]
    shares = []
    for m, c in masks:
        for layer in range(6):
            m_, c_ = m, c[:, :, layer, None, None]
            shares.append((m_ * (1 - c_) + c_).mean())  # (2, 5, 3, 4)
    densities, channel_masks = [m.mean() for m, _ in masks], [c for _, c in masks]
    torch.testing.assert_close(active_shares(densities, channel_masks).mean(), torch.stack(shares).mean())


def test_shares_are_between_0_and_1():
    zero, one, channels = torch.zeros(1), torch.ones(1), torch.ones(1, 3, 2)
    assert active_shares(zero, [0 * channels]) == 0
    assert active_shares(zero, [channels]) == active_shares(one, [0 * channels]) == 1
