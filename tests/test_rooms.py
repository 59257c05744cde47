"""The import direction between the rooms, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HTTP = {"fastapi", "httpx", "starlette", "requests", "aiohttp", "uvicorn", "openai"}
SHARED_WITH_SERVE = {"sft.adapter", "sft.template", "sft.errors", "sft.hardware"}
SHARED_WITH_GUARD = {"evals.checkers", "evals.answer", "evals.errors"}


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every imported module, wherever in the file; `from a import b` counts as a.b where that is a module of ours."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            inner = [f"{module}.{alias.name}" for alias in node.names]
            found = [name for name in inner if (ROOT / f"{name.replace('.', '/')}.py").is_file()]
            yield from found or [module]


def room(module: str) -> str:
    return module.split(".", 1)[0]


@pytest.mark.parametrize("path", files("serve"), ids=lambda path: path.name)
def test_serve_shares_only_a_few_files_with_training(path: Path) -> None:
    ours = {module for module in imports(path) if room(module) in ("sft", "jobs", "tests")}
    assert ours <= SHARED_WITH_SERVE
    judging = {module for module in imports(path) if room(module) == "evals"}
    assert judging <= (SHARED_WITH_GUARD if path.stem in ("config", "guard") else set())


@pytest.mark.parametrize("path", files("sft"), ids=lambda path: path.name)
def test_training_knows_nothing_of_serving_nor_of_http(path: Path) -> None:
    assert not {room(module) for module in imports(path)} & ({"serve", "jobs", "evals", "generate", "tests"} | HTTP)


@pytest.mark.parametrize("path", files("evals"), ids=lambda path: path.name)
def test_evaluation_knows_neither_training_nor_serving(path: Path) -> None:
    ours = {module for module in imports(path) if room(module) in ("sft", "serve", "jobs", "generate", "tests")}
    assert ours <= {"sft.errors", "sft.section", "sft.config", "sft.html"}
    asks = path.name == "client.py"
    assert bool({room(module) for module in imports(path)} & HTTP) == asks


@pytest.mark.parametrize("path", files("generate"), ids=lambda path: path.name)
def test_generation_asks_through_the_evaluations_client_alone(path: Path) -> None:
    found = set(imports(path))
    assert not {room(module) for module in found} & ({"serve", "jobs", "tests"} | HTTP)
    ours = {module for module in found if room(module) == "sft"}
    assert ours <= {"sft.errors", "sft.section", "sft.config", "sft.minhash", "sft.shingles"}


@pytest.mark.parametrize("name", ["loop.py", "batch.py", "feed.py", "loss.py", "mask.py"])
def test_files_that_run_without_ray_import_none(name: str) -> None:
    path = ROOT / "sft" / name
    assert "ray" not in {room(module) for module in imports(path)}


def test_the_engine_is_known_to_its_own_files_only() -> None:
    knowing = [path.name for path in files("serve") if "vllm" in {room(module) for module in imports(path)}]
    assert knowing == ["cpu_executor.py", "cpu_worker.py", "server.py", "slots.py"]
