"""Registry version -> verified local folder: the `model_downloader` of Ray's LLMServer.

The engine asks for a version by its engine id `base:name@vN`. What the engine could not serve, or would serve wrongly,
is refused here in one line, before the engine sees a byte of it.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError as JinjaError

from serve.errors import NotReadyError, VersionRefusedError
from serve.registry import Registry
from serve.versions import VersionId
from sft.adapter import MANIFEST, Bundle, TensorInfo, base_fingerprint, base_tensors, check_base
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
        """Refuses a version by its manifest, before anything else of it is downloaded.

        Raises:
            VersionRefusedError: one line with the manifest's field, what the version has and what this server has.
        """
        faults = []
        if bundle.base_fingerprint != self.base_fingerprint:
            other = f"it was trained on another base ({bundle.base_model}) than {self.base_id}, which runs here"
            faults.append(f"base_fingerprint: {other}")
        elif bundle.template_fingerprint != self.template_fingerprint:
            other = "it was trained with another chat template than the base model's, which this server applies"
            faults.append(f"template_fingerprint: {other}")
        if bundle.rank > self.max_rank:
            faults.append(f"rank: its rank {bundle.rank} is above engine.max_lora_rank {self.max_rank}")
        if faults:
            raise VersionRefusedError(f"{version} cannot be served: {MANIFEST}: {'; '.join(faults)}")


@dataclass(frozen=True, slots=True)
class Base:
    """The base model that the engine runs: what a version must agree with, tensor by tensor and token by token."""

    tokenizer: Any
    tensors: Mapping[str, TensorInfo]

    def check(self, folder: Path, bundle: Bundle) -> None:
        """Refuses a downloaded bundle whose weights do not fit, or whose prompts would be other ones here.

        Raises:
            AdapterError: one line that names the file and the field.
        """
        check_base(folder, self.tensors)
        for index, golden in enumerate(bundle.golden):
            field = f"{folder / MANIFEST}: golden.{index}.prompt_ids"
            try:
                ids = self.tokenizer.apply_chat_template(
                    list(golden.messages), add_generation_prompt=True, tokenize=True, return_dict=False
                )
            except (JinjaError, TypeError, ValueError) as error:
                raise AdapterError(f"{field}: the chat template refuses the messages ({error})") from None
            if tuple(ids) != golden.prompt_ids:
                raise AdapterError(f"{field}: the same messages give other prompt ids here than in training")


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
        self._address, self._base_model, self._base_id, self._max_rank = registry, base, base_id, max_rank
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
            folder = self._registry.download(published, self._cache / f"{version}-{published.digest[:16]}")
        except VersionRefusedError:
            raise
        except AdapterError as error:
            raise VersionRefusedError(f"{version} cannot be served: {error}") from None
        try:
            self._base.check(folder, published.bundle)
        except AdapterError as error:
            fault = str(error).replace(f"{folder}/", "")
            raise VersionRefusedError(f"{version} cannot be served: {fault}") from None
        return folder

    @cached_property
    def _registry(self) -> Registry:
        return Registry.open(self._address)

    @cached_property
    def _base(self) -> Base:
        from transformers import AutoTokenizer

        return Base(AutoTokenizer.from_pretrained(self._folder), base_tensors(self._folder))

    @cached_property
    def _limits(self) -> Limits:
        template = self._base.tokenizer.chat_template
        if not isinstance(template, str):
            raise ModelError(f"the tokenizer of {self._base_model} has no single chat template")
        return Limits(self._base_id, base_fingerprint(self._folder), fingerprint(template), self._max_rank)

    @cached_property
    def _folder(self) -> Path:
        return base_folder(self._base_model)


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
