import torch
import torch.nn.functional as F

from model.common import Work
from model.inference import self_ensemble


def nearest(x):
    return F.interpolate(x, scale_factor=2), Work(x.shape[2] * x.shape[3], 1, 2, 3, (3,), 4.0)


def test_self_ensemble_of_an_equivariant_function_is_that_function():
    x = torch.rand(2, 3, 5, 7)
    sr, work = self_ensemble(nearest, x)
    torch.testing.assert_close(sr, nearest(x)[0])
    assert work == Work(8 * 35, 8, 16, 24, (24,), 32.0)


def test_self_ensemble_sees_all_eight_orientations_and_undoes_them():
    seen = []

    def first_pixel_marked(x):
        seen.append(x.flatten().tolist())
        sr = torch.zeros_like(x)
        sr[..., 0, 0] = 8
        return sr, Work(1, 0, 0, 0)

    sr, _ = self_ensemble(first_pixel_marked, torch.arange(4.0).view(1, 1, 2, 2))
    assert len({tuple(values) for values in seen}) == 8
    assert torch.equal(sr, torch.full((1, 1, 2, 2), 2.0))  # each corner came first twice
