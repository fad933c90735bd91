"""Ctrl-C and SIGTERM: finish what would be lost, then leave."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class Interrupted(BaseException):  # like KeyboardInterrupt, not to be caught by `except Exception`
    """The process was asked to leave, and nothing needs to be finished first."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interruption:
    """Turns SIGINT and SIGTERM into a request to stop.

    Inside `deferred()` the first signal only sets `signum`, for the loop to look at; anywhere else, and from the second
    signal on, `Interrupted` is raised on the spot.

        with Interruption() as interruption:
            prepare()
            with interruption.deferred():
                while not interruption.signum: ...
                save()
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._deferred = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block finish on the first signal."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        first, self.signum = self.signum is None, signum
        # A scheduler sends SIGTERM to every process of a job, and torchrun passes on its own: one wish, not two.
        again = signum == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ
        if not (self._deferred and (first or again)):
            raise Interrupted(signum)

    def __enter__(self) -> "Interruption":
        self._previous = {signum: signal.signal(signum, self._handle) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
