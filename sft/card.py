"""The model card of a bundle: what is known of how the adapter came to be, as Hugging Face's hub shows it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from sft.record import RunRecord, evaluation_at
from sft.storage import HUB

TASKS_SHOWN = 40
"""Tasks that a card lists; the manifest has all."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MARKS = re.compile(r"([\\`*_{}\[\]<>#|~])")


def model_card(record: RunRecord, step: int, data: Mapping[str, Any], base_fingerprint: str) -> str:
    """Writes a model card in Markdown, with the header that the hub reads.

    Args:
        record: the run.
        step: after which the weights were taken.
        data: what the data held (`Survey.to_dict`).
        base_fingerprint: of the base model.
    """
    config = record.config
    parts = [
        f"---\n{yaml.safe_dump(_header(config), sort_keys=False, allow_unicode=True)}---",
        f"# {_plain(config['name'])}",
        f"A LoRA adapter for {_plain(_base_name(config))}, trained by raysft on {data['kept']:,} {_examples(config)}; "
        f"its weights are those after step {step:,}.",
        "## Base model",
        _table(
            ("", ""),
            [
                ("Model", _base_name(config)),
                ("Fingerprint", base_fingerprint),
                ("Weights while training", _weights(config["model"])),
                *((("Goes on from", config["model"]["adapter"]),) if config["model"].get("adapter") else ()),
            ],
        ),
        "## Data",
        f"{data['kept']:,} of {data['rows']:,} rows were kept: {data['tokens']:,} tokens, of which "
        f"{data['trained_tokens']:,} were trained. Fingerprint of the kept rows: `{data['fingerprint']}`.",
        _table(
            ("Source", "Rows", "Kept", "Tokens", "Trained tokens"),
            [
                (name, count["rows"], count["kept"], count["tokens"], count["trained_tokens"])
                for name, count in data["sources"].items()
            ],
        ),
        *_tasks(data),
        *_dropped(data),
        "## Training",
        _table(("", ""), _settings(config)),
        *_metrics(record, step),
        *_evaluation(record, step),
    ]
    return "\n\n".join(parts) + "\n"


def _header(config: Mapping[str, Any]) -> dict[str, Any]:
    header: dict[str, Any] = {
        "base_model": _base_name(config),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", _stage(config), "raysft"],
    }
    sets = [_data_set(source["path"]) for source in config["data"]["sources"] if source["path"].startswith(HUB)]
    if sets:
        header["datasets"] = list(dict.fromkeys(sets))
    return header


def _stage(config: Mapping[str, Any]) -> str:
    stage: str = config["train"].get("stage", "sft")
    return stage


def _examples(config: Mapping[str, Any]) -> str:
    return "pairs of answers by preference (DPO)" if _stage(config) == "dpo" else "examples"


def _base_name(config: Mapping[str, Any]) -> str:
    """The base as others know it: its id on the hub where it came from there, else the id that the run gave it."""
    base: str = config["model"]["base"]
    own: str | None = config["model"]["base_id"]
    return base if _HUB_ID.fullmatch(base) else own or base.rstrip("/").rsplit("/", 1)[-1]


def _data_set(address: str) -> str:
    owner, name = address.removeprefix(f"{HUB}datasets/").split("/")[:2]
    return f"{owner}/{name.split('@')[0]}"


def _weights(model: Mapping[str, Any]) -> str:
    kind = "4 bits (NF4)" if model["quantization"] == "nf4" else f"{model['dtype']}"
    return f"frozen, {kind}"


def _settings(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The method and its settings: all of lora and train that is set, and what else changes the result."""
    lora, train = config["lora"], config["train"]
    if config["model"].get("adapter"):  # its shape is that of the adapter that it goes on from
        lora = {key: lora[key] for key in ("dropout", "plus_ratio")}
    rows = [
        *((f"lora.{key}", value) for key, value in lora.items()),
        *((f"train.{key}", value) for key, value in train.items()),
        *((f"preference.{key}", value) for key, value in _preference(config).items()),
        ("data.max_length", config["data"]["max_length"]),
        ("deepspeed.zero_stage", config["deepspeed"]["zero_stage"]),
        ("scaling.num_workers", config["scaling"]["num_workers"]),
    ]
    return [(key, value) for key, value in rows if value is not None]


def _preference(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of stage dpo; none where the run was of another."""
    settings: Mapping[str, Any] = config["preference"] if _stage(config) == "dpo" else {}
    return settings


def _tasks(data: Mapping[str, Any]) -> list[str]:
    tasks = [
        (cluster or "none", task or "none", count["rows"], count["kept"])
        for cluster, found in data["clusters"].items()
        for task, count in found.items()
    ]
    if not tasks:
        return []
    tasks.sort(key=lambda row: -row[-1])
    more = len(tasks) - TASKS_SHOWN
    shown = _table(("Cluster", "Task", "Rows", "Kept"), tasks[:TASKS_SHOWN])
    return [shown, f"And {more:,} more tasks."] if more > 0 else [shown]


def _dropped(data: Mapping[str, Any]) -> list[str]:
    if not data["dropped"]:
        return []
    return ["Rows that were not kept, by reason:", _table(("Reason", "Rows"), data["dropped"].items())]


def _metrics(record: RunRecord, step: int) -> list[str]:
    steps = [made for made in record.steps if made["step"] <= step]
    if not steps:
        return []
    seconds = sum(made["seconds"] for made in steps)
    trained = sum(made["trained_tokens"] for made in steps)
    rows = [
        ("Steps", f"{step:,}"),
        ("Epochs", f"{steps[-1]['epoch']:.2f}"),
        ("Training loss of the first and the last step", f"{_digits(steps[0]['loss'])}, {_digits(steps[-1]['loss'])}"),
        ("Trained tokens seen", f"{trained:,}"),
        ("Trained tokens per second", f"{trained / max(seconds, 1e-9):,.0f}"),
        ("Hours of training steps", f"{seconds / 3600:.2f}"),
    ]
    return ["## Metrics", _table(("", ""), rows)]


def _evaluation(record: RunRecord, step: int) -> list[str]:
    found = evaluation_at(record, step)
    if found is None:
        return []
    before = evaluation_at(record, 0)
    old = {} if before is None else {**before["sources"], "": before}
    of_pairs = _stage(record.config) == "dpo"
    last, digits = ("accuracy", 3) if of_pairs else ("perplexity", 2)
    rows = [
        (
            name or "all together",
            "" if not name else score["rows"],
            _digits(old[name]["loss"]) if name in old else "not measured",
            _digits(score["loss"]),
            _digits(score[last], digits),
        )
        for name, score in {**found["sources"], "": found}.items()
    ]
    about = "Cross-entropy per trained token, in nats, of rows that were not trained."
    if of_pairs:
        about = (
            "DPO loss of pairs that were not trained, log 2 at the start. Accuracy is the share of them in which the "
            "chosen answer gained more on the start than the rejected one."
        )
    first = "Loss at the start" if of_pairs else "Loss of the base"
    return [
        "## Evaluation",
        about,
        _table(("Held-out rows", "Examples", first, "Loss", last.capitalize()), rows),
    ]


def _digits(value: float | None, digits: int = 4) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_plain(key)} {_cell(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return str(value) if value == "---" else _plain(str(value))


def _plain(text: str) -> str:
    """Text as Markdown shows it unchanged, on one line; names come from configs and from rows."""
    return _MARKS.sub(r"\\\1", " ".join(text.split()))
