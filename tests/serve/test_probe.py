from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from serve.errors import VersionRefusedError
from serve.probe import distance, prove
from serve.versions import VersionId
from sft.adapter import Golden

pytestmark = pytest.mark.anyio
V1 = VersionId("support", 1)
GOLDEN = [
    Golden(messages=({"role": "user", "content": text},), prompt_ids=ids) for text, ids in (("a", (1,)), ("b", (2, 3)))
]
BASE = {1: -0.5, 2: -1.0, 3: -3.0}


async def tokenize(messages: Sequence[Mapping[str, Any]]) -> Sequence[int]:
    return {"a": [1], "b": [2, 3]}[messages[0]["content"]]


def says(*answers: Mapping[int, float]) -> Any:
    left = list(answers)

    async def ask(_: Sequence[int]) -> Mapping[int, float]:
        return left.pop(0) if len(left) > 1 else left[0]

    return ask


async def test_a_version_that_changes_one_prompt_is_proven() -> None:
    await prove(V1, GOLDEN, tokenize, says(BASE, {**BASE, 2: -1.2}), says(BASE))


@pytest.mark.parametrize(
    ("tuned", "base"),
    [
        (says(BASE), says(BASE)),
        (says({1: -0.53, 2: -1.0}), says(BASE, {**BASE, 1: -0.51})),  # no more than four times the noise
    ],
)
async def test_a_version_without_an_effect_is_refused(tuned: Any, base: Any) -> None:
    with pytest.raises(VersionRefusedError, match=r"^support@v1 cannot be served: it has no effect: on the manifest's"):
        await prove(V1, GOLDEN[:1], tokenize, tuned, base)


async def test_other_prompts_are_refused_before_anything_is_asked() -> None:
    async def other(_: Sequence[Mapping[str, Any]]) -> Sequence[int]:
        return [1]

    with pytest.raises(VersionRefusedError, match=r"golden\.1\.prompt_ids: the server makes other prompt ids"):
        await prove(V1, GOLDEN, other, says(), says())


def test_distance() -> None:
    assert distance(BASE, BASE) == 0
    assert distance(BASE, {1: -0.25, 2: -1.0, 9: -4.0}) == 0.25
    assert distance({1: -1.0}, {2: -1.0}) == math.inf
