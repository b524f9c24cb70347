"""A polite end: SIGTERM and Ctrl-C let the step finish, so that the run can save and be resumed."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType


class Interrupt:
    """Remembers the first SIGINT or SIGTERM while it is entered; a second Ctrl-C stops at once.

    with Interrupt() as interrupt:
        for step in ...:
            ...
            if interrupt.has_come():
                save()
                raise SystemExit(interrupt.exit_code)
    """

    def __init__(self, agree: Callable[[bool], bool] = bool) -> None:
        """
        Args:
            agree: tells whether it is true of any process of the run; all of them ask at the same time.
        """
        self.received: signal.Signals | None = None  # once all know of it
        self._noted: signal.Signals | None = None
        self._agree = agree

    def has_come(self) -> bool:
        """Whether a signal has come, to any process of the run; from then on `received` is set in all of them."""
        if self._agree(self._noted is not None):
            self.received = self._noted or signal.SIGTERM
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """What shells expect of a process that a signal ended."""
        return 128 + (self.received or 0)

    def __enter__(self) -> "Interrupt":
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._noted is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._noted = signal.Signals(number)
