"""One thread computes what is too small to be divided, and nobody else's number changes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cribsheet.kernels.threads import one_thread, pays_to_divide


def in_a_new_thread(call: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def test_it_is_one_inside_and_as_before_afterwards(two_threads):
    with one_thread():
        assert torch.get_num_threads() == 1
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_an_error_inside_leaves_the_number_as_it_was(two_threads):
    with pytest.raises(ZeroDivisionError), one_thread():
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == 2


class Interrupted(BaseException):
    """What Ctrl-C would raise, wherever the caller is."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one that comes while it leaves
def test_an_interruption_at_any_moment_leaves_the_number_as_it_was(two_threads):
    def interrupt(*_: Any) -> None:
        raise Interrupted

    before, chance = signal.signal(signal.SIGALRM, interrupt), random.Random(0)
    try:
        for _ in range(2000):
            with contextlib.suppress(Interrupted):
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 2e-4))
                for _ in range(300):
                    with one_thread():
                        pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert torch.get_num_threads() == 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_other_threads_keep_theirs_and_those_that_start_meanwhile_have_the_processs(two_threads):
    inside, asked, seen = threading.Event(), threading.Event(), []

    def alone():
        with one_thread():
            inside.set()
            asked.wait(60)
            seen.append(torch.get_num_threads())

    thread = threading.Thread(target=alone)
    thread.start()
    assert inside.wait(60)
    assert torch.get_num_threads() == 2
    assert in_a_new_thread(torch.get_num_threads) == 2
    asked.set()
    thread.join()
    assert seen == [1]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="only Linux lists a process's threads")
def test_nobody_else_computes_inside(two_threads):
    """A thread's helpers start when it first has work for them: PyTorch's own and those of MKL."""
    square = torch.ones(600, 600)

    def begun():
        before = set(os.listdir("/proc/self/task"))
        with one_thread():
            square @ square
            square.exp().sum()
            torch.nn.functional.silu(square.bfloat16())
            alone = set(os.listdir("/proc/self/task")) - before
        square @ square
        return alone, set(os.listdir("/proc/self/task")) - before

    alone, together = in_a_new_thread(begun)
    assert not alone and len(together) == 1


SMALL = (2_660_000, 8 * 64, 4 * 64)  # the pocket model's weights for each layer, and the widths of queries and of keys
LARGE = (20_600_000, 14 * 64, 2 * 64)  # Qwen2.5-Coder-0.5B's


def test_short_questions_and_steps_of_small_models_do_not_pay_to_divide(two_threads):
    assert not pays_to_divide(1, *SMALL, before=4_846)
    assert not pays_to_divide(20, *SMALL, before=1_615)
    assert not pays_to_divide(64, *SMALL, before=512)


def test_long_reads_and_long_sheets_and_larger_models_do(two_threads):
    assert pays_to_divide(512, *SMALL, before=0)
    assert pays_to_divide(1, *SMALL, before=65_536)
    assert pays_to_divide(1, *LARGE, before=1_024)


def test_more_threads_save_more_and_one_saves_nothing(two_threads):
    passage = (48, *SMALL, 1_024)
    assert not pays_to_divide(*passage)
    torch.set_num_threads(16)
    assert pays_to_divide(*passage)
    torch.set_num_threads(1)
    assert not pays_to_divide(10_000, *LARGE, before=0)
