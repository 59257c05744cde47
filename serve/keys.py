"""API keys: who may ask for what. Only hashes are kept; a key itself is seen once, when it is made.

A key is `raysft_ID_SECRET`. The secret is 256 random bits, so that a plain SHA-256 cannot be searched and costs a
request a microsecond, where the slow hashes that passwords need would cost it a tenth of a second.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from fnmatch import translate
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints, ValidationError

from serve.config import Rates
from sft.errors import ConfigError

ENVIRONMENT = "RAYSFT_API_KEYS"
"""Environment variable with further keys, one a line as in the file."""

PREFIX = "raysft_"
CHECK_EVERY_S = 1.0
"""How soon a changed file is noticed."""

Scope = Literal["chat", "admin", "metrics"]
KeyName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]

logger = logging.getLogger("ray.serve")


class Key(Rates):
    """One key as the file has it: what it may do, and what it may use."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    id: KeyName
    hash: Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...] = Field(("chat",), min_length=1)
    models: tuple[str, ...] = Field(("*",), min_length=1)

    def may_use(self, model: str) -> bool:
        """Whether a request of this key may name that model; `*` in a pattern stands for any text."""
        return bool(_pattern(self.models).fullmatch(model))


class KeyRing:
    """All keys that are in force."""

    def __init__(self, keys: Mapping[str, Key]) -> None:
        self._keys = MappingProxyType(dict(keys))

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, text: str) -> Key | None:
        """The key that a client presents, or None; takes equally long for a wrong secret, whatever is wrong in it."""
        name = text.removeprefix(PREFIX).rpartition("_")[0]
        key = self._keys.get(name)
        known = hmac.compare_digest(key.hash if key else _NOBODY, hash_key(text))
        return key if known else None


def new_key(name: str) -> str:
    """Makes the text of a key; it is not kept anywhere."""
    return f"{PREFIX}{name}_{secrets.token_hex(32)}"


def hash_key(text: str) -> str:
    """What is kept of a key."""
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()}"


def parse_keys(text: str, origin: str) -> KeyRing:
    """Reads keys, one JSON object a line; empty lines and lines that begin with # are passed over.

    Args:
        text: the lines.
        origin: where they come from, for messages.

    Raises:
        ConfigError: every fault with its line; never what the line says.
    """
    keys: dict[str, Key] = {}
    faults = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            key = Key.model_validate(json.loads(line))
        except ValidationError as error:
            details = error.errors(include_input=False, include_url=False)
            faults += [f"line {number}: {'.'.join(map(str, d['loc'])) or 'the line'}: {d['msg']}" for d in details]
            continue
        except ValueError:
            faults.append(f"line {number}: is no JSON object; write a line as `python -m jobs.keys create` prints it")
            continue
        if key.id in keys:
            faults.append(f"line {number}: the id {key.id} is taken by a line above it; give each key an id of its own")
        keys[key.id] = key
    if faults:
        raise ConfigError(origin, faults)
    return KeyRing(keys)


class KeySource:
    """The keys of a file and of the environment, read again when the file changes.

    A file that went away or has faults leaves the keys in force that were read last.

    Args:
        file: the file's path, or None.
        further: more lines, from the environment.
        clock: seconds, ever growing.

    Raises:
        ConfigError: the keys cannot be read at the start.
    """

    def __init__(self, file: str | None, further: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._further, self._clock = Path(file) if file else None, further, clock
        self._checked_at = clock()
        self._seen = self._stamp()
        self._ring = self._read()

    @property
    def configured(self) -> bool:
        """Whether there is any place for keys; where there is none, nobody has one."""
        return self._file is not None or bool(self._further.strip())

    def ring(self) -> KeyRing:
        """The keys in force; at most `CHECK_EVERY_S` behind the file."""
        now = self._clock()
        if self._file is not None and now - self._checked_at >= CHECK_EVERY_S:
            self._checked_at = now
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                try:
                    self._ring = self._read()
                    logger.info("API keys read again: %d in force", len(self._ring))
                except ConfigError as error:
                    logger.error("the API keys that were read last stay in force: %s", error)
        return self._ring

    def _stamp(self) -> tuple[int, ...] | None:
        """What changes when the file does."""
        try:
            found = self._file.stat() if self._file else None
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None

    def _read(self) -> KeyRing:
        if self._file is None:
            return parse_keys(self._further, ENVIRONMENT)
        try:
            lines = self._file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
            raise ConfigError(str(self._file), [f"the API keys cannot be read: {reason}"]) from None
        return parse_keys(f"{lines}\n{self._further}", str(self._file))


@lru_cache(maxsize=1024)
def _pattern(models: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{translate(model)})" for model in models))


_NOBODY = hash_key(new_key("nobody"))
