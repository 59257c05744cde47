"""A real S3 API server on loopback: `with s3_server() as environment`, or `python -m tests.s3_server PORT`.

It answers one request at a time, because the store behind it does not check and write in one step by itself.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.ports import free_port

BUCKET = "adapters"


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Starts the server with an empty bucket, and stops it.

    Yields:
        The environment variables by which a client finds it.
    """
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.s3_server", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, "the S3 server did not start: are flask and flask-cors installed?"
            try:
                httpx.put(f"{address}/{BUCKET}").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield {
            "AWS_ENDPOINT_URL": address,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    run_simple("127.0.0.1", int(sys.argv[1]), DomainDispatcherApplication(create_backend_app))
