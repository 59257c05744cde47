"""The end of a replica, in good time and with nothing left of it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
from typing import NoReturn

logger = logging.getLogger("ray.serve")

_GUARD = 'read -r line; kill -9 "$@"'
"""Waits for the end of its input, which comes when the process that holds the other end is gone, however it went."""


def tie_children() -> subprocess.Popen[bytes]:
    """Has the processes that this one started end with it, even where it is killed or they hang.

    An engine's process does not notice that its replica is gone, and would keep its memory for ever. The guard that is
    returned must be kept for as long as they are to live.
    """
    children = [str(child.pid) for child in multiprocessing.active_children()]
    return subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "guard", *children], stdin=subprocess.PIPE, start_new_session=True
    )


def leave(why: str) -> NoReturn:
    """Ends this process at once.

    Serve goes round a process that is gone at the next request, and starts another. One that only says that it is
    unwell gets requests until three checks have failed, and is then waited for until its requests end, which they never
    do.
    """
    logger.critical("this replica ends: %s", why)
    logging.shutdown()
    os._exit(1)
