"""Ray Serve LLM's own application, as its users start it, with its request limits raised on both deployments.

`python -m jobs.bench.serve_ray_llm JSON` serves until SIGTERM; `jobs.bench.serve_peers` starts it.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from typing import Any

ONGOING_REQUESTS = 256
"""Serve's default of 5 would let the sixth request wait."""


def main() -> None:
    """Serves."""
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.llm import LLMConfig, build_openai_app

    given: dict[str, Any] = json.loads(sys.argv[1])
    config = LLMConfig(
        model_loading_config={"model_id": given["base_id"], "model_source": given["base"]},
        accelerator_type=None,
        placement_group_config={"bundles": [{"CPU": 1}]},
        engine_kwargs=given["engine_kwargs"],
        deployment_config={"num_replicas": 1, "max_ongoing_requests": ONGOING_REQUESTS},
        runtime_env={"env_vars": {"VLLM_CPU_KVCACHE_SPACE": str(given["kv_cache_gib"])}},
    )
    ingress = {"num_replicas": 1, "max_ongoing_requests": ONGOING_REQUESTS}
    ray.init("local", num_cpus=given["num_cpus"], include_dashboard=False, logging_level=logging.ERROR)
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=given["port"]))
        serve.run(build_openai_app({"llm_configs": [config], "ingress_deployment_config": ingress}))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        threading.Event().wait()
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
