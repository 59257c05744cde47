"""What `python -m jobs.train --preflight` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from sft.memory import GIB
from sft.preflight import Preflight


def lines(found: Preflight) -> Iterator[str]:
    """One line a finding, then the memory of a worker and which cards it fits, then the outcome."""
    for finding in found.findings:
        text = f"{finding.text}. {finding.remedy[0].upper()}{finding.remedy[1:]}" if finding.remedy else finding.text
        yield f"{finding.state:8} {finding.check:9} {text}"
    if found.memory is not None:
        yield f"\nmemory of a worker, in GiB, where {found.trained_share:.0%} of tokens are trained"
        for part, size in found.memory.parts().items():
            yield f"  {part:17} {size / GIB:7.2f}"
        yield f"  {'total':17} {found.memory.total / GIB:7.2f}  (a layer's backward pass and the logits take turns)"
    if found.verdicts:
        yield "\none worker on one GPU"
    for verdict in found.verdicts:
        told: str = verdict.verdict
        if told != "fits":
            told += f"; fits with {', '.join(verdict.changes)}" if verdict.changes else "; and no setting changes that"
        yield f"  {verdict.card:11} {verdict.gib:6.1f} GiB  {told}"
    states = [finding.state for finding in found.findings]
    faults, warnings = states.count("fault"), states.count("warning")
    outcome = "the run can start" if found.sound else "mend the faults first"
    yield f"\n{faults} fault(s), {warnings} warning(s): {outcome}"


def plain(found: Preflight) -> dict[str, Any]:
    """The same as plain data; memory in bytes."""
    memory = found.memory
    return {
        "sound": found.sound,
        "findings": [dataclasses.asdict(finding) for finding in found.findings],
        "trained_share": found.trained_share,
        "memory": None if memory is None else {**memory.parts(), "total": memory.total},
        "verdicts": [dataclasses.asdict(verdict) for verdict in found.verdicts],
    }
