"""Signals: the first waits for the step, the second does not."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from marlinctl.system.signals import SIGNALS, Stopping


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Python's own handler of SIGINT: a shell that runs tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_ignored_signal_stays_ignored() -> None:
    """A run in the background would save a state after every step, and never stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Stopping() as stopping:
        signal.raise_signal(signal.SIGINT)
        assert not stopping.asked
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_the_first_signal_is_remembered_and_raised_again() -> None:
    """A step that is cut off is lost; a signal that is swallowed leaves a run that nobody can stop."""
    before = signal.getsignal(signal.SIGINT)
    with Stopping() as stopping:
        signal.raise_signal(signal.SIGINT)
        assert stopping.asked == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is before, "a second Ctrl-C acts at once"
        with pytest.raises(KeyboardInterrupt):
            stopping.raise_again()
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_come_back() -> None:
    """A program that uses marlinctl as a library must get its own handlers back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with Stopping() as stopping:
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
    assert not stopping.asked and {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_every_signal_that_ends_a_run_waits_for_the_step(number: signal.Signals) -> None:
    """A terminal that is closed would cost the block of an hour that a Ctrl-C does not cost."""
    heard: list[int] = []
    before = signal.signal(number, lambda got, _frame: heard.append(got))
    try:
        with Stopping() as stopping:
            signal.raise_signal(number)
            assert stopping.asked == number and not heard
            stopping.raise_again()
            assert heard == [number]
    finally:
        signal.signal(number, before)


def test_what_a_second_signal_does_fits_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    """The handler writes without the console, which breaks lines: at 80 columns the end would stand alone on a second line."""
    with Stopping() as stopping:
        signal.raise_signal(signal.SIGINT)
        assert stopping.asked
    said = capfd.readouterr().err
    assert "press again to stop at once and lose it" in said and max(map(len, said.splitlines())) <= 78
