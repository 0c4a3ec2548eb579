"""Signals: what is remembered, what is raised, and who handles them afterwards."""

from __future__ import annotations

import signal
import sys
import time

import pytest

from megatron_ee.errors import Interrupted
from megatron_ee.tuning.interrupt import SIGNALS, Interrupt, Signalled, raise_signals, watch_signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with watch_signals() as interrupt:
        interrupt.check()
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.name == number.name
        with watch_signals() as inner:  # what the command caught before the run watches too
            assert inner is interrupt
        with pytest.raises(Interrupted, match=number.name):
            interrupt.check()
    assert [signal.getsignal(each) for each in SIGNALS] == before
    with watch_signals() as another:
        assert not another.requested


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), watch_signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_raised_once(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with raise_signals():
        with pytest.raises(Signalled, match=number.name) as raised:
            signal.raise_signal(number)
        assert raised.value.number == number
        signal.raise_signal(signal.SIGTERM)  # cleaning up goes on
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.filterwarnings("error")
def test_a_signal_within_a_finaliser_is_not_lost() -> None:
    """Python drops what is raised there."""

    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    hook, start = sys.unraisablehook, time.monotonic()
    with raise_signals():
        with pytest.raises(Signalled, match="SIGTERM"):
            Finalised()
            time.sleep(10)
        assert time.monotonic() - start < 5
        signal.raise_signal(signal.SIGTERM)  # cleaning up goes on
    assert sys.unraisablehook is hook


def test_saving_commands_watch_inside_of_others() -> None:
    """A command may run another one that saves; its own handlers are back afterwards."""
    with raise_signals():
        with watch_signals() as interrupt:
            signal.raise_signal(signal.SIGTERM)
        assert interrupt.requested
        with pytest.raises(Signalled):
            signal.raise_signal(signal.SIGTERM)


def test_a_fresh_interrupt_asks_nothing() -> None:
    Interrupt().check()
