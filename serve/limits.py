"""How much a key may use: requests and tokens a minute, and requests at a time. Pure but for the clock.

Requests and tokens come from buckets that hold a minute's worth and fill evenly. What a request will take is reserved
when it comes in and put right when it ends, so a bucket can be in debt; then the next request waits for longer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serve.config import Rates
from serve.errors import FullError, LimitError
from serve.keys import Key

Headers = tuple[tuple[str, str], ...]

MINUTE_S = 60.0
BUSY_RETRY_S = 1.0
NEVER = ("x-should-retry", "false")


class Bucket:
    """A minute's worth of something, which fills evenly.

    Args:
        capacity: what fits in, and what flows in a minute.
        now: the present second.
    """

    def __init__(self, capacity: int, now: float) -> None:
        self.capacity = capacity
        self._left, self._at = float(capacity), now

    def left(self, now: float) -> float:
        """What is in it; below zero after more was used than was reserved."""
        return min(self.capacity, self._left + (now - self._at) * self.capacity / MINUTE_S)

    def take(self, amount: float, now: float) -> None:
        """Takes an amount out, or with a negative one puts it back."""
        self._left, self._at = min(self.capacity, self.left(now) - amount), now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until that amount is in it; infinite for more than fits in."""
        if amount > self.capacity:
            return math.inf
        return max(0.0, (amount - self.left(now)) * MINUTE_S / self.capacity)

    def full_in(self, now: float) -> float:
        """Seconds until it is full."""
        return self.wait(self.capacity, now)


class Lease:
    """The right of one request to be worked on; what it used is told by `settle`.

    Args:
        reserved: tokens that were taken out for it.
        headers: what the client is told of its limits.
    """

    def __init__(self, reserved: int, headers: Headers) -> None:
        self.reserved, self.headers = reserved, headers
        self.used: int | None = None

    def settle(self, used: int) -> None:
        """Says how many tokens the request took; one that never says so took what was reserved."""
        self.used = used


@dataclass(slots=True)
class _Account:
    """What one key has left; `key` is the key as it was when the buckets were made."""

    key: Key | None = None
    requests: Bucket | None = None
    tokens: Bucket | None = None
    concurrency: int | None = None
    running: int = 0


class Limiter:
    """Lets requests of all keys in, up to the limits of each and of the server.

    Args:
        defaults: rates of a key that names none.
        total: requests at a time, all keys together.
        replicas: gateways that share the limits; each holds its even part of them, rounded up.
        clock: seconds, ever growing.
    """

    def __init__(
        self, defaults: Rates, total: int, replicas: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._defaults, self._replicas, self._clock = defaults, replicas, clock
        self._total = math.ceil(total / replicas)
        self._accounts: dict[str, _Account] = {}
        self.running = 0

    @contextmanager
    def admit(self, key: Key, tokens: int) -> Iterator[Lease]:
        """Lets one request in for as long as the context lasts, or takes nothing from anyone.

        Args:
            key: who asks.
            tokens: prompt and answer together, at most.

        Raises:
            FullError: the server works on as many requests as it takes.
            LimitError: the key has reached one of its limits.
        """
        now = self._clock()
        account = self._account(key, now)
        if self.running >= self._total:
            raise FullError("the server is full; try again in a moment")
        _check(account, tokens, now)
        if account.requests:
            account.requests.take(1, now)
        if account.tokens:
            account.tokens.take(tokens, now)
        account.running += 1
        self.running += 1
        lease = Lease(tokens, _headers(account, now))
        try:
            yield lease
        finally:
            account.running -= 1
            self.running -= 1
            if account.tokens and lease.used is not None:
                account.tokens.take(lease.used - lease.reserved, self._clock())

    def _account(self, key: Key, now: float) -> _Account:
        account = self._accounts.setdefault(key.id, _Account())
        if account.key is not key:  # a new key, or one whose line was read again
            account.key = key
            requests = self._share(key.requests_per_minute, self._defaults.requests_per_minute)
            tokens = self._share(key.tokens_per_minute, self._defaults.tokens_per_minute)
            account.requests = _same_or_new(account.requests, requests, now)
            account.tokens = _same_or_new(account.tokens, tokens, now)
            account.concurrency = self._share(key.concurrency, self._defaults.concurrency)
        return account

    def _share(self, own: int | None, default: int | None) -> int | None:
        whole = own or default
        return math.ceil(whole / self._replicas) if whole else None


def _same_or_new(bucket: Bucket | None, capacity: int | None, now: float) -> Bucket | None:
    if capacity is None:
        return None
    return bucket if bucket and bucket.capacity == capacity else Bucket(capacity, now)


def _check(account: _Account, tokens: int, now: float) -> None:
    most = account.concurrency
    if most is not None and account.running >= most:
        _refuse(account, "concurrency", f"{most} requests at a time", BUSY_RETRY_S, now)
    if account.requests and (wait := account.requests.wait(1, now)):
        _refuse(account, "requests", f"{account.requests.capacity} requests a minute", wait, now)
    if account.tokens and (wait := account.tokens.wait(tokens, now)):
        what = f"{account.tokens.capacity} tokens a minute, prompt and longest answer together; this one asks {tokens}"
        _refuse(account, "tokens", what, wait, now)


def _refuse(account: _Account, limit: str, what: str, wait: float, now: float) -> None:
    headers = _headers(account, now)
    if math.isinf(wait):
        raise LimitError(f"this API key's limit is {what}: it can never fit", limit, (*headers, NEVER))
    seconds = max(1, math.ceil(wait))
    message = f"this API key's limit is {what}: try again in {seconds} s"
    raise LimitError(message, limit, (*headers, ("retry-after", str(seconds))))


def _headers(account: _Account, now: float) -> Headers:
    """The limits in the headers that OpenAI's clients know."""
    found: list[tuple[str, str]] = []
    for name, bucket in (("requests", account.requests), ("tokens", account.tokens)):
        if bucket:
            found += [
                (f"x-ratelimit-limit-{name}", str(bucket.capacity)),
                (f"x-ratelimit-remaining-{name}", str(max(0, math.floor(bucket.left(now))))),
                (f"x-ratelimit-reset-{name}", f"{bucket.full_in(now):.3f}s"),
            ]
    return tuple(found)
