"""What came of a generation, as numbers, and as lines for people."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from generate.candidate import Outcome, Rejected
from generate.teacher import Asked
from sft.section import Section

REPORT_S = 5.0


class Source(Section):
    """What became of the candidates of one source."""

    candidates: int
    kept: int
    rejected: dict[str, int]


class Requests(Section):
    """What the teacher was asked. `from_record` are those that an earlier run of the same command had asked."""

    asked: int
    from_record: int
    failed: dict[str, int]


class Tokens(Section):
    """Tokens that the teacher counted, those of earlier runs among them."""

    prompt: int
    completion: int


class Summary(Section):
    """A generation. Rule: candidates == kept + all rejected; `stopped` is empty where it reached its target."""

    mode: str
    teacher: str
    seed: int
    target: int
    rounds: int
    candidates: int
    kept: int
    rejected: dict[str, int]
    by_source: dict[str, Source]
    requests: Requests
    tokens: Tokens
    seconds: float
    stopped: str

    @property
    def complete(self) -> bool:
        """Whether there are as many rows as were asked for."""
        return self.kept == self.target

    def lines(self) -> Iterator[str]:
        """The summary for people."""
        share = f" ({self.kept / self.candidates:.0%})" if self.candidates else ""
        yield f"kept {self.kept:,} of {self.candidates:,} candidates{share}; target {self.target:,}"
        for name, source in self.by_source.items():
            yield f"  {name}: kept {source.kept:,} of {source.candidates:,}"
        for reason, count in self.rejected.items():
            yield f"  rejected, {reason}: {count:,}"
        failed = "".join(f", {count:,} failed with {failure}" for failure, count in self.requests.failed.items())
        yield (
            f"{self.requests.asked:,} requests in {self.rounds:,} rounds, {self.requests.from_record:,} of them asked "
            f"before{failed}; {self.tokens.prompt:,} prompt and {self.tokens.completion:,} answer tokens; "
            f"{self.seconds:,.0f} s"
        )
        if self.stopped:
            yield f"stopped: {self.stopped}"


@dataclass
class Tally:
    """Counts outcomes, and says every few seconds how far it is."""

    target: int
    say: Callable[[str], None]
    begun: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)
    round: int = 0
    heard: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        """Counts what became of a candidate."""
        if isinstance(outcome, Rejected):
            self.rejected[outcome.candidate.source, str(outcome.reason)] += 1
        else:
            self.kept[outcome.source] += 1

    def hear(self, stage: str, ended: int, requests: int) -> None:
        """Counts an answer."""
        self.heard += 1
        now = time.monotonic()
        if now - self.said >= REPORT_S:
            self.said = now
            kept = self.kept.total()
            left = f", about {(self.target - kept) / kept * (now - self.begun):,.0f} s to go" if kept else ""
            self.say(
                f"round {self.round}: {stage} {ended:,} of {requests:,}; kept {kept:,} of {self.target:,} rows, "
                f"rejected {self.rejected.total():,}; {self.heard / (now - self.begun):.1f} answers/s{left}"
            )

    def summary(self, mode: str, teacher: str, seed: int, asked: Asked, stopped: str) -> Summary:
        """The final numbers."""
        reasons: Counter[str] = Counter()
        for (_, reason), count in self.rejected.items():
            reasons[reason] += count
        sources = sorted({*self.kept, *(source for source, _ in self.rejected)})
        return Summary(
            mode=mode,
            teacher=teacher,
            seed=seed,
            target=self.target,
            rounds=self.round,
            candidates=self.kept.total() + self.rejected.total(),
            kept=self.kept.total(),
            rejected=dict(reasons.most_common()),
            by_source={source: self._source(source) for source in sources},
            requests=Requests(asked=asked.requests, from_record=asked.from_record, failed=dict(asked.failed)),
            tokens=Tokens(prompt=asked.prompt_tokens, completion=asked.completion_tokens),
            seconds=round(time.monotonic() - self.begun, 3),
            stopped=stopped,
        )

    def _source(self, name: str) -> Source:
        rejected = {reason: count for (source, reason), count in sorted(self.rejected.items()) if source == name}
        kept = self.kept[name]
        return Source(candidates=kept + sum(rejected.values()), kept=kept, rejected=rejected)
