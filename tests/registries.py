"""Registries for tests."""

from __future__ import annotations

from pathlib import Path

from serve.registry import Registry
from tests.bundles import tiny_bundle


def filled_registry(folder: Path, count: int = 3) -> Registry:
    """A registry in a folder with support@v1 and so on, each of a bundle of its own: bundle-1 and so on beside it."""
    registry = Registry.open(folder, create=True)
    for seed in range(1, count + 1):
        registry.publish(made_bundle(folder.parent, seed), "support")
    return registry


def made_bundle(folder: Path, seed: int) -> Path:
    """A bundle in a folder of its own, made where it is missing."""
    bundle = folder / f"bundle-{seed}"
    if not bundle.exists():
        tiny_bundle(bundle, seed=seed)
    return bundle
