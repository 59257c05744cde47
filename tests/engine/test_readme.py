"""The README's commands, run as a reader would run them; training, registry, server and client together."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cli
from sft.adapter import verify_bundle
from sft.config import TrainConfig
from tests.engine.conftest import BASE, Endpoint

pytestmark = [pytest.mark.engine, pytest.mark.e2e, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
URL = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]
ELSEWHERE = {
    "make demo": "the demo has its own target",
    "make test": "this is it",
    "python -m jobs.serve --config jobs/configs/demo-serve.yaml": "the endpoint of these tests runs that application",
    "python -m jobs.adapters promote support@v1 --alias best --gate jobs/configs/support-gate.yaml "
    f"--endpoint {URL}": "a gate for a version that was tuned in earnest; tests/engine/test_gate.py has gates",
}
SUBMIT = [command for command in COMMANDS if command.startswith("ray job submit")]
RUN = [command for command in COMMANDS if command not in ELSEWHERE and command not in SUBMIT]


@pytest.fixture(scope="module")
def workspace(endpoint: Endpoint, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose demo model and registry are those of the running endpoint."""
    folder = tmp_path_factory.mktemp("readme")
    for room in ("jobs", "sft", "serve", "evals", "generate"):
        (folder / room).symlink_to(ROOT / room)
    (folder / "build/demo").mkdir(parents=True)
    (folder / "build/demo/model").symlink_to(demo_model)
    (folder / "build/demo/registry").symlink_to(endpoint.registry.address.removeprefix("file://"))
    return folder


def test_every_command_is_known() -> None:
    assert set(ELSEWHERE) <= set(COMMANDS)
    assert len(SUBMIT) == 1
    assert len(RUN) >= 8


@pytest.mark.long
def test_the_commands_run_in_their_order(endpoint: Endpoint, workspace: Path) -> None:
    outputs = {}
    for command in RUN:
        words = shlex.split(command.replace(URL, endpoint.url))
        assert words[0] == "python"
        done = subprocess.run([sys.executable, *words[1:]], cwd=workspace, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        outputs[command] = done.stdout
    trained = next(text for command, text in outputs.items() if "--train.max_steps 2" in command)
    assert "step 2/2" in trained
    assert "published mine@v1" in trained

    # What was trained a moment ago is served by the endpoint that has been running all along.
    for model in ("mine", "best"):
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
        answer = endpoint.client.post("/v1/chat/completions", json=body)
        assert (answer.status_code, answer.headers["x-raysft-version"]) == (200, "mine@v1"), answer.text

    # The prompt ids that training used are those that the server makes (contract between the two halves).
    for golden in verify_bundle(workspace / "build/demo/runs/mine/bundle").golden:
        asked = endpoint.client.post("/tokenize", json={"model": BASE, "messages": list(golden.messages)})
        assert tuple(asked.json()["tokens"]) == golden.prompt_ids


def test_the_openai_snippet_runs(endpoint: Endpoint) -> None:
    (snippet,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", snippet.replace(URL, endpoint.url)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_the_submitted_command_line_is_valid() -> None:
    words = shlex.split(SUBMIT[0])
    job = words[words.index("--") + 1 :]
    assert job[:3] == ["python", "-m", "jobs.train"]
    _, config = cli.configure(cli.parser("train", ""), TrainConfig, job[3:])
    assert config.storage == "s3://BUCKET/runs"


def test_every_linked_file_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 8
    assert not [link for link in links if not (ROOT / link).exists()]
