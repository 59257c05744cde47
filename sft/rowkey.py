"""Row ids -> 64-bit numbers, whole columns at a time: what draws a sub-sample without holding a position or a list.

A row's hash depends on the bytes of its id alone, never on its neighbours, its block or the process.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Hashes = npt.NDArray[np.uint64]

_WORD = 8


def hash_ids(ids: pa.ChunkedArray) -> Hashes:
    """Hashes a column of row ids.

    Args:
        ids: strings, shape (rows,), without nulls.

    Returns:
        Shape (rows,).
    """
    column = pa.concat_arrays([chunk.cast(pa.large_binary()) for chunk in ids.chunks]) if ids.num_chunks else None
    if column is None or not len(column):
        return np.empty(0, np.uint64)
    _, offsets_buffer, data = column.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[column.offset : column.offset + len(column) + 1]
    # Every 8 bytes as one little-endian number, read where they lie; the padding keeps the last word inside the buffer.
    padded = (data.to_pybytes() if data is not None else b"") + bytes(_WORD)
    words = np.ndarray((len(padded) - _WORD + 1,), "<u8", padded, strides=(1,))
    begins, lengths = offsets[:-1], np.diff(offsets)
    hashes = _mix(lengths.astype(np.uint64))
    for place in range(0, int(lengths.max()), _WORD):
        rows = np.flatnonzero(lengths > place)
        word = words[begins[rows] + place]
        unused = np.clip(_WORD - (lengths[rows] - place), 0, _WORD - 1).astype(np.uint64) * np.uint64(8)
        hashes[rows] = _mix(hashes[rows] ^ (word & (~np.uint64(0) >> unused)))
    return hashes


def salt(*parts: object) -> int:
    """A 64-bit number for a draw: another draw, another number."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def row_keys(hashes: Hashes, salts: int | Hashes) -> Hashes:
    """The places of rows in a random order: different rows have different keys, and each salt makes another order.

    Args:
        hashes: of row ids, shape (rows,).
        salts: one for all rows, or shape (rows,).
    """
    return _mix(hashes ^ np.asarray(salts, np.uint64))


def _mix(numbers: Hashes) -> Hashes:
    """Mixes bits well and one to one (the finaliser of SplitMix64, after a step of its counter)."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
