"""The preflight's look at the registry, which is reached by other means than a run's storage."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

from serve.errors import RegistryError
from serve.store import open_store

if TYPE_CHECKING:
    from sft.preflight import Finding


def check_registry(address: str) -> Iterator[Finding]:
    """Creates, reads and deletes a small object in a registry; it makes the folder of a new one.

    Raises:
        RegistryError: the registry cannot be used.
    """
    from sft.preflight import Finding  # with it comes PyTorch, which takes seconds

    store = open_store(address, create=True)
    key, content = f"preflight/{secrets.token_hex(8)}", secrets.token_bytes(64)
    try:
        if not store.create(key, content) or store.read(key) != content:
            raise RegistryError(f"registry {address}: what is read is not what was written")
    finally:
        store.delete([key])
    yield Finding("registry", "ok", f"{address} can be written, read and deleted")
