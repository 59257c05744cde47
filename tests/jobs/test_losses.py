from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.losses import main
from sft.errors import ConfigError
from tests.bundles import lora_bundle


def test_losses_of_base_and_adapter_are_written_by_row_and_summed_up(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, bundle = tmp_path / "held.jsonl", tmp_path / "bundle"
    rows.write_text("".join(json.dumps({"instruction": "Say it.", "output": word}) + "\n" for word in ("one", "two")))
    lora_bundle(bundle, tiny_model, seed=1)
    options = ["--base", str(tiny_model), "--rows", str(rows), "--output", str(tmp_path / "out"), "--max_length", "256"]
    assert main([*options, "--models", str(bundle)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "losses.jsonl").read_text().splitlines()]
    assert [one["model"] for one in lines] == ["base", "base", str(bundle), str(bundle)]
    models = json.loads((tmp_path / "out" / "losses.json").read_text())["held.jsonl"]["models"]
    total, tokens = (sum(one[key] for one in lines[:2]) for key in ("total", "tokens"))
    assert models["base"]["loss"] == pytest.approx(total / tokens)
    assert models[str(bundle)]["difference"] == pytest.approx(models[str(bundle)]["loss"] - models["base"]["loss"])
    assert "held.jsonl: 2 rows" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="a@v1 is a version; name its --registry"):
        main([*options, "--models", "a@v1"])
