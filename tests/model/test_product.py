import pytest
import torch

from model import product
from model.product import build_product, quickest

WAYS = (product._linear, product._convolution, product._packed_linear)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [(0, 5, 3), (1, 1, 1), (7, 5, 3), (300, 64, 48), (40, 576, 64)])
@pytest.mark.parametrize("relu", [False, True])
def test_every_way_is_the_product(way, size, relu):
    rows, columns, outputs = size
    if way is product._packed_linear and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    if way is product._convolution and rows == 0:
        pytest.skip("nothing to convolve")
    x, weight, bias = torch.randn(rows, columns), torch.randn(outputs, columns), torch.randn(outputs)
    for b in (None, bias):
        expected = x @ weight.T + (0 if b is None else b)
        expected = expected.relu() if relu else expected
        torch.testing.assert_close(way(weight, b, relu)(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_have_a_way(dtype):
    x, weight = torch.randn(50, 20).to(dtype), torch.randn(8, 20).to(dtype)
    result = build_product(weight)(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), x.double() @ weight.double().T, atol=0.1, rtol=0.02)


def test_no_inputs_make_the_bias_alone():
    bias = torch.randn(4)
    assert torch.equal(build_product(torch.empty(4, 0), bias)(torch.empty(3, 0)), bias.expand(3, 4))


def test_the_quickest_way_is_measured_once_and_may_be_missing(monkeypatch):
    def absent(*_):
        raise AttributeError

    assert quickest(torch.float32) is quickest(torch.float32)
    monkeypatch.setattr("utility._measured", {})
    monkeypatch.setattr(product, "_packed_linear", absent)
    assert quickest(torch.float32) in WAYS[:2]
