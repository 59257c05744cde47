"""lm-evaluation-harness at the endpoint, as its users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.engine.conftest import Endpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]
ROWS = ["Name a colour.", "Name an animal."]


def test_the_harness_scores_an_alias(endpoint: Endpoint, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": question, "answer": "x"}) + "\n" for question in ROWS))
    task = {
        "task": "raysft_probe",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "raysft_probe.yaml").write_text(yaml.safe_dump(task))
    arguments = f"model=support,base_url={endpoint.url}/v1/chat/completions,num_concurrent=2"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions", "--model_args", arguments]
    command += ["--tasks", "raysft_probe", "--include_path", str(tmp_path), "--apply_chat_template", "--log_samples"]
    caches = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out")],
        env={**os.environ, **caches},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert len(answers) == len(ROWS)
    assert all(answers)
