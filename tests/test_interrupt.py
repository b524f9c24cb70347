"""A signal is remembered; a second Ctrl-C is not waited for; what came before comes back."""

import os
import signal

import pytest

from kdtune.interrupt import Interrupt


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_is_remembered(number: signal.Signals, code: int) -> None:
    with Interrupt() as interrupt:
        assert interrupt.received is None
        os.kill(os.getpid(), number)
        assert interrupt.has_come()
        assert interrupt.received is number
        assert interrupt.exit_code == code


def test_nobody_acts_before_all_know() -> None:
    """A signal that comes after they have agreed waits for the next time that they do."""
    answers = iter([False, True, True])
    with Interrupt(lambda _: next(answers)) as interrupt:
        assert not interrupt.has_come()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.received is None
        assert interrupt.has_come()
        assert interrupt.received is signal.SIGINT
    with Interrupt(lambda _: next(answers)) as elsewhere:
        assert elsewhere.has_come()
        assert elsewhere.received is signal.SIGTERM


def test_a_second_ctrl_c_stops_at_once() -> None:
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may repeat itself
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.has_come()
        assert interrupt.received is signal.SIGTERM


def test_handlers_come_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with Interrupt():
        assert signal.getsignal(signal.SIGINT) != before[signal.SIGINT]
    assert {number: signal.getsignal(number) for number in before} == before
