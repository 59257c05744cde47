from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser

from serve.registry import Registry
from serve.versions import VersionId
from tests.browser.chromium import chromium
from tests.browser.storyteller import Storyteller
from tests.registries import filled_registry
from tests.serve.served import served
from tests.serve.stand_in import gateway_app


# Of the package, not the session: a browser that stays up takes the cores of all later tests.
@pytest.fixture(scope="package")
async def browser(anyio_backend: str) -> AsyncIterator[Browser]:  # noqa: ARG001  (anyio wants it named)
    async with chromium() as browser:
        yield browser


@pytest.fixture(scope="package")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Holds `support@v1`, with the alias `support`, and `support@v2`; to be read only."""
    made = filled_registry(tmp_path_factory.mktemp("browser") / "registry", 2)
    made.promote("support", VersionId("support", 1))
    return made


@pytest.fixture
def engine() -> Storyteller:
    return Storyteller()


@pytest.fixture
async def url(engine: Storyteller, registry: Registry) -> AsyncIterator[str]:
    """A gateway without keys."""
    async with served(gateway_app(engine, registry)) as port:
        yield f"http://127.0.0.1:{port}"
