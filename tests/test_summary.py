import io
import math

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import summary
from data import DataSettings, build_test_sets
from program import InputError
from summary import (
    MaskMonitor,
    RunningMeans,
    TensorBoard,
    check_tensorboard,
    comparable,
    draw_panels,
    find_collapsed,
    find_curves,
    mask_histogram,
    read_history,
    write_curves,
    write_history,
)

# ---- running means ---------------------------------------------------------------------------------------------------

NAMES = ["loss", "loss_L1", "active_1", "active_2", "density_1", "grad_norm"]
CPU = torch.device("cpu")

numbers = st.floats(-1000, 1000, width=32)
good_steps = st.tuples(st.lists(numbers, min_size=6, max_size=6), st.just(True))
skipped_steps = st.tuples(
    st.lists(numbers | st.sampled_from([math.nan, math.inf, -math.inf]), min_size=6, max_size=6), st.just(False)
)
epochs = st.lists(good_steps | skipped_steps, max_size=12)


def add(means, steps):
    for values, is_good in steps:
        means.add(NAMES, torch.tensor(values), torch.tensor(is_good))


def through_a_file(state):
    """A state as it returns from checkpoint.pt."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(means, other):
    """Two RunningMeans agree in every bit."""
    assert means.names == other.names
    assert torch.equal(means.skipped, other.skipped)
    assert (means.sums is None) == (other.sums is None)
    assert means.sums is None or torch.equal(means.sums, other.sums)
    assert repr(means.means()) == repr(other.means())  # repr, since nan differs from itself


@given(epochs)
def test_the_means_are_those_of_the_good_steps(steps):
    means = RunningMeans(CPU)
    add(means, steps)
    good = np.array([values for values, is_good in steps if is_good], np.float64)
    found = means.means()
    if not steps:
        assert list(found) == ["loss", "active"]
    else:
        assert list(found) == [*NAMES, "active"]
    if len(good) == 0:
        assert all(math.isnan(value) for value in found.values())
        return
    expected = dict(zip(NAMES, good.mean(0), strict=True))
    expected["active"] = good[:, 2:4].mean()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-3)  # sums of up to 12000 in float32


@given(epochs)
def test_skipped_steps_are_counted_and_leave_the_means_as_they_were(steps):
    means, good_alone = RunningMeans(CPU), RunningMeans(CPU)
    add(means, steps)
    add(good_alone, [step for step in steps if step[1]])
    if good_alone.sums is not None:
        assert torch.equal(means.sums, good_alone.sums)
    flags = [is_good for _, is_good in steps]
    in_a_row = flags[::-1].index(True) if True in flags else len(flags)
    assert means.skipped.tolist() == [flags.count(False), in_a_row]
    assert means.skipped_steps() == (flags.count(False), in_a_row)
    assert means.skipped_steps() == (0, in_a_row)


@given(epochs, epochs)
def test_skipped_steps_are_reported_once(first, second):
    means = RunningMeans(CPU)
    reported = 0
    for steps in (first, second):
        add(means, steps)
        reported += means.skipped_steps()[0]
    assert reported == means.skipped[0] == sum(not is_good for _, is_good in first + second)


@given(epochs, epochs)
def test_resumed_means_are_bit_identical(first, second):
    whole, half, resumed = RunningMeans(CPU), RunningMeans(CPU), RunningMeans(CPU)
    add(whole, first + second)
    add(half, first)
    resumed.load_state(through_a_file(half.state()))
    assert_same(resumed, half)
    assert resumed.skipped_steps()[0] == 0  # they were reported before
    add(resumed, second)
    assert_same(resumed, whole)


@given(epochs, epochs)
def test_an_epoch_starts_from_nothing_but_the_skipped_steps_in_a_row(first, second):
    means, fresh = RunningMeans(CPU), RunningMeans(CPU)
    add(means, first)
    in_a_row = means.skipped_steps()[1]
    means.start_epoch()
    assert means.skipped.tolist() == [0, in_a_row]
    assert repr(means.means()) == repr(fresh.means())
    add(means, second)
    add(fresh, second)
    assert repr(means.means()) == repr(fresh.means())
    n_skipped = sum(not is_good for _, is_good in second)
    all_skipped = n_skipped == len(second)
    assert means.skipped_steps() == (n_skipped, fresh.skipped_steps()[1] + (in_a_row if all_skipped else 0))


@given(epochs.filter(bool), epochs.filter(bool))
def test_several_processes_report_the_means_over_all_their_steps(ours, theirs):
    means, others, together = RunningMeans(CPU), RunningMeans(CPU), RunningMeans(CPU)
    add(means, ours)
    add(others, theirs)
    add(together, ours + theirs)

    def average(tensors):
        for tensor in tensors:
            tensor.add_(others.sums).div_(2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distributed.average", average)
        means.average_over_processes()
        RunningMeans(CPU).average_over_processes()  # before the first step there is nothing to average
    for name, value in together.means().items():
        np.testing.assert_allclose(means.means()[name], value, rtol=1e-4, atol=1e-3, equal_nan=True)


def test_a_network_without_masks_has_one_active_share():
    means = RunningMeans(CPU)
    means.add(["loss", "active_1", "grad_norm"], torch.tensor([2.0, 1.0, 0.5]), torch.tensor(True))
    assert means.means() == {"loss": 2.0, "active_1": 1.0, "grad_norm": 0.5, "active": 1.0}


@given(epochs.filter(bool), epochs.filter(bool))
def test_a_value_that_only_some_steps_of_an_epoch_have_is_unknown(first, second):
    """As after an update in the middle of an epoch, or with another loss."""
    means, together = RunningMeans(CPU), RunningMeans(CPU)
    for values, is_good in first:
        means.add(["removed", *NAMES[:4], NAMES[5]], torch.tensor([1.0, *values[:4], values[5]]), torch.tensor(is_good))
    add(means, second)
    add(together, first + second)
    expected, found = together.means(), means.means()
    assert list(found) == list(expected)
    assert math.isnan(found.pop("density_1"))
    del expected["density_1"]
    assert repr(found) == repr(expected)


# ---- masks that collapse ---------------------------------------------------------------------------------------------


def warnings_of(caplog, monitor, epochs, **options):
    """What a monitor logs about epochs, each given as the densities (N, K)."""
    caplog.clear()
    for epoch, densities in enumerate(epochs, 1):
        monitor.check(epoch, np.array(densities), **options)
    return [record.getMessage() for record in caplog.records]


ALIVE, COLLAPSED = [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], [[0.009, 0.5, 0.0], [0.0, 0.02, 0.0]]


def test_masks_that_stay_empty_are_reported_once(caplog):
    (line,) = warnings_of(caplog, MaskMonitor(), [ALIVE, *[COLLAPSED] * 5])
    assert line.startswith(
        "epoch 3: the masks of these modules have been empty on every validation image for 2 epochs: 1, 3; "
    )
    assert "start another run from the weights of this one with revive_masks" in line
    assert line.endswith("(docs/training.md)")


def test_masks_that_recover_are_not_reported(caplog):
    assert warnings_of(caplog, MaskMonitor(), [COLLAPSED, ALIVE] * 3) == []
    assert len(warnings_of(caplog, MaskMonitor(), [COLLAPSED, COLLAPSED, ALIVE] * 2)) == 2  # each collapse is


def test_one_image_with_another_density_is_enough(caplog):
    assert warnings_of(caplog, MaskMonitor(), [[[0.0], [0.011]]] * 3) == []
    assert warnings_of(caplog, MaskMonitor(), [[[1.0], [0.989]]] * 3) == []


def test_full_masks_are_reported_unless_they_may_be_full(caplog):
    full = [[[1.0, 0.5], [0.991, 1.0]]] * 4
    (line,) = warnings_of(caplog, MaskMonitor(), full)
    assert line.startswith("epoch 2: the masks of these modules have been full on every validation image")
    assert ": 1; raise lambda_sparsity" in line
    monitor = MaskMonitor()
    assert warnings_of(caplog, monitor, full, may_be_full=True) == []
    assert len(warnings_of(caplog, monitor, full)) == 1


def test_networks_without_masks_have_none_that_collapse(caplog):
    assert warnings_of(caplog, MaskMonitor(), [[[], []]] * 3) == []


# ---- histogram, log.csv and curves -----------------------------------------------------------------------------------


def test_mask_histogram():
    masks = [torch.full((1, 1, 2, 2), 0.05), torch.tensor([0.0, 1.0, 0.95, 0.55]).view(1, 1, 2, 2)]
    histogram = mask_histogram(masks)
    assert list(histogram) == [f"mask_{index / 10}" for index in range(10)]
    assert [histogram[f"mask_{edge}"] for edge in (0.0, 0.5, 0.9)] == [5 / 8, 1 / 8, 2 / 8]
    assert sum(histogram.values()) == 1


def test_the_histogram_of_16_bit_masks_is_that_of_their_values():
    masks = [torch.rand(2, 1, 7, 9).to(torch.bfloat16) for _ in range(3)]
    counts, _ = np.histogram(np.concatenate([m.float().numpy().ravel() for m in masks]), np.arange(11) / np.float32(10))
    assert list(mask_histogram(masks).values()) == pytest.approx(counts / (3 * 2 * 7 * 9))


def test_history_is_written_as_a_table(tmp_path):
    write_history(tmp_path, [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0, "psnr_y_Set5": 30.0}])
    assert (tmp_path / "log.csv").read_text().splitlines() == ["epoch,loss,psnr_y_Set5", "1,2,", "2,1,30"]


def test_history_is_drawn_as_curves(tmp_path):
    history = [{"epoch": 1, "loss": 2.0, "active": 0.9}, {"epoch": 2, "loss": 1.0, "active": 0.8, "psnr_y_Set5": 30.0}]
    write_curves(tmp_path, history)
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("loss", "psnr", "active_share"))
    assert not (tmp_path / "masks.png").exists()
    write_curves(tmp_path, [row | mask_histogram([torch.rand(1, 1, 4, 4)]) for row in history])
    assert (tmp_path / "masks.png").stat().st_size > 1000
    assert not (tmp_path / "density.png").exists()
    write_curves(tmp_path, [history[0], history[1] | {"density_1": 0.5, "density_1_Set5": 0.4}])  # of a resumed run
    assert (tmp_path / "density.png").stat().st_size > 1000


def test_each_figure_draws_its_columns_under_readable_names():
    columns = ["epoch", "loss", "loss_L1", "active", "active_1", "density_1", "density_2"]
    for name, kind in (("A_1", "rgb"), ("Set5", "y")):
        for suffix in ("", "_ema"):
            columns += [f"psnr_{kind}_{name}{suffix}", f"ssim_y_{name}{suffix}", f"active_share_{name}{suffix}"]
            columns += [f"density_1_{name}{suffix}", f"density_2_{name}{suffix}"]
    found = find_curves([dict.fromkeys(columns, 0.5)])
    assert {name: panels for name, (_, _, panels) in found.items()} == {
        "loss": {"loss": {"total, with λ · active share": "loss", "L1": "loss_L1"}},
        "psnr": {
            "PSNR, A_1, RGB": {"weights": "psnr_rgb_A_1", "weights, averaged": "psnr_rgb_A_1_ema"},
            "PSNR, Set5, Y": {"weights": "psnr_y_Set5", "weights, averaged": "psnr_y_Set5_ema"},
        },
        "active_share": {
            "active share, training, soft masks": {"mean": "active", "module 1": "active_1"},
            "active share, validation, hard masks": {
                "A_1": "active_share_A_1",
                "A_1, averaged": "active_share_A_1_ema",
                "Set5": "active_share_Set5",
                "Set5, averaged": "active_share_Set5_ema",
            },
        },
        "density": {
            "mask density, training, soft masks": {"module 1": "density_1", "module 2": "density_2"},
            "mask density, A_1, hard masks": {"module 1": "density_1_A_1", "module 2": "density_2_A_1"},
            "mask density, Set5, hard masks": {"module 1": "density_1_Set5", "module 2": "density_2_Set5"},
        },
    }


def test_a_history_is_read_as_it_was_written(tmp_path):
    history = [{"epoch": 1, "loss": math.inf}, {"epoch": 2, "loss": 1.5, "psnr_y_Set5": 30.25}]
    write_history(tmp_path, history)
    assert read_history(tmp_path) == history
    with pytest.raises(InputError, match=r"absent/log\.csv: No such file"):
        read_history(tmp_path / "absent")


def test_every_panel_is_drawn_for_itself():
    history = [{"epoch": 1, "loss": 2.0, "psnr_y_A": 30.0, "psnr_y_B": 31.0} | mask_histogram([torch.rand(1, 1, 4, 4)])]
    titles = [title for title, figure in draw_panels(history) if len(figure.get_axes()) <= 1]
    assert titles == ["loss", "PSNR, A, Y", "PSNR, B, Y", "mask values"]


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def test_a_missing_tensorboard_is_reported_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr(summary.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install tensorboard") as caught:
        check_tensorboard()
    assert caught.value.argument == "tensorboard"


def test_tensorboard_gets_the_numbers_of_each_epoch_and_images_of_some(tmp_path, make_set, tiny):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    check_tensorboard()
    (images,) = build_test_sets(["Tiny"], DataSettings(str(make_set(count=1))))
    board = TensorBoard(tmp_path, images_every=2)
    for epoch in (1, 2, 3):
        row = {"epoch": epoch, "loss": 1 / epoch, "density_2_Tiny": 0.5, "psnr_y_Tiny": 30.0 + epoch}
        board.write(row, tiny, images)
    board.writer.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0}).Reload()
    assert sorted(events.Tags()["scalars"]) == ["density/2_Tiny", "loss", "psnr/y_Tiny"]
    assert [(event.step, event.value) for event in events.Scalars("psnr/y_Tiny")] == [(1, 31), (2, 32), (3, 33)]
    assert sorted(events.Tags()["images"]) == [f"img0/{title}" for title in ("HR", "LR", "SR", "mask 1", "mask 2")]
    written = {title: events.Images(f"img0/{title}") for title in ("HR", "LR", "SR", "mask 1")}
    assert all([event.step for event in events] == [1, 3] for events in written.values())
    sizes = {title: (events[0].height, events[0].width) for title, events in written.items()}
    assert sizes == {"HR": (40, 48), "LR": (20, 24), "SR": (40, 48), "mask 1": (20, 24)}
    _, lr, hr = images[0]
    for title, image in (("LR", lr), ("SR", tiny.eval().upscale(lr)), ("HR", hr)):
        assert np.array_equal(iio.imread(written[title][-1].encoded_image_string), image)


def test_epochs_rival_each_other_with_the_same_pressure_on_their_masks():
    history = [{"epoch": k, "lambda": value, "density_1": 0.5} for k, value in enumerate([0.0, 0.0, 0.1, 0.1])]
    assert comparable(history) == history[2:]
    assert comparable(history[:2]) == history[:2]
    history = [{"lambda": 0.0, "density_1": 1.0, "active": 1.0}, {"lambda": 0.0, "density_1": 0.9, "active": 0.9}]
    assert comparable(history) == history[1:]  # the first epoch was without masks
    of_version_0_1_0 = [{"lambda": 0.1, "mask_0.0": 0.5, "active": 0.5}]
    now = [{"lambda": 0.1, "density_1": math.nan, "active": math.nan}]  # all steps were skipped
    assert comparable(of_version_0_1_0 + now) == of_version_0_1_0 + now
    without_masks = [{"epoch": k, "lambda": k / 10} for k in range(3)]
    assert comparable(without_masks) == without_masks
    assert len(comparable([{"epoch": 1, "density_1": 0.5, "lambda": math.nan}])) == 1  # an edited log


def test_masks_that_select_pixels_on_one_image_have_not_collapsed():
    densities = np.array([[0.0, 1.0, 0.0, 0.5], [0.0, 1.0, 0.2, 0.5]])
    assert find_collapsed(densities).tolist() == [True, True, False, False]
