"""What the workers tell while they train, and the thread of the driver that hears it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sft.evaluation import Evaluation
from sft.loop import StepReport
from sft.report import Reporter

POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Notice:
    """A word from the workers to whoever watches the run."""

    text: str


@dataclass(frozen=True, slots=True)
class Started:
    """A group of so many workers has its places."""

    workers: int


class Listener:
    """Hands the workers' words to the reporter, and ends a run that waits for workers in vain.

    Args:
        queue: a Ray queue of StepReports, Evaluations, Notices and Starteds.
        reporter: takes the steps and evaluations.
        say: prints a line.
        lacking: says what the cluster lacks to run the fewest workers, None where it lacks nothing.
        patience: seconds without a word after which a run that lacks something is ended; None never ends it.
    """

    def __init__(
        self,
        queue: Any,
        reporter: Reporter,
        say: Callable[[str], None],
        lacking: Callable[[], str | None],
        patience: float | None,
    ) -> None:
        self.gave_up: str | None = None
        self._queue = queue
        self._reporter = reporter
        self._say = say
        self._lacking = lacking
        self._patience = patience
        self._groups = 0
        self._heard = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after what is in the queue."""
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        from ray.exceptions import RayError
        from ray.util.queue import Empty

        while True:
            stopping = self._stop.is_set()
            try:
                told: StepReport | Evaluation | Notice | Started = self._queue.get(timeout=POLL_SECONDS)
            except Empty:
                if stopping:
                    return
                self._check_patience()
            except RayError:
                return
            else:
                self._heard = time.monotonic()
                self._tell(told)

    def _tell(self, told: StepReport | Evaluation | Notice | Started) -> None:
        if isinstance(told, StepReport):
            self._reporter.step(told)
        elif isinstance(told, Evaluation):
            self._reporter.evaluation(told)
        elif isinstance(told, Notice):
            self._say(told.text)
        else:
            if self._groups:
                self._say(f"a new group of {told.workers} worker(s) has started")
            self._groups += 1

    def _check_patience(self) -> None:
        waited = time.monotonic() - self._heard
        if self.gave_up or self._patience is None or waited < self._patience:
            return
        busy = None if self._groups else "room for the workers, which other work holds at present"
        self.gave_up = self._lacking() or busy
        if self.gave_up:
            # As Ctrl-C: it is the way in which Ray Train ends a run from the outside.
            os.kill(os.getpid(), signal.SIGINT)
