"""A run's bundle is a version once."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.publish import publish_once
from serve.registry import Registry
from serve.versions import VersionId
from tests.bundles import tiny_bundle


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.open(str(tmp_path / "registry"), create=True)


def test_the_same_bundle_is_published_once(registry: Registry, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "bundle")
    first, made = publish_once(registry, tmp_path / "bundle", "support")
    again, made_again = publish_once(registry, tmp_path / "bundle", "support")
    assert (made, made_again) == (True, False)
    assert first.id == again.id == VersionId("support", 1)
    other, made_other = publish_once(registry, tmp_path / "bundle", "sales")
    assert (str(other.id), made_other) == ("sales@v1", True)


def test_a_retired_version_is_not_taken_again(registry: Registry, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "bundle")
    first, _ = publish_once(registry, tmp_path / "bundle", "support")
    registry.retire(first.id)
    assert publish_once(registry, tmp_path / "bundle", "support")[0].id == VersionId("support", 2)


def test_an_alias_that_is_there_does_not_move(registry: Registry, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "bundle")
    version, _ = publish_once(registry, tmp_path / "bundle", "support")
    registry.promote("live", version.id, reason="first")
    registry.promote("live", version.id)
    assert [(entry.number, entry.reason) for entry in registry.history("live")] == [(1, "first")]
