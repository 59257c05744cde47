"""A finished run's bundle in a registry: a version once, however often the job is run again."""

from __future__ import annotations

from pathlib import Path

from serve.registry import Registry
from serve.versions import Version
from sft.adapter import verify_bundle


def publish_once(registry: Registry, bundle: Path, name: str) -> tuple[Version, bool]:
    """Publishes a bundle, or takes the newest version, not retired, that holds the very same files.

    Returns:
        The version, and whether it was made now.

    Raises:
        AdapterError: the bundle is not whole or not sound.
        RegistryError: the registry cannot be written, or the name cannot be one.
    """
    files = verify_bundle(bundle).files
    retired = registry.contents().retired
    same = [found for found in registry.versions(name) if found.bundle.files == files and found.id not in retired]
    return (same[-1], False) if same else (registry.publish(bundle, name), True)
