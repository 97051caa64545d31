"""Interruptions and failures of a training: stop cleanly, and report what to do in one line."""

import contextlib
import os
import re
import signal
from collections.abc import Iterator

import distributed
from checkpoint import Experiment
from program import InputError, is_out_of_memory


class Stop:
    """Whether the user or the system asked the run to stop."""

    requested = False


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into `Stop.requested`, so that the step in progress can finish; a second Ctrl-C raises.

    A second SIGTERM does not: torchrun forwards the signal that each process already got from the batch system.
    """
    stop, signals = Stop(), (signal.SIGINT, signal.SIGTERM)
    former = {number: signal.getsignal(number) for number in signals}

    def request(*_):
        stop.requested = True
        signal.signal(signal.SIGINT, former[signal.SIGINT])
        os.write(2, b"\nstopping after this step or evaluation; press Ctrl-C to stop at once\n")  # a logger may be busy

    for number in signals:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def report_failures(experiment: Experiment) -> Iterator[None]:
    """Report user-visible failures in one line, as an InputError, with the command to resume."""
    try:
        yield
    except BrokenPipeError:  # nobody reads the output any more, which is not a mistake
        raise
    except OSError as error:
        problem = f"{error.filename or 'a file'}: {error.strerror or error}"
        raise InputError(f"{problem}; fix it, then {resume_hint(experiment)}") from None
    except (MemoryError, RuntimeError) as error:
        if distributed.is_connection_lost(error):
            raise InputError(f"another process of this run has died; {resume_hint(experiment)}") from None
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            problem = str(error).strip().splitlines()[0]
            raise InputError(f"{problem}; install what is missing or leave it out", argument="compile") from None
        if str(error).startswith("DataLoader worker"):
            killed = re.search(r"killed by signal: ([\w ]+)", str(error))
            problem = f"a worker process was killed ({killed[1]})" if killed else "a worker process has died"
            advice = "if memory is short, use fewer, or 0"
            raise InputError(f"{problem}; {advice}; {resume_hint(experiment)}", "n_threads") from None
        if is_out_of_memory(error):
            advice = "use a smaller one, or more parts (split_batch)"
            raise InputError(
                f"there is not enough memory; {advice}, then {resume_hint(experiment)}", "batch_size"
            ) from None
        if str(error).startswith("CUDA error"):  # the device is lost, or a kernel failed
            problem = str(error).splitlines()[0]
            raise InputError(f"{problem}; if the GPU works, {resume_hint(experiment)}") from None
        raise


def resume_hint(experiment: Experiment) -> str:
    """What to do after a failure: resume if the run has a checkpoint."""
    if experiment.checkpoint_path.exists():
        return f"resume with: python main.py --load {experiment.name}"
    return "start again"
