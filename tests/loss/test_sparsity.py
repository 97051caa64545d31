import torch

from loss.sparsity import active_shares


def test_shares_equal_the_mean_over_layers_channels_and_pixels():
    masks = [(torch.rand(2, 1, 3, 4), torch.rand(1, 5, 6)) for _ in range(3)]
    shares = []
    for m, c in masks:
        for layer in range(6):
            m_, c_ = m, c[:, :, layer, None, None]
            shares.append((m_ * (1 - c_) + c_).mean())  # (2, 5, 3, 4)
    torch.testing.assert_close(active_shares(masks).mean(), torch.stack(shares).mean())


def test_shares_are_between_0_and_1():
    zeros, ones = torch.zeros(1, 1, 2, 2), torch.ones(1, 3, 2)
    assert active_shares([(zeros, 0 * ones)]) == 0
    assert active_shares([(zeros, ones)]) == active_shares([(1 + zeros, 0 * ones)]) == 1
