"""vLLM's engine on CPU with a scheduler that sleeps while its worker computes."""

from __future__ import annotations

import time
from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

NAP_S = 5e-4
"""How late a step may be noticed; one takes 50 ms and more on few cores."""


class CpuExecutor(MultiprocExecutor):  # type: ignore[misc]  # vLLM is untyped here
    """vLLM's own asks without a pause whether the worker is done, and so takes a whole core from gateway and proxy."""

    def _init_executor(self) -> None:
        super()._init_executor()
        for queue in self.response_mqs:
            _nap(queue._spin_condition)


class CpuEngine(VLLMEngine):
    """Ray's engine with that executor, for which it has no argument."""

    def _start_async_llm_engine(self, args: Any, config: Any, group: Any) -> Any:
        config.parallel_config.distributed_executor_backend = CpuExecutor
        return super()._start_async_llm_engine(args, config, group)


def _nap(condition: Any) -> None:
    """Puts naps where a queue's reader would only yield; what it does after a second without news stays.

    It could wait for the queue's notification at once, but under load some of those get lost.
    """
    wait = condition.wait

    def nap(timeout_ms: int | None = None) -> None:
        if time.monotonic() <= condition.last_read + condition.busy_loop_s:
            time.sleep(NAP_S)
        else:
            wait(timeout_ms)

    condition.wait = nap
