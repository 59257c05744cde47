"""What `python -m jobs.adapters merge` says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobs.adapter_text import size_text

if TYPE_CHECKING:
    from sft.merge import Merged

MERGED_TYPES = ("bfloat16", "float16", "float32")


def merge_data(merged: Merged) -> dict[str, Any]:
    """The result as plain data."""
    return {
        "output": str(merged.folder),
        "base_model": merged.bundle.base_model,
        "modules": merged.modules,
        "bytes": merged.size,
        "trained_on_4_bit": _on_4_bit(merged),
    }


def merge_text(what: str, merged: Merged) -> str:
    """The result in words."""
    text = (
        f"merged {what} into {merged.bundle.base_model}: {merged.modules} modules changed, "
        f"{size_text(merged.size)} of weights in {merged.folder}"
    )
    if _on_4_bit(merged):
        text += "\nit was trained on a 4-bit base, and these are the base's full weights: answers differ a little"
    return text


def _on_4_bit(merged: Merged) -> bool:
    config = merged.bundle.lineage.get("config") or {}
    return bool((config.get("model") or {}).get("quantization", "none") != "none")
