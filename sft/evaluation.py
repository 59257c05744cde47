"""A model under training, looked at: held-out loss by source, and answers to sample prompts.

Losses are exact: the cross-entropy of all trained tokens of a source divided by their number. Which rows share a
forward pass depends on the rows alone, so neither the number of workers nor the micro-batch can change a digit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import DynamicCache

from sft.batch import Layout, Row, collate
from sft.engine import Engine
from sft.mask import Example
from sft.objective import ACCURACY, CROSS_ENTROPY, Objective
from sft.pack import best_fit


@dataclass(frozen=True, slots=True)
class Score:
    """The held-out loss of some rows.

    Rule: `total` is the sum of the cross-entropy over `tokens` trained tokens; of pairs it is the sum of their losses,
    and `right` says in how many of them the chosen answer's reward is above the rejected one's.
    """

    total: float
    tokens: int
    rows: int
    right: int | None = None

    @property
    def loss(self) -> float:
        """Mean cross-entropy per trained token, in nats, or mean loss of a pair."""
        return self.total / (self.tokens if self.right is None else self.rows)

    @property
    def perplexity(self) -> float | None:
        """exp(loss), which stays a number for any loss; None for pairs."""
        if self.right is not None:
            return None
        return math.exp(min(self.loss, 700.0)) if math.isfinite(self.loss) else math.inf

    @property
    def accuracy(self) -> float | None:
        """Share of pairs whose chosen answer's reward is the higher one; None for other rows."""
        return None if self.right is None else self.right / self.rows

    @staticmethod
    def of(scores: Iterable[Score]) -> Score:
        """The score of several sources' rows together, which are all pairs or none."""
        held = list(scores)
        right = [score.right for score in held if score.right is not None]
        return Score(
            math.fsum(score.total for score in held),
            sum(score.tokens for score in held),
            sum(score.rows for score in held),
            sum(right) if right else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """The score as plain values, for JSON; with an accuracy where the rows are pairs."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        values |= {"loss": self.loss, "perplexity": self.perplexity}
        return values if self.right is None else {**values, "accuracy": self.accuracy}


@dataclass(frozen=True, slots=True)
class Sample:
    """An answer of the running weights: greedy tokens, without the stop token that ended it (`ended`)."""

    prompt: str
    ids: tuple[int, ...]
    ended: bool


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The model after `step` steps; the same on every worker, `seconds` aside.

    Rule: `loss` is that of all sources' trained tokens or pairs together, None where no rows are held out; `best` says
    whether it is the lowest of the run's trained weights so far.
    """

    step: int
    epoch: float
    sources: Mapping[str, Score]
    samples: tuple[Sample, ...]
    seconds: float
    best: bool = False

    @property
    def total(self) -> Score | None:
        """All sources together."""
        return Score.of(self.sources.values()) if self.sources else None

    @property
    def loss(self) -> float | None:
        """The held-out loss of all sources together."""
        return self.total.loss if self.total else None

    def to_dict(self, answers: Sequence[str]) -> dict[str, Any]:
        """The evaluation as plain values, for JSON.

        Args:
            answers: the samples' texts.
        """
        total = self.total
        return {
            "step": self.step,
            "epoch": self.epoch,
            "loss": self.loss,
            "perplexity": total.perplexity if total else None,
            **({"accuracy": total.accuracy} if total and total.right is not None else {}),
            "best": self.best,
            "seconds": self.seconds,
            "sources": {name: score.to_dict() for name, score in self.sources.items()},
            "samples": [
                {"prompt": sample.prompt, "answer": answer, "ended": sample.ended}
                for sample, answer in zip(self.samples, answers, strict=True)
            ],
        }


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationPlan:
    """What is evaluated; the same for every worker.

    Rule: rows are laid out as in training (`layout`, `length` tokens, `pad_id`); `prompts` are texts with their ids.
    """

    sources: Mapping[str, Sequence[Example]]
    prompts: Mapping[str, Sequence[int]]
    max_new_tokens: int
    stop_ids: frozenset[int]
    layout: Layout
    length: int
    pad_id: int


class Evaluator:
    """Evaluates an engine's model. All workers must call it together, under any ZeRO stage.

    Args:
        engine: the engine.
        plan: what is evaluated.
        rank: this worker's number.
        objective: what the run minimises.
    """

    def __init__(self, engine: Engine, plan: EvaluationPlan, rank: int, objective: Objective = CROSS_ENTROPY) -> None:
        self._engine = engine
        self._plan = plan
        self._rank = rank
        self._objective = objective
        self._batches = [
            (source, batch)
            for source, examples in plan.sources.items()
            for batch in together(examples, plan.layout, plan.length)
        ]

    def __call__(self, step: int, epoch: float) -> Evaluation:
        """Evaluates the model as it is after `step` steps, and leaves engine and random state as they were."""
        begin = time.perf_counter()
        with self._engine.evaluating():
            scores = self._scores()
            samples = self._samples()
        return Evaluation(step, epoch, scores, samples, time.perf_counter() - begin)

    def _scores(self) -> dict[str, Score]:
        workers = self._engine.workers
        names = ("loss", *self._objective.figures)
        sums = torch.zeros((len(self._batches), len(names)), dtype=torch.float64, device=self._engine.device)
        for first in range(0, len(self._batches), workers):
            # Every worker makes as many passes as the others, which ZeRO-3 needs; the surplus is empty.
            mine = first + self._rank
            batch = self._batches[mine][1] if mine < len(self._batches) else ()
            micro = collate(batch, self._plan.layout, self._plan.pad_id)
            summed, figures = self._objective(self._engine, micro)
            if batch:
                sums[mine] = torch.cat([summed[None], figures])
        if workers > 1 and len(sums):
            dist.all_reduce(sums)  # of each sum all summands but one are 0, so it is exact
        found: dict[str, list[list[float]]] = {source: [] for source in self._plan.sources}
        for (source, _), values in zip(self._batches, sums.tolist(), strict=True):
            found[source].append(values)
        return {
            source: _score(examples, dict(zip(names, map(math.fsum, zip(*found[source], strict=True)), strict=True)))
            for source, examples in self._plan.sources.items()
        }

    def _samples(self) -> tuple[Sample, ...]:
        prompts = list(self._plan.prompts.items())
        engine = self._engine
        if engine.workers == 1 or engine.plan.zero_stage == 3:
            # Sharded weights are gathered for each pass, so all workers must make the same ones.
            return tuple(self._answer(text, ids) for text, ids in prompts)
        mine = [self._answer(text, ids) for text, ids in prompts[self._rank :: engine.workers]]
        shares: list[Any] = [None] * engine.workers
        dist.all_gather_object(shares, mine)
        return tuple(shares[number % engine.workers][number // engine.workers] for number in range(len(prompts)))

    def _answer(self, text: str, prompt: Sequence[int]) -> Sample:
        """Greedy tokens after a prompt, with the key-value cache of one text."""
        engine = self._engine
        cache = DynamicCache()
        following = torch.tensor([prompt], device=engine.device)
        ids: list[int] = []
        for _ in range(self._plan.max_new_tokens):
            token = engine.forward(input_ids=following, cache=cache).argmax()
            if engine.workers > 1 and engine.plan.zero_stage == 3:
                dist.broadcast(token, src=0)  # workers that disagreed on a token would wait for each other for ever
            if int(token) in self._plan.stop_ids:
                return Sample(text, tuple(ids), ended=True)
            ids.append(int(token))
            following = token.reshape(1, 1)
        return Sample(text, tuple(ids), ended=False)


def _score(examples: Sequence[Example], sums: Mapping[str, float]) -> Score:
    right = round(sums[ACCURACY]) if ACCURACY in sums else None
    return Score(sums["loss"], sum(example.trained_tokens for example in examples), len(examples), right)


def together(examples: Sequence[Example], layout: Layout, length: int) -> list[Row]:
    """Which examples share a forward pass: packs of `length` tokens, or as many padded ones of about one length.

    A function of the examples alone; a pass takes no more memory than a training step's.
    """
    lengths = [len(example.input_ids) for example in examples]
    if layout == "packed":
        return [[examples[i] for i in pack] for pack in best_fit(lengths, length)]
    batches: list[list[Example]] = []
    for i in sorted(range(len(examples)), key=lambda i: (-lengths[i], i)):
        # The first of a batch is its longest, to which the others are padded.
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].input_ids) <= length:
            batches[-1].append(examples[i])
        else:
            batches.append([examples[i]])
    return list(batches)
