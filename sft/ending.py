"""What is told of a run when it ends, however it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sft import storage
from sft.record import read_record
from sft.run import RunFolder
from sft.run_page import page
from sft.trackers import Status, Trackers


@contextmanager
def ending(folder: RunFolder, tracked: Trackers, say: Callable[[str], None]) -> Iterator[None]:
    """Ends the trackers and writes the run's report page after what runs inside, or after its failure."""
    status: Status = "failed"
    try:
        yield
        status = "finished"
    except KeyboardInterrupt:
        status = "stopped"
        raise
    finally:
        tracked.finish(status)
        try:
            storage.write(folder.report, page(read_record(folder), status).encode("utf-8", "replace"))
            say(f"report in {folder.report}")
        except Exception as error:  # a page is never worth a run
            say(f"warning: no report page could be written ({type(error).__name__}: {error})")
