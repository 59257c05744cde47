"""Which training rows are set aside for evaluation: a share of them, by their content alone.

Rows of the same content are on the same side wherever they lie, whatever the seed, and a larger share holds a smaller
one. So two runs on the same rows can be compared, and no row is trained that is evaluated.
"""

from __future__ import annotations

import hashlib

CONTENT_BYTES = 6
"""Bytes of the content hash in a row's id."""


def content_hash(raw: bytes) -> str:
    """The hash of a row's bytes that its id ends with, as hexadecimal digits."""
    return hashlib.blake2b(raw, digest_size=CONTENT_BYTES).hexdigest()


def place(row_id: str) -> float:
    """Where a row lies among all contents, at random from 0 to 1; the turns of a split row lie together.

    Args:
        row_id: `SOURCE/FILE:POSITION:HASH`, and `#TURN` after it where the row was split.
    """
    return int(row_id.rsplit(":", 1)[1].split("#", 1)[0], 16) / (1 << 8 * CONTENT_BYTES)


def is_set_aside(row_id: str, share: float) -> bool:
    """Whether a row is in the share of the rows that is evaluated and not trained."""
    return place(row_id) < share
