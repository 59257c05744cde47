"""Parts of a serving application are killed while clients ask: what they see, and what comes back."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve.versions import VersionId
from tests.chaos.conftest import STALL_S, WANTED, Site
from tests.load import Load, ask, until
from tests.replicas import Replica, running_replicas

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]


def holds_what_is_wanted(site: Site, replica: Replica) -> bool:
    (status,) = (status for name, status in site.statuses().items() if name.endswith(replica.id))
    return set(WANTED) <= set(status["resident"]) and set(status["generations"]) >= {"support", "next"}


def check_answers(load: Load) -> None:
    """No client saw a failure that trying again would not get it over, and each was served what it asked."""
    assert load.faults == []
    assert {heard.version for heard in load.whole} == set(WANTED)
    texts: dict[Any, set[str]] = {}
    for heard in load.whole:
        texts.setdefault(heard.version, set()).add(heard.text)
    assert {version: len(found) for version, found in texts.items()} == dict.fromkeys(WANTED, 1)


def kill_and_recover(site: Site, victim: psutil.Process, of: Replica, how: signal.Signals, within: float) -> Load:
    """Kills a process of a replica under load; waits until another replica is in that one's place."""
    engine = [of.core, *of.core.children(recursive=True)]
    with site.load() as load:
        load.more(3)
        os.kill(victim.pid, how)
        until(lambda: of.id not in {replica.id for replica in running_replicas()}, within)
        until(lambda: not any(process.is_running() for process in engine), 30)
        load.more(3)  # the other one serves on
        replicas = site.ready(2, without=[of])
        assert all(holds_what_is_wanted(site, replica) for replica in replicas)
        load.more(3)
    check_answers(load)
    return load


def test_under_load_a_second_replica_comes_up_on_the_second_node(site: Site) -> None:
    (first,) = site.keep(1)
    with site.load(4) as load:
        site.deploy(1, 2)
        first, second = sorted(site.ready(2), key=lambda replica: replica != first)
        # It was ready only when it held what the aliases name, so its first request found it there.
        assert holds_what_is_wanted(site, second)
        load.more(4)
    check_answers(load)
    assert first.node != second.node


def test_the_engine_of_a_replica_is_killed(site: Site) -> None:
    victim = site.keep(2)[0]
    kill_and_recover(site, victim.core, victim, signal.SIGKILL, within=30)


def test_the_process_of_a_replica_is_killed(site: Site) -> None:
    victim = site.keep(2)[1]
    kill_and_recover(site, psutil.Process(victim.pid), victim, signal.SIGKILL, within=30)


def test_an_engine_that_hangs_is_found_out(site: Site) -> None:
    victim = site.keep(2)[0]
    began = time.monotonic()
    load = kill_and_recover(site, victim.core, victim, signal.SIGSTOP, within=4 * STALL_S)
    assert time.monotonic() - began > STALL_S / 2
    assert load.torn or any(heard.status == 503 for heard in load.heard)


def test_the_controller_is_killed(site: Site) -> None:
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    before = site.keep(2)
    controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
    pid: int = ray.get(controller.__ray_call__.remote(lambda _: os.getpid()))
    with site.load() as load:
        load.more(3)
        os.kill(pid, signal.SIGKILL)
        site.registry.promote("third", VersionId("support", 3))
        until(lambda: ask(site.client, "third").version == "support@v3", 60)
        load.more(3)
        until(lambda: _answers(controller), 120)
        assert {replica.id for replica in site.ready(2)} == {replica.id for replica in before}
    check_answers(load)
    assert {heard.status for heard in load.heard} == {200}
    assert load.torn == []


def test_the_registry_is_lost_and_comes_back(site: Site) -> None:
    site.keep(2)
    folder = Path(site.registry.address)
    away = folder.with_name("away")
    with site.load() as load:
        load.more(2)
        folder.rename(away)
        try:
            moved = site.client.post("/admin/aliases/late/promote", json={"version": "support@v3"})
            assert (moved.status_code, moved.json()["error"]["code"]) == (503, "registry_unavailable")
            time.sleep(3)
            load.more(3)
        finally:
            away.rename(folder)
        site.registry.promote("late", VersionId("support", 3))
        until(lambda: ask(site.client, "late").version == "support@v3", 30)
        until(lambda: [status["generations"].get("late") for status in site.statuses().values()] == [1, 1], 30)
    check_answers(load)
    assert {heard.status for heard in load.heard} == {200}


def test_a_replica_that_is_to_stop_ends_its_streams(site: Site) -> None:
    site.keep(2)
    with ThreadPoolExecutor(4) as pool:
        # Two for each replica, and long enough to be there still when it is told to stop.
        streams = [pool.submit(ask, site.client, model, max_tokens=300) for model in ("support", "next") * 2]
        until(lambda: _in_flight(site) >= 4, 60)
        site.deploy(1, 1)
        until(lambda: len(running_replicas()) == 1, 60)
        assert not all(stream.done() for stream in streams)
        heard = [stream.result(300) for stream in streams]
    assert [one for one in heard if not one.whole or len(one.text) < 300] == []
    site.ready(1)


def _answers(actor: Any) -> bool:
    import ray

    try:
        ray.get(actor.check_alive.remote(), timeout=10)
    except (ray.exceptions.RayError, TimeoutError):
        return False
    return True


def _in_flight(site: Site) -> float:
    lines = site.client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("raysft_requests_in_flight"))
