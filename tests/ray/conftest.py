from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.heads import Head, ray_head


@pytest.fixture(scope="package")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """One Ray head for all tests of this folder."""
    with ray_head(tmp_path_factory.mktemp("head")) as running:
        yield running


@pytest.fixture(scope="package")
def cluster(head: Head) -> Iterator[str]:
    """Connects this process to the head; gives its address."""
    import ray

    from sft.cluster import connect

    connect(head.address, num_cpus=None, needed_cpus=1)
    yield head.address
    ray.shutdown()
