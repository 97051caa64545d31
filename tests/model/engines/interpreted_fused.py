"""Tests of the fused engine in Triton's interpreter, which test_fused.py runs in a process of their own.

The interpreter must be chosen before Triton is imported, and no other test may see it.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engines import fused_kernels as kernels
from model.engines.fused import FusedEngine, FusedPlan
from model.smsr import SMSR
from model.sparse import Plan
from program import InputError
from tests.model.masks import with_dense_channels, with_density
from utility import logger


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def build(dense=(), density=None, x=None, **sizes):
    """A network with these numbers of dense channels per layer, and this mask density for the images x."""
    model = SMSR(**({"scale": 2, "n_feats": 16, "n_blocks": 1, "n_layers": max(1, len(dense))} | sizes)).eval()
    f = model.head(x.float() - model.mean) if density is not None else None
    with torch.no_grad():
        for block in model.blocks:
            with_dense_channels(block, dense)
            if density is not None:
                with_density(block, f, density)
                f = block(f, *block.hard_masks(f))
    return model


@torch.no_grad()
def assert_equals_plain(model, x, atol=1e-3):
    """The image, the masks and the cost of the fused engine are those of the plain engine."""
    engine = FusedEngine(Plan(model))
    sr, cost = engine(x)
    expected, plain = Plan(model)(x, "sparse")
    assert engine.fused, engine.reported  # it did not fall back
    assert sr.shape == expected.shape
    assert sr.dtype == expected.dtype
    assert [mask.shape for mask in cost.masks] == [mask.shape for mask in plain.masks]
    assert all(torch.equal(a, b) for a, b in zip(cost.masks, plain.masks, strict=True))
    torch.testing.assert_close(sr, expected, atol=atol, rtol=0)
    for name in ("pixels", "macs", "macs_dense", "important", "active_share", "mask_density"):
        assert getattr(cost, name) == getattr(plain, name)
    return cost


SPLITS = [(0, 0, 0), (16, 16, 16), (1, 0, 1), (0, 16, 0), (0, 16, 16), (16, 0, 16), (15, 15, 15), (1, 1, 1)]


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dense", SPLITS)
def test_extreme_masks_and_channel_masks(density, dense):
    x = torch.rand(1, 3, 6, 8) * 255
    cost = assert_equals_plain(build(dense, density, x), x)
    assert cost.important == (round(density * 48),)


def test_modules_with_other_dense_channels():
    x = torch.rand(1, 3, 6, 8) * 255
    model = build((16, 16, 1), n_blocks=3)
    for block, dense in zip(model.blocks[1:], [(0, 0, 0), (0, 1, 16)], strict=True):
        with_dense_channels(block, dense)
    assert_equals_plain(model, x)


@settings(max_examples=5)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 2),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    density=st.floats(0, 1),
    dense=st.lists(st.integers(0, 16), min_size=1, max_size=4),
)
def test_any_size_batch_density_and_split(seed, n, size, density, dense):
    torch.manual_seed(seed)
    x = torch.rand(n, 3, *size) * 255
    even = torch.nn.functional.pad(x, (0, size[1] % 2, 0, size[0] % 2), mode="replicate")
    assert_equals_plain(build(tuple(dense), density, even), x)


@pytest.mark.parametrize(
    "sizes",
    [
        {"scale": 3, "n_colors": 1},
        {"scale": 4, "n_blocks": 2, "n_layers": 5},
        {"scale": 1, "n_feats": 48},
        {"scale": 2, "n_feats": 8, "rgb_range": 1},
        {"scale": 2, "n_feats": 128, "n_layers": 2},
    ],
)
def test_any_network(sizes):
    x = torch.rand(1, sizes.get("n_colors", 3), 5, 6) * sizes.get("rgb_range", 255)
    model = SMSR(**({"n_feats": 16, "n_blocks": 1, "n_layers": 2} | sizes)).eval()
    assert_equals_plain(model, x)


def test_many_tiles():
    x = torch.rand(2, 3, 17, 18).contiguous(memory_format=torch.channels_last) * 255
    assert_equals_plain(SMSR(2, n_feats=16, n_blocks=1, n_layers=2).eval(), x)


def test_float16():
    x = torch.rand(1, 3, 8, 10) * 255
    model = SMSR(2, n_feats=16, n_blocks=1, n_layers=2).eval()
    with torch.no_grad():
        expected = model(x)
        sr, cost = FusedEngine(Plan(model.half()))(x.half())
    assert sr.dtype == torch.float16
    assert cost.pixels == 80
    assert (sr.float() - expected).abs().mean() < 0.5


def test_two_runs_give_the_same_bits():
    x = torch.rand(1, 3, 10, 18) * 255
    engine = FusedEngine(Plan(SMSR(2, n_feats=16, n_blocks=1, n_layers=2).eval()))
    first, second = (engine.fused(x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_cost_of_images_with_nan_or_infinity_is_refused(value):
    x = torch.rand(2, 3, 6, 6)
    x[1, 2, 3, 4] = value
    _, cost = FusedEngine(Plan(SMSR(2, n_feats=16, n_blocks=1, n_layers=1).eval()))(x)
    with pytest.raises(InputError, match="the images contain NaN or infinity; pass finite pixels"):
        cost.important  # noqa: B018


def test_tiles_and_the_masked_dense_mode_run_by_the_plain_plan(monkeypatch):
    model = SMSR(2, n_feats=16, n_blocks=1, n_layers=1).eval()
    engine = FusedEngine(Plan(model))
    monkeypatch.setattr(FusedPlan, "__call__", None)
    x = torch.rand(1, 3, 6, 6)
    for arguments, reported in (((x, "dense"), set()), ((x, "auto", 64), {"it runs whole images, not tiles"})):
        assert torch.equal(engine(*arguments)[0], Plan(model)(*arguments)[0])
        assert engine.reported == reported


# 2 features, 2 layers, 2 more, dense channels, and one; the second padded from 8 to 11 maps; the last runs plainly
@pytest.mark.parametrize(("n_feats", "dense", "expected"), [(16, 16, 9), (48, 20, 11), (144, 20, 8)])
def test_the_memory_check_knows_the_maps_of_the_engine(n_feats, dense, expected):
    model = build((dense, dense), n_feats=n_feats, n_blocks=2)
    assert FusedEngine(Plan(model)).peak_maps == expected


def test_what_the_engine_cannot_run_falls_back_with_one_log_line(caplog, monkeypatch):
    logger.setLevel("INFO")
    x = torch.rand(1, 3, 6, 6)
    large = SMSR(2, n_feats=144, n_blocks=1, n_layers=1).eval()
    engine = FusedEngine(Plan(large))
    for _ in range(2):
        assert torch.equal(engine(x)[0], Plan(large)(x)[0])
    assert [record.message for record in caplog.records] == [
        "fused engine: the network has more than 128 features; using plain operators, which are slower"
    ]
    caplog.clear()
    model = SMSR(2, n_feats=16, n_blocks=1, n_layers=1).eval()
    engine = FusedEngine(Plan(model))

    def fail(*_):
        raise ValueError("no such target\nsecond line")

    engine.graphs.function = fail
    for _ in range(2):
        assert torch.equal(engine(x)[0], Plan(model)(x)[0])
    assert [record.message for record in caplog.records] == [
        "fused engine: ValueError: no such target; using plain operators, which are slower"
    ]


def test_memory_errors_are_not_hidden():
    engine = FusedEngine(Plan(SMSR(2, n_feats=16, n_blocks=1, n_layers=1).eval()))

    def fail(*_):
        raise RuntimeError("CUDA out of memory")

    engine.graphs.function = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        engine(torch.rand(1, 3, 6, 6))


KERNELS = ("first_conv", "conv3x3", "mask_pool", "mask_decide", "kernel_map")
KERNELS += ("important_layer", "dense_layer", "attend", "reduce", "reconstruct")


# dense channels of the published x2 weights
PUBLISHED_SPLITS = ((24, 9, 3, 0), (16, 4, 1, 0), (16, 7, 1, 0), (3, 0, 0, 0), (14, 5, 0, 0))


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched, none of which runs."""
    names = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: names.append(self.name)

        def warmup(self, *args, grid, **options):
            pass

    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Recorder(name))
    return names


def test_a_forward_never_waits_and_launches_few_kernels(launches):
    model = SMSR(2)
    for block, dense in zip(model.blocks, PUBLISHED_SPLITS, strict=True):
        with_dense_channels(block, dense)
    plan = FusedPlan(Plan(model))
    plan(torch.empty(1, 3, 360, 640, device="meta"))  # numbers on this device cannot be read
    assert launches.count("important_layer") == 20
    assert launches.count("dense_layer") == 12  # none where a layer has no dense channels
    assert len(launches) + 1 <= 60  # and one that writes zeros


@pytest.mark.parametrize("n", [1, 2])
def test_memory_of_a_forward(launches, monkeypatch, n):
    plan = FusedPlan(Plan(SMSR(2)))
    x = torch.empty(n, 3, 1080, 1920, device="meta", dtype=torch.float16)
    allocated = []
    new_empty = torch.Tensor.new_empty

    def record(self, *args, **options):
        allocated.append(new_empty(self, *args, **options))
        return allocated[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", record)
    plan.compile(x)
    allocated.clear()
    plan(x)
    total = sum(tensor.nbytes for tensor in allocated)
    assert total <= n * 4 * 2**30  # an output of 3840x2160 within 4 GiB
    assert 0.8 * total < plan.needed_bytes(x) <= total
