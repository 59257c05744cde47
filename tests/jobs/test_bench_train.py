from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from jobs.bench.machine import BenchmarkError
from jobs.bench.train import FIRST_STEPS, summary
from jobs.bench.train_contenders import CONTENDERS
from jobs.bench.train_rows import HELD_OUT_PACKS, PACKS_A_STEP, Workload, make_workload, read_workload, write_workload
from jobs.bench.train_step import SHAPES
from jobs.bench.train_work import flop_of
from sft.mask import Example


def pack(size: int, trained: int) -> list[Example]:
    ids = np.arange(size, dtype=np.int32)
    labels = np.where(ids >= size - trained, ids, -100).astype(np.int32)
    return [Example(f"row {size}", ids, labels)]


WORK = Workload([[pack(6, 2), pack(4, 3)], [pack(5, 1), pack(5, 4)]], [pack(3, 1)])


def run(rate: float) -> dict[str, Any]:
    return {
        "tokens_per_s": rate,
        "tokens_per_s_with_start": rate / 2,
        "step_s": [1.0] * (FIRST_STEPS + 1),
        "start_s": 4.0,
        "peak_bytes": 100,
        "losses": [2.0],
        "recover_s": None,
    }


def test_a_workload_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_workload(WORK, tmp_path / "work.json")
    back = read_workload(tmp_path / "work.json")
    assert (back.tokens, back.trained_tokens) == ([10, 10], [5, 5])
    assert len(back.held_out) == 1
    example = back.steps[1][0][0]
    assert (example.id, example.input_ids.tolist(), example.labels.tolist()) == (
        "row 5",
        [0, 1, 2, 3, 4],
        [-100, -100, -100, -100, 4],
    )


def test_steps_and_held_out_rows_have_none_in_common(tiny_model: Path) -> None:
    work = make_workload(tiny_model, 3)
    trained = [example.id for step in work.steps for made in step for example in made]
    held_out = [example.id for made in work.held_out for example in made]
    assert [len(step) for step in work.steps] == [PACKS_A_STEP] * 3
    assert len(work.held_out) == HELD_OUT_PACKS
    assert len({*trained, *held_out}) == len(trained) + len(held_out)
    with pytest.raises(BenchmarkError, match="are enough for"):
        make_workload(tiny_model, 10_000)


def test_ratios_and_the_bound_are_of_medians(tiny_model: Path) -> None:
    runs = {
        "ours": [run(30.0), run(50.0), run(40.0)],
        "trl_packed": [run(10.0)],
        "recovery": [{"recover_s": 12.5}],
    }
    made = summary(runs, {"ours": 1.0, "trl_packed": 1.01}, {"float32": 2.0, "bfloat16": 2.0}, tiny_model, WORK)
    assert (made["ratio_vs_trl_packed"], made["recover_s"]) == (4.0, 12.5)
    assert "ratio_vs_plain" not in made
    bound = made["bound_tokens_per_s"]
    assert bound == 2e9 / (made["gflop_per_token"] * 1e9)
    assert made["contenders"]["ours"]["share_of_matrix_rate"] == pytest.approx(40.0 / bound)
    assert made["contenders"]["ours"]["trained_tokens_per_s"] == 20.0


def test_contenders_that_learned_other_things_have_no_ratio(tiny_model: Path) -> None:
    with pytest.raises(BenchmarkError, match="learned different things"):
        summary(
            {"ours": [run(1.0)], "plain": [run(1.0)]}, {"ours": 1.0, "plain": 1.1}, {"float32": 1.0}, tiny_model, WORK
        )


def test_the_work_of_a_token_is_four_flop_a_parameter() -> None:
    shape = {key: value for key, value in SHAPES["smollm2-135m"].items() if key != "model_type"}
    assert flop_of(LlamaConfig(**shape), 1.0) == 4 * (30 * 3_538_944 + 576 * 49_152)
    assert flop_of(LlamaConfig(**shape), 0.0) == 4 * 30 * 3_538_944


def test_the_plain_loop_and_ours_agree(tiny_model: Path, tmp_path: Path) -> None:
    from jobs.bench.train_contenders import first_adapter, held_out_loss

    first_adapter(tiny_model, tmp_path / "first.safetensors")
    work = make_workload(tiny_model, 2)
    folder = tmp_path / "plain"
    folder.mkdir()
    told = CONTENDERS["plain"](work, tiny_model, folder, 1)
    before = held_out_loss(work, tiny_model, tmp_path / "first.safetensors")
    assert len(told.losses) == len(told.ends) == 2
    assert told.losses[0] == pytest.approx(before, rel=0.05)  # a random model knows nothing of either's rows
    assert held_out_loss(work, tiny_model, folder / "adapter.safetensors") != before
