from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.config import Rates
from serve.errors import FullError, LimitError
from serve.keys import Key, hash_key
from serve.limits import MINUTE_S, Bucket, Limiter

amounts = st.integers(0, 200)
pauses = st.floats(0, 100, allow_nan=False)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def key(name: str = "app", **rates: int) -> Key:
    return Key(id=name, hash=hash_key(name), **rates)


def limiter(clock: Clock, total: int = 100, replicas: int = 1, **defaults: Any) -> Limiter:
    return Limiter(Rates(**defaults), total, replicas, clock)


def headers(error: LimitError) -> dict[str, str]:
    return dict(error.headers)


@given(st.integers(1, 100), st.lists(st.tuples(amounts, pauses)))
def test_a_bucket_never_gives_more_than_it_holds_and_what_flows_in(
    capacity: int, wishes: list[tuple[int, float]]
) -> None:
    bucket, now, taken = Bucket(capacity, 0.0), 0.0, 0.0
    for amount, pause in wishes:
        now += pause
        if bucket.wait(amount, now) == 0:
            bucket.take(amount, now)
            taken += amount
        assert taken <= capacity * (1 + now / MINUTE_S) * (1 + 1e-9)
        assert bucket.left(now) <= capacity


@given(st.integers(1, 100), st.lists(amounts, max_size=5), amounts)
def test_after_the_wait_there_is_enough(capacity: int, taken: list[int], amount: int) -> None:
    bucket = Bucket(capacity, 0.0)
    for each in taken:
        bucket.take(each, 0.0)
    wait = bucket.wait(amount, 0.0)
    if amount > capacity:
        assert math.isinf(wait)
    else:
        assert bucket.left(wait) == pytest.approx(max(amount, bucket.left(0.0)))


def test_a_bucket_fills_evenly_and_can_be_in_debt() -> None:
    bucket = Bucket(60, 0.0)
    bucket.take(90, 0.0)
    assert (bucket.left(0.0), bucket.left(15.0), bucket.left(1000.0)) == (-30.0, -15.0, 60.0)
    assert (bucket.wait(1, 0.0), bucket.full_in(30.0)) == (31.0, 60.0)


def test_requests_a_minute() -> None:
    clock = Clock()
    limits, app = limiter(clock, requests_per_minute=2), key()
    for left in ("1", "0"):
        with limits.admit(app, 5) as lease:
            assert dict(lease.headers)["x-ratelimit-remaining-requests"] == left
    with pytest.raises(LimitError, match="2 requests a minute: try again in 30 s") as caught, limits.admit(app, 5):
        pass
    assert caught.value.limit == "requests"
    assert headers(caught.value) == {
        "retry-after": "30",
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "60.000s",
    }
    with limits.admit(key("other"), 5):
        pass
    clock.now += 30
    with limits.admit(app, 5):
        pass


def test_tokens_are_reserved_and_settled() -> None:
    clock = Clock()
    limits, app = limiter(clock, tokens_per_minute=600), key()
    with limits.admit(app, 500) as lease:
        with pytest.raises(LimitError, match="this one asks 101: try again in 1 s"), limits.admit(app, 101):
            pass
        lease.settle(80)
    with limits.admit(app, 520) as lease:
        assert dict(lease.headers)["x-ratelimit-remaining-tokens"] == "0"
        lease.settle(1120)
    with pytest.raises(LimitError, match="try again in 61 s"), limits.admit(app, 10):
        pass
    clock.now += 61
    with limits.admit(app, 10):
        pass
    with pytest.raises(LimitError), limits.admit(app, 10):
        pass  # the last one never said what it used, so its reservation stands


def test_what_can_never_fit_is_not_to_be_tried_again() -> None:
    limits = limiter(Clock(), tokens_per_minute=600)
    with pytest.raises(LimitError, match="it can never fit") as caught, limits.admit(key(), 601):
        pass
    assert headers(caught.value)["x-should-retry"] == "false"
    assert "retry-after" not in headers(caught.value)


def test_requests_at_a_time_of_a_key_and_of_the_server() -> None:
    limits = limiter(Clock(), total=3, concurrency=2)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(limits.admit(key(), 1))
        with pytest.raises(LimitError, match="2 requests at a time: try again in 1 s") as caught:
            stack.enter_context(limits.admit(key(), 1))
        assert caught.value.limit == "concurrency"
        stack.enter_context(limits.admit(key("other"), 1))
        with pytest.raises(FullError):
            stack.enter_context(limits.admit(key("third"), 1))
        assert limits.running == 3
    assert limits.running == 0
    with limits.admit(key(), 1):
        pass


def test_a_key_has_rates_of_its_own() -> None:
    limits = limiter(Clock(), requests_per_minute=1)
    app = key(requests_per_minute=3)
    for _ in range(3):
        with limits.admit(app, 1):
            pass
    with pytest.raises(LimitError), limits.admit(app, 1):
        pass


def test_a_line_that_is_read_again_gives_nothing_back() -> None:
    limits = limiter(Clock())
    with limits.admit(key(requests_per_minute=2, concurrency=2), 1):
        with limits.admit(key(requests_per_minute=2, concurrency=2), 1), pytest.raises(LimitError):
            limits.admit(key(requests_per_minute=2), 1).__enter__()
        with pytest.raises(LimitError, match="1 requests at a time"):
            limits.admit(key(requests_per_minute=9, concurrency=1), 1).__enter__()
        with limits.admit(key(requests_per_minute=9), 1):
            assert limits.running == 2
    assert limits.running == 0


@pytest.mark.parametrize(("replicas", "share"), [(1, 10), (2, 5), (3, 4), (20, 1)])
def test_replicas_hold_even_parts_rounded_up(replicas: int, share: int) -> None:
    limits = limiter(Clock(), total=10, replicas=replicas, requests_per_minute=10)
    with ExitStack() as stack:
        for _ in range(share):
            stack.enter_context(limits.admit(key(), 1))
        with pytest.raises(FullError):
            stack.enter_context(limits.admit(key("other"), 1))
    with pytest.raises(LimitError), limits.admit(key(), 1):
        pass


steps = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 300), st.one_of(st.none(), st.integers(0, 400)), pauses),
    max_size=30,
)


@given(steps)
def test_whatever_happens_no_place_is_lost_and_no_limit_broken(
    wishes: list[tuple[str, int, int | None, float]],
) -> None:
    clock = Clock()
    limits = limiter(clock, total=2, requests_per_minute=5, tokens_per_minute=300)
    begun: dict[str, list[float]] = {"a": [], "b": []}
    for name, tokens, used, pause in wishes:
        clock.now += pause
        try:
            with limits.admit(key(name), tokens) as lease:
                begun[name].append(clock.now)
                assert limits.running == 1
                if used is not None:
                    lease.settle(used)
        except LimitError:
            pass
        assert limits.running == 0
    for moments in begun.values():
        for index, moment in enumerate(moments):
            within = [other for other in moments[index:] if other - moment < MINUTE_S]
            assert len(within) <= 10
