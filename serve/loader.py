"""Registry version -> verified local folder: the `model_downloader` of Ray's LLMServer.

The engine asks for a version by its engine id `base:name@vN`. What the engine could not serve, or would serve wrongly,
is refused here in one line, before the engine sees a byte of it.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from serve.errors import NotReadyError, VersionRefusedError
from serve.registry import Registry
from serve.versions import VersionId
from sft.adapter import Bundle, base_fingerprint
from sft.errors import AdapterError, ModelError
from sft.template import fingerprint

if TYPE_CHECKING:
    from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
    from ray.serve.llm import LLMConfig


@dataclass(frozen=True, slots=True)
class Limits:
    """What a version must fit in order to be served."""

    base_id: str
    base_fingerprint: str
    template_fingerprint: str
    max_rank: int

    def check(self, version: VersionId, bundle: Bundle) -> None:
        """Refuses a version that does not fit.

        Raises:
            VersionRefusedError: one line with what the version has and what this server has.
        """
        faults = []
        if bundle.base_fingerprint != self.base_fingerprint:
            faults.append(f"it was trained on another base ({bundle.base_model}) than {self.base_id}, which runs here")
        elif bundle.template_fingerprint != self.template_fingerprint:
            faults.append("it was trained with another chat template than the base model's, which this server applies")
        if bundle.rank > self.max_rank:
            faults.append(f"its rank {bundle.rank} is above engine.max_lora_rank {self.max_rank}")
        if faults:
            raise VersionRefusedError(f"{version} cannot be served: {'; '.join(faults)}")


class AdapterLoader:
    """Downloads versions from a registry, verifies them and hands them to the engine.

    Args:
        registry: the registry's address.
        base: folder or hub id of the base model that the engine runs.
        base_id: the base model's id for users.
        max_rank: highest rank that the engine can hold.
        cache: folder for downloaded versions; by default one under the system's temporary folder.
        download_timeout_s: how long one version may take.
        max_tries: given by LLMServer; the object store's client retries by itself.
    """

    def __init__(
        self,
        registry: str,
        base: str,
        base_id: str,
        max_rank: int,
        cache: Path | None = None,
        *,
        download_timeout_s: float | None = None,
        max_tries: int = 1,  # noqa: ARG002  (part of LLMServer's contract)
    ) -> None:
        self._address, self._base, self._base_id, self._max_rank = registry, base, base_id, max_rank
        self._cache = cache or Path(tempfile.gettempdir()) / "raysft-adapters"
        self._timeout_s = download_timeout_s
        self._numbers: dict[str, int] = {}

    async def load_model_from_config(
        self,
        lora_model_id: str,
        llm_config: LLMConfig,  # noqa: ARG002  (part of LLMServer's contract)
    ) -> DiskMultiplexConfig:
        """Called by LLMServer with an engine id.

        Raises:
            VersionRefusedError: the version is damaged, or does not fit this server.
            UnknownModelError: there is no such version.
            NotReadyError: the download took too long.
        """
        from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig

        version = VersionId.parse(lora_model_id.removeprefix(f"{self._base_id}:"))
        try:
            async with asyncio.timeout(self._timeout_s):
                folder = await asyncio.to_thread(self.fetch, version)
        except TimeoutError:
            raise NotReadyError(f"{version} was not downloaded within {self._timeout_s:.0f} s; try again") from None
        return DiskMultiplexConfig(
            model_id=lora_model_id,
            max_total_tokens=None,
            local_path=str(folder),
            lora_assigned_int_id=self._numbers.setdefault(lora_model_id, len(self._numbers) + 1),
        )

    def fetch(self, version: VersionId) -> Path:
        """Returns a local folder with the version's whole, verified bundle, which fits this server.

        Raises:
            VersionRefusedError: the version is damaged, or does not fit this server.
            UnknownModelError: there is no such version.
            RegistryError: the registry cannot be read.
        """
        try:
            published = self._registry.get(version)
            self._limits.check(version, published.bundle)
            # The digest keeps a version apart from one of the same name in a registry that was made anew.
            return self._registry.download(published, self._cache / f"{version}-{published.digest[:16]}")
        except VersionRefusedError:
            raise
        except AdapterError as error:
            raise VersionRefusedError(f"{version} cannot be served: {error}") from None

    @cached_property
    def _registry(self) -> Registry:
        return Registry.open(self._address)

    @cached_property
    def _limits(self) -> Limits:
        from transformers import AutoTokenizer

        folder = base_folder(self._base)
        template = AutoTokenizer.from_pretrained(folder).chat_template
        if not isinstance(template, str):
            raise ModelError(f"the tokenizer of {self._base} has no single chat template")
        return Limits(self._base_id, base_fingerprint(folder), fingerprint(template), self._max_rank)


def base_folder(base: str) -> Path:
    """The local folder of a base model: the folder itself, or the hub's local snapshot that the engine runs from.

    Raises:
        ModelError: there is neither.
    """
    folder = Path(base)
    if (folder / "config.json").is_file():
        return folder.absolute()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise ModelError(f"base model {base}: no checkpoint there, and no such model in the hub cache") from None
