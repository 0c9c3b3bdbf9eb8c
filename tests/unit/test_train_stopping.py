"""A training's minutes, by a clock that is none, and its end by Ctrl-C."""

import os
import signal

import pytest

from vllm_dflash.training.stopping import OverError, Stopping


def run(paces: list[float], minutes: float | None, most: int, eval_s: float = 0.0) -> tuple:
    """Steps of these seconds each, the last one's from there on; how many were done, and when."""
    spent = [0.0]
    stopping = Stopping(minutes, lambda: spent[0])
    done, now = 0, most
    while done < now:
        spent[0] += paces[min(done, len(paces) - 1)]
        done += 1
        now = stopping.steps(done, now, most)
        if done % 10 == 0:
            spent[0] += eval_s
            now = stopping.steps(done, now, most)
    return done, spent[0]


def test_without_minutes_all_steps_are_done() -> None:
    assert run([1e9], None, 20)[0] == 20


def test_as_fast_as_it_was_estimated() -> None:
    """Sixty steps of a second in a minute: none is left out."""
    assert run([1.0], 1.0, 60)[0] == 60


@pytest.mark.parametrize("slower", [2.0, 15.0])
def test_a_machine_that_became_slower(slower: float) -> None:
    """The minutes hold within a step."""
    done, spent = run([slower], 1.0, 60)
    assert done == pytest.approx(60 / slower, abs=1)
    assert spent <= 60 + slower


def test_measuring_on_the_way_counts() -> None:
    done, spent = run([1.0], 1.0, 60, eval_s=5.0)
    assert 40 <= done <= 45
    assert spent <= 66


def test_a_load_that_has_gone() -> None:
    """It was slower for a while: what fits is counted anew, up to the estimate."""
    done, spent = run([3.0] * 10 + [0.5], 1.0, 60)
    assert done > 45
    assert spent <= 61


def test_a_step_is_done_at_least() -> None:
    assert run([100.0], 0.01, 60)[0] == 1


def test_one_that_goes_on_after_its_minutes() -> None:
    assert Stopping(1.0, lambda: 61.0).steps(7, 60, 60) == 7


def test_a_measurement_is_broken_off() -> None:
    spent = [0.0]
    stopping = Stopping(1.0, lambda: spent[0])
    stopping.look()
    spent[0] = 60.0
    with pytest.raises(OverError):
        stopping.look()
    without = Stopping(None, lambda: 1e9)
    without.look()
    without.interrupted = True
    with pytest.raises(OverError):
        without.look()


def test_ctrl_c_is_noted_and_a_second_one_ends_it() -> None:
    stopping = Stopping(None, lambda: 0.0)
    with stopping.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.interrupted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_answers_it_otherwise_is_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stopping(None, lambda: 0.0).interruptible():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
