import itertools
import os
import signal
import threading
import time

import pytest
import torch

from data.prefetch import BATCHES_AHEAD, Prefetcher, run_ahead


def counted(taken):
    """0, 1, ...; the list `taken` gets the thread that took each number."""
    for number in itertools.count():
        taken.append(threading.current_thread())
        yield number


@pytest.mark.parametrize("length", [0, 1, 2, 3, 10])
def test_items_come_in_order_from_another_thread(length):
    taken = []
    items = itertools.islice(counted(taken), length)
    assert list(run_ahead(items, 3)) == list(range(length))
    assert threading.current_thread() not in taken
    assert len(set(taken)) == min(length, 1)


def test_a_bounded_number_of_items_is_taken_ahead():
    taken = []
    items = run_ahead(counted(taken), 3)
    for number in range(5):
        assert next(items) == number
        time.sleep(0.05)
        assert len(taken) == number + 1 + 3
    items.close()


def test_an_error_is_raised_after_the_items_before_it():
    def broken():
        yield from range(5)
        raise FileNotFoundError("a/b.png")

    items = run_ahead(broken(), 3)
    assert [next(items) for _ in range(5)] == list(range(5))
    with pytest.raises(FileNotFoundError, match=r"a/b\.png"):
        next(items)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_closing_ends_the_thread(count):
    taken = []
    items = run_ahead(counted(taken), 3)
    assert list(itertools.islice(items, count)) == list(range(count))
    items.close()
    assert len(taken) <= count + 3
    assert not any(thread.is_alive() for thread in taken)


@pytest.mark.skipif(os.name != "posix", reason="needs a timer signal")
def test_a_signal_reaches_who_waits_for_an_item():
    def request(*_):
        raise KeyboardInterrupt

    def slow():
        time.sleep(0.5)
        yield 1

    former = signal.signal(signal.SIGALRM, request)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            next(run_ahead(slow(), 2))
    finally:
        signal.signal(signal.SIGALRM, former)


def test_on_a_cpu_batches_are_passed_on_without_a_thread():
    taken = []
    batches = ([torch.full((2,), number)] for number in counted(taken))
    copies = Prefetcher(torch.device("cpu"))(batches)
    assert [next(copies)[0].tolist() for _ in range(3)] == [[0, 0], [1, 1], [2, 2]]
    assert taken == [threading.current_thread()] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_batches_are_copied_ahead_and_intact():
    device = torch.device("cuda")
    busy = torch.rand(4096, 4096, device=device)
    taken, sums = [], []
    batches = ([torch.full((1 << 20,), number), torch.full((3,), -number)] for number in counted(taken))
    copies = Prefetcher(device)(batches)
    for number, (large, small) in enumerate(itertools.islice(copies, 50)):
        busy = busy @ busy  # the device is late, so that memory would be reused too early
        sums.append((large - number).abs().sum() + (small + number).abs().sum())
        assert large.device.type == "cuda"
    copies.close()
    assert not torch.stack(sums).any()
    assert threading.current_thread() not in taken
    assert len(taken) <= 50 + BATCHES_AHEAD
