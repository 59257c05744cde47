"""Config -> the config file of `serve deploy`, for a cluster that is managed by that."""

from __future__ import annotations

from typing import Any

import yaml

from serve.app import APP, app_builder, located
from serve.config import ServeConfig

HEADER = """\
# Made by `python -m jobs.serve --write-deploy`. Deploy it with `serve deploy FILE`; raysft must be installed on all
# nodes, and the registry and the base model must be reachable from them. API keys of the environment are read on the
# head node.
"""


def deploy_file(config: ServeConfig) -> str:
    """The text of the file.

    Raises:
        ModelError: the base model is neither a checkpoint's folder nor a hub id.
    """
    found = located(config)
    arguments: dict[str, Any] = found.model_dump(mode="json", exclude_defaults=True, exclude={"http", "ray"})
    # The door looks at the address, so the application must know it, too.
    arguments["http"] = {"host": found.http.host, "port": found.http.port}
    content = {
        "proxy_location": "EveryNode",
        "http_options": arguments["http"].copy(),
        "applications": [
            {
                "name": APP,
                "route_prefix": "/",
                "import_path": f"{app_builder.__module__}:{app_builder.__name__}",
                "args": arguments,
            }
        ],
    }
    return HEADER + yaml.safe_dump(content, sort_keys=False)
