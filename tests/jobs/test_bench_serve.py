"""The serving benchmark's own arithmetic: what it reads off a stream, what it counts, and what it calls mixed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from jobs.bench import load
from jobs.bench.load import Address, Answer, Call, ask, fetch, figures, middle_and_tail, percentile, run_calls
from jobs.bench.machine import BenchmarkError
from jobs.bench.serve import compare, read_prompts
from jobs.bench.serve_peers import PEERS, Setup
from jobs.bench.serve_swap import judged, tells_apart

CALL = Call("m", "p", 3)


def event(text: str | None = None, tokens: int | None = None) -> bytes:
    choices = [] if text is None else [{"delta": {"content": text}}]
    usage = {} if tokens is None else {"usage": {"completion_tokens": tokens}}
    return b"data: " + json.dumps({"choices": choices, **usage}).encode() + b"\n\n"


def answer(
    text: str = "x", version: str | None = "a@v1", *, at: Sequence[float] = (1.0, 2.0), error: str | None = None
) -> Answer:
    return Answer(CALL, 0.5, at[-1], tuple(at), text, 3, version, error)


@asynccontextmanager
async def server(parts: Sequence[bytes], *, status: str = "200 OK", whole: bool = True) -> AsyncIterator[Address]:
    """Sends these parts, about one read each, whatever it is asked."""

    answering: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.add(asyncio.current_task())
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        await reader.readexactly(length)
        writer.write(f"HTTP/1.1 {status}\r\nX-Raysft-Version: a@v1\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for part in parts:
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)
        if whole:
            writer.write(b"0\r\n\r\n")
        writer.close()
        with suppress(ConnectionError):  # a client that has heard enough may leave first
            await writer.wait_closed()

    made = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with made:
        yield Address(made.sockets[0].getsockname()[1])
    await asyncio.gather(*filter(None, answering))


def test_an_answer_is_read_whole_however_its_events_are_cut() -> None:
    stream = event("") + event("héé") + event("llo") + event("!") + event(None, 3) + b"data: [DONE]\n\n"
    cuts = [stream[:60], stream[60:90], stream[90:]]

    async def run() -> Answer:
        async with server(cuts) as address:
            return await ask(address, CALL)

    found = asyncio.run(run())
    assert (found.error, found.text, found.tokens, found.version) == (None, "hééllo!", 3, "a@v1")
    assert found.begun_at < found.arrivals[0] <= found.arrivals[-1] <= found.ended_at


@pytest.mark.parametrize(
    ("parts", "status", "whole", "fault"),
    [
        ([event("a"), event(None, 1)], "200 OK", True, "broke off"),
        ([event("a")], "200 OK", False, "0 bytes read"),
        ([event("a"), b'data: {"error": {"message": "no"}}\n\n'], "200 OK", True, "in the stream"),
        ([b'{"error": {"message": "full"}}'], "503 Service Unavailable", True, '503: {"error": {"message": "full"}}'),
    ],
)
def test_what_goes_wrong_is_told(parts: list[bytes], status: str, whole: bool, fault: str) -> None:
    async def run() -> Answer:
        async with server(parts, status=status, whole=whole) as address:
            return await ask(address, CALL)

    assert fault in str(asyncio.run(run()).error)


def test_a_server_that_is_gone_fails_the_answer_and_breaks_the_plain_request() -> None:
    async def run() -> Answer:
        async with server([]) as address:
            pass
        with pytest.raises(OSError, match="Connect"):
            await fetch(address, "GET", "/")
        return await ask(address, CALL)

    assert "Connect" in str(asyncio.run(run()).error)


def test_calls_run_in_parallel_up_to_the_number_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = 0, 0

    async def fake(_: Address, call: Call) -> Answer:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return Answer(call, 0, 1, (1,), call.prompt, 1, None, None)

    monkeypatch.setattr(load, "ask", fake)
    calls = [Call("m", str(number), 1) for number in range(7)]
    _, answers = asyncio.run(run_calls(Address(1), calls, 3))
    assert [found.text for found in answers] == [call.prompt for call in calls]
    assert most == 3


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert (percentile(values, 50), percentile(values, 99), percentile([7.0], 99)) == (50, 99, 7)
    assert middle_and_tail([0.5, 0.25]) == {"p50": 250, "p99": 500}
    assert middle_and_tail([]) == {}


def test_figures_of_a_load_leave_failed_requests_out_of_the_times() -> None:
    answers = [answer(at=(1.0, 1.5, 2.0)), answer(at=(9.0,), error="gone")]
    assert figures(2.0, answers) == {
        "requests": 2,
        "failed": 1,
        "tokens": 3,
        "seconds": 2.0,
        "tokens_per_s": 1.5,
        "first_token_ms": {"p50": 500, "p99": 500},
        "per_token_ms": {"p50": 500, "p99": 500},
        "pause_ms": {"p50": 500, "p99": 500},
    }


def test_ratios_are_taken_within_a_round() -> None:
    def run(speed: float, first: float) -> dict[str, object]:
        single = {"first_token_ms": {"p50": first}, "per_token_ms": {"p50": first / 10}}
        return {"parallel": {"tokens_per_s": speed, "first_token_ms": {"p50": first}}, "single": single}

    # The second round ran on a busy machine: all were half as fast, and the ratios stay.
    runs = {
        "vllm_serve": [run(100, 50), run(50, 100), run(100, 50)],
        "ray_serve_llm": [run(60, 80), run(30, 160), run(60, 80)],
        "raysft": [run(90, 60), run(45, 120), run(90, 60)],
    }
    found = compare(runs)
    assert found["throughput_ratio_vs_vllm_serve"] == 0.9
    assert found["throughput_ratio_vs_ray_serve_llm"] == 1.5
    assert found["first_token_p50_ratio_vs_vllm_serve"] == 1.2
    assert (found["gateway_added_ms"], found["gateway_added_ms_per_token"]) == (10, 1)


GOLDEN = {"a@v1": {"p": "one"}, "a@v2": {"p": "two"}}


def test_an_answer_is_mixed_unless_it_is_the_golden_of_the_version_that_it_names() -> None:
    answers = [
        answer("one", "a@v1"),
        answer("two", "a@v2", at=(3.0, 5.0)),
        answer("two", "a@v1"),  # says the wrong version
        answer("onwo", "a@v2"),  # belongs to none
        answer("one", None),  # names none
        answer("", "a@v1", error="gone"),
    ]
    found = judged(answers, GOLDEN, flipped_at=[4.0])
    assert (found["answers"], found["failed"], found["mixed"], found["answers_through_a_flip"]) == (6, 1, 3, 1)
    assert found["mixtures"][1]["characters_along_with"] == {"a@v1": 2, "a@v2": 0}
    assert found["failures"] == ["gone"]


@pytest.mark.parametrize(
    "answers",
    [[answer("one", "a@v1")] * 2, [answer("one", "a@v1", at=(3.0, 3.5)), answer("two", "a@v2", at=(5.0, 6.0))]],
)
def test_a_swap_that_no_answer_saw_proves_nothing(answers: list[Answer]) -> None:
    with pytest.raises(BenchmarkError, match="nothing is proven"):
        judged(answers, GOLDEN, flipped_at=[1.5 if answers[0] is answers[1] else 4.0])


def test_a_prompt_counts_only_where_it_tells_versions_apart() -> None:
    assert tells_apart([{"one"}, {"two"}])
    assert not tells_apart([{"one"}, {"one"}])
    assert not tells_apart([{"one", "On"}, {"two"}])


def test_all_contenders_get_the_same_engine_flags(tmp_path: Path) -> None:
    setup = Setup(Path("/models/base"), tmp_path, "float32")
    bare, ray, ours = (" ".join(command(setup, 80)) for command in PEERS.values())
    config = (tmp_path / "serve-80.yaml").read_text()
    assert ours.endswith("serve-80.yaml")
    for name, value in setup.engine_arguments().items():
        assert f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") in bare
        assert f'"{name}": {json.dumps(value)}' in ray
        # Ours says no word of what it sets by itself.
        assert name in ("enable_lora", "enforce_eager") or f"{name}: {json.dumps(value).strip(chr(34))}" in config


def test_there_is_a_prompt_for_every_stream() -> None:
    assert len(set(read_prompts())) >= 8
