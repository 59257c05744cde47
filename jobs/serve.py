"""Serves a base model and the adapters of a registry as a chat endpoint, until Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import configure, parser, run
from serve.config import ServeConfig

TERMINATED = 143
"""Exit code after SIGTERM, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """The job."""
    made = parser(
        "serve",
        "Serve a base model and every adapter version of a registry behind an OpenAI-compatible API.\n"
        "A version that is published while this runs is served without a restart. Ctrl-C stops it.",
    )
    made.add_argument(
        "--write-deploy", type=Path, metavar="FILE", help="write the config file for `serve deploy`, and start nothing"
    )
    options, config = configure(made, ServeConfig, argv)
    # Ray takes seconds to import, which --help and a faulty config need not wait for.
    import ray

    from serve import app

    if options.write_deploy:
        from serve.deploy import deploy_file

        options.write_deploy.write_text(deploy_file(config), encoding="utf-8")
        print(f"wrote {options.write_deploy}; deploy it with: serve deploy {options.write_deploy}")
        return 0
    try:
        app.start(config, say=lambda line: print(line, flush=True))
        # `ray job stop` ends the job in good order, too. Not earlier: Ray sets a handler of its own when it starts.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
        print("models: GET /v1/models    stop: Ctrl-C", flush=True)
        threading.Event().wait()
    finally:
        if ray.is_initialized():
            print("stopping ...", flush=True)
            app.stop()
            ray.shutdown()
    return 0


if __name__ == "__main__":
    run(main)
