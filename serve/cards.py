"""What `/v1/models` says of each model. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.traffic import Known
from serve.versions import Version


def model_cards(known: Known, versions: Sequence[Version], max_model_len: int) -> list[dict[str, Any]]:
    """The cards of the base model, of every alias and of every version that is not retired.

    Args:
        known: what can be asked for.
        versions: the manifests that could be read.
        max_model_len: the longest prompt and answer together, in tokens.
    """
    by_id = {version.id: version for version in versions}
    base = {**_card(known.base_id, 0, known.base_id, None), "max_model_len": max_model_len}
    aliases = [
        _version_card(alias, by_id[version], known.base_id, **_trials(alias, known))
        for alias, version in sorted(known.aliases.items())
        if version in by_id and alias != known.base_id
    ]
    current = [version for version in versions if version.id not in known.retired]
    return [base, *aliases, *(_version_card(str(version.id), version, known.base_id) for version in current)]


def _card(model: str, created: int, root: str, parent: str | None) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": created, "owned_by": "raysft", "root": root, "parent": parent}


def _trials(alias: str, known: Known) -> dict[str, Any]:
    """The canary and the shadow of an alias, where it has them."""
    parts = {"canary": known.canaries.get(alias), "shadow": known.shadows.get(alias)}
    return {name: part.model_dump(mode="json", exclude={"since"}) for name, part in parts.items() if part}


def _version_card(model: str, version: Version, base_id: str, **trials: Any) -> dict[str, Any]:
    bundle = version.bundle
    # Of the lineage only what holds no path: a run's config stays with the registry.
    lineage = {key: bundle.lineage[key] for key in ("run", "data_fingerprint", "metrics") if key in bundle.lineage}
    metadata = {
        "version": str(version.id),
        "digest": version.digest,
        "rank": bundle.rank,
        "base_fingerprint": bundle.base_fingerprint,
        "template_fingerprint": bundle.template_fingerprint,
        "published_by": version.published_by,
        "lineage": lineage,
        **trials,
    }
    card = _card(model, int(version.published_at.timestamp()), str(version.id), base_id)
    return {**card, "metadata": metadata}
