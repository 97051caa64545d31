import os
import signal

import pytest
import torch

from checkpoint import Experiment
from program import InputError
from recovery import report_failures, resume_hint, stop_on_interrupt

# ---- interruptions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def terminable():
    """SIGTERM is counted instead of ending the tests; returns the list of the signals received."""
    received = []
    former = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, former)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_requests_a_stop(number, interruptible, terminable, capfd):
    with stop_on_interrupt() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
    assert terminable == []
    assert capfd.readouterr().err == "\nstopping after this step or evaluation; press Ctrl-C to stop at once\n"
    with stop_on_interrupt() as next_stop:
        assert not next_stop.requested


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_a_signal_raises(first, interruptible, terminable):
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt():  # noqa: PT012 - both signals belong to it
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_sigterm_after_a_signal_changes_nothing(first, interruptible, terminable):
    with stop_on_interrupt() as stop:
        signal.raise_signal(first)
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert stop.requested
    assert terminable == []


@pytest.mark.parametrize("signals", [[], [signal.SIGINT], [signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM]])
@pytest.mark.parametrize("fails", [False, True])
def test_the_former_handlers_are_restored(interruptible, terminable, signals, fails):
    numbers = signal.SIGINT, signal.SIGTERM
    former = [signal.getsignal(number) for number in numbers]
    try:
        with stop_on_interrupt():
            assert all(signal.getsignal(n) is not f for n, f in zip(numbers, former, strict=True))
            for number in signals:
                signal.raise_signal(number)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert [signal.getsignal(number) for number in numbers] == former
    signal.raise_signal(signal.SIGTERM)
    assert terminable == [signal.SIGTERM]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_handlers_are_restored_after_a_second_ctrl_c(interruptible, terminable):
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt():  # noqa: PT012 - both signals belong to it
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is former


# ---- failures --------------------------------------------------------------------------------------------------------

RESUME = "resume with: python main.py --load run"


@pytest.fixture
def experiment(tmp_path):
    """A run with a checkpoint."""
    experiment = Experiment("run", tmp_path)
    experiment.save_checkpoint({})
    return experiment


def reported(experiment, error):
    """What `report_failures` makes of an error: its message and argument."""
    with pytest.raises(InputError) as caught, report_failures(experiment):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__  # without the traceback of the original error
    return str(caught.value), caught.value.argument


def test_the_hint_is_to_resume_if_there_is_a_checkpoint(experiment, tmp_path):
    assert resume_hint(experiment) == RESUME
    assert resume_hint(Experiment("other", tmp_path)) == "start again"


def test_success_and_user_mistakes_pass_through(experiment):
    with report_failures(experiment):
        pass
    with pytest.raises(InputError, match=r"^a mistake$"), report_failures(experiment):
        raise InputError("a mistake")


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (FileNotFoundError(2, "No such file or directory", "a/b.png"), "a/b.png: No such file or directory"),
        (OSError(28, "No space left on device"), "a file: No space left on device"),
        (OSError("cut off"), "a file: cut off"),
    ],
)
def test_failures_of_files_are_reported_in_one_line(experiment, error, problem):
    assert reported(experiment, error) == (f"{problem}; fix it, then {RESUME}", None)


def test_without_a_checkpoint_the_report_says_to_start_again(tmp_path):
    message, _ = reported(Experiment("new", tmp_path), OSError(28, "No space left on device", "checkpoint.pt"))
    assert message == "checkpoint.pt: No space left on device; fix it, then start again"


def test_a_lost_process_is_reported_if_there_are_several(experiment, monkeypatch):
    error = RuntimeError("[../third_party/gloo/transport/tcp/pair.cc] Connection closed by peer")
    with pytest.raises(RuntimeError, match="Connection closed"), report_failures(experiment):
        raise error
    monkeypatch.setattr("distributed.world_size", lambda: 2)
    expected = f"another process of this run has died; {RESUME}", None
    assert reported(experiment, error) == expected
    assert reported(experiment, torch.distributed.DistNetworkError("timed out")) == expected


@pytest.mark.parametrize("error", ["torch._dynamo.exc.BackendCompilerFailed", "torch._inductor.exc.InvalidCxxCompiler"])
def test_a_missing_compiler_is_reported_with_the_flag(experiment, error):
    package, _, name = error.rpartition(".")
    failure = type(name, (RuntimeError,), {"__module__": package})("no C++ compiler\nset the variable CXX")
    message = "no C++ compiler; install what is missing or leave it out"
    assert reported(experiment, failure) == (message, "compile")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes differ"), ValueError("a bug"), KeyboardInterrupt(), BrokenPipeError(32, "Broken pipe")],
)
def test_other_errors_keep_their_type(experiment, error):
    with pytest.raises(type(error)) as caught, report_failures(experiment):
        raise error
    assert caught.value is error


def test_the_message_of_a_signal_does_not_use_the_logger(interruptible, monkeypatch):
    """A signal may arrive while the logger holds its lock, so the message is written directly."""
    written = []
    monkeypatch.setattr(os, "write", lambda descriptor, text: written.append((descriptor, text)))
    with stop_on_interrupt():
        signal.raise_signal(signal.SIGINT)
    assert [descriptor for descriptor, _ in written] == [2]
