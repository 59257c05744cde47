from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.base import BaseTokenizer
from sft.data import here, plan_data, prepare_rows
from sft.data_config import DataSection
from sft.errors import ConfigError, DataError
from sft.evaluate_config import EvaluateSection
from sft.evaluation_rows import held_out_examples, plan_evaluation, prompt_ids
from sft.mask import UNTRAINED, Example
from sft.rows import examples
from sft.selection import select
from sft.set_aside import content_hash, is_set_aside, place

ROWS = 60


def write(path: Path, numbers: Sequence[int]) -> Path:
    path.write_text("".join(json.dumps({"instruction": f"count to {n}", "output": f"{n}!"}) + "\n" for n in numbers))
    return path


def data(folder: Path, **changes: Any) -> DataSection:
    path = write(folder / "rows.jsonl", range(ROWS))
    return DataSection.model_validate({"sources": [{"path": str(path), "name": "rows"}], **changes})


def held(section: EvaluateSection, of: DataSection, base: Path) -> dict[str, tuple[Example, ...]]:
    return held_out_examples(section, of, plan_data(of, base, None, section.share), None, here)


@given(st.binary(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_holds_a_smaller_one_and_turns_stay_together(raw: bytes, one: float, other: float) -> None:
    row = f"s/a:b.jsonl:3:{content_hash(raw)}"
    assert 0 <= place(row) < 1
    assert place(row) == place(f"{row}#4") == place(f"elsewhere:{content_hash(raw)}")
    if is_set_aside(row, min(one, other)):
        assert is_set_aside(row, max(one, other))


def test_a_share_is_evaluated_and_the_rest_trained(tmp_path: Path, tiny_model: Path) -> None:
    of = data(tmp_path)
    plan = plan_data(of, tiny_model, None, 0.3)
    chosen = select(of, plan, here)
    trained = {e.id for table in here(plan, prepare_rows) for e in examples(table)}
    evaluated = {e.id for e in held(EvaluateSection(share=0.3), of, tiny_model)["rows"]}
    everything = {e.id for table in here(replace(plan, set_aside=0.0), prepare_rows) for e in examples(table)}
    assert (len(everything), trained | evaluated, trained & evaluated) == (ROWS, everything, set())
    assert evaluated == {name for name in everything if is_set_aside(name, 0.3)}
    assert chosen.survey.dropped == {"set_aside": len(evaluated)}
    assert (chosen.examples, chosen.survey.total.faults.total()) == (len(trained), 0)


def test_at_most_so_many_are_taken_whatever_the_order_of_the_rows(tmp_path: Path, tiny_model: Path) -> None:
    section = EvaluateSection(share=0.5, max_rows=5)
    found = held(section, data(tmp_path), tiny_model)["rows"]
    (tmp_path / "other").mkdir()
    path = write(tmp_path / "other" / "rows.jsonl", range(ROWS)[::-1])
    turned = held(section, DataSection.model_validate({"sources": [{"path": str(path), "name": "rows"}]}), tiny_model)
    assert len(found) == 5
    assert [e.input_ids.tolist() for e in found] == [e.input_ids.tolist() for e in turned["rows"]]


def test_other_files_are_evaluated_by_the_rules_of_the_data_and_without_prompt_weights(
    tmp_path: Path, tiny_model: Path
) -> None:
    of = data(tmp_path, mask={"prompt_weight": 0.5}, max_length=48)
    path = write(tmp_path / "held.jsonl", [1, 2])
    with path.open("a") as file:
        file.write(json.dumps({"instruction": "long " * 40, "output": "x"}) + "\n")
    section = EvaluateSection.model_validate({"sources": [{"path": str(path)}]})
    with pytest.raises(DataError, match=r"evaluate\.sources: 1 of 3 rows cannot be used \(1 too_long\)"):
        held(section, of, tiny_model)
    found = held(section, of.model_copy(update={"max_bad_fraction": 0.5}), tiny_model)
    assert {name: len(rows) for name, rows in found.items()} == {"held.jsonl": 2}
    assert all(e.weights is None and (e.labels == UNTRAINED).any() for e in found["held.jsonl"])


def test_held_out_tasks_are_not_evaluated_with_the_share(tmp_path: Path, tiny_model: Path) -> None:
    of = data(tmp_path)
    with (tmp_path / "rows.jsonl").open("a") as file:
        for n in range(30):
            file.write(json.dumps({"instruction": f"add {n}", "output": "x", "task": "sum"}) + "\n")
    of = of.model_copy(update={"hold_out": of.hold_out.model_copy(update={"tasks": ["sum"]})})
    assert {e.id for e in held(EvaluateSection(share=0.5), of, tiny_model)["rows"]} == {
        e.id for e in held(EvaluateSection(share=0.5), data(tmp_path), tiny_model)["rows"]
    }


def test_a_share_that_holds_nothing_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(DataError, match=r"evaluate\.share 1e-09 sets no usable row aside"):
        held(EvaluateSection(share=1e-9), data(tmp_path), tiny_model)


def test_prompts_are_what_a_server_makes_of_them(tmp_path: Path, base: BaseTokenizer) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Hi?\n\nTwo + two\n")
    found = prompt_ids(EvaluateSection(prompts=str(path)), base)
    assert found == prompt_ids(EvaluateSection(prompts=["Hi?", "Two + two"]), base)
    assert base.tokenizer.decode(found["Hi?"]) == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ConfigError, match=r"none\.txt: cannot be read"):
        prompt_ids(EvaluateSection(prompts=str(tmp_path / "none.txt")), base)


def test_without_rows_and_prompts_nothing_is_planned(tmp_path: Path, tiny_model: Path) -> None:
    of = data(tmp_path)
    plan = plan_data(of, tiny_model)
    assert plan_evaluation(EvaluateSection(), of, plan, None, "packed", here) is None
    made = plan_evaluation(EvaluateSection(prompts=["Hi?"]), of, plan, None, "padded", here)
    assert made is not None
    assert (list(made.sources), list(made.prompts)) == ([], ["Hi?"])
    assert (made.layout, sorted(made.stop_ids), made.pad_id) == ("padded", [1], 1)
