"""What a data set holds: counted once, before anything is trained, so that nothing is lost silently."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft.errors import DataError
from sft.mask import UNTRAINED

QUARANTINE_SHOWN = 3


@dataclass
class SourceCount:
    """Counts of one source."""

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class Survey:
    """Adds up PREPARED tables: counts by source, the rows that were refused, and a fingerprint of those kept.

    The fingerprint is a sum over row ids (which hold a content hash), so it does not depend on order or blocks.
    """

    def __init__(self) -> None:
        self.sources: dict[str, SourceCount] = {}
        self.refused: list[dict[str, Any]] = []
        self._sum = 0

    def add(self, table: pa.Table) -> None:
        """Counts a PREPARED table."""
        for row in table.select(["id", "source", "file", "position", "reason", "field", "message"]).to_pylist():
            count = self.sources.setdefault(row["source"], SourceCount())
            count.rows += 1
            if row["reason"]:
                count.dropped[row["reason"]] += 1
                self.refused.append(row)
            else:
                count.kept += 1
                self._sum += int.from_bytes(hashlib.blake2b(row["id"].encode(), digest_size=16).digest())
        lengths = pc.list_value_length(table.column("input_ids")).to_pylist()
        trained = _trained_lengths(table.column("labels").combine_chunks())
        for source, length, labels in zip(table.column("source").to_pylist(), lengths, trained, strict=True):
            count = self.sources[source]
            count.tokens += length
            count.trained_tokens += labels
            count.longest = max(count.longest, length)

    @property
    def rows(self) -> int:
        """Rows read."""
        return sum(count.rows for count in self.sources.values())

    @property
    def kept(self) -> int:
        """Rows that are trained on."""
        return sum(count.kept for count in self.sources.values())

    @property
    def tokens(self) -> int:
        """Tokens of the kept rows."""
        return sum(count.tokens for count in self.sources.values())

    @property
    def trained_tokens(self) -> int:
        """Tokens that carry a label."""
        return sum(count.trained_tokens for count in self.sources.values())

    @property
    def dropped(self) -> Counter[str]:
        """Refused rows by reason."""
        return sum((count.dropped for count in self.sources.values()), Counter())

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the kept rows, as checkpoints and bundles carry it."""
        return f"{self._sum % (1 << 128):032x}"

    def check(self, max_bad_fraction: float) -> None:
        """Refuses a data set that is not fit to train on.

        Raises:
            DataError: there are no rows, none was kept, or more than the allowed share is bad.
        """
        if not self.rows:
            raise DataError("the data holds no rows; check data.sources")
        bad = self.rows - self.kept
        if self.kept and bad <= max_bad_fraction * self.rows:
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        shown = "\n".join(f"  - {_place(row)}: {row['message']}" for row in self.refused[:QUARANTINE_SHOWN])
        allowed = (
            "nothing is left to train on"
            if not self.kept
            else f"the limit is {max_bad_fraction:.1%} (data.max_bad_fraction)"
        )
        raise DataError(
            f"{bad} of {self.rows} rows cannot be used ({reasons}); {allowed}. The first:\n{shown}\n"
            "`python -m jobs.inspect_data` with the same config shows all of them."
        )

    def quarantine(self) -> bytes:
        """The refused rows as JSON lines: place, reason, field and message; never the content."""
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.refused).encode()

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain values, for JSON."""
        return {
            "rows": self.rows,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "fingerprint": self.fingerprint,
            "sources": {
                name: {
                    "rows": count.rows,
                    "kept": count.kept,
                    "dropped": dict(count.dropped),
                    "tokens": count.tokens,
                    "trained_tokens": count.trained_tokens,
                    "longest": count.longest,
                }
                for name, count in self.sources.items()
            },
        }


def survey(tables: Iterable[pa.Table]) -> Survey:
    """Counts all tables of a data set."""
    counted = Survey()
    for table in tables:
        counted.add(table)
    return counted


def _trained_lengths(labels: pa.ListArray) -> list[int]:
    trained = pc.not_equal(labels.flatten(), UNTRAINED)
    rows = pc.list_parent_indices(labels).filter(trained)
    counts: list[int] = np.bincount(rows.to_numpy(), minlength=len(labels)).tolist()
    return counts


def _place(row: dict[str, Any]) -> str:
    where = f"{row['file']}:{row['position']}"
    return f"{where} {row['reason']} in {row['field']}" if row["field"] else f"{where} {row['reason']}"
