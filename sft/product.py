"""A run's product: its last or best checkpoint as an adapter bundle, or as a model folder."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from sft.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, GOLDEN_MESSAGES, Golden, write_bundle
from sft.base import BaseTokenizer
from sft.card import model_card
from sft.checkpoint import verify_checkpoint
from sft.model_folder import write_model
from sft.record import evaluation_at, read_record
from sft.run import keep_bundle, keep_model
from sft.survey import Survey
from sft.tokens import encode
from sft.worker_group import PreparedRun


def make_product(run: PreparedRun, checkpoint: Path, counted: Survey) -> Path:
    """Makes the run's result out of a checkpoint and keeps it: an adapter bundle, or a model.

    Args:
        run: whose workers have ended.
        checkpoint: folder of the last or the best one.
        counted: what the data held.

    Returns:
        Where it can be read on local disk.

    Raises:
        AdapterError: what was trained makes no valid bundle.
        StorageError: it cannot be kept.
    """
    config, tokenizer, prints, reporter, folder = run.config, run.tokenizer, run.prints, run.reporter, run.folder
    state = verify_checkpoint(checkpoint)
    record = read_record(folder)
    work = Path(tempfile.mkdtemp(prefix="raysft-"))
    lineage = {
        "run": config.name,
        "data_fingerprint": counted.fingerprint,
        "metrics": {
            "steps": state.step,
            "loss": reporter.loss(state.step),
            "tokens_per_s": reporter.tokens / max(reporter.seconds, 1e-9),
            "trained_tokens_per_s": reporter.trained_tokens / max(reporter.seconds, 1e-9),
        },
        "data": counted.to_dict(),
        "evaluation": evaluation_at(record, state.step),
        "config": state.config,
    }
    if config.model.adapter is not None:
        lineage["start"] = {"adapter": config.model.adapter, "weights": prints.adapter}
    try:
        if config.makes_model:
            write_model(
                work / "model",
                checkpoint=checkpoint,
                base=run.epochs.plan.base,
                tokenizer=tokenizer,
                base_model=config.model.id,
                base_fingerprint=prints.base,
                lineage=lineage,
            )
            return keep_model(folder, work / "model")
        write_bundle(
            work / "bundle",
            weights=checkpoint / ADAPTER_WEIGHTS,
            peft_config=checkpoint / ADAPTER_CONFIG,
            template=tokenizer.template.source,
            base_model=config.model.id,
            base_fingerprint=prints.base,
            stop_ids=tokenizer.stop_ids,
            golden=golden(tokenizer),
            lineage=lineage,
            card=model_card(record, state.step, counted.to_dict(), prints.base),
        )
        return keep_bundle(folder, work / "bundle")
    finally:
        if "://" not in folder.address:
            shutil.rmtree(work, ignore_errors=True)


def golden(tokenizer: BaseTokenizer) -> list[Golden]:
    """Fixed conversations with the exact prompt ids that this tokenizer and template make of them."""
    made = []
    for messages in GOLDEN_MESSAGES:
        text = tokenizer.template.render_prompt(messages)
        if text is not None:
            made.append(Golden(messages=messages, prompt_ids=tuple(encode(tokenizer.tokenizer, [text])[0])))
    return made
