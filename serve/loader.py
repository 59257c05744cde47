"""Registry version -> verified local folder, and how its prompts are made.

What the engine could not serve, or would serve wrongly, is refused here in one line, before the engine sees a byte of
it.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError as JinjaError

from serve.errors import NotReadyError, VersionRefusedError
from serve.registry import Registry
from serve.versions import VersionId
from sft.adapter import MANIFEST, TEMPLATE, Bundle, TensorInfo, base_fingerprint, base_tensors, check_base
from sft.errors import AdapterError, ModelError
from sft.template import fingerprint

DOWNLOAD_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """A version on local disk, proven to fit this server.

    Rule: `template` is the chat template that its prompts are made with, None where it is the base model's own;
    `stop_ids` are the ids that end its turns beside the base model's.
    """

    version: VersionId
    folder: Path
    bundle: Bundle
    template: str | None
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a version must fit in order to be served."""

    base_id: str
    base_fingerprint: str
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
        if bundle.rank > self.max_rank:
            faults.append(f"rank: its rank {bundle.rank} is above engine.max_lora_rank {self.max_rank}")
        if faults:
            raise VersionRefusedError(f"{version} cannot be served: {MANIFEST}: {'; '.join(faults)}")


@dataclass(frozen=True, slots=True)
class Base:
    """The base model that the engine runs: what a version must agree with, tensor by tensor and token by token."""

    tokenizer: Any
    tensors: Mapping[str, TensorInfo]
    stop_ids: frozenset[int]

    @property
    def template(self) -> str:
        """The base model's own chat template."""
        template = self.tokenizer.chat_template
        if not isinstance(template, str):
            raise ModelError("the base model's tokenizer has no single chat template")
        return template

    def check(self, folder: Path, bundle: Bundle, template: str | None) -> None:
        """Refuses a downloaded bundle whose weights do not fit, or whose prompts would be other ones here.

        Args:
            folder: the bundle.
            bundle: its manifest.
            template: the chat template that its prompts are made with; None is the base model's.

        Raises:
            AdapterError: one line that names the file and the field.
        """
        check_base(folder, self.tensors)
        for index, golden in enumerate(bundle.golden):
            field = f"{folder / MANIFEST}: golden.{index}.prompt_ids"
            try:
                ids = self.tokenizer.apply_chat_template(
                    list(golden.messages),
                    chat_template=template,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=False,
                )
            except (JinjaError, TypeError, ValueError) as error:
                raise AdapterError(f"{field}: the chat template refuses the messages ({error})") from None
            if tuple(ids) != golden.prompt_ids:
                raise AdapterError(f"{field}: the same messages give other prompt ids here than in training")


class AdapterLoader:
    """Downloads versions from a registry and proves that they fit the base model.

    Args:
        registry: the registry's address.
        base: folder or hub id of the base model that the engine runs.
        base_id: the base model's id for users.
        max_rank: highest rank that the engine can hold.
        cache: folder for downloaded versions; by default one under the system's temporary folder.
    """

    def __init__(self, registry: str, base: str, base_id: str, max_rank: int, cache: Path | None = None) -> None:
        self._address, self._base_model, self._base_id, self._max_rank = registry, base, base_id, max_rank
        self._cache = cache or Path(tempfile.gettempdir()) / "raysft-adapters"

    async def load(self, version: VersionId) -> Loaded:
        """Fetches a version without holding up the event loop.

        Raises:
            VersionRefusedError: the version is damaged, or does not fit this server.
            UnknownModelError: there is no such version.
            RegistryError: the registry cannot be read.
            NotReadyError: the download took too long.
        """
        try:
            async with asyncio.timeout(DOWNLOAD_TIMEOUT_S):
                return await asyncio.to_thread(self.fetch, version)
        except TimeoutError:
            raise NotReadyError(f"{version} was not downloaded within {DOWNLOAD_TIMEOUT_S:.0f} s; try again") from None

    def fetch(self, version: VersionId) -> Loaded:
        """Returns a version's whole, verified bundle on local disk, which fits this server.

        Raises:
            VersionRefusedError: the version is damaged, or does not fit this server.
            UnknownModelError: there is no such version.
            RegistryError: the registry cannot be read.
        """
        try:
            published = self._registry.get(version)
            bundle = published.bundle
            self._limits.check(version, bundle)
            # The digest keeps a version apart from one of the same name in a registry that was made anew.
            folder = self._registry.download(published, self._cache / f"{version}-{published.digest[:16]}")
        except VersionRefusedError:
            raise
        except AdapterError as error:
            raise VersionRefusedError(f"{version} cannot be served: {error}") from None
        base = self._base
        own = bundle.template_fingerprint != fingerprint(base.template)
        template = (folder / TEMPLATE).read_text(encoding="utf-8") if own else None
        try:
            base.check(folder, bundle, template)
        except AdapterError as error:
            fault = str(error).replace(f"{folder}/", "")
            raise VersionRefusedError(f"{version} cannot be served: {fault}") from None
        stops = tuple(token for token in bundle.stop_ids if token not in base.stop_ids)
        return Loaded(version, folder, bundle, template, stops)

    @cached_property
    def _registry(self) -> Registry:
        return Registry.open(self._address)

    @cached_property
    def _base(self) -> Base:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._folder)
        return Base(tokenizer, base_tensors(self._folder), _stop_ids(self._folder) | {tokenizer.eos_token_id})

    @cached_property
    def _limits(self) -> Limits:
        return Limits(self._base_id, base_fingerprint(self._folder), self._max_rank)

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


def _stop_ids(folder: Path) -> frozenset[int]:
    """The ids at which the base model's generation settings end an answer, as vLLM reads them."""
    try:
        found = json.loads((folder / "generation_config.json").read_bytes()).get("eos_token_id")
    except (OSError, ValueError):
        return frozenset()
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])
