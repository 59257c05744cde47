"""The teacher: asked once for each thing, remembered for good."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from evals.client import FAILED_IN_A_ROW, Request, is_outage
from evals.records import Key, Record, write_record
from evals.suite import fingerprint
from generate.asking import Asks
from generate.round import Question, Reply
from sft.errors import RaysftError


class TeacherError(RaysftError):
    """The teacher is dead or refuses every request. What it answered before is kept."""


@dataclass
class Asked:
    """What the teacher was asked so far, this time and before."""

    requests: int = 0
    from_record: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Teacher:
    """Answers questions from the record where it can, and else asks.

    Args:
        model: the model to ask.
        extra: further fields of every request.
        asks: how requests are sent.
        records: what it answered before; grows.
        file: where answers are kept, as they come.
        heard: called after each answer with the stage, and with how many of how many requests have ended.
    """

    def __init__(
        self,
        model: str,
        extra: Mapping[str, Any],
        asks: Asks,
        records: dict[Key, Record],
        file: IO[str],
        heard: Callable[[str, int, int], None],
    ) -> None:
        self._model, self._extra, self._asks, self._heard = model, extra, asks, heard
        self._records, self._file = records, file
        self._unsure: list[Record] = []
        self.asked = Asked()

    def ask(self, number: int, stage: str, questions: Sequence[Question]) -> list[Reply]:
        """Asks the questions of one stage of a round.

        A request that failed for good is one reply without an answer, also in a later run. Only failures after which
        nothing but failures came are forgotten where the teacher is taken for dead: the next run asks again.

        Returns:
            A reply for each question, in their order.

        Raises:
            TeacherError: too many requests failed in a row.
            EvaluationError: the endpoint refuses the key or the model.
        """
        requests = [self._request(stage, f"{number}-{place}", one) for place, one in enumerate(questions)]
        missing = [one for one in requests if self._answered(one) is None]
        if missing:
            self._ask(stage, missing)
        records = [self._records[one.record.key] for one in requests]
        self._count(records, len(records) - len(missing))
        return [Reply.of(record) for record in records]

    def _request(self, stage: str, row: str, question: Question) -> Request:
        body = {**self._extra, **question.body}
        asked = fingerprint({"route": question.route, **body})
        return Request(Record(stage, self._model, row, 0, asked), body, question.route)

    def _answered(self, request: Request) -> Record | None:
        record = self._records.get(request.record.key)
        return record if record is not None and record.request == request.record.request else None

    def settle(self) -> None:
        """Writes down the last failures: what was made without those answers stands."""
        for record in self._unsure:
            write_record(self._file, record)
        self._unsure.clear()

    def _ask(self, stage: str, requests: Sequence[Request]) -> None:
        ended = 0
        for record in self._asks(requests):
            ended += 1
            self._records[record.key] = record
            self._unsure.append(record)
            if not is_outage(record.failure):
                self.settle()
            if len(self._unsure) >= FAILED_IN_A_ROW:
                break
            self._heard(stage, ended, len(requests))
        if ended < len(requests) or len(self._unsure) >= FAILED_IN_A_ROW:
            last = self._unsure[-1] if self._unsure else None
            why = f", the last time with {last.failure}: {last.detail}" if last else ""
            raise TeacherError(
                f"the teacher failed {FAILED_IN_A_ROW} times in a row{why}. Its answers are kept: give the same "
                "command again when it is back"
            )

    def _count(self, records: Sequence[Record], from_record: int) -> None:
        asked = self.asked
        asked.requests += len(records)
        asked.from_record += from_record
        asked.failed.update(record.failure for record in records if record.failure)
        asked.prompt_tokens += sum(record.prompt_tokens or 0 for record in records)
        asked.completion_tokens += sum(record.completion_tokens or 0 for record in records)
