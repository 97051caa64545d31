import pytest
import torch

from model import matmul
from model.matmul import build_matmul, fastest_builder

BUILDERS = (matmul._linear, matmul._convolution, matmul._packed_linear)


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("size", [(0, 5, 3), (1, 1, 1), (7, 5, 3), (300, 64, 48), (40, 576, 64)])
@pytest.mark.parametrize("relu", [False, True])
def test_every_builder_multiplies(builder, size, relu):
    rows, columns, outputs = size
    if builder is matmul._packed_linear and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    if builder is matmul._convolution and rows == 0:
        pytest.skip("PyTorch does not convolve empty images")
    x, weight, bias = torch.randn(rows, columns), torch.randn(outputs, columns), torch.randn(outputs)
    for b in (None, bias):
        expected = x @ weight.T + (0 if b is None else b)
        expected = expected.relu() if relu else expected
        torch.testing.assert_close(builder(weight, b, relu)(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("relu", [False, True])
def test_the_fastest_product_has_bias_and_relu(relu):
    x, weight, bias = torch.randn(50, 20), torch.randn(8, 20), torch.randn(8)
    expected = x @ weight.T + bias
    multiply = build_matmul(weight, bias, relu=relu)
    torch.testing.assert_close(multiply(x), expected.relu() if relu else expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_multiplied(dtype):
    x, weight = torch.randn(50, 20).to(dtype), torch.randn(8, 20).to(dtype)
    result = build_matmul(weight)(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), x.double() @ weight.double().T, atol=0.1, rtol=0.02)


def test_the_result_without_inputs_is_the_bias():
    bias = torch.randn(4)
    assert torch.equal(build_matmul(torch.empty(4, 0), bias)(torch.empty(3, 0)), bias.expand(3, 4))


def test_the_fastest_builder_is_measured_once_and_one_may_be_missing(monkeypatch):
    def missing(*_):
        raise AttributeError

    assert fastest_builder(torch.float32) is fastest_builder(torch.float32)
    monkeypatch.setattr("utility._measurements", {})
    monkeypatch.setattr(matmul, "_packed_linear", missing)
    assert fastest_builder(torch.float32) in BUILDERS[:2]
