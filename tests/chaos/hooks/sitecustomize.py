"""Stops a worker at a named place: every Python process of a chaos test's cluster runs this as it starts.

The folder that CHAOS_CONTROL names holds what is armed. Whoever comes to an armed place takes the arm away, writes its
process id into `at-PLACE` and waits there to be killed. Nothing of this is in the product.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

CONTROL = Path(os.environ["CHAOS_CONTROL"])


def wait_here(place: str) -> None:
    """Waits to be killed, if the place is armed."""
    try:
        (CONTROL / f"arm-{place}").unlink()
    except FileNotFoundError:
        return
    (CONTROL / "writing").write_text(str(os.getpid()))
    (CONTROL / "writing").rename(CONTROL / f"at-{place}")
    time.sleep(3600)


def stop_in_uploads(storage: ModuleType) -> None:
    """Place `upload-STEP`: all files of a checkpoint are there but its manifest."""
    copy = storage.copy_files

    def copy_files(source: str, target: str, *rest: Any) -> None:
        if target.endswith("/manifest.json"):
            wait_here(f"upload-{int(target.split('/')[-2].split('-')[1])}")
        copy(source, target, *rest)

    storage.copy_files = copy_files  # type: ignore[attr-defined]


def stop_in_steps(loop: ModuleType) -> None:
    """Place `step-EPOCH-STEP-RANK`: one micro-batch is done, its gradients are there, the optimizer has not stepped."""
    train_step = loop._train_step

    def slow_step(engine: Any, batch: Any, *rest: Any) -> Any:
        slow = CONTROL / "slow"
        if slow.exists():
            time.sleep(float(slow.read_text()))
        step = engine.step
        place = f"step-{batch.epoch}-{batch.step}-{os.environ['RANK']}"

        def stopping() -> None:
            wait_here(place)
            step()

        engine.step = stopping
        try:
            return train_step(engine, batch, *rest)
        finally:
            del engine.step

    loop._train_step = slow_step  # type: ignore[attr-defined]


PLACES: dict[str, Callable[[ModuleType], None]] = {"sft.storage": stop_in_uploads, "sft.loop": stop_in_steps}


class _Patching(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        PLACES[module.__name__](module)


class _Finder(MetaPathFinder):
    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if name not in PLACES:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Patching(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
