"""Signals that end a run in good order: the state is saved first. A second one ends it at once."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

from harness import parallel

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}  # schedulers send SIGTERM; shells know 128 + the signal's number


class Stopped(BaseException):
    """A signal asked the run to end; `code` is the exit code. Like KeyboardInterrupt no Exception, so that none catches it."""

    def __init__(self, code: int):
        self.code = code


class Stop:
    """Turns the first SIGINT or SIGTERM into `Stopped`: at once, or, where it would leave half a step, at the end of it.

    Of several processes the first stops, and the others with it.
    """

    def __init__(self):
        self.code, self.waiting = None, False

    def __enter__(self):
        here = threading.current_thread() is threading.main_thread()  # elsewhere Python sets no handlers
        self.before = {number: signal.signal(number, self.asked) for number in SIGNALS} if here else {}
        self.hook, sys.unraisablehook = sys.unraisablehook, self.unraisable
        return self

    def __exit__(self, *_):
        sys.unraisablehook = self.hook
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def asked(self, number: int, frame) -> None:
        if not parallel.first():
            return
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)  # the second ends the process
        self.code = SIGNALS[number]  # type: ignore[index]
        if not self.waiting:
            raise Stopped(self.code)

    def unraisable(self, what) -> None:
        """Python drops what is raised within a `__del__` (a progress bar's) and prints it: the next `after` ends the run."""
        if not isinstance(what.exc_value, Stopped):
            self.hook(what)

    @contextlib.contextmanager
    def after(self) -> Iterator[None]:
        """What is begun here is ended before the run stops."""
        self.waiting = True
        yield
        self.waiting = False
        if self.code:
            raise Stopped(self.code)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """What a signal ends. After it a run says how it ended, which no first signal cuts off."""
        try:
            yield
        finally:
            self.waiting = True
