from __future__ import annotations

from typing import Any

import pytest

from sft.config import TrainConfig, read_config
from sft.errors import ConfigError

BASE: dict[str, Any] = {
    "name": "r",
    "storage": "/runs",
    "model": {"base": "/m"},
    "data": {"sources": [{"path": "rows.jsonl"}]},
}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"evaluate": {"use": "best", "every_steps": 5}}, "use: best needs held-out rows: name sources, or set share"),
        ({"evaluate": {"share": 0.1, "early_stopping": {}}}, "early_stopping needs every_steps"),
        (
            {"evaluate": {"share": 0.1, "every_steps": 1, "use": "best", "keep_best": False}},
            "evaluate: use: best needs keep_best",
        ),
        ({"evaluate": {"share": 0.6}}, "evaluate.share: Input should be less than or equal to 0.5, got 0.6"),
        ({"evaluate": {"sources": [{"path": "a", "cap": 3}]}}, "weight and cap of a are not read here"),
        ({"evaluate": {"sources": [{"path": "x/rows.jsonl"}]}}, "rows.jsonl is a source of data and of evaluate"),
        ({"storage": "s3://b/runs", "tracking": {"tensorboard": True}}, "tracking.tensorboard needs a local storage"),
        ({"tracking": {"wandb": {"mode": "on"}}}, "tracking.wandb.mode: Input should be 'online' or 'offline'"),
        ({"evaluate": {"every": 3}}, "evaluate.every: no such key; did you mean evaluate.every_steps?"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(TrainConfig, None, {**BASE, **changes})
    assert fault in str(caught.value)


def test_nothing_is_evaluated_or_tracked_unless_asked() -> None:
    config = read_config(TrainConfig, None, BASE)
    assert (config.evaluate.enabled, config.evaluate.has_rows, config.tracking.tensorboard) == (False, False, False)
    prompts = read_config(TrainConfig, None, {**BASE, "evaluate": {"prompts": ["Hi?"]}}).evaluate
    assert (prompts.enabled, prompts.has_rows) == (True, False)
