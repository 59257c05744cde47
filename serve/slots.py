"""vLLM's side of an adapter: its name and weights in the engine, and the two questions that prove it there.

The engine keeps weights in few slots and swaps them in and out of host memory by itself; what stands here is which
adapters it knows at all.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from serve.cpu_worker import CpuWorker
from serve.errors import NotReadyError

TOP = 20
"""Most log-probabilities that vLLM tells of a position by default."""


class Slots:
    """The adapters of one engine.

    Args:
        engine: Ray's `VLLMEngine`, started.
    """

    def __init__(self, engine: Any) -> None:
        self._models, self._client = engine._oai_models, engine._engine_client

    async def group_by_slot(self) -> None:
        """Mends the workers of an engine on CPU; see `serve.cpu_worker`."""
        await self._client.collective_rpc(CpuWorker.group_by_slot.__name__)

    @property
    def dead(self) -> bool:
        """Whether the engine is gone for good, so that whatever it is asked can only fail."""
        return bool(self._client.errored)

    async def load(self, engine_id: str, folder: str) -> None:
        """Loads an adapter under a name.

        Raises:
            ValueError: the engine refuses it.
        """
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        answer = await self._models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=engine_id, lora_path=folder))
        if not isinstance(answer, str):
            raise ValueError(answer.error.message)

    async def unload(self, engine_id: str) -> None:
        """Frees a name and the weights under it; nobody may use them any more."""
        request = self._models.lora_requests.pop(engine_id)
        await self._client.remove_lora(request.lora_int_id)

    async def next_token(self, prompt_ids: Sequence[int], engine_id: str | None = None) -> Mapping[int, float]:
        """The log-probabilities of the likeliest next tokens.

        Args:
            prompt_ids: the prompt.
            engine_id: an adapter's name; None asks the base model.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=TOP)
        adapter = None if engine_id is None else self._models.lora_requests[engine_id]
        prompt, request_id = {"prompt_token_ids": list(prompt_ids)}, f"probe-{secrets.token_hex(8)}"
        made = [part async for part in self._client.generate(prompt, sampling, request_id, lora_request=adapter)]
        return {token: entry.logprob for token, entry in made[-1].outputs[0].logprobs[0].items()}

    async def beat(self, seconds: float) -> None:
        """Has the engine make one token.

        Raises:
            NotReadyError: it did not within so many seconds.
        """
        try:
            async with asyncio.timeout(seconds):
                await self.next_token([0])
        except TimeoutError:
            raise NotReadyError(f"the engine made no token within {seconds:g} s") from None
